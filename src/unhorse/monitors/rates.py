"""How well contrasting and filtering do on clean and Trojan images: every rate of the paper from one pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unhorse.core import Dataset, Scores
from unhorse.inputs import check_clean
from unhorse.metrics import auroc, auroc_interval
from unhorse.monitors.contrast import Contrast, Outcomes
from unhorse.rates import Rate, TrojanImages, drop, paired_drop, rate_of


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
        found["clean_drop"] = paired_drop(right, before.filtered_predicted == clean.labels.cpu())
    trojan_scores = torch.empty(0)
    if trojaned is not None:
        known = trojaned.checked(monitor.model)
        outcomes = monitor.outcomes(known.images)
        eligible = known.counted()
        trojan_scores = outcomes.score[eligible]
        found |= _trojan_rates(outcomes, known, eligible, threshold)
        found["auroc"] = _auroc(before.score, trojan_scores)
        if known.labels is not None and right is not None and clean.labels is not None:
            recovered = outcomes.filtered_predicted == known.labels
            paired = torch.equal(known.labels, clean.labels.cpu())
            found["recovery_drop"] = (paired_drop if paired else drop)(right, recovered)
    return Evaluation(
        threshold,
        len(clean),
        fpr=rate_of(before.score > threshold),
        fpr_hard=rate_of(before.score > 0),
        clean_scores=before.score,
        trojan_scores=trojan_scores,
        **found,
    )


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


def _auroc(clean: Scores, trojaned: Scores) -> Rate:
    scores = torch.cat([clean, trojaned])
    positive = torch.arange(len(scores)) >= len(clean)
    return Rate(auroc(scores, positive), *auroc_interval(scores, positive), len(scores))
