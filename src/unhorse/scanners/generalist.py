"""The scanner in the box: evidence that means the same in every network, weighed as others taught."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from math import inf
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Classifier, Dataset, Reference, ScanResult, Scores, Verdict
from unhorse.metrics import judge
from unhorse.scanners.activation_outlier import EFFORTS, ActivationOutlier, unfit
from unhorse.scanners.countdown import Countdown, OnScanStep, TimeUp
from unhorse.scanners.evidence import Evidence, EvidenceSearch, Unreadable
from unhorse.scanners.evidence_weights import Weights
from unhorse.scanners.margins import unreadable
from unhorse.scanners.readings import Readings

CARD = "generalist.json"


@dataclass
class Generalist:
    """A logistic regression on numbers that are free of the scale of a network's logits (ours).

    The margins of activation-outlier find one class that stands out; universal stamps on stand-ins for clean
    images find what has no single target. Of Readings.numbers() those count whose names hold one of `uses`.
    Each can only count against a model, so that the groups of models it was fitted on cannot be told apart by
    one number against another; all groups weigh the same, and so do benign and trojaned models within each.
    The score is the log odds of "trojaned"; `threshold` is the 95 % quantile of the scores that benign models
    got from fits without their groups (docs/methods). With a `reference` the p-value decides instead.
    UNDECIDED: fewer than 3 classes, no stand-ins, or `budget` seconds are over.
    """

    outlier: ActivationOutlier = field(default_factory=ActivationOutlier)
    search: EvidenceSearch = field(default_factory=EvidenceSearch)
    uses: tuple[str, ...] = ("margin", "raised")
    ridge: float = 0.02
    budget: float | None = None
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)
    weights: Weights | None = field(default=None, repr=False, compare=False)
    threshold: float = 0.0

    name = "generalist"

    @classmethod
    def shipped(cls, effort: str = "standard", **fields: Any) -> Self:
        """The one that comes with this package, fitted on the models that its card names; `effort` is that of
        the demonstration, and changes no score.
        """
        card = json.loads(resources.files("unhorse.scanners").joinpath(CARD).read_text("utf-8"))
        search = EFFORTS[effort].search
        return replace(cls.read(card), outlier=ActivationOutlier(search=search), **fields)

    # --- learning -------------------------------------------------------------------------------------------

    def features(self, model: Classifier) -> dict[str, Any]:
        """The readings of `model` for JSON: what takes long, and is the same whatever numbers are made of it;
        ValueError where it has none.
        """
        return self._evidence(model, Countdown(budget=self.budget)).readings().record()

    def fit(
        self,
        features: Sequence[Mapping[str, Any]],
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
        numbers = [Readings.read(each).numbers() for each in features]
        names = [name for name in numbers[0] if any(part in name for part in self.uses)]
        rows = torch.tensor([[each[name] for name in names] for each in numbers], dtype=torch.float64)
        self.weights = Weights.learned(names, rows, flags, groups or [0] * len(flags), self.ridge)
        return self

    def scores(self, features: Sequence[Mapping[str, Any]]) -> Scores:
        """Log odds of "trojaned" per model."""
        return self._fitted().scores(torch.cat([self._row(Readings.read(each)) for each in features]))

    def _fitted(self) -> Weights:
        if self.weights is None:
            raise ValueError("nothing was learned yet: call fit() or Generalist.shipped()")
        return self.weights

    def card(self) -> dict[str, Any]:
        """What was learned, for JSON."""
        learned = {"uses": self.uses, "ridge": self.ridge, "threshold": self.threshold}
        return {**learned, "weights": self._fitted().card()}

    @classmethod
    def read(cls, card: Mapping[str, Any]) -> Self:
        """From what card() gave."""
        weights = Weights.read(card["weights"])
        return cls(
            uses=tuple(card["uses"]), ridge=card["ridge"], weights=weights, threshold=card["threshold"]
        )

    # --- scanning -------------------------------------------------------------------------------------------

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model`; clean images, if given, serve the demonstration of a trigger. `on_step` hears
        (passes done, passes at most, what is going on).
        """
        self._fitted()
        started, mine = time.monotonic(), self.search.passes(model.num_classes)
        heard = _Steps(on_step, mine)
        outlier = replace(self._outlier(), budget=self.budget)
        first = outlier.scan(model, clean, on_step=heard.first if on_step else None)
        if first.verdict is Verdict.UNDECIDED:
            return replace(first, scanner=self.name)
        left = None if self.budget is None else self.budget - (time.monotonic() - started)
        clock = Countdown(mine, budget=left, on_step=heard.second if on_step else None)
        reached = torch.tensor(first.reached)
        try:
            evidence = self._search().run(model, reached, outlier.precision_for(model), clock)
        except Unreadable as error:
            return ScanResult.undecided(self.name, str(error))
        except TimeUp:
            return self._out_of_time(first, clock)
        return self._judged(first, evidence)

    def measure(self, model: Classifier) -> ScanResult:
        """The score alone, without demonstration and so without a verdict: what references are made of."""
        clock = Countdown(budget=self.budget, phase="finding margins")
        try:
            evidence = self._evidence(model, clock)
        except Unreadable as error:
            return ScanResult.undecided(self.name, str(error))
        except TimeUp:
            return self._out_of_time(ScanResult.undecided(self.name, ""), clock)
        score = float(self._fitted().scores(self._row(evidence.readings())))
        result = ScanResult.undecided(self.name, "only the score was measured")
        return replace(result, score=score, reached=tuple(evidence.reached.tolist()))

    def estimate(self, model: Classifier) -> float:
        """Seconds that a scan of `model` will take."""
        margins = sum(self._outlier().passes(model.num_classes)) / 2
        return self._outlier().estimate(model) * (1 + self.search.passes(model.num_classes) / margins)

    def _evidence(self, model: Classifier, clock: Countdown) -> Evidence:
        if reason := unfit(model):
            raise Unreadable(reason)
        margins = self._outlier().margins(model, clock)
        if not margins.complete:
            raise TimeUp
        if reason := unreadable(model, margins):
            raise Unreadable(reason)
        return self._search().run(model, margins.reached, self.outlier.precision_for(model), clock)

    def _outlier(self) -> ActivationOutlier:
        return replace(self.outlier, seed=self.seed, threshold=inf)

    def _search(self) -> EvidenceSearch:
        return self.search.seeded(self.seed)

    def _row(self, readings: Readings) -> Float[Tensor, "1 d"]:
        numbers = readings.numbers()
        return torch.tensor([[numbers[name] for name in self._fitted().names]], dtype=torch.float64)

    # --- results --------------------------------------------------------------------------------------------

    def _judged(self, first: ScanResult, evidence: Evidence) -> ScanResult:
        """What the activation outlier found, `first`, with the score of all numbers in place of its own."""
        weights, readings = self._fitted(), evidence.readings()
        row = self._row(readings)
        score = float(weights.scores(row))
        judgement = judge(score, self.threshold, self.reference)
        verdict = Verdict.of(flagged=judgement.flagged, demonstrated=bool(first.triggers))
        facts = {"score of activation-outlier": first.score, "stand-ins": len(evidence.stand_ins.held)}
        target = None
        if verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS):
            target = min(first.triggers) if first.triggers else self._suspect(readings, row)
        return replace(
            first,
            verdict=verdict,
            scanner=self.name,
            score=score,
            threshold=self.threshold,
            p_value=judgement.p_value,
            reference=self.reference,
            target=target,
            facts={**first.facts, **facts},
            exhibits=(*first.exhibits, *evidence.exhibits(), weights.table(row)),
            warnings=(*judgement.warnings, *(() if self.reference else first.warnings)),
        )

    def _suspect(self, readings: Readings, row: Float[Tensor, "1 d"]) -> int | None:
        """The class with the largest margin if the margins make up half of the score, else the one to which
        the largest stamp leads, if it leads to one.
        """
        weights = self._fitted()
        shares = weights.shares(row)[0]
        of_margins = torch.tensor(["margin" in name for name in weights.names])
        if 2 * float(shares[of_margins].sum()) >= float(shares.sum()):
            return int(readings.reached.argmax())
        return readings.suspect

    def _out_of_time(self, first: ScanResult, clock: Countdown) -> ScanResult:
        reason = f"{self.budget:.0f} s were over while {clock.phase}"
        reason += ": give more time (--timeout) or take --effort quick"
        return replace(ScanResult.undecided(self.name, reason), facts=first.facts, exhibits=first.exhibits)


class _Steps:
    """One count of passes over both parts of a scan."""

    def __init__(self, on_step: Callable[[int, int, str], None] | None, second: int) -> None:
        self.on_step, self.of_second, self.of_first = on_step, second, 0

    def first(self, done: int, most: int, words: str) -> None:
        self.of_first = done
        assert self.on_step is not None
        self.on_step(done, most + self.of_second, words)

    def second(self, done: int, most: int, words: str) -> None:
        assert self.on_step is not None
        self.on_step(self.of_first + done, self.of_first + most, words)
