"""Norms of numbers among benign models: centres, widths, quantiles in which every group counts the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log

import torch

from unhorse.core import Classifier, ScanResult, Verdict

Norms = Mapping[str, tuple[float, float]]
"""Centre and width of each number among benign models."""

CENTRE, RIM = 0.5, 0.95
"""Quantiles of benign models that become 0 and 1."""
LEAST_WIDTH = 1e-3
LARGEST_SIDE = 32
"""Pixels: no network of larger images had a part in the norms of the card."""


def normed_by(norms: Norms, numbers: Mapping[str, float]) -> dict[str, float]:
    """Each number so that 0 is what most benign models have, and 1 what hardly one exceeds."""
    return {test: (numbers[test] - centre) / width for test, (centre, width) in norms.items()}


def soft_maximum(numbers: Mapping[str, float]) -> float:
    """The logarithm of the mean of e to the numbers."""
    values = torch.tensor(list(numbers.values())).double()
    return float(values.logsumexp(0)) - log(len(values))


def unlike(model: Classifier, result: ScanResult) -> ScanResult:
    """With a warning where the score alone reports a network that is unlike those of the norms."""
    if result.verdict is not Verdict.SUSPICIOUS or result.triggers or result.reference:
        return result
    height, width = model.image_shape[1:]
    if model.num_classes == 2:
        what = "it has two classes, and the norms are those of 60 small networks that we trained"
    elif max(height, width) > LARGEST_SIDE:
        what = f"its images are {height}x{width}, and the norms are those of networks of at most 32x32"
    else:
        return result
    warning = (
        f"only the score speaks against this model: {what}. Benign classifiers of such a kind were reported, "
        "too (docs/verdicts.md): compare with benign models of your own (--reference)"
    )
    return replace(result, warnings=(*result.warnings, warning))


def norm(numbers: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Centre and width of benign models' numbers."""
    centre, rim = (quantile(numbers, weights, share) for share in (CENTRE, RIM))
    return centre, max(rim - centre, LEAST_WIDTH)


def quantile(numbers: Sequence[float], weights: Sequence[float], share: float, further: float = 0.0) -> float:
    """The least of the numbers that, with those below it, has that share of all weight and of a `further` one
    above them all.
    """
    total, reached = share * (sum(weights) + further), 0.0
    for number, weight in sorted(zip(numbers, weights, strict=True)):
        reached += weight
        if reached >= total - 1e-9:
            return number
    return max(numbers)
