"""Margin maps: images that put one class of a model as far ahead of all others as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Bars, Classifier, Exhibit, ImageGrid, Images, Labels, Logits
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.footprints import Inputs
from unhorse.scanners.optimisation import Precision, Preset, chunk_size, frozen, optimise, uses_bf16
from unhorse.scanners.screening import Plan

BASE_LEVELS = (0.0, 0.5, 0.25, 0.75)  # start images: a flat grey of this level and some noise
SHOWN = 50
"""At most as many maps are kept: those of 1000 classes at 224x224 would take 600 MB per start."""
HIDDEN = "MD308"
"""The rule of what is assumed of a model whose outputs are probabilities that cannot be undone."""
LEAST_MARGIN = 1e-3
"""The least margin, as a share of the largest: one below 0 says no more."""


class Margins(NamedTuple):
    """The best margin per class (k,), -inf where none was tried; maps (m, c, h, w) of the classes `shown`;
    inputs for a demonstration; what was finished of a screened model; and which precision decided.
    """

    reached: Float[Tensor, " k"]
    maps: Images
    shown: tuple[int, ...]
    inputs: Inputs
    plan: Plan | None
    precision: str
    complete: bool = True

    @property
    def screened(self) -> int:
        """How many classes were driven at all."""
        return int((self.reached > -torch.inf).sum())

    def exhibits(self, names: Sequence[str], threshold: float, target: int | None) -> Iterator[Exhibit]:
        """The maps, and how far each class was driven; `target` is marked."""
        reached = self.reached.tolist()
        screened = self.reached.isfinite().nonzero()[:, 0].tolist()
        if not screened:
            return
        yield ImageGrid(
            "Margin maps: what drives each class",
            self.maps,
            tuple(f"{names[label]}: {reached[label]:.1f}" for label in self.shown),
            tuple(place for place, label in enumerate(self.shown) if label == target),
            note="Each image was optimised until the model preferred its class as strongly as it can; "
            "the number is the best margin over the next class, over all starts.",
        )
        judged = self.complete and isfinite(threshold)
        sampled = self.plan is not None and self.complete
        yield Bars(
            "Margin reached per class",
            tuple(names[label] for label in screened),
            tuple(reached[label] for label in screened),
            threshold=flagging_margin(self.reached, threshold) if judged else None,
            marked=() if target is None else (target,),
            axis="logit margin",
            note="A Trojan leaves a class much easier to reach than the others."
            + judged * " The line is where the largest one would be flagged, the others being as they are."
            + sampled * " A class that was only screened has the margin of one beside it that was finished.",
        )


class Job(NamedTuple):
    """Classes (n,) to drive, each from the start image of the same place in `starts` (n,); the inputs of a
    demonstration are taken from the rows `kept` (m,), in their order.
    """

    classes: Labels
    starts: Labels
    kept: Labels

    @staticmethod
    def of(classes: Labels, starts: int, kept: Labels | None = None) -> Job:
        """Every class from every start, start by start."""
        rows = torch.arange(starts).repeat_interleave(len(classes))
        nothing = torch.empty(0, dtype=torch.long)
        return Job(classes.repeat(starts), rows, nothing if kept is None else kept)


@dataclass(frozen=True)
class Climb:
    """How margins (target logit minus the best other) are maximised: Adam on pixels, clamped to [0, 1]."""

    steps: int
    learning_rate: float
    confidence: float
    precision: Precision


class MarginMaps:
    """What climbs have reached so far: the best margin per class (k,), -inf where none was tried; at most
    SHOWN maps with their classes, best first; and the inputs of a demonstration: images on their way to a
    class, taken where the model was just confident of it.
    """

    def __init__(self, model: Classifier, starts: Images, clock: Countdown) -> None:
        self.model, self.starts, self.clock = model, starts, clock
        self.chunk = chunk_size(model)
        self.reached = torch.full((model.num_classes,), -torch.inf)
        self.maps = torch.empty(0, *model.image_shape)
        self.shown: list[int] = []
        self.margins = torch.empty(0)
        self.inputs = Inputs(starts[:0], torch.empty(0, dtype=torch.long, device=starts.device))

    def climb(self, job: Job, settings: Climb) -> Float[Tensor, " n"]:
        """The margins of `job`; call it inside `frozen(model)`. After TimeUp whole chunks count."""
        found, images, rows = [], [], []
        for first in range(0, len(job.classes), self.chunk):
            part = slice(first, first + self.chunk)
            targets = job.classes[part].to(self.starts.device)
            maps, reached, proxies = self._chunk(self.starts[job.starts[part]], targets, settings)
            self._keep(maps, job.classes[part], reached)
            found.append(reached)
            here = job.kept[(job.kept >= first) & (job.kept < first + len(targets))]
            images.append(proxies[here - first])
            rows.append(here)
        if len(job.kept):
            place = torch.cat(rows).argsort()[job.kept.argsort().argsort()]
            labels = job.classes[job.kept].to(self.starts.device)
            self.inputs = Inputs(torch.cat(images)[place], labels)
        return torch.cat(found)

    def found(
        self, reached: Tensor, plan: Plan | None, precision: Precision, *, complete: bool = True
    ) -> Margins:
        """The maps in the order of their classes where all are shown, else best first."""
        order = list(range(len(self.shown)))
        if len(order) == self.model.num_classes:
            order.sort(key=self.shown.__getitem__)
        shown = tuple(self.shown[place] for place in order)
        used = "bf16" if uses_bf16(self.model, precision) else "fp32"
        return Margins(reached, self.maps[order], shown, self.inputs, plan, used, complete)

    def _keep(self, maps: Images, classes: Labels, reached: Tensor) -> None:
        """The best map of each class, of those with the largest margins."""
        self.reached.scatter_reduce_(0, classes, reached, "amax")
        several = torch.cat([self.margins, reached]).argsort(descending=True, stable=True).tolist()
        labels = self.shown + classes.tolist()
        best = {labels[place]: place for place in reversed(several)}  # of several of a class the first
        chosen = [place for place in several if best[labels[place]] == place][:SHOWN]
        self.maps = torch.cat([self.maps, maps.cpu()])[chosen]
        self.margins = torch.cat([self.margins, reached])[chosen]
        self.shown = [labels[place] for place in chosen]

    def _chunk(self, start: Images, targets: Labels, settings: Climb) -> tuple[Images, Tensor, Images]:
        proxies = start.clone()
        unsure = torch.ones(len(targets), dtype=torch.bool, device=start.device)

        def watch(maps: Images, logits: Logits) -> None:
            nonlocal unsure
            self.clock.passed(len(targets))
            sure = logits.softmax(1).gather(1, targets[:, None])[:, 0] >= settings.confidence
            torch.where((unsure & sure)[:, None, None, None], maps, proxies, out=proxies)
            unsure = unsure & ~sure

        def objective(logits: Logits, part: slice) -> Tensor:
            own = targets[part, None]
            others = logits.scatter(1, own, -torch.inf).amax(1)
            return others - logits.gather(1, own)[:, 0]

        preset = Preset(
            "margin", "adam", settings.learning_rate, settings.steps, "pixels", weight_decay=0.0, clamp=True
        )
        found = optimise(self.model, objective, start, preset, precision=settings.precision, watch=watch)
        proxies = torch.where(unsure[:, None, None, None], found.maps, proxies)
        return found.maps, -found.objective.cpu(), proxies


def start_images(model: Classifier, count: int, seed: int) -> Images:
    """Flat greys with some noise (count, c, h, w)."""
    rng = torch.Generator().manual_seed(seed)
    levels = torch.tensor([BASE_LEVELS[index % len(BASE_LEVELS)] for index in range(count)])
    noise = 0.2 * torch.rand(count, *model.image_shape, generator=rng)
    return (levels[:, None, None, None] + noise).to(model.mean.device)


def unfit(model: Classifier, least: int = 3) -> str:
    """Why no outlier among its classes can be looked for; empty if one can."""
    hidden = [line for line in model.assumptions if line.startswith(HIDDEN)]
    if hidden:
        return hidden[0].removeprefix(HIDDEN).strip()
    if model.num_classes < least:
        return f"{model.num_classes} class(es): an outlier needs {least} or more; check --classes"
    return ""


def unreadable(model: Classifier, margins: Margins) -> str:
    """Why margins say nothing about `model`, with the remedy; empty if they do."""
    if not margins.reached.isfinite().all():
        return "the outputs are not finite: check the weights and the normalisation (--mean, --std, --range)"
    some = margins.maps[:: max(1, len(margins.maps) // 16)]  # a few are enough to see whether outputs differ
    with frozen(model, "fp32"), torch.no_grad():
        logits = model(some.to(model.mean.device))
    constant = float((logits - logits[:1]).abs().max()) <= 1e-6 * float(logits.abs().max())
    if constant or float(margins.reached.max()) <= 0:
        return (
            "no image changes what the model prefers: it is constant, or not a classifier of images, or its "
            "normalisation is wrong (--mean, --std, --range)"
        )
    return ""


def outlier_score(reached: Float[Tensor, " k"]) -> float:
    """log(largest / median) + standard deviation / mean of positive margins; negative margins count as nearly
    zero.
    """
    margins = reached.double().clamp(min=LEAST_MARGIN * float(reached.max()))
    outlier = torch.log(margins.max() / margins.quantile(0.5))
    return float(outlier + margins.std(correction=0) / margins.mean())


def flagging_margin(reached: Float[Tensor, " k"], threshold: float) -> float:
    """The margin at which the largest class would reach `threshold`, the others as they are; by bisection."""
    others = reached.sort().values[:-1]
    low, high = float(others[-1]), 1e3 * float(reached.max())
    for _ in range(60):
        middle = (low + high) / 2
        flagged = outlier_score(torch.cat([others, torch.tensor([middle])])) >= threshold
        low, high = (low, middle) if flagged else (middle, high)
    return high
