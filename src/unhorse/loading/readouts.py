"""What a reader makes of a file: a network from images to logits, or tensors, and the facts it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from unhorse.checks.expectations import Facts
from unhorse.rules import LoadRefused

CLASSIFIER_REMEDY = (
    "export a network that maps float images (n, c, h, w) to logits (n, k) with k of 2 or more"
)


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
    """The (n, k) output of a network that may return tuples, dictionaries or (n, k, 1, 1) maps.

    With `channels_last` the network is given (n, h, w, c). Raises LD221 where no output is (n, k).
    """

    def __init__(self, network: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.network = network
        self.channels_last = channels_last
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) to (n, k)."""
        output = self.network(images.permute(0, 2, 3, 1) if self.channels_last else images)
        return logits_in(output, len(images))

    def train(self, mode: bool = True) -> LogitsOf:
        """Stays as it is: exported programs refuse to change, and nothing here may train."""
        return self


def logits_in(output: object, count: int) -> Tensor:
    """The first tensor of (count, k >= 2) in what a network returned; otherwise LD221."""
    shapes = []
    for tensor in _tensors_in(output):
        if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        shapes.append("x".join(str(size) for size in tensor.shape))
        if tensor.ndim == 2 and tensor.shape[0] == count and tensor.shape[1] >= 2:
            return tensor
        if count == 1 and tensor.ndim == 1 and tensor.shape[0] >= 2:
            return tensor[None]
    if any(shape in (f"{count}x1", str(count)) for shape in shapes):
        remedy = "give it two outputs: logits of (0, x) decide exactly as one logit x does"
        raise LoadRefused("LD221", "the network answers with a single number per image", remedy)
    listed = ", ".join(shapes) or "no tensor"
    raise LoadRefused("LD221", f"for {count} images the network answers {listed}", CLASSIFIER_REMEDY)


def _tensors_in(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        named = [output["logits"]] if "logits" in output else list(output.values())
        for value in named:
            yield from _tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors_in(value)
