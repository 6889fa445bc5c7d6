"""The scanner in the box: evidence that means the same in every network, weighed as others taught."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unhorse.core import Classifier, Dataset, Reference, ScanResult, Scores, Table, Verdict
from unhorse.metrics import judge
from unhorse.scanners.activation_outlier import ActivationOutlier, unfit
from unhorse.scanners.countdown import Countdown, OnScanStep, TimeUp
from unhorse.scanners.evidence import Evidence, EvidenceSearch, Unreadable, names_of
from unhorse.scanners.margins import unreadable
from unhorse.scanners.optimisation import Precision

LOWEST, HIGHEST = -2.0, 6.0
"""Numbers count within these deviations from benign networks: beyond, they say no more."""
CARD = "generalist.json"


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


@dataclass
class Generalist:
    """A logistic regression on `uses`, numbers that are free of the scale of a network's logits (ours).

    The margins of activation-outlier find one class that stands out; universal stamps on stand-ins for clean
    images find what has no single target. Each number can only count against a model, so that the groups of
    models it was fitted on cannot be told apart by one number against another. All groups weigh the same, and
    so do benign and infected models within each. The score is the log odds of "trojaned";
    `threshold_` is the benign quantile that a fit without the model's group gave (docs/methods).
    UNDECIDED: fewer than 3 classes, no stand-ins, or `budget` seconds are over.
    """

    outlier: ActivationOutlier = field(default_factory=ActivationOutlier)
    search: EvidenceSearch = field(default_factory=EvidenceSearch)
    uses: tuple[str, ...] = ("margin", "raised")
    ridge: float = 0.02
    budget: float | None = None
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)

    weights_: Weights | None = field(default=None, init=False, repr=False, compare=False)
    threshold_: float = field(default=0.0, init=False)
    card_: Mapping[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name = "generalist"

    @property
    def threshold(self) -> float:
        return self.threshold_

    @property
    def used(self) -> tuple[str, ...]:
        """The numbers whose names hold one of `uses`."""
        return tuple(name for name in names_of(self.search) if any(part in name for part in self.uses))

    # --- learning -------------------------------------------------------------------------------------------

    def features(self, model: Classifier) -> Float[Tensor, " d"]:
        """All numbers of `model`, in the order of names_of(); ValueError where it has none."""
        numbers = self._evidence(model, Countdown(budget=self.budget)).numbers()
        return torch.tensor([numbers[name] for name in names_of(self.search)], dtype=torch.float64)

    def fit(
        self,
        features: Float[Tensor, "n d"],
        trojaned: Sequence[bool],
        groups: Sequence[object] | None = None,
    ) -> Self:
        """Learn from the features of models whose kind is known; `groups` says which belong together."""
        flags = torch.tensor([bool(flag) for flag in trojaned])
        if len(features) != len(flags) or int(flags.sum()) < 2 or int((~flags).sum()) < 2:
            raise ValueError(
                f"{len(features)} models with {int(flags.sum())} of {len(flags)} labels trojaned: give a "
                "label for each, and at least 2 models of either kind"
            )
        chosen = self._chosen(features)
        shares = _balanced(flags, groups or [0] * len(flags))
        benign = shares * ~flags / (shares * ~flags).sum()
        means = (benign[:, None] * chosen).sum(0)
        deviations = (benign[:, None] * (chosen - means) ** 2).sum(0).sqrt() + 1e-6
        standard = ((chosen - means) / deviations).clamp(LOWEST, HIGHEST)
        weights, intercept = _regression(standard, flags, shares, self.ridge)
        self.weights_ = Weights(self.used, means, deviations, weights, intercept)
        return self

    def scores(self, features: Float[Tensor, "n d"]) -> Scores:
        """Log odds of "trojaned" per model."""
        return self._fitted().scores(self._chosen(features))

    def _chosen(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        names = names_of(self.search)
        return features.double()[:, [names.index(name) for name in self.used]]

    def _fitted(self) -> Weights:
        if self.weights_ is None:
            raise ValueError("nothing was learned yet: call fit() or Generalist.shipped()")
        return self.weights_

    # --- scanning -------------------------------------------------------------------------------------------

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model`; clean images, if given, serve the demonstration of a trigger. `on_step` hears
        (passes done, passes at most, what is going on).
        """
        self._fitted()
        clock = Countdown(self.search.passes(model.num_classes), budget=self.budget, on_step=on_step)
        first = replace(self._outlier(), budget=self.budget).scan(model, clean, on_step=on_step)
        if first.verdict is Verdict.UNDECIDED:
            return replace(first, scanner=self.name)
        try:
            evidence = self.search.run(model, torch.tensor(first.reached), self._precision(model), clock)
        except Unreadable as error:
            return ScanResult.undecided(self.name, str(error))
        except TimeUp:
            return self._out_of_time(first, clock)
        return self._judged(model, first, evidence)

    def _judged(self, model: Classifier, first: ScanResult, evidence: Evidence) -> ScanResult:
        """What the activation outlier found, `first`, with the score of all numbers in place of its own."""
        weights, row = self._fitted(), self._row(evidence)
        score, shares = float(weights.scores(row)), weights.shares(row)[0]
        judgement = judge(score, self.threshold_, self.reference)
        verdict = Verdict.of(flagged=judgement.flagged, demonstrated=bool(first.triggers))
        of_margins = torch.tensor(["margin" in name for name in weights.names])
        suspect = evidence.suspect
        if 2 * shares[of_margins].sum() >= shares.sum():
            suspect = int(evidence.reached.argmax())
        if first.triggers:
            suspect = min(first.triggers)
        facts = {
            "score of the margins alone": first.score,
            "stand-ins": len(evidence.stand_ins.held),
        }
        return replace(
            first,
            verdict=verdict,
            scanner=self.name,
            score=score,
            threshold=self.threshold_,
            p_value=judgement.p_value,
            reference=self.reference,
            target=suspect if verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS) else None,
            facts={**first.facts, **facts},
            exhibits=(*first.exhibits, *evidence.exhibits(), weights.table(row)),
            warnings=(*judgement.warnings, *first.warnings),
        )

    def measure(self, model: Classifier) -> ScanResult:
        """The score alone, without demonstration and so without a verdict: what references are made of."""
        if reason := unfit(model):
            return ScanResult.undecided(self.name, reason)
        clock = Countdown(budget=self.budget)
        try:
            evidence = self._evidence(model, clock)
        except ValueError as error:
            return ScanResult.undecided(self.name, str(error))
        except TimeUp:
            return self._out_of_time(ScanResult.undecided(self.name, ""), clock)
        score = float(self._fitted().scores(self._row(evidence)))
        result = ScanResult.undecided(self.name, "only the score was measured")
        return replace(result, score=score, reached=tuple(evidence.reached.tolist()))

    def estimate(self, model: Classifier) -> float:
        """Seconds that a scan of `model` will take."""
        passes = self.search.passes(model.num_classes)
        return self._outlier().estimate(model) * (1 + passes / self._outlier().passes(model.num_classes))

    def _row(self, evidence: Evidence) -> Float[Tensor, "1 d"]:
        numbers = evidence.numbers()
        return torch.tensor([[numbers[name] for name in self._fitted().names]], dtype=torch.float64)

    def _outlier(self) -> ActivationOutlier:
        return replace(self.outlier, seed=self.seed)

    def _precision(self, model: Classifier) -> Precision:
        return self.outlier.precision_for(model)

    def _evidence(self, model: Classifier, clock: Countdown) -> Evidence:
        if reason := unfit(model):
            raise Unreadable(reason)
        margins = self._outlier().margins(model, clock)
        if not margins.complete:
            raise TimeUp
        if reason := unreadable(model, margins):
            raise Unreadable(reason)
        return self.search.run(model, margins.reached, self._precision(model), clock)

    def _out_of_time(self, first: ScanResult, clock: Countdown) -> ScanResult:
        reason = f"{self.budget:.0f} s were over while {clock.phase}"
        reason += ": give more time (--timeout) or take --effort quick"
        return replace(ScanResult.undecided(self.name, reason), facts=first.facts, exhibits=first.exhibits)

    # --- the one in the box ---------------------------------------------------------------------------------

    @classmethod
    def shipped(cls) -> Self:
        """The one that comes with this package, fitted on the models that its card names."""
        return cls.read(json.loads(resources.files("unhorse.scanners").joinpath(CARD).read_text("utf-8")))

    @classmethod
    def read(cls, card: Mapping[str, Any]) -> Self:
        """From what card() gives."""
        scanner = cls(uses=tuple(card["uses"]), ridge=card["ridge"])
        columns = [
            torch.tensor(card[name], dtype=torch.float64) for name in ("means", "deviations", "weights")
        ]
        scanner.weights_ = Weights(
            tuple(card["numbers"]), columns[0], columns[1], columns[2], card["intercept"]
        )
        scanner.threshold_, scanner.card_ = card["threshold"], card
        return scanner

    def card(self) -> dict[str, Any]:
        """What was learned, for JSON."""
        weights = self._fitted()
        return {
            "uses": self.uses,
            "ridge": self.ridge,
            "threshold": self.threshold_,
            "numbers": weights.names,
            "means": weights.means.tolist(),
            "deviations": weights.deviations.tolist(),
            "weights": weights.weights.tolist(),
            "intercept": weights.intercept,
        }


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
        losses = torch.nn.functional.softplus(odds) - torch.from_numpy(y) * odds
        total = (torch.from_numpy(share) * losses).sum() + ridge / 2 * (weights[:-1] ** 2).sum()
        (gradient,) = torch.autograd.grad(total, weights)
        return float(total.detach()), gradient.numpy()

    d = x.shape[1]
    bounds = [(0, None)] * d + [(None, None)]
    found = minimize(loss, torch.zeros(d + 1, dtype=torch.float64).numpy(), jac=True, bounds=bounds)
    return torch.from_numpy(found.x[:-1].copy()), float(found.x[-1])
