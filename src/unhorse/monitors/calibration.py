"""Calibration: an alarm threshold from clean images, with the false-positive rate that it promises."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from unhorse.core import Dataset
from unhorse.rates import Rate

ROUNDING = 1e-9  # 0.05 * 20 is not quite 1


@dataclass(frozen=True)
class Calibration:
    """Where a guard's threshold comes from: the scores of clean images that the filter was not fitted on.

    `alarm_rate` is the share of them above the threshold, `disagreement` the share whose class changes, which
    is the paper's rule; `clean_drop` is the accuracy that answering by filtered images would cost.
    """

    fpr: float | None
    threshold: float
    alarm_rate: Rate
    disagreement: Rate
    scores: tuple[float, ...] = field(repr=False)
    clean_accuracy: Rate | None = None
    clean_drop: Rate | None = None

    @property
    def n(self) -> int:
        return len(self.scores)


def conformal_threshold(scores: list[float], fpr: float) -> float:
    """The ceil((n + 1) * (1 - fpr))-th smallest score: a fresh one exceeds it with probability <= fpr."""
    check_count(fpr, len(scores))
    place = math.ceil((len(scores) + 1) * (1 - fpr) - ROUNDING)
    return sorted(scores)[max(place, 1) - 1]


def split_clean(clean: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """(the rest, `share` of the images), shuffled; every class has its share in both, to within one image."""
    if not 0 < share < 1:
        raise ValueError(f"calibration_share is {share}: give a share between 0 and 1, such as 0.3")
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
    by_class = order
    if clean.labels is not None:
        by_class = order[clean.labels.cpu()[order].argsort(stable=True)]
    taken = ((torch.arange(len(clean) + 1).double() * share) + ROUNDING).floor().diff() > 0  # evenly along
    chosen = torch.zeros(len(clean), dtype=torch.bool)
    chosen[by_class[taken]] = True
    return clean[order[~chosen[order]]], clean[order[chosen[order]]]


def check_count(fpr: float | None, n: int, share: float | None = None) -> None:
    """Refuses a rate that `n` calibration images, `share` of all clean ones, cannot promise."""
    if fpr is None:
        return
    if not 0 < fpr < 1:
        raise ValueError(f"fpr is {fpr}: give a rate between 0 and 1, or None for the paper's hard rule")
    needed = math.ceil(1 / fpr - 1 - ROUNDING)
    if n < needed:
        total = "" if share is None else f" ({math.ceil(needed / share)} clean images in all)"
        raise ValueError(
            f"{n} calibration images cannot promise a false-positive rate of {fpr}: give at least "
            f"{needed}{total}, a rate of {1 / (n + 1):.3g} or more, or fpr=None for the paper's hard rule"
        )
