"""The default scanner: margin maps, an outlier among the classes, and a demonstrated trigger. Needs no data
and no population.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
    Logits,
    Reference,
    ScanResult,
    Table,
    Verdict,
)
from unhorse.metrics import judge
from unhorse.scanners.footprints import Demonstration, FootprintSearch, Inputs, demonstrate
from unhorse.scanners.optimisation import Precision, Preset, chunk_size, frozen, optimise

BASE_LEVELS = (0.0, 0.5, 0.25, 0.75)  # start images: a flat grey of this level and some noise


class Margins(NamedTuple):
    """Margin maps of s starts x k classes, flattened start by start, in pixels; the best margin per class
    (k,); and for each (start, class) the first image that the model was just confident about, with its class.
    """

    maps: Images
    reached: Float[Tensor, " k"]
    proxies: Images
    labels: Labels


@dataclass(frozen=True)
class ActivationOutlier:
    """One class that is too easy to reach, or classes unequally easy (ours; after MM-BD, Wang et al., S&P
    2024).

    For each class an image clamped to [0, 1] maximises the margin (target logit minus the best other). The
    score is log(largest / median) + standard deviation / mean of the margins reached: how far one class
    stands out, and how unequal the classes are; it is free of the logits' scale. `threshold` was chosen on
    development models only (docs/methods). With a `reference` of at least 19 benign models the split-
    conformal p-value decides instead. Fewer than 3 classes: UNDECIDED.
    """

    steps: int = 20
    learning_rate: float = 0.15
    starts: int = 3
    confidence: float = 0.95
    threshold: float = 0.7
    search: FootprintSearch = FootprintSearch()
    precision: Precision = "auto"
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)

    name = "activation-outlier"

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judges `model`; clean images, if given, take the place of the maps in the demonstration."""
        if reason := _unfit(model):
            return ScanResult.undecided(self.name, reason)
        margins = self.margins(model)
        if reason := _unreadable(model, margins):
            return ScanResult.undecided(self.name, reason)
        score = outlier_score(margins.reached)
        suspect = int(margins.reached.argmax())
        inputs = Inputs(margins.proxies, margins.labels) if clean is None else _labelled(model, clean)
        rng = torch.Generator().manual_seed(self.seed)
        with frozen(model, self.precision):
            demonstration = demonstrate(model, inputs, margins.reached, self.search, rng, self.precision)
        judgement = judge(score, self.threshold, self.reference)
        verdict = Verdict.of(flagged=judgement.flagged, demonstrated=demonstration.demonstrated)
        finding = verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS)
        return ScanResult(
            verdict,
            self.name,
            score=score,
            threshold=self.threshold,
            p_value=judgement.p_value,
            class_scores=tuple(margins.reached.tolist()),
            target=suspect if finding else None,
            reached=tuple(margins.reached.tolist()),
            triggers={suspect: demonstration.trigger} if demonstration.demonstrated else {},
            reference=self.reference,
            facts=self._facts(demonstration, clean),
            exhibits=tuple(self._exhibits(model, margins, demonstration, suspect if finding else None)),
            warnings=(*judgement.warnings, *_warnings(model)),
        )

    def measure(self, model: Classifier) -> ScanResult:
        """The score alone, without demonstration and so without a verdict: what references are made of."""
        if reason := _unfit(model):
            return ScanResult.undecided(self.name, reason)
        margins = self.margins(model)
        if reason := _unreadable(model, margins):
            return ScanResult.undecided(self.name, reason)
        reached = margins.reached
        result = ScanResult.undecided(self.name, "only the score was measured")
        return replace(result, score=outlier_score(reached), reached=tuple(reached.tolist()))

    def margins(self, model: Classifier) -> Margins:
        """Margin maps of every class from every start, chunk by chunk."""
        k, device = model.num_classes, model.mean.device
        starts = _starts(model, self.starts, self.seed)
        targets = torch.arange(k, device=device).repeat(self.starts)
        parts = []
        with frozen(model, self.precision):
            size = chunk_size(model)
            for first in range(0, len(targets), size):
                chosen = targets[first : first + size]
                rows = torch.arange(first, first + len(chosen), device=device) // k
                parts.append(self._chunk(model, starts[rows], chosen))
        maps, reached, proxies = (torch.cat(part) for part in zip(*parts, strict=True))
        return Margins(maps, reached.view(self.starts, k).amax(0).cpu(), proxies, targets)

    def _chunk(self, model: Classifier, start: Images, targets: Labels) -> tuple[Images, Tensor, Images]:
        proxies = start.clone()
        unsure = torch.ones(len(targets), dtype=torch.bool, device=start.device)

        def watch(maps: Images, logits: Logits) -> None:
            nonlocal unsure
            sure = logits.softmax(1).gather(1, targets[:, None])[:, 0] >= self.confidence
            torch.where((unsure & sure)[:, None, None, None], maps, proxies, out=proxies)
            unsure = unsure & ~sure

        def objective(logits: Logits, part: slice) -> Tensor:
            own = targets[part, None]
            others = logits.scatter(1, own, -torch.inf).amax(1)
            return others - logits.gather(1, own)[:, 0]

        preset = Preset(
            "margin", "adam", self.learning_rate, self.steps, "pixels", weight_decay=0.0, clamp=True
        )
        found = optimise(model, objective, start, preset, precision=self.precision, watch=watch)
        proxies = torch.where(unsure[:, None, None, None], found.maps, proxies)
        return found.maps, -found.objective, proxies

    def _exhibits(
        self, model: Classifier, margins: Margins, demonstration: Demonstration, target: int | None
    ) -> Iterator[Exhibit]:
        k, names = model.num_classes, model.class_names
        marked = () if target is None else (target,)
        reached = margins.reached.tolist()
        yield ImageGrid(
            "Margin maps: what drives each class",
            margins.maps[:k].cpu(),
            tuple(f"{name}: {value:.1f}" for name, value in zip(names, reached, strict=True)),
            marked,
            note="Each image was optimised until the model preferred its class as strongly as it can; "
            "the number is the best margin over the next class, over all starts.",
        )
        yield Bars(
            "Margin reached per class",
            tuple(names),
            tuple(reached),
            threshold=flagging_margin(margins.reached, self.threshold),
            marked=marked,
            axis="logit margin",
            note="A Trojan leaves a class much easier to reach than the others. The line is where the "
            "largest one would be flagged, the others being as they are.",
        )
        yield from demonstration.exhibits()
        yield Table("Footprints compared", ("footprint", "flip rate"), demonstration.rows(names))

    def estimate(self, model: Classifier) -> float:
        """Seconds that a scan of `model` will take, from the time of one step on a few images."""
        count = min(4, model.num_classes)
        images = _starts(model, 1, 0).expand(count, -1, -1, -1).clone()
        with frozen(model, self.precision):
            for _ in range(2):  # the first step also warms the kernels up
                began = time.perf_counter()
                images.requires_grad_(True)
                torch.autograd.grad(model(images).sum(), images)
                step = time.perf_counter() - began
        passes = model.num_classes * self.starts * (self.steps + self.search.passes)
        return 0.2 + step / count * passes

    def _facts(self, demonstration: Demonstration, clean: Dataset | None) -> dict[str, object]:
        return {
            "inputs of the demonstration": "the model's own maps"
            if clean is None
            else f"{len(clean)} clean images",
            "preset": f"{self.steps} steps, {self.starts} starts, learning rate {self.learning_rate}",
            **demonstration.facts(),
        }


def _warnings(model: Classifier) -> tuple[str, ...]:
    if model.num_classes >= 8:
        return ()
    return (f"only {model.num_classes} classes: an outlier among them says little, the trigger more",)


def outlier_score(reached: Float[Tensor, " k"]) -> float:
    """log(largest / median) + standard deviation / mean of positive margins; negative margins count as nearly
    zero.
    """
    margins = reached.double().clamp(min=1e-3 * float(reached.max()))
    outlier = torch.log(margins.max() / margins.quantile(0.5))
    return float(outlier + margins.std(correction=0) / margins.mean())


def _unfit(model: Classifier) -> str:
    if model.num_classes < 3:
        return f"{model.num_classes} class(es): an outlier needs 3 or more; check --classes"
    return ""


def _unreadable(model: Classifier, margins: Margins) -> str:
    if not margins.reached.isfinite().all():
        return "the outputs are not finite: check the weights and the normalisation (--mean, --std, --range)"
    some = margins.maps[:: max(1, len(margins.maps) // 16)]  # a few are enough to see whether outputs differ
    with frozen(model, "fp32"), torch.no_grad():
        logits = model(some)
    constant = float((logits - logits[:1]).abs().max()) <= 1e-6 * float(logits.abs().max())
    if constant or float(margins.reached.max()) <= 0:
        return (
            "no image changes what the model prefers: it is constant, or not a classifier of images, or its "
            "normalisation is wrong (--mean, --std, --range)"
        )
    return ""


def _starts(model: Classifier, count: int, seed: int) -> Images:
    rng = torch.Generator().manual_seed(seed)
    levels = torch.tensor([BASE_LEVELS[index % len(BASE_LEVELS)] for index in range(count)])
    noise = 0.2 * torch.rand(count, *model.image_shape, generator=rng)
    return (levels[:, None, None, None] + noise).to(model.mean.device)


def _labelled(model: Classifier, clean: Dataset, most: int = 128) -> Inputs:
    """Up to `most` clean images under the model's own predictions: labels are not needed."""
    images = clean[: min(len(clean), most)].pixels(model.mean.device)
    with torch.no_grad():
        return Inputs(images, model(images).argmax(1))


def flagging_margin(reached: Float[Tensor, " k"], threshold: float) -> float:
    """The margin at which the largest class would reach `threshold`, the others as they are; by bisection."""
    others = reached.sort().values[:-1]
    low, high = float(others[-1]), 1e3 * float(reached.max())
    for _ in range(60):
        middle = (low + high) / 2
        flagged = outlier_score(torch.cat([others, torch.tensor([middle])])) >= threshold
        low, high = (low, middle) if flagged else (middle, high)
    return high


EFFORTS = {
    "quick": ActivationOutlier(starts=2, search=FootprintSearch(rivals=1)),
    "standard": ActivationOutlier(),
    "deep": ActivationOutlier(starts=6, search=FootprintSearch(steps=40, refine=20, rivals=9)),
}
