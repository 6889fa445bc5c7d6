"""What numbers are among benign models, and how much each says of whether a model is infected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CENTRE, RIM = 0.5, 0.95
"""Quantiles of benign models that become 0 and 1."""
LEAST_WIDTH = 1e-3


def norm_of(numbers: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Centre and width of benign models' numbers; `counts` say how much each model counts."""
    centre, rim = (quantile(numbers, counts, share) for share in (CENTRE, RIM))
    return centre, max(rim - centre, LEAST_WIDTH)


def quantile(numbers: Sequence[float], counts: Sequence[float], share: float, further: float = 0.0) -> float:
    """The least of the numbers that, with those below it, has that share of all that counts and of a
    `further` one above them all.
    """
    total, reached = share * (sum(counts) + further), 0.0
    for number, count in sorted(zip(numbers, counts, strict=True)):
        reached += count
        if reached >= total - 1e-9:
            return number
    return max(numbers)


def shares_of_evidence(
    normed: Sequence[Mapping[str, float]], trojaned: Sequence[bool], counts: Sequence[float]
) -> dict[str, float]:
    """How much each number says of whether a model is infected, all together 1: the slopes of a logistic
    regression to which both kinds count the same, and 0 for a number that is lower in infected models.

    ValueError where that is so of all numbers.
    """
    from sklearn.linear_model import LogisticRegression  # a second that only fitting needs

    infected = sum(count for count, flag in zip(counts, trojaned, strict=True) if flag)
    whole = {True: infected, False: sum(counts) - infected}
    balanced = [len(counts) * count / 2 / whole[flag] for count, flag in zip(counts, trojaned, strict=True)]
    rows = [list(each.values()) for each in normed]
    slopes = LogisticRegression().fit(rows, list(trojaned), balanced).coef_[0].clip(min=0)
    if not slopes.any():
        raise ValueError("no number is higher in infected models than in benign ones")
    return dict(zip(normed[0], (slopes / slopes.sum()).tolist(), strict=True))
