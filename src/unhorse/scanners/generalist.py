"""The scanner in the box: two tests whose numbers mean the same in every network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from math import inf
from typing import Any, Self

import torch

from unhorse.core import Classifier, Dataset, Reference, ScanResult, Scores, Table, Verdict
from unhorse.metrics import judge
from unhorse.scanners.activation_outlier import EFFORTS, ActivationOutlier, unfit
from unhorse.scanners.countdown import Countdown, OnScanStep, TimeUp
from unhorse.scanners.evidence import Evidence, EvidenceSearch, Unreadable
from unhorse.scanners.margins import unreadable
from unhorse.scanners.readings import Readings

CARD = "generalist.json"
FALSE_POSITIVES, CORROBORATED = 0.05, 0.2
"""What share of benign models a score alone may flag, and one that a demonstrated trigger goes with."""
OUTLIER, RISE = "one class stands out", "a small stamp raises another class"


@dataclass
class Generalist:
    """Two tests whose numbers mean the same in every network, whatever its classes and images (ours).

    Does one class stand out among the margins that activation-outlier finds (Readings.outlier)? Does one
    small stamp raise another class in every stand-in for a clean image (Readings.rise)? Each number is
    divided by its scale, and the score is the larger one. Scales were chosen on development models,
    `threshold` is the 95 % quantile of the scores of benign models of many groups, and `corroborated` their
    80 % quantile: it takes the place of the threshold where a trigger was demonstrated (docs/methods). With
    a `reference` of benign models p-values of 0.05 and 0.2 decide instead. UNDECIDED: fewer than 3 classes,
    no stand-ins, or `budget` seconds are over.
    """

    outlier: ActivationOutlier = field(default_factory=ActivationOutlier)
    search: EvidenceSearch = field(default_factory=EvidenceSearch)
    area: float = 0.01
    outlier_scale: float = 4.5
    rise_scale: float = 0.33
    threshold: float = 1.0
    corroborated: float = 0.6
    budget: float | None = None
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)

    name = "generalist"

    @classmethod
    def shipped(cls, effort: str = "standard", **fields: Any) -> Self:
        """The one that comes with this package, with the thresholds of its card; `effort` is that of the
        demonstration, and changes no score.
        """
        card = json.loads(resources.files("unhorse.scanners").joinpath(CARD).read_text("utf-8"))
        thresholds = {name: card[name] for name in ("threshold", "corroborated")}
        return cls(outlier=ActivationOutlier(search=EFFORTS[effort].search), **thresholds, **fields)

    # --- over many models -----------------------------------------------------------------------------------

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
        """Nothing is learned but the thresholds, from benign models of `groups`, of which each counts the
        same.
        """
        several: dict[object, list[float]] = {}
        groups = groups or [0] * len(features)
        for score, flag, group in zip(self.scores(features).tolist(), trojaned, groups, strict=True):
            if not flag:
                several.setdefault(group, []).append(score)
        if not several:
            raise ValueError("no benign models: thresholds are made of their scores")
        least = min(len(own) for own in several.values())
        calm = torch.tensor([score for own in several.values() for score in own[:least]])
        self.threshold = float(calm.quantile(1 - FALSE_POSITIVES))
        self.corroborated = float(calm.quantile(1 - CORROBORATED))
        return self

    @property
    def threshold_(self) -> float:
        """As scanners that learn call it."""
        return self.threshold

    def scores(self, features: Sequence[Mapping[str, Any]]) -> Scores:
        """The score of each model."""
        found = [max(self.ratios(Readings.read(each)).values()) for each in features]
        return torch.tensor(found, dtype=torch.float64)

    def ratios(self, readings: Readings) -> dict[str, float]:
        """Both numbers over their scales, by what they ask."""
        return {
            OUTLIER: readings.outlier() / self.outlier_scale,
            RISE: readings.rise(self.area) / self.rise_scale,
        }

    # --- scanning -------------------------------------------------------------------------------------------

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model`; clean images, if given, serve the demonstration of a trigger. `on_step` hears
        (passes done, passes at most, what is going on).
        """
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
        score = max(self.ratios(evidence.readings()).values())
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

    # --- results --------------------------------------------------------------------------------------------

    def _judged(self, first: ScanResult, evidence: Evidence) -> ScanResult:
        """What the activation outlier found, `first`, with both tests in the place of its score."""
        readings = evidence.readings()
        ratios = self.ratios(readings)
        score, shown = max(ratios.values()), bool(first.triggers)
        judgement = judge(score, self.threshold, self.reference, alpha=FALSE_POSITIVES)
        enough = judge(score, self.corroborated, self.reference, alpha=CORROBORATED)
        verdict = Verdict.of(flagged=(enough if shown else judgement).flagged, demonstrated=shown)
        suspect = int(readings.reached.argmax()) if ratios[OUTLIER] >= ratios[RISE] else readings.suspect
        found = verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS)
        numbers = (readings.outlier(), readings.rise(self.area))
        scales = (self.outlier_scale, self.rise_scale)
        return replace(
            first,
            verdict=verdict,
            scanner=self.name,
            score=score,
            threshold=self.threshold,
            p_value=judgement.p_value,
            reference=self.reference,
            target=(min(first.triggers) if shown else suspect) if found else None,
            facts={
                **first.facts,
                "threshold with a demonstrated trigger": self.corroborated,
                "score of activation-outlier": first.score,
                "stand-ins": len(evidence.stand_ins.held),
            },
            exhibits=(
                *first.exhibits,
                *evidence.exhibits(),
                Table(
                    "Two tests: the score is the larger ratio",
                    ("asked", "number", "scale", "ratio"),
                    tuple(
                        (asked, f"{number:.3f}", f"{scale:.3f}", f"{number / scale:.3f}")
                        for asked, number, scale in zip(ratios, numbers, scales, strict=True)
                    ),
                ),
            ),
            warnings=(*judgement.warnings, *(() if self.reference else first.warnings)),
        )

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
