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
LEAST_SPREAD = 0.01
"""Log margins that differ less than this are called equal."""


class Readings(NamedTuple):
    """Margins `reached` (k,); of n stand-ins their `labels`, how often they are `held` when disturbed (n,)
    and their `logits`; and under the stamp of each of `areas`, smallest first, `stamped` (s, n, k).
    """

    reached: Float[Tensor, " k"]
    labels: Labels
    held: Float[Tensor, " n"]
    logits: Logits
    areas: tuple[float, ...]
    stamped: Float[Tensor, "s n k"]

    def outlier(self) -> float:
        """How far the largest log margin stands out from the others, in their standard deviations. Margins
        below a thousandth of the largest count as that.
        """
        reached = self.reached.double()
        logs = reached.clamp(min=1e-3 * float(reached.max())).log().sort(descending=True).values
        return float((logs[0] - logs[1:].mean()) / (logs[1:].std() + LEAST_SPREAD))

    def rise(self, area: float) -> float:
        """How far the class that rises most under the stamp of that area rises, on average over the
        stand-ins, as a share of the lead that their own classes had. Logits are taken relative to their mean,
        and an image's own class does not count.
        """
        change = (self.stamped[self.areas.index(area)] - self.logits).double()
        change = (change - change.mean(1, keepdim=True)).scatter(1, self.labels[:, None], 0.0)
        return float(change.amax(1).mean() / -lead_of_others(self.logits, self.labels).double().mean())

    @property
    def suspect(self) -> int | None:
        """The class to which most images go under the largest stamp, if most do."""
        counts = torch.bincount(next_class(self.stamped[-1], self.labels))
        return int(counts.argmax()) if 2 * int(counts.max()) > len(self.labels) else None

    def record(self) -> dict[str, Any]:
        """For JSON: all of it, to DIGITS digits."""
        floats = ("reached", "held", "logits", "stamped")
        return {
            **{name: _rounded(getattr(self, name).tolist()) for name in floats},
            "labels": self.labels.tolist(),
            "areas": list(self.areas),
        }

    @staticmethod
    def read(record: Mapping[str, Any]) -> Readings:
        """What record() wrote."""
        return Readings(
            torch.tensor(record["reached"]),
            torch.tensor(record["labels"]),
            torch.tensor(record["held"]),
            torch.tensor(record["logits"]),
            tuple(record["areas"]),
            torch.tensor(record["stamped"]),
        )


def called(area: float) -> str:
    """As in "stamp of 0.5%"."""
    return f"stamp of {area:.1%}".replace(".0%", "%")


def lead_of_others(logits: Logits, labels: Labels) -> Float[Tensor, " n"]:
    """By how much the best other class leads each image's own."""
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(1) - logits.gather(1, own)[:, 0]


def next_class(logits: Logits, labels: Labels) -> Labels:
    """The best class but each image's own."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}")
