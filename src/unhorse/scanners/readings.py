"""Readings of a model, and numbers of them that mean the same whatever the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Labels, Logits
from unhorse.scanners.margins import LEAST_MARGIN

DIGITS = 5
"""Significant digits that are kept of a reading."""
LEAST_RISE = 0.05
"""What a stamp does for an image, at the least, as a share of the lead of its own class."""


class Readings(NamedTuple):
    """Margins `reached` (k,); the shares `sinks` (k,) of images without structure that each class takes; of n
    stand-ins their `labels`, how often they are `held` when disturbed (n,)
    and their `logits`. Leads under stamps: `permuted` are those of the class that the image's own is sent
    to, in every stand-in; `towards_all` and `towards_each`, under one stamp for all and one for each, are
    those of each of `targets`, in the stand-ins `bearers` and in every second of these.
    """

    reached: Float[Tensor, " k"]
    sinks: Float[Tensor, " k"]
    labels: Labels
    held: Float[Tensor, " n"]
    logits: Logits
    permuted: Float[Tensor, " n"]
    targets: Labels
    bearers: Labels
    towards_all: Float[Tensor, "t m"]
    towards_each: Float[Tensor, "t half_m"]

    def rises(self) -> Float[Tensor, " t"]:
        """Per target: by how much one stamp for all raises its lead, on average over the images of other
        classes, as a share of what own classes lead by; 0 where there are none.
        """
        return self._risen(self.towards_all, self.bearers)

    def shares(self) -> Float[Tensor, " t"]:
        """Per target: what one stamp for all does for it, as a share of what each image's own stamp does."""
        own = self._risen(self.towards_each, self.bearers[::2])
        return self.rises().clamp(min=LEAST_RISE) / own.clamp(min=LEAST_RISE)

    def favour(self) -> float:
        """How far the class stands out that a stamp does most for: the sum of two logarithms, of what it does
        as a multiple of what one does for the median class, and of its share of what each image's own stamp
        does as a multiple of the median share.
        """
        rises, shares = self.rises().clamp(min=LEAST_RISE), self.shares()
        best = int(self.rises().argmax())
        return sum(log(float(each[best] / each.median())) for each in (rises, shares))

    def reshuffled(self) -> float:
        """By how much those classes lead, on average, that one stamp sends each class to, no two to the same,
        as a share of what own classes lead by without it.
        """
        return float(self.permuted.double().mean()) / self._typical_lead

    def apart(self) -> float:
        """How far the class with the largest margin is from the next one: the logarithm of their ratio."""
        first, second = self.reached.double().topk(2).values.tolist()
        return log(first / max(second, LEAST_MARGIN * first))

    def sunk(self) -> float:
        """The largest share of images without structure that one class takes."""
        return float(self.sinks.max())

    def _risen(self, leads: Float[Tensor, "t m"], images: Labels) -> Float[Tensor, " t"]:
        logits = self.logits[images]
        before = torch.stack([lead_of(logits, target.expand(len(logits))) for target in self.targets])
        foreign = (self.labels[images] != self.targets[:, None]).double()
        risen = ((leads - before).double() * foreign).sum(1) / foreign.sum(1).clamp(min=1)
        return risen / self._typical_lead

    @property
    def _typical_lead(self) -> float:
        return float(-lead_of_others(self.logits, self.labels).double().mean())

    def record(self) -> dict[str, Any]:
        """For JSON: all of it, to DIGITS digits."""
        return {name: rounded(values.tolist()) for name, values in self._asdict().items()}

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


def rounded(values: Any) -> Any:
    """Numbers, in lists of lists, to DIGITS digits; whole ones as they are."""
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return values if isinstance(values, int) else float(f"{values:.{DIGITS}g}")
