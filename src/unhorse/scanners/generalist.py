"""The scanner in the box: four tests whose numbers mean the same in every network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from math import inf, log
from typing import Any, Self

import torch

from unhorse.core import Classifier, Dataset, Reference, ScanResult, Scores, Table, Verdict
from unhorse.metrics import judge
from unhorse.scanners.activation_outlier import EFFORTS, ActivationOutlier
from unhorse.scanners.countdown import Countdown, OnScanStep, TimeUp
from unhorse.scanners.evidence import Evidence, EvidenceSearch, Unreadable
from unhorse.scanners.margins import unfit, unreadable
from unhorse.scanners.norms import norm, quantile, unlike
from unhorse.scanners.readings import Readings
from unhorse.scanners.screening import Screening
from unhorse.scanners.two_classes import TwoClasses

CARD = "generalist.json"
FALSE_POSITIVES, CORROBORATED = 0.05, 0.2
"""What share of benign models a score alone may flag, and one that a demonstrated trigger goes with."""
MANY_CLASSES = Screening(steps=3, share=0.02, controls=16)
"""Screening at effort "quick": the margins of 1000 classes in 6,300 passes, minutes for images of 224x224."""
TOWARDS = "how far does a stamp stand out that leads all images to one class?"
PERMUTED = "how far does one stamp lead that sends each class to another, no two to the same?"
APART = "how far is the class that is easiest to reach from the next one?"
SUNK = "how large a share of images without structure does one class take?"
TESTS = (TOWARDS, PERMUTED, APART, SUNK)
SHORT = {
    TOWARDS: "a stamp towards one class",
    PERMUTED: "a stamp that permutes classes",
    APART: "the easiest class",
    SUNK: "images without structure",
}
"""What the tests are called among facts."""
COUNTS = {TOWARDS: 1.0, PERMUTED: 1.0, APART: 0.5, SUNK: 1.0}
"""How much a normed number counts: benign networks have the third far out more often than the others."""
TITLE = "Four tests: the score is the logarithm of the mean of e to what counts"


@dataclass
class Generalist:
    """Four tests whose numbers mean the same in every network, whatever its classes and images (ours).

    How far does one small stamp stand out that leads all stand-ins of clean images to one class, from those
    that lead to other classes (Readings.favour)? How far does one lead that sends each class to another one
    (Readings.reshuffled)? How far is the class that one image of its own reaches most easily from the next
    (Readings.apart)? How many of the images without structure does one class take (Readings.sunk)? `norms`
    are the centre and the width of each number among benign models of populations drawn at random. A Trojan
    shows in one of them or in several, each hardly above what benign models have: the score is the logarithm
    of the mean of e to the numbers so normed, of which the third counts half.
    `threshold` is the 95 % quantile of those models' scores, and `corroborated` their 80 % quantile: it takes
    the place of the threshold where a trigger was demonstrated. With a `reference` of benign models p-values
    of 0.05 and 0.2 decide instead. Networks of two classes have tests and norms of their own: `pair`.
    UNDECIDED: one class, no stand-ins, or `budget` seconds are over.
    """

    outlier: ActivationOutlier = field(default_factory=ActivationOutlier)
    search: EvidenceSearch = field(default_factory=EvidenceSearch)
    norms: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: dict(
            zip(TESTS, ((0.6, 0.7), (-0.9, 0.6), (0.1, 0.3), (0.4, 0.5)), strict=True)
        )
    )
    threshold: float = 1.0
    corroborated: float = 0.6
    budget: float | None = None
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)
    pair: TwoClasses = field(default_factory=TwoClasses)

    name = "generalist"

    @classmethod
    def shipped(cls, effort: str = "standard", **fields: Any) -> Self:
        """The one that comes with this package, with the norms and thresholds of its card; `effort` is that
        of the demonstration, and changes no score; "quick" finishes the margins of a part of 100 classes and
        more.
        """
        card = json.loads(resources.files("unhorse.scanners").joinpath(CARD).read_text("utf-8"))
        learned = {name: card[name] for name in ("norms", "threshold", "corroborated")}
        pair = TwoClasses(**{name: card["two classes"][name] for name in ("norms", "threshold", "auroc")})
        screening = MANY_CLASSES if effort == "quick" else None
        outlier = ActivationOutlier(search=EFFORTS[effort].search, screening=screening)
        return cls(outlier=outlier, **learned, pair=pair, **fields)

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
        """Only norms and thresholds are learned, from benign models of `groups`, of which each counts the
        same.
        """
        names = [
            group for flag, group in zip(trojaned, groups or [0] * len(features), strict=True) if not flag
        ]
        calm = [each for flag, each in zip(trojaned, features, strict=True) if not flag]
        if not calm:
            raise ValueError("no benign models: thresholds are made of their scores")
        weights = [1 / names.count(name) for name in names]
        numbers = [_numbers(Readings.read(each)) for each in calm]
        self.norms = {test: norm([each[test] for each in numbers], weights) for test in self.norms}
        scores, stranger = self.scores(calm).tolist(), max(weights)  # which weighs, too (split conformal)
        self.threshold = quantile(scores, weights, 1 - FALSE_POSITIVES, stranger)
        self.corroborated = quantile(scores, weights, 1 - CORROBORATED, stranger)
        return self

    @property
    def threshold_(self) -> float:
        """As scanners that learn call it."""
        return self.threshold

    def scores(self, features: Sequence[Mapping[str, Any]]) -> Scores:
        """The score of each model."""
        found = [self._score(self.normed(Readings.read(each))) for each in features]
        return torch.tensor(found, dtype=torch.float64)

    def normed(self, readings: Readings) -> dict[str, float]:
        """The number of each test: 0 is what most benign models have, 1 what hardly one exceeds."""
        numbers = _numbers(readings)
        return {test: (numbers[test] - centre) / width for test, (centre, width) in self.norms.items()}

    @staticmethod
    def _score(normed: Mapping[str, float]) -> float:
        counted = list(_counted(normed).values())
        return float(torch.tensor(counted).double().logsumexp(0)) - log(len(counted))

    # --- scanning -------------------------------------------------------------------------------------------

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model`; clean images, if given, serve the demonstration of a trigger. `on_step` hears
        (passes done, passes at most, what is going on).
        """
        if model.num_classes == 2:
            return self._pair().scan(model, clean, on_step=on_step)
        started, mine = time.monotonic(), self.search.passes(model.num_classes)
        heard = _Steps(on_step, mine)
        outlier = replace(self._outlier(), budget=self.budget)
        first = outlier.scan(model, clean, on_step=heard.first if on_step else None)
        if first.verdict is Verdict.UNDECIDED:
            return replace(
                first, scanner=self.name
            )  # with its score, where only its demonstration is missing
        left = None if self.budget is None else self.budget - (time.monotonic() - started)
        clock = Countdown(mine, budget=left, on_step=heard.second if on_step else None)
        reached = torch.tensor(first.reached)
        try:
            evidence = self._search().run(model, reached, outlier.precision_for(model), clock)
        except Unreadable as error:
            return ScanResult.undecided(self.name, str(error))
        except TimeUp:
            return self._out_of_time(first, clock)
        return self._judged(model, first, evidence)

    def measure(self, model: Classifier) -> ScanResult:
        """The score alone, without demonstration and so without a verdict: what references are made of."""
        if model.num_classes == 2:
            return self._pair().measure(model)
        clock = Countdown(budget=self.budget, phase="finding margins")
        try:
            evidence = self._evidence(model, clock)
        except Unreadable as error:
            return ScanResult.undecided(self.name, str(error))
        except TimeUp:
            return self._out_of_time(ScanResult.undecided(self.name, ""), clock)
        score = self._score(self.normed(evidence.readings()))
        result = ScanResult.undecided(self.name, "only the score was measured")
        return replace(result, score=score, reached=tuple(evidence.reached.tolist()))

    def estimate(self, model: Classifier) -> float:
        """Seconds that a scan of `model` will take."""
        margins = sum(self._outlier().passes(model.num_classes)) / 2
        mine = self.pair.passes() if model.num_classes == 2 else self.search.passes(model.num_classes)
        return self._outlier().estimate(model) * (1 + mine / margins)

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

    def _pair(self) -> TwoClasses:
        return replace(self.pair, budget=self.budget, seed=self.seed, reference=self.reference)

    def _search(self) -> EvidenceSearch:
        return self.search.seeded(self.seed)

    # --- results --------------------------------------------------------------------------------------------

    def _judged(self, model: Classifier, first: ScanResult, evidence: Evidence) -> ScanResult:
        """What the activation outlier found, `first`, with the tests in the place of its score."""
        readings = evidence.readings()
        normed, numbers = self.normed(readings), _numbers(readings)
        counted = _counted(normed)
        score, shown = self._score(normed), bool(first.triggers)
        judgement = judge(score, self.threshold, self.reference, alpha=FALSE_POSITIVES)
        enough = judge(score, self.corroborated, self.reference, alpha=CORROBORATED)
        flagged = judgement.flagged or (shown and enough.flagged)
        verdict = Verdict.of(flagged=flagged, demonstrated=shown)
        suspects = {
            TOWARDS: int(readings.targets[readings.rises().argmax()]),
            APART: int(readings.reached.argmax()),
            SUNK: int(readings.sinks.argmax()),
        }
        suspect = suspects.get(max(counted, key=counted.__getitem__))
        found = verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS)
        with torch.no_grad():
            exhibits = tuple(evidence.exhibits(model))
        rows = tuple(
            (test, *(f"{value:.3f}" for value in (numbers[test], *norm, normed[test], counted[test])))
            for test, norm in self.norms.items()
        )
        table = Table(TITLE, ("asked", "number", "benign median", "width", "normed", "counts"), rows)
        result = replace(
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
                **{f"normed number of {SHORT[test]}": number for test, number in normed.items()},
            },
            exhibits=(*first.exhibits, *exhibits, table),
            warnings=(*judgement.warnings, *(() if self.reference else first.warnings)),
        )
        return unlike(model, result)

    def _out_of_time(self, first: ScanResult, clock: Countdown) -> ScanResult:
        reason = f"{self.budget:.0f} s were over while {clock.phase}"
        reason += ": give more time (--timeout) or take --scanner activation-outlier, which is faster"
        if first.score is None:
            return replace(
                ScanResult.undecided(self.name, reason), facts=first.facts, exhibits=first.exhibits
            )
        reason += f". The margins of all classes are known: {first.score:.2f} by activation-outlier alone"
        return replace(first, verdict=Verdict.UNDECIDED, scanner=self.name, target=None, reason=reason)


def _numbers(readings: Readings) -> dict[str, float]:
    return {
        TOWARDS: readings.favour(),
        PERMUTED: readings.reshuffled(),
        APART: readings.apart(),
        SUNK: readings.sunk(),
    }


def _counted(normed: Mapping[str, float]) -> dict[str, float]:
    return {test: COUNTS[test] * number for test, number in normed.items()}


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
