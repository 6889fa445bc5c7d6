"""STRIP: images that keep their class under any blend are suspicious."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, stdev
from typing import Literal, Self

import torch
from torch import Tensor

from unhorse.core import Classifier, Dataset, Histogram, Images, Logits, ScanResult, Scores
from unhorse.inputs import check_clean, check_images, scaled
from unhorse.metrics import evaluation
from unhorse.models.training import autocast, bf16_pays
from unhorse.monitors.calibration import check_count, conformal_threshold

Method = Literal["quantile", "normal"]
MOST_BYTES = 16 * 2**20
"""Of pixels in one forward pass, so that large images do not exhaust the memory."""


def entropy(logits: Logits) -> Tensor:
    """-sum of p log2 p over the classes, in bits; a class of probability 0 adds nothing; NaN for NaN."""
    return torch.special.entr(logits.float().softmax(1)).sum(1) / math.log(2)


def threshold_of(scores: Sequence[float], fpr: float, method: Method = "quantile") -> float:
    """The score that a clean image exceeds with probability `fpr`, from scores of clean images.

    "quantile" is the conformal threshold of the guard, "normal" that of a normal distribution with the mean
    and deviation of the scores, as in the authors' notebook.
    """
    if method == "quantile":
        return conformal_threshold(list(scores), fpr)
    if method != "normal":
        raise ValueError(f"unknown method {method!r}: take 'quantile' or 'normal'")
    if not 0 < fpr < 1 or len(scores) < 2:
        raise ValueError(f"fpr {fpr} of {len(scores)} scores: give a rate between 0 and 1, and two or more")
    deviation = stdev(scores)
    return NormalDist(fmean(scores), deviation).inv_cdf(1 - fpr) if deviation else fmean(scores)


def entropy_histogram(
    clean: Scores, trojaned: Scores | None = None, threshold: float | None = None
) -> Histogram:
    """The entropies behind scores of clean and Trojan images, with the threshold of the scores."""
    series = {"clean images": (-clean).tolist()}
    if trojaned is not None:
        series["Trojan images"] = (-trojaned).tolist()
    return Histogram(
        "Entropy under blending",
        series,
        None if threshold is None else -threshold,
        "mean entropy (bits)",
        "Below the threshold an image alarms: whatever is laid over it, its class stays.",
    )


@dataclass
class Strip:
    """STRIP (Gao et al., ACSAC 2019): a trigger survives blending, so the entropy of its blends stays low.

    The score is minus the mean entropy, in bits, of `image_weight` * x + `overlay_weight` * o over the
    `overlays` clean images o that `fit` draws by `seed`, the same for all x. `batch_size` blends are
    classified at a time. `precision` "auto" takes bf16 where it pays (bf16_pays).
    """

    overlays: int = 100
    image_weight: float = 1.0
    overlay_weight: float = 1.0
    clip: bool = False
    batch_size: int = 500
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    model_: Classifier = field(init=False, repr=False, compare=False)
    overlays_: Tensor = field(init=False, repr=False, compare=False)

    def fit(self, model: Classifier, clean: Dataset, finding: ScanResult | None = None) -> Self:
        """Keeps the model and draws the overlays; labels and `finding` are not needed."""
        check_clean(model, clean)
        if self.overlays < 1 or self.batch_size < 1:
            raise ValueError(
                f"overlays={self.overlays}, batch_size={self.batch_size}: give 1 or more of each"
            )
        if len(clean) < self.overlays:
            raise ValueError(
                f"{self.overlays} overlays cannot be drawn from {len(clean)} clean images: give more images, "
                "or fewer overlays"
            )
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(self.seed))
        self.model_ = model
        self.overlays_ = clean.images[order[: self.overlays]].clone()
        return self

    @property
    def model(self) -> Classifier:
        """The classifier that `fit` was given."""
        if getattr(self, "model_", None) is None:
            raise ValueError("STRIP has no model and no overlays: call fit first")
        return self.model_

    def score(self, images: Images) -> Scores:
        """Minus the mean entropy of each image's blends, on the device of `images`; infinite for NaN logits.

        Any number of images, uint8 or floats in [0, 1].
        """
        model = self.model
        check_images(model, images)
        device, low_precision = model.mean.device, self._uses_bf16(model)
        overlays = self.overlay_weight * scaled(self.overlays_.to(device))
        size = max(1, min(self.batch_size, MOST_BYTES // (4 * overlays[0].numel())))
        means = []
        with evaluation(model), autocast(device, low_precision):
            for part in images.split(max(1, size // len(overlays))):
                bases = self.image_weight * scaled(part.to(device))
                blends = (bases[:, None] + overlays).flatten(0, 1)  # (n*N, c, h, w)
                if self.clip:
                    blends = blends.clamp(0, 1)
                bits = torch.cat([entropy(model(some)) for some in blends.split(size)])
                means.append(bits.view(len(part), -1).mean(1))
        scores = -torch.cat(means).to(images.device)
        return scores.masked_fill(scores.isnan(), torch.inf)

    def held_out(self, clean: Dataset) -> Dataset:
        """The clean images that are not among the overlays, by their pixels: those a threshold may see."""
        check_images(self.model, clean.images, "clean images")
        taken = {image.numpy().tobytes() for image in self.overlays_.cpu()}
        fresh = torch.tensor([image.numpy().tobytes() not in taken for image in clean.images.cpu()])
        if not fresh.any():
            raise ValueError(
                f"all {len(clean)} clean images are overlays, which tells nothing of fresh ones: give more"
            )
        return clean[fresh]

    def threshold(self, clean: Dataset, fpr: float = 0.05, *, method: Method = "quantile") -> float:
        """The score that a fresh clean image exceeds with probability `fpr`, from `held_out(clean)`."""
        held_out = self.held_out(clean)
        check_count(fpr, len(held_out))
        scores = self.score(held_out.images)
        if not scores.isfinite().all():
            raise ValueError(
                f"{int((~scores.isfinite()).sum())} clean images have no finite score: the classifier "
                "returns NaN, so it cannot be monitored; check its weights"
            )
        return threshold_of(scores.tolist(), fpr, method)

    def _uses_bf16(self, model: Classifier) -> bool:
        if self.precision == "auto":
            return bf16_pays(model, model.mean.device)
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"unknown precision {self.precision!r}: take 'auto', 'fp32' or 'bf16'")
        return self.precision == "bf16"
