"""What a reader makes of a file: a network from images to logits, or tensors, and the facts it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from unhorse.checks.expectations import Facts
from unhorse.loading.outputs import CLASSIFIER_REMEDY, Chosen, Wanted, choose, rows_of, tensors_in
from unhorse.rules import LoadRefused


class Readout(NamedTuple):
    """Either a `network` in eval mode (float32 NCHW images in its own units to (n, k)) or state dicts by key.

    `batch` is the one batch size that the network takes, None where it takes any; `notes` say what was
    assumed; `left_out` says in words which tensors of the file are in none of the `networks`.
    """

    network: nn.Module | None
    facts: Facts
    networks: Mapping[str, Mapping[str, Tensor]] = {}
    batch: int | None = None
    left_out: Sequence[str] = ()
    notes: tuple[str, ...] = ()


class LogitsOf(nn.Module):
    """The logits of a network that may return tuples, dictionaries or (n, k, 1, 1) maps, as (n, k); (n, 1) of
    one that answers with a single number per image.

    `options` are those of the reader, `names` those that the file gives its outputs. The first images that it
    is given decide which output it takes; `notes` say which, where there are several. Raises LD221 or LD239
    where no output is (n, k).
    """

    def __init__(
        self, network: nn.Module, *, options: Mapping[str, Any] | None = None, names: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.training = False
        self.wanted, self.names = Wanted.of(options or {}), tuple(names)
        self.chosen: Chosen | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report says of the outputs that were passed over."""
        return (self.chosen.note,) if self.chosen is not None and self.chosen.note else ()

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) to (n, k)."""
        answer = self.network(images)
        if self.chosen is None:
            self.chosen = choose(self.network, images, answer, self.names, self.wanted)
        return self.taken(answer, len(images))

    def taken(self, answer: object, count: int) -> Tensor:
        """The logits in what the network, or another one with the same outputs, returned for some images."""
        listed = list(tensors_in(answer))
        place = 0 if self.chosen is None else self.chosen.place
        rows = rows_of(listed[place][1], count) if place < len(listed) else None
        if rows is None:
            raise LoadRefused("LD221", "its outputs differ from image to image", CLASSIFIER_REMEDY)
        return rows

    def train(self, mode: bool = True) -> LogitsOf:
        """Stays as it is: exported programs refuse to change, and nothing here may train."""
        return self
