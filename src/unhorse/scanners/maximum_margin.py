"""MM-BD: how far each class can be driven, and whether the farthest fits the distribution of the others."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Bars, Classifier, Dataset, Images, Labels, Reference, ScanResult, Verdict
from unhorse.metrics import judge
from unhorse.scanners.countdown import Countdown, OnScanStep
from unhorse.scanners.optimisation import chunk_size, frozen

Statistic = Literal["p", "ratio"]
SMALLEST_P = 1e-300
FEW_CLASSES, PROBES, COMPACT_EVERY = 20, 8, 10
FIRST_LOSS = 1000.0
CACHED = 1 << 23
"""Bytes of activations per pass on a processor, where larger tensors are mapped anew for every layer."""


class NoMargins(ValueError):
    """A model whose margins say nothing, and why; scan() says UNDECIDED."""


class Finding(NamedTuple):
    """The maximum margin of each class (k,), the Gamma p-value of the largest, and the score."""

    margins: Float[Tensor, " k"]
    p_value: float
    ratio: float
    score: float


@dataclass(frozen=True)
class MaximumMargin:
    """MM-BD (Wang et al., IEEE S&P 2024): a Trojan's class reaches a far larger margin than the others.

    From `starts` random images per class the margin (logit of the class minus the best other) climbs by SGD
    until the sum over the starts moves by less than `tolerance` of itself. A Gamma distribution is fitted to
    the margins of the other K - 1 classes, and p = 1 - F(largest)^K. Statistic "p": the score is -log10 p,
    and `threshold` means p <= 0.05. "ratio" is ours: log(largest / median of the others), free of the fit;
    give it a threshold of its own, as MAXIMUM_MARGIN does. Always in fp32. Neither data nor other models are
    needed. UNDECIDED: fewer than 3 classes, outputs that no image changes, a Gamma that cannot be fitted.
    """

    starts: int = 30
    steps: int = 300
    learning_rate: float = 1e-2
    momentum: float = 0.2
    tolerance: float = 1e-5
    statistic: Statistic = "p"
    threshold: float = -math.log10(0.05)
    seed: int = 0
    reference: Reference | None = field(default=None, repr=False)

    name = "maximum-margin"

    def scan(
        self, model: Classifier, clean: Dataset | None = None, *, on_step: OnScanStep | None = None
    ) -> ScanResult:
        """Judges `model`; clean images are not needed. `on_step` hears (passes done, at most, what)."""
        try:
            found = self._found(model, on_step)
        except NoMargins as error:
            return ScanResult.undecided(self.name, str(error))
        judgement = judge(found.score, self.threshold, self.reference)
        target = int(found.margins.argmax()) if judgement.flagged else None
        reached, k = tuple(found.margins.tolist()), model.num_classes
        few = f"the Gamma distribution was fitted to {k - 1} margins: p is rough, and often too small"
        return ScanResult(
            Verdict.of(flagged=judgement.flagged, demonstrated=False),
            self.name,
            score=found.score,
            threshold=self.threshold,
            p_value=judgement.p_value,
            class_scores=reached,
            target=target,
            reached=reached,
            reference=self.reference,
            facts={
                "p-value of the Gamma distribution": found.p_value,
                "largest margin over the median of the others": math.exp(found.ratio),
                "preset": f"{self.starts} starts, at most {self.steps} steps, rate {self.learning_rate}",
            },
            exhibits=tuple(_exhibits(model, reached, target)),
            warnings=(*judgement.warnings, *([few] if self.statistic == "p" and k < FEW_CLASSES else [])),
        )

    def measure(self, model: Classifier) -> float:
        """The score alone; ValueError where scan() would be UNDECIDED."""
        return self._found(model, None).score

    def margins(self, model: Classifier, *, on_step: OnScanStep | None = None) -> Float[Tensor, " k"]:
        """The maximum margin of each class, on the CPU; ValueError where outputs are not finite or fixed.

        Classes climb together, as many as one backward pass may hold; which ones does not change the starts.
        """
        self._check()
        k = model.num_classes
        if k < 3:
            raise NoMargins(f"{k} class(es): an outlier needs 3 or more; check --classes")
        rng = torch.Generator().manual_seed(self.seed)
        clock = Countdown(k * self.starts * self.steps, on_step=on_step, phase="finding margins")
        found = []
        with frozen(model, "fp32"):
            _check_outputs(model)
            most = chunk_size(model)
            chunk = min(most, chunk_size(model, CACHED)) if model.mean.device.type == "cpu" else most
            for classes in torch.arange(k).split(max(1, most // self.starts)):
                drawn = [torch.rand(self.starts, *model.image_shape, generator=rng) for _ in classes]
                images = torch.stack(drawn).to(model.mean.device)
                found.append(self._climbed(model, images, classes.to(images.device), chunk, clock))
        reached = torch.cat(found).cpu()
        if not reached.isfinite().all():
            raise NoMargins("the margins are not finite: check the weights and the normalisation (--range)")
        if float(reached.max()) <= 0:
            raise NoMargins("no image makes any class win: check the normalisation (--mean, --std, --range)")
        return reached

    def _climbed(
        self, model: Classifier, images: Tensor, classes: Labels, chunk: int, clock: Countdown
    ) -> Float[Tensor, " b"]:
        """The largest margin of `classes` (b,) from `images` (b, starts, c, h, w), at their last step."""
        reached = images.new_full((len(classes),), -torch.inf)
        place, targets = torch.arange(len(classes), device=images.device), classes
        velocity, losses = torch.zeros_like(images), images.new_full((len(classes),), FIRST_LOSS)
        climbing = torch.ones_like(targets, dtype=torch.bool)
        for step in range(self.steps):
            margins, gradients = _ascent(model, images, targets, chunk)
            clock.passed(margins.numel())
            reached[place] = torch.where(climbing, margins.amax(1), reached[place])
            velocity.mul_(self.momentum).add_(gradients)
            images.add_(velocity, alpha=self.learning_rate)
            loss = -margins.sum(1)
            climbing = climbing & ((losses - loss).abs() >= self.tolerance * losses.abs())
            losses = loss
            if step % COMPACT_EVERY == COMPACT_EVERY - 1:  # asking at every step would wait for the device
                images, velocity = images[climbing], velocity[climbing]
                place, targets, losses = place[climbing], targets[climbing], losses[climbing]
                climbing = climbing[climbing]
                if not len(place):
                    break
        return reached

    def _found(self, model: Classifier, on_step: OnScanStep | None) -> Finding:
        margins = self.margins(model, on_step=on_step)
        ratio, p_value = outlier_ratio(margins), gamma_p_value(margins)
        if self.statistic == "ratio":
            return Finding(margins, p_value, ratio, ratio)
        if math.isnan(p_value):
            raise NoMargins(f"no Gamma distribution fits {len(margins) - 1} margins: take statistic 'ratio'")
        return Finding(margins, p_value, ratio, -math.log10(max(p_value, SMALLEST_P)))

    def _check(self) -> None:
        if self.statistic not in get_args(Statistic):
            raise ValueError(f"statistic is {self.statistic!r}: take one of {', '.join(get_args(Statistic))}")
        if self.starts < 1 or self.steps < 1:
            raise ValueError(f"starts={self.starts}, steps={self.steps}: give 1 or more")


def gamma_p_value(margins: Float[Tensor, " k"]) -> float:
    """1 - F(largest)^k for the Gamma distribution F, location included, that is most likely given the others.

    NaN where none can be fitted.
    """
    from scipy.stats import FitError, gamma  # 0.3 s that only this scanner needs

    ordered = np.sort(margins.double().numpy())
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the search passes through shapes that no distribution has
        try:
            shape, location, scale = gamma.fit(ordered[:-1])
        except FitError:
            return math.nan
        above = float(gamma.sf(ordered[-1], shape, loc=location, scale=scale))
    # exact for the small probabilities that 1 - F^k would round to 0
    return -math.expm1(len(ordered) * math.log1p(-above)) if above < 1 else 1.0 + 0 * above


def outlier_ratio(margins: Float[Tensor, " k"]) -> float:
    """log(largest / median of the others); margins below a thousandth of the largest count as that."""
    ordered = margins.double().sort().values
    floored = ordered.clamp_min(1e-3 * float(ordered[-1]))
    return float((floored[-1] / floored[:-1].quantile(0.5)).log())


def _ascent(
    model: Classifier, images: Tensor, targets: Labels, chunk: int
) -> tuple[Float[Tensor, "b starts"], Tensor]:
    """Margins of `images` (b, starts, c, h, w), clamped to [0, 1] on their way in, and their gradients."""
    margins, gradients = [], []
    own_class = targets.repeat_interleave(images.shape[1])
    for part, own in zip(images.flatten(0, 1).split(chunk), own_class.split(chunk), strict=True):
        leaf = part.detach().requires_grad_(True)
        reached = _margins(model, leaf.clamp(0, 1), own)
        gradients.append(torch.autograd.grad(reached.sum(), leaf)[0])
        margins.append(reached.detach())
    return torch.cat(margins).view(images.shape[:2]), torch.cat(gradients).view_as(images)


def _margins(model: Classifier, images: Images, own: Labels) -> Float[Tensor, " n"]:
    logits = model(images)
    others = logits.scatter(1, own[:, None], -torch.inf).amax(1)
    return logits.gather(1, own[:, None])[:, 0] - others


def _check_outputs(model: Classifier) -> None:
    """Refuses outputs that are not finite, or the same whatever the image."""
    images = torch.rand(PROBES, *model.image_shape, generator=torch.Generator().manual_seed(0))
    images[0], images[1] = 0, 1
    with torch.no_grad():
        logits = model(images.to(model.mean.device))
    if not logits.isfinite().all():
        raise NoMargins(
            "the outputs are not finite: check the weights, and the normalisation (--mean, --std)"
        )
    if float((logits - logits[:1]).abs().max()) <= 1e-6 * float(logits.abs().max()):
        raise NoMargins("no image changes the outputs: the model is constant, or its normalisation is wrong")


def _exhibits(model: Classifier, reached: tuple[float, ...], target: int | None) -> Iterator[Bars]:
    yield Bars(
        "Maximum margin of each class",
        tuple(model.class_names),
        reached,
        marked=() if target is None else (target,),
        axis="logit margin",
        note="The best margin over the next class that any start image was driven to. A Trojan leaves one "
        "class much easier to reach than the others.",
    )


MAXIMUM_MARGIN = {
    "maximum-margin": MaximumMargin(),
    "maximum-margin-ratio": MaximumMargin(statistic="ratio", threshold=math.log(2)),
}
