"""How well contrasting and filtering do on clean and Trojan images: every rate of the paper from one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from unhorse.core import Classifier, Dataset, Labels, Scores
from unhorse.inputs import check_clean, check_images, check_labels
from unhorse.metrics import auroc, auroc_interval, wilson_interval
from unhorse.monitors.contrast import Contrast, Outcomes


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


@dataclass(frozen=True)
class Evaluation:
    """Rates as in Do et al. (ECCV 2022, Sec. 5.2), as fractions; None where not measured.

    An image x is filtered to x°, C is the classifier; "hard" rates alarm where C(x) and C(x°) differ, the
    others where the score exceeds `threshold`.
    """

    threshold: float
    n: int
    fpr: Rate  # share of clean images that alarm
    fpr_hard: Rate
    clean_accuracy: Rate | None = None  # of C(x)
    clean_drop: Rate | None = None  # what C(x°) loses of it
    trojan_accuracy_before: Rate | None = None  # share of Trojan images where C(x) is the wanted class
    trojan_accuracy: Rate | None = None  # where C(x°) is
    trojan_passed: Rate | None = None  # where C(x) is, and nothing alarms
    recovery_accuracy: Rate | None = None  # share of all Trojan images where C(x°) is the true class
    recovery_drop: Rate | None = None  # clean accuracy minus that
    fnr: Rate | None = None  # share of Trojan images that do not alarm
    fnr_hard: Rate | None = None
    auroc: Rate | None = None  # of the score, Trojan against clean images
    clean_scores: Scores = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)
    trojan_scores: Scores = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)


def contrast_rates(
    monitor: Contrast, clean: Dataset, trojaned: TrojanImages | None = None, *, threshold: float = 0.0
) -> Evaluation:
    """All rates, in one pass over the clean and one over the Trojan images; at threshold 0 both kinds agree.

    The clean images are D_test; what depends on labels is left out where there are none. ValueError names
    what does not fit the model.
    """
    check_clean(monitor.model, clean)
    before = monitor.outcomes(clean.images)
    right = None if clean.labels is None else before.predicted == clean.labels.cpu()
    found: dict[str, Rate] = {}
    if right is not None and clean.labels is not None:
        found["clean_accuracy"] = rate_of(right)
        found["clean_drop"] = _paired_drop(right, before.filtered_predicted == clean.labels.cpu())
    trojan_scores = torch.empty(0)
    if trojaned is not None:
        known = _on_the_cpu(trojaned, monitor.model)
        outcomes = monitor.outcomes(known.images)
        eligible = _eligible(known)
        trojan_scores = outcomes.score[eligible]
        found |= _trojan_rates(outcomes, known, eligible, threshold)
        found["auroc"] = _auroc(before.score, trojan_scores)
        if known.labels is not None and right is not None and clean.labels is not None:
            recovered = outcomes.filtered_predicted == known.labels
            paired = torch.equal(known.labels, clean.labels.cpu())
            found["recovery_drop"] = (_paired_drop if paired else _drop)(right, recovered)
    return Evaluation(
        threshold,
        len(clean),
        fpr=rate_of(before.score > threshold),
        fpr_hard=rate_of(before.score > 0),
        clean_scores=before.score,
        trojan_scores=trojan_scores,
        **found,
    )


def rate_of(hits: Tensor) -> Rate:
    """The share of True with its Wilson interval."""
    count, n = int(hits.sum()), len(hits)
    return Rate(count / n, *wilson_interval(count, n), n)


def _trojan_rates(
    outcomes: Outcomes, trojaned: TrojanImages, eligible: Tensor, threshold: float
) -> dict[str, Rate]:
    score = outcomes.score[eligible]
    found = {"fnr": rate_of(score <= threshold), "fnr_hard": rate_of(score <= 0)}
    if trojaned.wanted is not None:
        wanted = trojaned.wanted[eligible]
        fooled = outcomes.predicted[eligible] == wanted
        found["trojan_accuracy_before"] = rate_of(fooled)
        found["trojan_accuracy"] = rate_of(outcomes.filtered_predicted[eligible] == wanted)
        found["trojan_passed"] = rate_of(fooled & (score <= threshold))
    if trojaned.labels is not None:
        found["recovery_accuracy"] = rate_of(outcomes.filtered_predicted == trojaned.labels)
    return found


def _on_the_cpu(trojaned: TrojanImages, model: Classifier) -> TrojanImages:
    """The same, what is known of the images on the CPU; ValueError where it does not fit the model."""
    n = len(trojaned.images)
    check_images(model, trojaned.images, "Trojan images")
    for labels, what in ((trojaned.labels, "true labels"), (trojaned.wanted, "wanted labels")):
        if labels is not None:
            check_labels(model, labels, n, f"{what} of the Trojan images")
    if trojaned.eligible is not None and trojaned.eligible.shape != (n,):
        raise ValueError(f"{tuple(trojaned.eligible.shape)} eligible for {n} Trojan images: give one of each")
    known = (entry if entry is None else entry.cpu() for entry in trojaned[1:])
    return TrojanImages(trojaned.images, *known)


def _eligible(trojaned: TrojanImages) -> Tensor:
    if trojaned.eligible is not None:
        eligible = trojaned.eligible.bool()
    elif trojaned.labels is None or trojaned.wanted is None:
        eligible = torch.ones(len(trojaned.images), dtype=torch.bool)
    else:
        eligible = trojaned.labels != trojaned.wanted
    if not eligible.any():
        raise ValueError(
            "every Trojan image is of the class that the attacker wants: give images of other classes"
        )
    return eligible


def _auroc(clean: Scores, trojaned: Scores) -> Rate:
    scores = torch.cat([clean, trojaned])
    positive = torch.arange(len(scores)) >= len(clean)
    return Rate(auroc(scores, positive), *auroc_interval(scores, positive), len(scores))


def _paired_drop(before: Tensor, after: Tensor) -> Rate:
    """Share right before minus share right after, on the same images, by Bonett and Price (JEBS 2012)."""
    n = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    return _around((lost - won) / n, p - q, ((p + q - (p - q) ** 2) / (n + 2)) ** 0.5, n)


def _drop(before: Tensor, after: Tensor) -> Rate:
    """The same on different images, by Agresti and Caffo (The American Statistician 2000)."""
    p, q = ((int(hits.sum()) + 1) / (len(hits) + 2) for hits in (before, after))
    variance = p * (1 - p) / (len(before) + 2) + q * (1 - q) / (len(after) + 2)
    value = float(before.float().mean() - after.float().mean())
    return _around(value, p - q, variance**0.5, min(len(before), len(after)))


def _around(value: float, center: float, error: float, n: int) -> Rate:
    half = NormalDist().inv_cdf(0.975) * error
    return Rate(value, max(-1.0, center - half), min(1.0, center + half), n)
