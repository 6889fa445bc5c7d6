"""Shares with their intervals, Trojan images with what is known of them, and what a defended model loses."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from unhorse.core import Classifier, Dataset, Labels
from unhorse.inputs import check_clean, check_images, check_labels, scaled
from unhorse.metrics import evaluation, wilson_interval

BATCH = 512


class Rate(NamedTuple):
    """A measured share, difference or area with its 95 % interval, over `n` images."""

    value: float
    low: float
    high: float
    n: int


class TrojanImages(NamedTuple):
    """Images under a trigger: uint8 or floats in [0, 1] (n, c, h, w), and what is known of them.

    `labels` are the true ones, `wanted` the attacker's. Trojan accuracy and misses are counted on `eligible`
    images; without it, on those whose true label is not the wanted one.
    """

    images: Tensor
    labels: Labels | None = None
    wanted: Labels | None = None
    eligible: Tensor | None = None

    def checked(self, model: Classifier) -> TrojanImages:
        """The same, what is known of the images on the CPU; ValueError where it does not fit the model."""
        n = len(self.images)
        check_images(model, self.images, "Trojan images")
        for labels, what in ((self.labels, "true labels"), (self.wanted, "wanted labels")):
            if labels is not None:
                check_labels(model, labels, n, f"{what} of the Trojan images")
        if self.eligible is not None and self.eligible.shape != (n,):
            raise ValueError(f"{tuple(self.eligible.shape)} eligible for {n} Trojan images: give one of each")
        known = (entry if entry is None else entry.cpu() for entry in self[1:])
        return TrojanImages(self.images, *known)

    def counted(self) -> Tensor:
        """Which images count (n,); ValueError where none does."""
        if self.eligible is not None:
            eligible = self.eligible.bool()
        elif self.labels is None or self.wanted is None:
            eligible = torch.ones(len(self.images), dtype=torch.bool)
        else:
            eligible = self.labels != self.wanted
        if not eligible.any():
            raise ValueError(
                "every Trojan image is of the class that the attacker wants: give images of other classes"
            )
        return eligible


def predictions(model: Classifier, images: Tensor) -> Labels:
    """The class of each image (uint8, or floats in [0, 1]), in eval mode, in batches; on the CPU."""
    device = model.mean.device
    with evaluation(model):
        parts = [model(scaled(part.to(device))).argmax(1).cpu() for part in images.split(BATCH)]
    return torch.cat(parts)


def repair_rates(
    before: Classifier, after: Classifier, clean: Dataset, trojaned: TrojanImages | None = None
) -> dict[str, Rate]:
    """What a repair cost and what it cured (Do et al., ECCV 2022, Sec. 5.2), on images that it has not seen.

    `clean_accuracy` is of `before`, `clean_drop` what `after` loses of it; with Trojan images
    `trojan_accuracy_before`, `trojan_accuracy`, `recovery_accuracy` and, where the Trojan images are the
    clean ones stamped, `recovery_drop`. What needs labels is left out where there are none.
    """
    check_clean(before, clean)
    found: dict[str, Rate] = {}
    right = None
    if clean.labels is not None:
        labels = clean.labels.cpu()
        right = predictions(before, clean.images) == labels
        found["clean_accuracy"] = rate_of(right)
        found["clean_drop"] = paired_drop(right, predictions(after, clean.images) == labels)
    if trojaned is None:
        return found
    known = trojaned.checked(before)
    answers, eligible = predictions(after, known.images), known.counted()
    if known.wanted is not None:
        wanted = known.wanted[eligible]
        found["trojan_accuracy_before"] = rate_of(predictions(before, known.images)[eligible] == wanted)
        found["trojan_accuracy"] = rate_of(answers[eligible] == wanted)
    if known.labels is not None:
        recovered = answers == known.labels
        found["recovery_accuracy"] = rate_of(recovered)
        if right is not None and clean.labels is not None:
            paired = torch.equal(known.labels, clean.labels.cpu())
            found["recovery_drop"] = (paired_drop if paired else drop)(right, recovered)
    return found


def rate_of(hits: Tensor) -> Rate:
    """The share of True with its Wilson interval."""
    count, n = int(hits.sum()), len(hits)
    return Rate(count / n, *wilson_interval(count, n), n)


def paired_drop(before: Tensor, after: Tensor) -> Rate:
    """Share right before minus share right after, on the same images, by Bonett and Price (JEBS 2012)."""
    n = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    return _around((lost - won) / n, p - q, ((p + q - (p - q) ** 2) / (n + 2)) ** 0.5, n)


def drop(before: Tensor, after: Tensor) -> Rate:
    """The same for outcomes on different images, by Agresti and Caffo (The American Statistician 2000)."""
    p, q = ((int(hits.sum()) + 1) / (len(hits) + 2) for hits in (before, after))
    variance = p * (1 - p) / (len(before) + 2) + q * (1 - q) / (len(after) + 2)
    value = float(before.float().mean() - after.float().mean())
    return _around(value, p - q, variance**0.5, min(len(before), len(after)))


def _around(value: float, center: float, error: float, n: int) -> Rate:
    half = NormalDist().inv_cdf(0.975) * error
    return Rate(value, max(-1.0, center - half), min(1.0, center + half), n)
