"""The activation outlier: margin maps, an outlier among the classes, and a demonstrated trigger. It needs
neither data nor a population.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from unhorse.core import (
    Classifier,
    Dataset,
    Labels,
    Reference,
    ScanResult,
    Table,
    Verdict,
)
from unhorse.metrics import judge
from unhorse.models.training import autocast
from unhorse.scanners.countdown import Countdown, OnScanStep, TimeUp
from unhorse.scanners.demonstration import Demonstration, demonstrate
from unhorse.scanners.footprints import FootprintSearch, Inputs
from unhorse.scanners.margins import (
    Climb,
    Job,
    MarginMaps,
    Margins,
    outlier_score,
    start_images,
    unfit,
    unreadable,
)
from unhorse.scanners.optimisation import Precision, frozen, uses_bf16
from unhorse.scanners.screening import Plan, Screening

NEAR = 0.1
"""A bf16 score this near to the threshold, relative to it, is computed again in fp32."""
BF16_FROM = 700_000
"""Weights from which "auto" may take bf16: scans of smaller networks take seconds in fp32 too, and bf16 makes
them depend on the last bits of the weights."""
CLEAN_IMAGES, MANY = 128, 100


@dataclass(frozen=True)
class ActivationOutlier:
    """One class that is too easy to reach, or classes unequally easy (ours; after MM-BD, Wang et al., S&P
    2024).

    For each class an image clamped to [0, 1] maximises the margin (target logit minus the best other). The
    score is log(largest / median) + standard deviation / mean of the margins reached: how far one class
    stands out, and how unequal the classes are; it is free of the logits' scale. `threshold` was chosen on
    development models only (docs/methods); with inf nothing is flagged. With a `reference` of at least 19
    benign models the split-conformal p-value decides instead. `screening` spares time where classes are many.
    Precision "auto" is bf16 where that saves much time, and fp32 again near the threshold. UNDECIDED: fewer
    than 3 classes, or `budget` seconds are over.
    """

    steps: int = 20
    learning_rate: float = 0.15
    starts: int = 3
    confidence: float = 0.95
    threshold: float = 0.7
    search: FootprintSearch = FootprintSearch()
    screening: Screening | None = None
    budget: float | None = None
    precision: Precision = "auto"
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)

    name = "activation-outlier"

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model`; clean images, if given, take the place of the maps in the demonstration. `on_step`
        hears (passes done, passes at most, what is going on).
        """
        if reason := unfit(model):
            return ScanResult.undecided(self.name, reason)
        precision = self.precision_for(model)
        clock = Countdown(
            self.passes(model.num_classes)[1], budget=self.budget, on_step=on_step, phase="finding margins"
        )
        rng = torch.Generator().manual_seed(self.seed)
        rows = self._rows(model.num_classes) if clean is None else min(len(clean), CLEAN_IMAGES)
        drawn = self.search.drawn(rows, rng)
        margins = self.margins(model, clock, kept=drawn if clean is None else None)
        if not margins.complete:
            return self._out_of_time(model, margins, clock)
        if reason := unreadable(model, margins):
            return ScanResult.undecided(self.name, reason)
        inputs = margins.inputs if clean is None else _labelled(model, clean, drawn)
        clock.phase = "searching a footprint"
        try:
            with frozen(model, precision):
                demonstration = demonstrate(
                    model, inputs, margins.reached, self.search, rng, precision, clock
                )
        except TimeUp:
            return self._out_of_time(model, margins, clock)
        return self._judged(model, margins, demonstration, clean)

    def measure(self, model: Classifier) -> ScanResult:
        """The score alone, without demonstration and so without a verdict: what references are made of."""
        if reason := unfit(model):
            return ScanResult.undecided(self.name, reason)
        clock = Countdown(budget=self.budget, phase="finding margins")
        margins = self.margins(model, clock)
        if not margins.complete:
            return self._out_of_time(model, margins, clock)
        if reason := unreadable(model, margins):
            return ScanResult.undecided(self.name, reason)
        result = ScanResult.undecided(self.name, "only the score was measured")
        return replace(result, score=outlier_score(margins.reached), reached=tuple(margins.reached.tolist()))

    # --- margins --------------------------------------------------------------------------------------------

    def margins(
        self, model: Classifier, clock: Countdown | None = None, *, kept: Labels | None = None
    ) -> Margins:
        """Margin maps of every class, or of those that screening leaves; in fp32 again near the threshold."""
        clock = clock or Countdown()
        precision = self.precision_for(model)
        found = self._climbed(model, clock, precision, kept)
        if precision == self.precision or precision == "fp32" or not found.complete:
            return found
        if not abs((score := outlier_score(found.reached)) - self.threshold) <= NEAR * self.threshold < inf:
            return found
        clock.phase = "finding margins again in fp32"
        clock.most += self._finishing(model.num_classes)
        again = self._climbed(model, clock, "fp32", None, found.plan)
        if not again.complete:
            return found._replace(complete=False)
        return found._replace(reached=again.reached, precision=f"fp32 (bf16 came near: {score:.3f})")

    def precision_for(self, model: Classifier) -> Precision:
        """What "auto" stands for."""
        if self.precision != "auto":
            return self.precision
        weights = sum(parameter.numel() for parameter in model.parameters())
        return "bf16" if weights >= BF16_FROM and uses_bf16(model) else "fp32"

    def _climbed(
        self,
        model: Classifier,
        clock: Countdown,
        precision: Precision,
        kept: Labels | None,
        plan: Plan | None = None,
    ) -> Margins:
        settings = Climb(self.steps, self.learning_rate, self.confidence, precision)
        everything = torch.arange(model.num_classes)
        with frozen(model, precision):
            search = MarginMaps(model, start_images(model, self.starts, self.seed), clock)
            try:
                if plan is None and self.screening is not None and self._screens(model.num_classes):
                    shorter = replace(settings, steps=self.screening.steps)
                    plan = self.screening.plan(search.climb(Job.of(everything, 1, kept), shorter))
                    kept = None
                job = Job.of(everything if plan is None else plan.classes, self.starts, kept)
                reached = search.climb(job, settings).view(self.starts, -1).amax(0)
            except TimeUp:
                return search.found(search.reached, plan, precision, complete=False)
        return search.found(reached if plan is None else plan.combined(reached), plan, precision)

    # --- how long -------------------------------------------------------------------------------------------

    def _screens(self, num_classes: int) -> bool:
        return self.screening is not None and num_classes >= self.screening.above

    def _rows(self, num_classes: int) -> int:
        """From how many margin maps the inputs of a demonstration are drawn."""
        return num_classes if self._screens(num_classes) else num_classes * self.starts

    def _finishing(self, num_classes: int) -> int:
        """Passes of the climbs that take all steps; a climb looks once more after its last step."""
        chosen = num_classes
        if self.screening is not None and self._screens(num_classes):
            chosen = self.screening.finished(num_classes)
        return chosen * self.starts * (self.steps + 1)

    def passes(self, num_classes: int) -> tuple[int, int]:
        """Passes of a scan at least, and with the rivals' footprints."""
        screened = 0
        if self.screening is not None and self._screens(num_classes):
            screened = num_classes * (self.screening.steps + 1)
        least, most = self.search.passes(self._rows(num_classes))
        margins = screened + self._finishing(num_classes)
        return margins + least, margins + most

    def estimate(self, model: Classifier) -> float:
        """Seconds that a scan of `model` will take, from the time of one step on a few images; rivals count
        half, and near the threshold the margins take longer.
        """
        precision = self.precision_for(model)
        for count in (2, 8, 32):  # the first step also warms the kernels up
            images = start_images(model, 1, 0).expand(count, -1, -1, -1).clone().requires_grad_(True)
            with frozen(model, precision), autocast(images.device, precision == "bf16"):
                began = time.perf_counter()
                torch.autograd.grad(model(images).float().sum(), images)
                step = time.perf_counter() - began
            if count > 2 and step > 0.05:
                break
        return 0.2 + step / count * sum(self.passes(model.num_classes)) / 2

    # --- results --------------------------------------------------------------------------------------------

    def _judged(
        self, model: Classifier, margins: Margins, demonstration: Demonstration, clean: Dataset | None
    ) -> ScanResult:
        score = outlier_score(margins.reached)
        suspect = int(margins.reached.argmax())
        judgement = judge(score, self.threshold, self.reference)
        verdict = Verdict.of(flagged=judgement.flagged, demonstrated=demonstration.demonstrated)
        target = suspect if verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS) else None
        source = "the model's own maps" if clean is None else f"{len(clean)} clean images"
        table = Table(
            "Footprints compared", ("footprint", "flip rate"), demonstration.rows(model.class_names)
        )
        return ScanResult(
            verdict,
            self.name,
            score=score,
            threshold=self.threshold,
            p_value=judgement.p_value,
            class_scores=tuple(margins.reached.tolist()),
            target=target,
            reached=tuple(margins.reached.tolist()),
            triggers={suspect: demonstration.trigger} if demonstration.demonstrated else {},
            reference=self.reference,
            facts={
                "inputs of the demonstration": source,
                **self._facts(margins),
                **demonstration.facts(),
            },
            exhibits=(
                *margins.exhibits(model.class_names, self.threshold, target),
                *demonstration.exhibits(),
                table,
            ),
            warnings=(*judgement.warnings, *_warnings(model, self.reference)),
        )

    def _out_of_time(self, model: Classifier, margins: Margins, clock: Countdown) -> ScanResult:
        less = "" if self.screening else " or take --effort quick"
        reason = (
            f"{self.budget:.0f} s were over with {margins.screened} of {model.num_classes} classes screened, "
            f"while {clock.phase}: give more time (--timeout){less}"
        )
        seen: dict[str, Any] = {}
        if margins.complete:  # the score is known, and only the demonstration is missing
            reached = tuple(margins.reached.tolist())
            seen = {"score": outlier_score(margins.reached), "class_scores": reached, "reached": reached}
            seen["threshold"] = self.threshold if self.threshold < inf else None
        return replace(
            ScanResult.undecided(self.name, reason),
            facts=self._facts(margins),
            exhibits=tuple(margins.exhibits(model.class_names, self.threshold, None)),
            **seen,
        )

    def _facts(self, margins: Margins) -> dict[str, object]:
        preset = f"{self.steps} steps, {self.starts} starts, learning rate {self.learning_rate}"
        if margins.plan is not None and self.screening is not None:
            leaders, controls, k = len(margins.plan.leaders), len(margins.plan.controls), len(margins.reached)
            preset += f", for {leaders} leading classes and {controls} others of {k}"
            preset += f" after {self.screening.steps} steps for all"
        return {"preset": preset, "precision of the margins": margins.precision}


def _warnings(model: Classifier, reference: Reference | None) -> tuple[str, ...]:
    k = model.num_classes
    if k < 8:
        return (f"only {k} classes: an outlier among them says little, the trigger more",)
    if k >= MANY and reference is None:
        said = f"the threshold is that of models with 10 classes; of {k} one stands out sooner: --reference"
        return (said,)
    return ()


def _labelled(model: Classifier, clean: Dataset, drawn: Tensor) -> Inputs:
    """The drawn ones of the first clean images under the model's own predictions: labels are not needed."""
    images = clean[: min(len(clean), CLEAN_IMAGES)].pixels(model.mean.device)
    with torch.no_grad():
        return Inputs(images[drawn], model(images).argmax(1)[drawn])


EFFORTS = {
    "quick": ActivationOutlier(starts=2, search=FootprintSearch(rivals=1), screening=Screening()),
    "standard": ActivationOutlier(),
    "deep": ActivationOutlier(starts=6, search=FootprintSearch(steps=40, refine=20, rivals=9)),
}
