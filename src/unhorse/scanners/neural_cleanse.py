"""Neural Cleanse: a trigger is searched for every class, and one that is too small accuses its class."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import (
    Bars,
    Classifier,
    Dataset,
    Exhibit,
    ImageGrid,
    Images,
    Labels,
    ReconstructedTrigger,
    ScanResult,
    Verdict,
)
from unhorse.inputs import check_clean, check_recognised, scaled
from unhorse.metrics import evaluation
from unhorse.scanners.optimisation import Precision
from unhorse.scanners.trigger_inversion import Inversion, OnStep, invert

OnScanStep = Callable[[int, int, str], None]
LEAST_CLASSES, LEAST_IMAGES = 8, 20
HELD_OUT, MOST_HELD_OUT = 0.2, 1000
DEMONSTRATED = 0.9
CONSISTENCY = 1.4826
"""Makes the median absolute deviation of normal samples their standard deviation."""
SHOWN, EXAMPLES = 50, 10


@dataclass(frozen=True)
class NeuralCleanse:
    """Neural Cleanse (Wang et al., IEEE S&P 2019): a Trojan's class needs a far smaller mask than the others.

    The score is the anomaly index of the smallest mask; above `threshold` its class is accused, and the
    verdict is INFECTED if the trigger also flips 90 % of clean images that the search did not see. With
    several `repeats`, each from another seed, the median index decides. `samples_per_step` None is one pass
    over all images; at most `images` of the clean ones are searched on. No labels are used. UNDECIDED below
    8 classes, and where most classes cannot be reached.
    """

    norm: Literal["l1", "l2"] = "l1"
    steps: int = 1000
    samples_per_step: int | None = 1000
    batch_size: int = 32
    learning_rate: float = 0.1
    success: float = 0.99
    cost: float = 1e-3
    cost_from_start: bool = False
    start: Literal["uniform", "ones"] = "uniform"
    patience: int = 5
    multiplier: float = 2.0
    early_stop: bool = True
    early_stop_patience: int = 25
    repeats: int = 1
    threshold: float = 2.0
    images: int | None = None
    precision: Precision = "auto"
    seed: int = 0

    name = "neural-cleanse"

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model` on clean images; `on_step` hears (steps done, steps at most, what is going on)."""
        self._check()
        if clean is None:
            return ScanResult.undecided(self.name, "it searches on clean images, and got none: give --clean")
        if model.num_classes < 2:
            return ScanResult.undecided(self.name, f"{model.num_classes} class: check --classes")
        check_clean(model, clean)
        check_recognised(model, clean)
        started = time.monotonic()
        searched, held_out = self._parted(model, clean)
        logits = _logits(model, held_out)
        if not logits.isfinite().all():
            return ScanResult.undecided(
                self.name,
                "the outputs are not finite: check the weights, and the normalisation (--mean, --std)",
            )
        repeats = [
            invert(
                model, searched, self, self.seed + 1009 * index, on_step=self._reporter(index, model, on_step)
            )
            for index in range(self.repeats)
        ]
        if not all(found.norms.isfinite().all() for found in repeats):
            return ScanResult.undecided(self.name, "the gradients are not finite: check the weights")
        case = _Case(model, held_out, logits.argmax(1), repeats)
        return self._result(case, len(searched), time.monotonic() - started)

    def _result(self, case: _Case, searched: int, seconds: float) -> ScanResult:
        names, norms = case.model.class_names, case.inversion.norms
        indices = anomaly_indices(norms)
        smallest, score = int(norms.argmin()), float(indices.max())
        accused = [
            int(label) for label in indices.argsort(descending=True) if indices[label] > self.threshold
        ]
        triggers = {label: case.trigger(label) for label in {smallest, *accused}}
        flip_rate = triggers[smallest].flip_rate
        flagged = score > self.threshold
        verdict = Verdict.of(flagged=flagged, demonstrated=flagged and flip_rate >= DEMONSTRATED)
        reason = self._reason(case)
        all_indices = [float(anomaly_indices(found.norms).max()) for found in case.repeats]
        return ScanResult(
            Verdict.UNDECIDED if reason else verdict,
            self.name,
            score=score,
            threshold=self.threshold,
            class_scores=tuple(indices.tolist()),
            target=smallest if flagged and not reason else None,
            reached=tuple(case.inversion.reached.tolist()),
            triggers=triggers,
            facts={
                "norm of each mask": tuple(norms.tolist()),
                "smallest mask": f"{names[smallest]}, norm {float(norms[smallest]):.3g}",
                "accused classes": tuple(names[label] for label in accused),
                "flip rate on unseen images": flip_rate,
                "index of each repeat": tuple(all_indices),
                "spread of the index": max(all_indices) - min(all_indices),
                "class with the smallest mask in each repeat": tuple(
                    names[int(found.norms.argmin())] for found in case.repeats
                ),
                "steps of each class": tuple(case.inversion.steps.tolist()),
                "images searched on": searched,
                "images held out": len(case.held_out),
                "seconds of the search": seconds,
            },
            exhibits=tuple(self._exhibits(case, accused, triggers[smallest])),
            warnings=tuple(self._warnings(case, flagged)),
            reason=reason,
        )

    def _check(self) -> None:
        whole = ("steps", "batch_size", "patience", "early_stop_patience", "repeats")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if not 0 < self.success <= 1:
            raise ValueError(f"success is {self.success}: give a share above 0, at most 1")
        if self.multiplier <= 1 or self.cost <= 0:
            raise ValueError("give a multiplier above 1 and a cost above 0: the price must move both ways")
        for name, known in (("norm", ("l1", "l2")), ("start", ("uniform", "ones"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: take {' or '.join(known)}")

    def _parted(self, model: Classifier, clean: Dataset) -> tuple[Images, Images]:
        """Images to search on and images to demonstrate on."""
        if len(clean) < LEAST_IMAGES:
            raise ValueError(f"{len(clean)} clean images: give at least {LEAST_IMAGES}, better some hundreds")
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(self.seed))
        held = min(round(HELD_OUT * len(clean)), MOST_HELD_OUT)
        used = order[held:] if self.images is None else order[held : held + max(1, self.images)]
        device = model.mean.device
        return scaled(clean.images[used].to(device)), scaled(clean.images[order[:held]].to(device))

    def _reporter(self, repeat: int, model: Classifier, on_step: OnScanStep | None) -> OnStep | None:
        if on_step is None:
            return None
        report = on_step

        def heard(done: int, active: int) -> None:
            words = f"{active} of {model.num_classes} classes still searched"
            if self.repeats > 1:
                words = f"repeat {repeat + 1} of {self.repeats}, {words}"
            report(repeat * self.steps + (done if active else self.steps), self.repeats * self.steps, words)

        return heard

    def _reason(self, case: _Case) -> str:
        """Why the result is no verdict, if it is none."""
        k, reached = case.model.num_classes, int((case.inversion.reached > 0).sum())
        if 2 * reached < k:
            return (
                f"triggers of {self.success:.0%} success were found for {reached} of {k} classes only, so "
                "the sizes say nothing: give more steps, or check the normalisation (--mean, --std, --range)"
            )
        if k < LEAST_CLASSES:
            return (
                f"{k} classes: an outlier among fewer than {LEAST_CLASSES} says little; look at the "
                "triggers, or use the default scanner"
            )
        return ""

    def _warnings(self, case: _Case, flagged: bool) -> Iterator[str]:
        missed = int((case.inversion.reached == 0).sum())
        if missed:
            yield (
                f"{missed} of {case.model.num_classes} classes never reached {self.success:.0%} success in "
                f"{self.steps} steps: their masks are the last ones, and too small or too large"
            )
        smallest = {int(found.norms.argmin()) for found in case.repeats}
        if flagged and len(smallest) > 1:
            yield f"the repeats accuse {len(smallest)} different classes"

    def _exhibits(self, case: _Case, accused: list[int], trigger: ReconstructedTrigger) -> Iterator[Exhibit]:
        names, norms = case.model.class_names, case.inversion.norms
        shown = sorted(norms.argsort()[:SHOWN].tolist())
        masks, patterns = (part[shown].cpu() for part in (case.inversion.masks, case.inversion.patterns))
        marked = tuple(place for place, label in enumerate(shown) if label in accused)
        captions = tuple(f"{names[label]}: {float(norms[label]):.1f}" for label in shown)
        note = "What sends an image to each class; the number is the size of its mask."
        yield ImageGrid("Reversed triggers: mask x pattern", masks * patterns, captions, marked, note=note)
        yield ImageGrid("Masks", masks.expand_as(patterns), captions, marked)
        median, deviation = (float(value) for value in _median_and_deviation(norms))
        yield Bars(
            "Size of the smallest mask",
            tuple(names),
            tuple(norms.tolist()),
            threshold=max(0.0, median - self.threshold * deviation),
            marked=tuple(accused),
            axis="L1 norm of the mask",
            note="A Trojan's class is reached by a much smaller mask. Classes below the line are accused.",
        )
        examples = case.held_out[:EXAMPLES]
        both = torch.cat([examples, trigger(examples, torch.Generator())])
        predicted = _logits(case.model, both).argmax(1).tolist()
        yield ImageGrid(
            f"Clean images under the trigger of {names[int(norms.argmin())]}",
            both.cpu(),
            tuple(f"as {names[label]}" for label in predicted),
            columns=len(examples),
            note="Above as they are, below under the trigger; the search saw none of them.",
        )


class _Case(NamedTuple):
    """A searched model, with images that the search did not see and the class that it gives them."""

    model: Classifier
    held_out: Images
    predicted: Labels
    repeats: list[Inversion]

    @property
    def inversion(self) -> Inversion:
        """The repeat whose index is the median, the lower one of two."""
        ordered = sorted(self.repeats, key=lambda found: float(anomaly_indices(found.norms).max()))
        return ordered[(len(ordered) - 1) // 2]

    def trigger(self, label: int) -> ReconstructedTrigger:
        """The reversed trigger with the share of unseen images of other classes that it sends to `label`."""
        found = self.inversion
        trigger = ReconstructedTrigger(found.masks[label].cpu(), found.patterns[label].cpu())
        others = self.held_out[self.predicted != label]
        if not len(others):
            return trigger
        hits = _logits(self.model, trigger(others, torch.Generator())).argmax(1) == label
        return replace(trigger, flip_rate=float(hits.float().mean()))


def anomaly_indices(norms: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """(median - norm) / (1.4826 * median absolute deviation) of each class: above 0 for small masks.

    The deviation counts as a thousandth of the median at least; where that is 0 too every index is 0.
    """
    median, deviation = _median_and_deviation(norms)
    floor = torch.maximum(deviation, 1e-3 * median)
    return torch.where(floor > 0, (median - norms) / floor, 0.0)


def _median_and_deviation(norms: Tensor) -> tuple[Tensor, Tensor]:
    values = norms.double()
    median = values.quantile(0.5)
    return median, CONSISTENCY * (values - median).abs().quantile(0.5)


def _logits(model: Classifier, images: Images) -> Tensor:
    with evaluation(model):
        return torch.cat([model(part) for part in images.split(512)])


NEURAL_CLEANSE = {
    "neural-cleanse": NeuralCleanse(),
    "neural-cleanse-l2": NeuralCleanse(
        norm="l2",
        steps=50,
        samples_per_step=None,
        batch_size=64,
        cost_from_start=True,
        start="ones",
        early_stop=False,
    ),
}
