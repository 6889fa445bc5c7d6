"""Weights of evidence: what the numbers of many models, benign and trojaned, teach about one more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from unhorse.core import Scores, Table

LOWEST, HIGHEST = -2.0, 6.0
"""Numbers count within these deviations from benign models: beyond, they say no more."""
COLUMNS = ("means", "deviations", "weights")


class Weights(NamedTuple):
    """What was learned: of each number its mean and deviation in benign models, and its weight, never
    negative; then the intercept.
    """

    names: tuple[str, ...]
    means: Float[Tensor, " d"]
    deviations: Float[Tensor, " d"]
    weights: Float[Tensor, " d"]
    intercept: float

    def shares(self, numbers: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What each number adds to the score."""
        return ((numbers - self.means) / self.deviations).clamp(LOWEST, HIGHEST) * self.weights

    def table(self, numbers: Float[Tensor, "1 d"]) -> Table:
        """What one model's score is made of."""
        columns = (numbers[0], self.means, self.deviations, self.shares(numbers)[0])
        rows = zip(self.names, *(column.tolist() for column in columns), strict=True)
        return Table(
            "What the score is made of",
            ("number", "here", "benign models: mean", "deviation", "adds to the score"),
            tuple((name, *(f"{value:.3f}" for value in values)) for name, *values in rows),
        )

    def scores(self, numbers: Float[Tensor, "n d"]) -> Scores:
        """Log odds of "trojaned" per model."""
        return self.shares(numbers).sum(1) + self.intercept

    @staticmethod
    def learned(
        names: Sequence[str],
        numbers: Float[Tensor, "n d"],
        trojaned: Bool[Tensor, " n"],
        groups: Sequence[object],
        ridge: float,
    ) -> Weights:
        """From the numbers of models whose kind is known; all groups weigh the same, and so do benign and
        trojaned models within each.
        """
        shares = _balanced(trojaned, groups)
        benign = shares * ~trojaned / (shares * ~trojaned).sum()
        means = (benign[:, None] * numbers).sum(0)
        deviations = (benign[:, None] * (numbers - means) ** 2).sum(0).sqrt() + 1e-6
        standard = ((numbers - means) / deviations).clamp(LOWEST, HIGHEST)
        return Weights(tuple(names), means, deviations, *_regression(standard, trojaned, shares, ridge))

    def card(self) -> dict[str, Any]:
        """For JSON."""
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        return {"names": self.names, **columns, "intercept": self.intercept}

    @staticmethod
    def read(card: Mapping[str, Any]) -> Weights:
        """What card() wrote."""
        means, deviations, weights = (torch.tensor(card[name], dtype=torch.float64) for name in COLUMNS)
        return Weights(tuple(card["names"]), means, deviations, weights, float(card["intercept"]))


def _balanced(flags: Bool[Tensor, " n"], groups: Sequence[object]) -> Float[Tensor, " n"]:
    """Weights that add up to 1: the same for every group and either kind in it."""
    parts = [(group, bool(flag)) for group, flag in zip(groups, flags, strict=True)]
    counts = {part: parts.count(part) for part in set(parts)}
    return torch.tensor([1 / (len(counts) * counts[part]) for part in parts], dtype=torch.float64)


def _regression(
    numbers: Float[Tensor, "n d"], flags: Bool[Tensor, " n"], shares: Float[Tensor, " n"], ridge: float
) -> tuple[Float[Tensor, " d"], float]:
    """Weights >= 0 and the intercept of lowest weighted log loss + ridge / 2 |weights|^2."""
    from scipy.optimize import minimize  # 0.3 s that only fitting needs

    x, y, share = numbers.numpy(), flags.double().numpy(), shares.numpy()

    def loss(parameters: Any) -> tuple[float, Any]:
        weights = torch.from_numpy(parameters).requires_grad_(True)
        odds = torch.from_numpy(x) @ weights[:-1] + weights[-1]
        losses = functional.softplus(odds) - torch.from_numpy(y) * odds
        total = (torch.from_numpy(share) * losses).sum() + ridge / 2 * (weights[:-1] ** 2).sum()
        (gradient,) = torch.autograd.grad(total, weights)
        return float(total.detach()), gradient.numpy()

    d = x.shape[1]
    bounds = [(0, None)] * d + [(None, None)]
    found = minimize(loss, torch.zeros(d + 1, dtype=torch.float64).numpy(), jac=True, bounds=bounds)
    return torch.from_numpy(found.x[:-1].copy()), float(found.x[-1])
