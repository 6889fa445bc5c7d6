"""The scan of networks of two classes: what a small stamp does towards each, and how unequal the two are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from unhorse.core import (
    Classifier,
    Dataset,
    Exhibit,
    ImageGrid,
    Images,
    ReconstructedTrigger,
    Reference,
    ScanResult,
    Scores,
    Table,
    Verdict,
)
from unhorse.metrics import judge
from unhorse.scanners.activation_outlier import ActivationOutlier
from unhorse.scanners.countdown import Countdown, OnScanStep, TimeUp
from unhorse.scanners.evidence import FEW, SHOWN, Unreadable
from unhorse.scanners.footprints import Inputs
from unhorse.scanners.margins import unfit, unreadable
from unhorse.scanners.norms import norm, normed_by, quantile, soft_maximum, unlike
from unhorse.scanners.optimisation import frozen
from unhorse.scanners.pair_readings import PAIR_SHORT, PAIR_TESTS, PairReadings
from unhorse.scanners.stamps import Stamps, StampSearch
from unhorse.scanners.stand_ins import StandIns, StandInSearch
from unhorse.scanners.unstructured import Unstructured

FALSE_POSITIVES = 0.05
ENOUGH_AUROC = 0.85
"""A score that ranks held-out networks less well gives no verdict."""
FLIPS, LEAD, CLEAN_IMAGES = 0.7, 0.25, 128
"""What share of unseen images a demonstrated stamp flips, and how many more than the other class's."""
TITLE = "Four tests of two classes: the score is the logarithm of the mean of e to the normed numbers"


class PairEvidence(NamedTuple):
    """The readings of a network, and what they were read from."""

    readings: PairReadings
    stand_ins: StandIns
    stamps: Stamps


@dataclass(frozen=True)
class TwoClasses:
    """Four numbers of a network of two classes, normed by benign ones of two classes (ours).

    Among two classes none stands out, so what a stamp does is compared with what stamps do in benign
    networks, and one class with the other. `auroc` is what the score reached on networks that had no part in
    it; below ENOUGH_AUROC there is no verdict without a `reference`, and the evidence is shown all the same.
    UNDECIDED: that, no stand-ins, or `budget` seconds are over.
    """

    outlier: ActivationOutlier = field(default_factory=ActivationOutlier)
    stand_ins: StandInSearch = StandInSearch()
    stamps: StampSearch = StampSearch()
    unstructured: Unstructured = Unstructured()
    areas: tuple[float, float] = (0.005, 0.01)
    starts: int = 3
    norms: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: dict.fromkeys(PAIR_TESTS, (0.0, 1.0))
    )
    threshold: float = 1.0
    auroc: float = 0.0
    budget: float | None = None
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)

    name = "generalist"

    # --- over many models -----------------------------------------------------------------------------------

    def features(self, model: Classifier) -> dict[str, Any]:
        """The readings of `model` for JSON; ValueError where it has none."""
        return self.evidence(model, Countdown(budget=self.budget)).readings.record()

    def fitted(self, features: Sequence[Mapping[str, Any]], groups: Sequence[object]) -> Self:
        """With the norms and the threshold of benign models, of whose groups each counts the same."""
        weights = [1 / groups.count(group) for group in groups]
        numbers = [PairReadings.read(each).numbers() for each in features]
        norms = {test: norm([each[test] for each in numbers], weights) for test in PAIR_TESTS}
        found = replace(self, norms=norms)
        scores = found.scores(features).tolist()
        return replace(found, threshold=quantile(scores, weights, 1 - FALSE_POSITIVES, max(weights)))

    def scores(self, features: Sequence[Mapping[str, Any]]) -> Scores:
        """The score of each model."""
        numbers = [PairReadings.read(each).numbers() for each in features]
        return torch.tensor(
            [soft_maximum(normed_by(self.norms, each)) for each in numbers], dtype=torch.float64
        )

    # --- scanning -------------------------------------------------------------------------------------------

    def passes(self) -> int:
        """Forward and backward passes of one image, at most, beside those of the margins."""
        stamped = self.stamps.passes(len(self.areas) * self.starts * 2 * self.stand_ins.count)
        return self.unstructured.total + 2 * self.stand_ins.passes(2) + stamped

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model`; a stamp is demonstrated on clean images, if given, or on further stand-ins."""
        clock = Countdown(
            self.passes() + sum(self.outlier.passes(2)) // 2, budget=self.budget, on_step=on_step
        )
        evidence: PairEvidence | None = None
        try:
            evidence = self.evidence(model, clock)
            return self._judged(model, evidence, self._unseen(model, clean, clock))
        except Unreadable as error:
            return ScanResult.undecided(self.name, str(error))
        except TimeUp:
            reason = f"{self.budget:.0f} s were over while {clock.phase}: give more time (--timeout)"
            if evidence is None:
                return ScanResult.undecided(self.name, reason)
            return self._judged(model, evidence, None, reason)

    def measure(self, model: Classifier) -> ScanResult:
        """The score alone: what references are made of."""
        try:
            readings = self.evidence(model, Countdown(budget=self.budget)).readings
        except (Unreadable, TimeUp) as error:
            return ScanResult.undecided(self.name, str(error) or f"{self.budget:.0f} s were over")
        score = soft_maximum(normed_by(self.norms, readings.numbers()))
        result = ScanResult.undecided(self.name, "only the score was measured")
        return replace(result, score=score, reached=tuple(readings.reached.tolist()))

    def evidence(self, model: Classifier, clock: Countdown) -> PairEvidence:
        """Unreadable where a class has no stand-in; TimeUp when the clock's budget is spent."""
        if reason := unfit(model, least=2):
            raise Unreadable(reason)
        clock.phase = "finding margins"
        outlier = replace(self.outlier, seed=self.seed, threshold=inf)
        margins = outlier.margins(model, clock)
        if not margins.complete:
            raise TimeUp
        if reason := unreadable(model, margins):
            raise Unreadable(reason)
        precision = outlier.precision_for(model)
        with frozen(model, precision):
            clock.phase = "looking at images without structure"
            sinks = replace(self.unstructured, seed=self.seed).seen_by(model, clock)
            clock.phase = "drawing stand-ins for clean images"
            stand_ins = replace(self.stand_ins, seed=self.seed).run(model, precision, clock)
            inputs = stand_ins.inputs
            counts = inputs.labels.bincount(minlength=2)
            if int(counts.min()) < FEW // 2:
                raise Unreadable(
                    f"only {counts[0]} and {counts[1]} images were found that the model takes for its two "
                    "classes whatever is done to them: check the weights and the normalisation (--mean, "
                    "--std, --range)"
                )
            clock.phase = "searching stamps"
            small, large = (self._stamps(model, inputs, area, clock) for area in self.areas)
        readings = PairReadings(
            margins.reached, sinks, inputs.labels, stand_ins.logits, small.leads, large.leads
        )
        return PairEvidence(PairReadings(*(each.cpu() for each in readings)), stand_ins, large)

    def _stamps(self, model: Classifier, inputs: Inputs, area: float, clock: Countdown) -> Stamps:
        """One towards each class, the best of several starts."""
        targets = torch.arange(2).to(inputs.labels)
        foreign = inputs.labels != targets[:, None]
        best: Stamps | None = None
        for start in range(self.starts):
            search = replace(self.stamps, area=area, seed=self.seed + start)
            found = search.run(
                model, inputs, targets, precision=self.outlier.precision_for(model), clock=clock
            )
            best = found if best is None else best.improved(found, targets, foreign)
        assert best is not None
        return best

    # --- results --------------------------------------------------------------------------------------------

    def _unseen(self, model: Classifier, clean: Dataset | None, clock: Countdown) -> Inputs:
        """Images on which no stamp was searched, with the class that the model gives them."""
        if clean is not None:
            images = clean[: min(len(clean), CLEAN_IMAGES)].pixels(model.mean.device)
            with torch.no_grad():
                return Inputs(images, model(images).argmax(1))
        clock.phase = "drawing images to demonstrate a stamp on"
        precision = self.outlier.precision_for(model)
        with frozen(model, precision):
            return replace(self.stand_ins, seed=self.seed + 1).run(model, precision, clock).inputs

    def _judged(
        self, model: Classifier, evidence: PairEvidence, unseen: Inputs | None, late: str = ""
    ) -> ScanResult:
        """The verdict; without `unseen` images, and `late` says why, nothing is demonstrated."""
        readings = evidence.readings
        numbers = readings.numbers()
        normed = normed_by(self.norms, numbers)
        score, suspect = soft_maximum(normed), readings.suspect
        judgement = judge(score, self.threshold, self.reference, alpha=FALSE_POSITIVES)
        rates = [0.0, 0.0]
        if unseen:
            rates = [_flip_rate(model, unseen, evidence.stamps, target) for target in range(2)]
        trigger = ReconstructedTrigger(
            evidence.stamps.masks[suspect].cpu(), evidence.stamps.patterns[suspect].cpu(), rates[suspect]
        )
        shown = judgement.flagged and rates[suspect] >= FLIPS and rates[suspect] - rates[1 - suspect] >= LEAD
        verdict, reason = Verdict.of(flagged=judgement.flagged, demonstrated=shown), ""
        if self.auroc < ENOUGH_AUROC and self.reference is None:
            verdict, reason = Verdict.UNDECIDED, self._no_verdict(score)
        elif late and not judgement.flagged:
            verdict = Verdict.UNDECIDED
            reason = f"{late}. The score is known, {score:.2f} (threshold {self.threshold:.2f})"
        found = verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS)
        result = ScanResult(
            verdict,
            self.name,
            score=score,
            threshold=self.threshold,
            p_value=judgement.p_value,
            class_scores=tuple(readings.reached.tolist()),
            target=suspect if found else None,
            reached=tuple(readings.reached.tolist()),
            triggers={suspect: trigger} if found and shown else {},
            reference=self.reference,
            facts={
                "stand-ins": len(readings.labels),
                "flip rate": rates[suspect] if unseen else None,
                "flip rate of the other class's stamp": rates[1 - suspect] if unseen else None,
                **{f"normed number of {PAIR_SHORT[test]}": number for test, number in normed.items()},
            },
            exhibits=(*_pictures(model, evidence), self._table(numbers, normed)),
            warnings=(*judgement.warnings, late) if late and not reason else judgement.warnings,
            reason=reason,
        )
        return unlike(model, result)

    def _no_verdict(self, score: float) -> str:
        return (
            f"two classes: on networks that it was not fitted on this score has AUROC {self.auroc:.2f}, "
            f"and {ENOUGH_AUROC} is asked for; the score is {score:.2f} (threshold {self.threshold:.2f}): "
            "compare with 19 benign models of your own kind (--reference)"
        )

    def _table(self, numbers: Mapping[str, float], normed: Mapping[str, float]) -> Table:
        rows = tuple(
            (test, *(f"{value:.3f}" for value in (numbers[test], *self.norms[test], normed[test])))
            for test in PAIR_TESTS
        )
        return Table(TITLE, ("asked", "number", "benign median", "width", "normed"), rows)


@torch.no_grad()
def _flip_rate(model: Classifier, unseen: Inputs, stamps: Stamps, target: int) -> float:
    """Which share of the other class's images the stamp turns into the target."""
    images = unseen.images[unseen.labels != target]
    if not len(images):
        return 0.0
    return float((model(stamps.on(images, target)).argmax(1) == target).float().mean())


@torch.no_grad()
def _pictures(model: Classifier, evidence: PairEvidence) -> Iterator[Exhibit]:
    """Some stand-ins, and each under the stamp that leads to the other class."""
    images, labels = evidence.stand_ins.inputs
    some = torch.linspace(0, len(images) - 1, min(len(images), SHOWN)).round().long().to(labels)
    images, labels = images[some], labels[some]
    stamped: Images = torch.cat(
        [
            evidence.stamps.on(image[None], 1 - label)
            for image, label in zip(images, labels.tolist(), strict=True)
        ]
    )
    captions = [f"class {model.class_names[label]}" for label in labels.tolist()]
    seen: list[Any] = _classes(model, stamped)
    yield ImageGrid(
        "Stand-ins for clean images, and a stamp towards the other class",
        torch.cat([images, stamped]).cpu(),
        (*captions, *(f"seen as {name}" for name in seen)),
        (),
        len(some),
        "A Trojan makes a stamp do far more towards one class than towards the other.",
    )


def _classes(model: Classifier, images: Tensor) -> list[str]:
    return [model.class_names[label] for label in model(images).argmax(1).tolist()]
