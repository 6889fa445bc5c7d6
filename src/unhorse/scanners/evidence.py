"""Evidence of a Trojan without any data: stand-ins for clean images, and stamps on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Classifier, Exhibit, ImageGrid
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.optimisation import Precision, frozen
from unhorse.scanners.readings import Readings, called
from unhorse.scanners.stamps import Stamp, StampSearch
from unhorse.scanners.stand_ins import StandIns, StandInSearch

FEW = 4
"""Fewer stand-ins than this say nothing."""
SHOWN = 8


class Unreadable(ValueError):
    """A model of which no evidence can be taken, and why."""


class Evidence(NamedTuple):
    """What was found in a model: its margins (k,), its stand-ins, and the universal stamps on them."""

    reached: Float[Tensor, " k"]
    stand_ins: StandIns
    stamps: tuple[Stamp, ...]

    def readings(self) -> Readings:
        """What numbers are made of, on the CPU."""
        return Readings(
            self.reached.cpu(),
            self.stand_ins.inputs.labels.cpu(),
            self.stand_ins.held.cpu(),
            self.stand_ins.logits.cpu(),
            tuple(stamp.area for stamp in self.stamps),
            torch.stack([stamp.logits for stamp in self.stamps]).cpu(),
        )

    def exhibits(self) -> Iterator[Exhibit]:
        """The stand-ins, and below them the patches that take most from all of them."""
        images, labels = self.stand_ins.inputs
        chosen = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().long()
        rows, captions = [images[chosen]], [f"class {label}" for label in labels[chosen].tolist()]
        for stamp in self.stamps:
            own = images[chosen]
            rows.append(own + stamp.mask * (stamp.pattern - own))
            captions += [f"seen as {label}" for label in stamp.logits[chosen].argmax(1).tolist()]
        sizes = ", ".join(called(stamp.area) for stamp in self.stamps)
        yield ImageGrid(
            "Stand-ins for clean images, and the stamps that take most from them",
            torch.cat(rows).cpu(),
            tuple(captions),
            (),
            len(chosen),
            "First row: what the model takes for a class however it is disturbed. "
            f"Below, one stamp per row: {sizes}.",
        )


@dataclass(frozen=True)
class EvidenceSearch:
    """Stand-ins and universal stamps of a model, after its margins."""

    stand_ins: StandInSearch = StandInSearch()
    stamps: StampSearch = StampSearch()

    def seeded(self, seed: int) -> EvidenceSearch:
        """The same, from other random numbers."""
        return EvidenceSearch(replace(self.stand_ins, seed=seed), replace(self.stamps, seed=seed))

    def passes(self, num_classes: int) -> int:
        """Forward and backward passes of one image."""
        images = len(self.stand_ins.classes(num_classes))
        return self.stand_ins.passes(num_classes) + self.stamps.passes(images)

    def run(
        self,
        model: Classifier,
        reached: Float[Tensor, " k"],
        precision: Precision = "auto",
        clock: Countdown | None = None,
    ) -> Evidence:
        """Unreadable where hardly a class has a stand-in; TimeUp when the clock's budget is spent."""
        clock = clock or Countdown()
        with frozen(model, precision):
            clock.phase = "drawing stand-ins for clean images"
            stand_ins = self.stand_ins.run(model, precision, clock)
            if len(stand_ins.held) < FEW:
                raise Unreadable(
                    f"only {len(stand_ins.held)} images were found that the model takes for a class whatever "
                    "is done to them: check the weights and the normalisation (--mean, --std, --range)"
                )
            clock.phase = "searching universal stamps"
            return Evidence(reached, stand_ins, self.stamps.run(model, stand_ins.inputs, precision, clock))
