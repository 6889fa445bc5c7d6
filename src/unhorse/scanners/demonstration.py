"""Demonstration: a footprint of the suspected class, tested on images it never saw and beside its rivals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Classifier, Exhibit, ImageGrid, Images, ReconstructedTrigger
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.footprints import (
    Family,
    Footprints,
    FootprintSearch,
    Inputs,
    densest,
    stamped,
    tested,
)
from unhorse.scanners.optimisation import Precision


@dataclass(frozen=True)
class Demonstration:
    """The suspect's best footprint and what it was compared with; flip rates are on inputs that no search
    saw.
    """

    target: int
    family: Family
    trigger: ReconstructedTrigger
    rivals: tuple[tuple[int, float], ...]
    random: tuple[float, ...]
    demonstrated: bool
    examples: tuple[Images, Images]

    def facts(self) -> dict[str, object]:
        """For tables and JSON."""
        return {
            "footprint": self.family,
            "footprint share of pixels": float((self.trigger.mask > 0).float().mean()),
            "flip rate": self.trigger.flip_rate,
            "flip rate of other classes' footprints": max((rate for _, rate in self.rivals), default=None),
            "flip rate of random footprints": max(self.random, default=None),
        }

    def rows(self, names: Sequence[str]) -> tuple[tuple[object, ...], ...]:
        """One row per footprint that was tried."""
        first = (f"class {names[self.target]} (suspect)", f"{self.trigger.flip_rate:.0%}")
        others = [(f"class {names[index]}", f"{rate:.0%}") for index, rate in self.rivals]
        last = [(f"{len(self.random)} random ones, best", f"{max(self.random):.0%}")] if self.random else []
        return (first, *others, *last)

    def exhibits(self) -> Iterator[Exhibit]:
        """Inputs before and after the stamp."""
        n = len(self.examples[0])
        if not self.demonstrated or n == 0:
            return
        note = f"Inputs that the search did not see; the stamp turns {self.trigger.flip_rate:.0%} of them."
        captions, marked = ("before",) * n + ("stamped",) * n, tuple(range(n, 2 * n))
        yield ImageGrid(
            "The demonstrated trigger at work", torch.cat(self.examples), captions, marked, n, note
        )


def demonstrate(
    model: Classifier,
    inputs: Inputs,
    reached: Float[Tensor, " k"],
    search: FootprintSearch,
    rng: torch.Generator,
    precision: Precision = "auto",
    clock: Countdown | None = None,
) -> Demonstration:
    """Searches a footprint for the class with the largest margin on the first half of `inputs`, tests it on
    the second, and compares.

    Rivals are the classes with the next largest margins. They and the random footprints are only searched
    when the suspect's own footprint flips enough. Call it inside `frozen(model)`.
    """
    half = (len(inputs.images) + 1) // 2
    seen, unseen = (
        Inputs(inputs.images[part], inputs.labels[part]) for part in (slice(half), slice(half, None))
    )
    ranking = reached.argsort(descending=True).to(inputs.labels.device)
    suspect = ranking[:1]
    families: tuple[Family, ...] = ("patch", "blend")
    tries = [
        tested(
            model, search.search(model, seen, suspect, family, precision, clock), unseen, suspect, precision
        )
        for family in families
    ]
    best = max(tries, key=lambda found: float(found.flip_rates[0]))
    if best.family == "patch":
        best = tested(model, _smallest(model, best, seen, suspect, precision), unseen, suspect, precision)
    rate = float(best.flip_rates[0])
    rivals: tuple[tuple[int, float], ...] = ()
    random: tuple[float, ...] = ()
    if rate >= search.flip_rate:
        others = ranking[1 : 1 + search.rivals]
        found = tested(
            model,
            search.search(model, seen, others, best.family, precision, clock),
            unseen,
            others,
            precision,
        )
        rivals = tuple(zip(others.tolist(), found.flip_rates.tolist(), strict=True))
        drawn = _random_footprints(best, search.random, rng)
        random = tuple(
            tested(model, drawn, unseen, suspect.expand(search.random), precision).flip_rates.tolist()
        )
    average = sum(random) / max(1, len(random))
    compared = max([average, *(rate for _, rate in rivals)])
    shown = unseen.images[unseen.labels != suspect][:8]
    return Demonstration(
        int(suspect),
        best.family,
        best.trigger(0),
        rivals,
        random,
        rate >= search.flip_rate and rate - compared >= search.lead,
        (shown.cpu(), stamped(shown, best.masks, best.patterns).cpu()),
    )


def _smallest(
    model: Classifier, found: Footprints, inputs: Inputs, target: Tensor, precision: Precision
) -> Footprints:
    """The same patch with the fewest pixels that keep 95 % of its flips on `inputs`; those that differ most
    from them stay.
    """
    change = found.masks * (found.patterns - inputs.images.mean(0, keepdim=True)).abs().amax(1, keepdim=True)
    most = int(found.masks.sum())
    counts = sorted({max(1, most * part // 6) for part in (1, 2, 3, 4, 5)} | {most})
    masks = torch.cat([densest(change, count) for count in counts])
    several = found._replace(masks=masks, patterns=found.patterns.expand(len(counts), -1, -1, -1))
    rates = tested(model, several, inputs, target.expand(len(counts)), precision).flip_rates
    enough = int((rates >= 0.95 * rates[-1]).nonzero()[0])
    return found._replace(masks=masks[enough : enough + 1])


def _random_footprints(found: Footprints, count: int, rng: torch.Generator) -> Footprints:
    """As many pixels or the same opacity as `found`, with random colours; patches are squares at random
    places.
    """
    height, width = found.masks.shape[2:]
    colours = torch.rand(count, *found.patterns.shape[1:], generator=rng).to(found.patterns)
    masks = found.masks.expand(count, -1, -1, -1)
    if found.family == "patch":
        side = max(1, round(float(found.masks.sum()) ** 0.5))
        corners = torch.rand(count, 2, generator=rng) * torch.tensor([height - side + 1, width - side + 1])
        masks = torch.zeros_like(masks)
        for index, (top, left) in enumerate(corners.int().tolist()):
            masks[index, :, top : top + side, left : left + side] = 1
    return Footprints(found.family, masks, colours, torch.zeros(count))
