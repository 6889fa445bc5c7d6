"""Readings of a model, and the numbers made of them that mean the same whatever the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Labels, Logits

DIGITS = 5
"""Significant digits that are kept of a reading."""


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

    def numbers(self) -> dict[str, float]:
        """The numbers by name; of each a larger one is the more suspicious."""
        found: dict[str, Tensor | float] = {}
        found |= _of_margins(self.reached.double())
        lead = -lead_of_others(self.logits, self.labels).double().mean()
        found["stand-ins shaken"] = 1 - self.held.double().mean()
        found["stand-ins near"] = self.logits.double().std().clamp(min=1e-9) / lead
        for area, logits in zip(self.areas, self.stamped, strict=True):
            found |= {
                f"{called(area)}: {what}": value for what, value in self._of_stamp(logits, lead).items()
            }
        return {name: float(value) for name, value in found.items()}

    def _of_stamp(self, logits: Logits, lead: Tensor) -> dict[str, Tensor]:
        """The log of the share of the lead that a stamp takes, how often it takes more than all, how often
        the same class is the next one then, and how far the most raised class rises, as a share of the lead.
        """
        leads = lead_of_others(logits, self.labels).double()
        towards = next_class(logits, self.labels)
        change = (logits - self.logits).double()
        change = (change - change.mean(1, keepdim=True)).scatter(1, self.labels[:, None], 0.0)
        return {
            "taken": (1 + leads.mean() / lead).clamp(min=1e-3).log(),
            "flipped": (leads > 0).double().mean(),
            "agreement": torch.bincount(towards).max().double() / len(towards),
            "raised": change.mean(0).max() / lead,
        }

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


def _of_margins(reached: Float[Tensor, " k"]) -> dict[str, Tensor]:
    """How far the largest log margin stands out: in deviations of the others, over the next, over the next in
    deviations, and over the median.
    """
    logs = reached.clamp(min=1e-3 * float(reached.max())).log().sort(descending=True).values
    first, others = logs[0], logs[1:]
    spread = others.std() + 0.05
    gap = first - others[0]
    return {
        "margin outlier": (first - others.mean()) / spread,
        "margin gap": gap,
        "margin gap in deviations": gap / spread,
        "margin ratio": first - logs.quantile(0.5),
    }


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}")
