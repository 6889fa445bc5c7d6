"""Readings of a model, and numbers of them that mean the same whatever the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Labels, Logits

DIGITS = 5
"""Significant digits that are kept of a reading."""
LEAST_RISE = 0.05
"""What a stamp does for an image, at the least, as a share of the lead of its own class."""


class Readings(NamedTuple):
    """Margins `reached` (k,); of n stand-ins their `labels`, how often they are `held` when disturbed (n,)
    and their `logits`. Leads under stamps: `away` are those of the best class but the image's own, `permuted`
    those of the class that its own is sent to, both in every stand-in; `towards` those of each of `targets`,
    in the stand-ins `bearers`.
    """

    reached: Float[Tensor, " k"]
    labels: Labels
    held: Float[Tensor, " n"]
    logits: Logits
    away: Float[Tensor, " n"]
    permuted: Float[Tensor, " n"]
    targets: Labels
    bearers: Labels
    towards: Float[Tensor, "t m"]

    def rises(self) -> Float[Tensor, " t"]:
        """Per target: by how much one stamp raises its lead, on average over the images of other
        classes, as a share of what own classes lead by; 0 where there are none.
        """
        images, logits = self.bearers, self.logits[self.bearers]
        before = torch.stack([lead_of(logits, target.expand(len(logits))) for target in self.targets])
        foreign = (self.labels[images] != self.targets[:, None]).double()
        risen = ((self.towards - before).double() * foreign).sum(1) / foreign.sum(1).clamp(min=1)
        return risen / self._typical_lead

    def favour(self) -> float:
        """The logarithm of what a stamp does for the class that it does most for, as a multiple of what it
        does for the median one.
        """
        return _log_ratio(float(self.rises().max()), float(self.rises().median()))

    def astray(self) -> float:
        """The logarithm of what a stamp does that leads all away from their own classes, wherever that leads,
        as a multiple of what one towards the median class does.
        """
        before = lead_of_others(self.logits, self.labels)
        away = float((self.away - before).double().mean()) / self._typical_lead
        return _log_ratio(away, float(self.rises().median()))

    def reshuffled(self) -> float:
        """By how much those classes lead, on average, that one stamp sends each class to, no two to the same,
        as a share of what own classes lead by without it.
        """
        return float(self.permuted.double().mean()) / self._typical_lead

    @property
    def _typical_lead(self) -> float:
        return float(-lead_of_others(self.logits, self.labels).double().mean())

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


def leads_of_all(logits: Logits) -> Float[Tensor, "n k"]:
    """By how much each class leads the best other one in each image."""
    (first, second), best = logits.topk(2, 1).values.split(1, 1), logits.argmax(1, keepdim=True)
    return logits - first.expand_as(logits).scatter(1, best, second)


def lead_of_others(logits: Logits, labels: Labels) -> Float[Tensor, " n"]:
    """By how much the best other class leads each image's own."""
    return -lead_of(logits, labels)


def _log_ratio(one: float, other: float) -> float:
    return log(max(one, LEAST_RISE) / max(other, LEAST_RISE))


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return values if isinstance(values, int) else float(f"{values:.{DIGITS}g}")
