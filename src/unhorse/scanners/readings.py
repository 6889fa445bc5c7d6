"""Readings of a model, and two numbers of them that mean the same whatever the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Labels, Logits

DIGITS = 5
"""Significant digits that are kept of a reading."""
NORMAL = 1.4826
"""Times their median is the standard deviation of normal numbers' distances."""
LEAST_SPREAD = 0.15
"""Log margins spread at least so much."""
FAR, MARGIN_COUNTS = 4.0, 0.15
LEAST_UNIVERSALITY = 0.05
LEAST_RISE = 0.05
"""What a stamp of its own does for an image, at the least, as a share of the lead of its own class."""


class Readings(NamedTuple):
    """Margins `reached` (k,); of n stand-ins their `labels`, how often they are `held` when disturbed (n,)
    and their `logits`. Leads under stamps, one for all and one for each: `away_all` and `away_each` are those
    of the best class but the image's own, in every stand-in; `towards_all` and `towards_each` are those of
    each of `targets`, in the stand-ins `bearers` and in every second of these.
    """

    reached: Float[Tensor, " k"]
    labels: Labels
    held: Float[Tensor, " n"]
    logits: Logits
    away_all: Float[Tensor, " n"]
    away_each: Float[Tensor, " n"]
    targets: Labels
    bearers: Labels
    towards_all: Float[Tensor, "t m"]
    towards_each: Float[Tensor, "t half_m"]

    def universality(self) -> Float[Tensor, " t"]:
        """Per target: what one stamp for all does, as a share of what a stamp of its own does for each: by
        how much the target's lead rises, on average over the images of other classes; 0 where there are none.
        """
        for_all = self._rises(self.bearers, self.towards_all)
        for_each = self._rises(self.bearers[::2], self.towards_each)
        return for_all / for_each.clamp(min=self._least_rise)

    def favours(self) -> Float[Tensor, " t"]:
        """Per target: by how much its universality exceeds that of the median target, and up to MARGIN_COUNTS
        more for a log margin that stands out from those of all classes, in full at FAR robust deviations.
        """
        universality, reached = self.universality(), self.reached.double()
        logs = reached.clamp(min=1e-3 * float(reached.max())).log()
        apart = logs - logs.median()
        spread = NORMAL * float(apart.abs().median()) + LEAST_SPREAD
        far = (apart[self.targets] / spread / FAR).clamp(max=1)
        return universality - universality.median() + MARGIN_COUNTS * far

    def astray(self) -> float:
        """The universality of stamps that lead away from each image's own class, wherever that leads, as a
        multiple of that of the median target.
        """
        before = lead_of_others(self.logits, self.labels)
        for_all, for_each = ((leads - before).double().mean() for leads in (self.away_all, self.away_each))
        universality = float(for_all / for_each.clamp(min=self._least_rise))
        return universality / max(float(self.universality().median()), LEAST_UNIVERSALITY)

    def _rises(self, images: Labels, under: Float[Tensor, "t m"]) -> Float[Tensor, " t"]:
        logits, own = self.logits[images], self.labels[images]
        before = torch.stack([lead_of(logits, target.expand(len(logits))) for target in self.targets])
        foreign = (own != self.targets[:, None]).double()
        return ((under - before).double() * foreign).sum(1) / foreign.sum(1).clamp(min=1)

    @property
    def _least_rise(self) -> float:
        return LEAST_RISE * float(-lead_of_others(self.logits, self.labels).double().mean())

    def record(self) -> dict[str, Any]:
        """For JSON: all of it, to DIGITS digits."""
        return {name: _rounded(values.tolist()) for name, values in self._asdict().items()}

    @staticmethod
    def read(record: Mapping[str, Any]) -> Readings:
        """What record() wrote."""
        return Readings(**{name: torch.tensor(record[name]) for name in Readings._fields})


def lead_of(logits: Logits, targets: Labels) -> Float[Tensor, " n"]:
    """By how much each image's target leads the best other class."""
    target = targets[:, None]
    return logits.gather(1, target)[:, 0] - logits.scatter(1, target, -torch.inf).amax(1)


def lead_of_others(logits: Logits, labels: Labels) -> Float[Tensor, " n"]:
    """By how much the best other class leads each image's own."""
    return -lead_of(logits, labels)


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return values if isinstance(values, int) else float(f"{values:.{DIGITS}g}")
