"""Evidence of a Trojan in numbers that mean the same whatever the architecture, the classes or the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Classifier, Exhibit, ImageGrid, Labels
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.optimisation import Precision, frozen
from unhorse.scanners.stamps import Stamp, StampSearch
from unhorse.scanners.stand_ins import StandIns, StandInSearch, lead_of_others

OF_THE_MARGINS = ("margin outlier", "margin gap", "margin gap in deviations", "margin ratio")
OF_THE_STAND_INS = ("stand-ins shaken", "stand-ins near")
OF_A_STAMP = ("taken", "flipped", "agreement", "raised")
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

    def numbers(self) -> dict[str, float]:
        """The numbers by name; of each a larger one is the more suspicious."""
        leads = self.stand_ins.leads.double()
        found = dict(zip(OF_THE_MARGINS, _of_margins(self.reached.double()), strict=True))
        near = self.stand_ins.logits.double().std().clamp(min=1e-9) / leads.mean()
        shaken = 1 - self.stand_ins.held.double().mean()
        found |= dict(zip(OF_THE_STAND_INS, (shaken, near), strict=True))
        for stamp in self.stamps:
            values = _of_stamp(stamp, self.stand_ins)
            found |= {
                f"{_called(stamp.area)}: {what}": value
                for what, value in zip(OF_A_STAMP, values, strict=True)
            }
        return {name: float(value) for name, value in found.items()}

    @property
    def suspect(self) -> int | None:
        """The class to which most images go under the largest stamp, if most do."""
        towards = _next_class(self.stamps[-1], self.stand_ins)
        counts = torch.bincount(towards)
        return int(counts.argmax()) if 2 * int(counts.max()) > len(towards) else None

    def exhibits(self) -> Iterator[Exhibit]:
        """The stand-ins, and beside them the patches that take most from all of them."""
        images, labels = self.stand_ins.inputs
        chosen = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).round().long()
        rows, captions = [images[chosen]], [f"class {label}" for label in labels[chosen].tolist()]
        for stamp in self.stamps:
            own = images[chosen]
            rows.append(own + stamp.mask * (stamp.pattern - own))
            captions += [f"seen as {label}" for label in stamp.logits[chosen].argmax(1).tolist()]
        sizes = ", ".join(_called(stamp.area) for stamp in self.stamps)
        yield ImageGrid(
            "Stand-ins for clean images, and the stamps that take most from them",
            torch.cat(rows).cpu(),
            tuple(captions),
            (),
            len(chosen),
            "First row: what the model takes for a class however it is disturbed. "
            f"Below, one stamp per row: {sizes}.",
        )


def names_of(search: EvidenceSearch) -> list[str]:
    """What the numbers of its evidence are called, in their order."""
    stamps = [f"{_called(area)}: {what}" for area in search.stamps.areas for what in OF_A_STAMP]
    return [*OF_THE_MARGINS, *OF_THE_STAND_INS, *stamps]


def _called(area: float) -> str:
    return f"stamp of {area:.1%}".replace(".0%", "%")


def _next_class(stamp: Stamp, stand_ins: StandIns) -> Labels:
    return stamp.logits.scatter(1, stand_ins.inputs.labels[:, None], -torch.inf).argmax(1)


@dataclass(frozen=True)
class EvidenceSearch:
    """Stand-ins and universal stamps of a model, after its margins."""

    stand_ins: StandInSearch = StandInSearch()
    stamps: StampSearch = StampSearch()

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


def _of_margins(reached: Float[Tensor, " k"]) -> tuple[Tensor, ...]:
    """How far the largest log margin stands out: in deviations of the others, over the next, over the next in
    deviations, and over the median.
    """
    logs = reached.clamp(min=1e-3 * float(reached.max())).log().sort(descending=True).values
    first, others = logs[0], logs[1:]
    spread = others.std() + 0.05
    gap = first - others[0]
    return (first - others.mean()) / spread, gap, gap / spread, first - logs.quantile(0.5)


def _of_stamp(stamp: Stamp, stand_ins: StandIns) -> tuple[Tensor, ...]:
    """The log of the share of the lead that a stamp takes, how often it takes more than all, how often the
    same class is the next one then, and how far the most raised class rises, as a share of the lead.
    """
    labels, lead = stand_ins.inputs.labels, stand_ins.leads.double().mean()
    leads = lead_of_others(stamp.logits, labels)
    towards = _next_class(stamp, stand_ins)
    change = (stamp.logits - stand_ins.logits).double()
    change = (change - change.mean(1, keepdim=True)).scatter(1, labels[:, None], 0.0)
    return (
        (1 + leads.double().mean() / lead).clamp(min=1e-3).log(),
        (leads > 0).double().mean(),
        torch.bincount(towards).max().double() / len(towards),
        change.mean(0).max() / lead,
    )
