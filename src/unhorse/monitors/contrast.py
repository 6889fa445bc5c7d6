"""Filtering-then-contrasting: an image is suspicious when filtering it changes the classifier's mind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from unhorse.core import Classifier, Dataset, Images, Labels, Logits, ScanResult, Scores
from unhorse.filters.fitting import OnEpoch
from unhorse.inputs import check_images, scaled
from unhorse.metrics import evaluation


class NetworkFilter(Protocol):
    """An input filter that is one network, which `fit` leaves in `network_`."""

    @property
    def network_(self) -> nn.Module: ...

    def fit(
        self,
        model: Classifier,
        clean: Dataset,
        *,
        checkpoint: Path | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Self: ...

    def __call__(self, images: Images) -> Images: ...


class Comparison(NamedTuple):
    """What the classifier says of n images x and of x°, the same images filtered."""

    logits: Logits
    filtered: Images
    filtered_logits: Logits
    score: Scores


class Outcomes(NamedTuple):
    """Per image, on the CPU: the class of x, the class of x° and the score."""

    predicted: Labels
    filtered_predicted: Labels
    score: Scores


def contrast_score(logits: Logits, filtered_logits: Logits) -> Scores:
    """max over k != y of log p(k | x°), minus log p(y | x°), where y is the class of x.

    Above 0 exactly where x and x° get different classes, a tie counting as the same; infinite where a logit
    is NaN.
    """
    own = logits.argmax(1, keepdim=True)
    rival = filtered_logits.scatter(1, own, -torch.inf).amax(1)  # the softmax's denominator cancels
    score = rival - filtered_logits.gather(1, own).squeeze(1)
    return score.masked_fill(score.isnan() | logits.isnan().any(1), torch.inf)


def filtered_class(logits: Logits, filtered_logits: Logits, score: Scores) -> Labels:
    """The class of x°, that of x where both tie."""
    return torch.where(score > 0, filtered_logits.argmax(1), logits.argmax(1))


@dataclass
class Contrast:
    """IFtC, VIFtC and AIFtC (Do et al., ECCV 2022, Sec. 4.3): contrasts an image with its filtered self.

    The paper rejects an image whose class changes: score > 0. `batch_size` images are compared at a time, and
    the classifier sees twice as many; on a CPU larger batches are slower (docs/methods/guard.md).
    """

    filter: NetworkFilter
    batch_size: int = 32
    model_: Classifier = field(init=False, repr=False, compare=False)

    def fit(
        self,
        model: Classifier,
        clean: Dataset | None = None,
        finding: ScanResult | None = None,
        *,
        checkpoint: Path | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Self:
        """Keeps the model, and fits the filter on `clean` if it was not fitted; `finding` is not needed."""
        if getattr(self.filter, "network_", None) is None:
            if clean is None:
                raise ValueError("the filter is not fitted: give clean images to fit it on")
            self.filter.fit(model, clean, checkpoint=checkpoint, on_epoch=on_epoch)
        self.model_ = model
        return self

    @property
    def model(self) -> Classifier:
        """The classifier that `fit` was given."""
        if getattr(self, "model_", None) is None:
            raise ValueError("the contrast has no model: call fit first")
        return self.model_

    def compare(self, images: Images) -> Comparison:
        """Both passes through the classifier as one batch of 2n, in eval mode, on the device of `images`."""
        with evaluation(self.model), evaluation(self.filter.network_):
            filtered = self.filter(images)
            both = self.model(torch.cat([images, filtered]))  # (2n, k)
            logits, filtered_logits = both[: len(images)], both[len(images) :]
            return Comparison(logits, filtered, filtered_logits, contrast_score(logits, filtered_logits))

    def outcomes(self, images: Tensor) -> Outcomes:
        """Classes and scores of any number of images (uint8, or floats in [0, 1]), in batches."""
        check_images(self.model, images)
        parts = []
        for part in images.split(self.batch_size):
            found = self.compare(scaled(part.to(self.model.mean.device)))
            other = filtered_class(found.logits, found.filtered_logits, found.score)
            parts.append((found.logits.argmax(1), other, found.score))
        return Outcomes(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def score(self, images: Images) -> Scores:
        """One score per image, on the device of `images`; above 0 where the class changes."""
        return self.outcomes(images).score.to(images.device)
