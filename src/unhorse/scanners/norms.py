"""Norms of numbers among benign models: centres, widths, quantiles in which every group counts the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

import torch

Norms = Mapping[str, tuple[float, float]]
"""Centre and width of each number among benign models."""

CENTRE, RIM = 0.5, 0.95
"""Quantiles of benign models that become 0 and 1."""
LEAST_WIDTH = 1e-3


def normed_by(norms: Norms, numbers: Mapping[str, float]) -> dict[str, float]:
    """Each number so that 0 is what most benign models have, and 1 what hardly one exceeds."""
    return {test: (numbers[test] - centre) / width for test, (centre, width) in norms.items()}


def soft_maximum(numbers: Mapping[str, float]) -> float:
    """The logarithm of the mean of e to the numbers."""
    values = torch.tensor(list(numbers.values())).double()
    return float(values.logsumexp(0)) - log(len(values))


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
