"""What is read of a network of two classes, and four numbers of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Labels, Logits
from unhorse.scanners.margins import LEAST_MARGIN
from unhorse.scanners.readings import LEAST_RISE, lead_of_others, rounded

SMALL = "how far does a stamp of half a percent of the pixels lead all images of one class to the other?"
UNEQUAL = "how many times further does a stamp of one percent lead to one class than to the other?"
APART = "how much further from all other images is one class than the other?"
SUNK = "how large a share of images without structure does one class take?"
PAIR_TESTS = (SMALL, UNEQUAL, APART, SUNK)
PAIR_SHORT = {
    SMALL: "a stamp of half a percent",
    UNEQUAL: "a stamp of one percent, towards one class and the other",
    APART: "the easier class",
    SUNK: "images without structure",
}
"""What the tests are called among facts."""


class PairReadings(NamedTuple):
    """Margins `reached`; the shares `sinks` of images without structure that each class takes; of n stand-ins
    their `labels` and `logits`; and the lead of each class in every stand-in under the best stamp of half a
    percent towards it, `small`, and under that of one percent, `large`.
    """

    reached: Float[Tensor, " 2"]
    sinks: Float[Tensor, " 2"]
    labels: Labels
    logits: Logits
    small: Float[Tensor, "2 n"]
    large: Float[Tensor, "2 n"]

    def rises(self, leads: Float[Tensor, "2 n"]) -> list[float]:
        """By how much each class's stamp raises its lead in the other's images, as a share of what those lead
        by without it.
        """
        before = lead_of_others(self.logits, self.labels).double()
        foreign = [self.labels != target for target in range(2)]
        risen = [(leads[target] - before)[foreign[target]].mean() for target in range(2)]
        return [float(rise / -before.mean()) for rise in risen]

    def numbers(self) -> dict[str, float]:
        """The number of each test."""
        high, low = (max(rise, LEAST_RISE) for rise in sorted(self.rises(self.large), reverse=True))
        first, second = self.reached.double().topk(2).values.tolist()
        return {
            SMALL: max(self.rises(self.small)),
            UNEQUAL: log(high / low),
            APART: log(first / max(second, LEAST_MARGIN * first)),
            SUNK: float(self.sinks.max()),
        }

    @property
    def suspect(self) -> int:
        """The class that the stamp of one percent does more towards."""
        first, second = self.rises(self.large)
        return int(second > first)

    def record(self) -> dict[str, Any]:
        """For JSON: all of it, to a few digits."""
        return {name: rounded(values.tolist()) for name, values in self._asdict().items()}

    @staticmethod
    def read(record: Mapping[str, Any]) -> PairReadings:
        """What record() wrote."""
        return PairReadings(**{name: torch.tensor(record[name]) for name in PairReadings._fields})
