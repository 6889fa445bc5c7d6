"""The guard: a classifier, the monitor of its inputs, an alarm threshold with a known error, and a policy."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from unhorse.core import Classifier, Dataset, Images
from unhorse.filters.fitting import OnEpoch
from unhorse.inputs import check_clean, check_images, check_recognised
from unhorse.monitors.calibration import Calibration, check_count, conformal_threshold, split_clean
from unhorse.monitors.contrast import Contrast, NetworkFilter
from unhorse.monitors.guard_storage import GUARD_FILE, read_guard, write_guard
from unhorse.monitors.guarded_classifier import POLICIES, Decision, GuardedClassifier, Policy, decide
from unhorse.monitors.rates import Evaluation, contrast_rates
from unhorse.rates import TrojanImages, rate_of


@dataclass
class Guard:
    """Answers an image, or raises the alarm: a fresh clean image alarms with a probability of at most `fpr`.

    `fpr` None is the paper's hard rule instead (Do et al., ECCV 2022, Sec. 4.3): alarm where the filtered
    image gets another class. On alarm, policy "hold" labels the image -1, "replace" with the class of the
    filtered image, and "observe" as the classifier does.
    """

    model: Classifier
    monitor: Contrast
    fpr: float | None = 0.05
    policy: Policy = "hold"
    calibration_: Calibration | None = field(init=False, default=None, repr=False)

    @classmethod
    def fit(  # noqa: PLR0913 (a filter's fit and a calibration in one call)
        cls,
        model: Classifier,
        filter: NetworkFilter,
        clean: Dataset,
        *,
        fpr: float | None = 0.05,
        policy: Policy = "hold",
        calibration_share: float = 0.3,
        seed: int = 0,
        checkpoint: Path | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Self:
        """Fits the filter on one part of the clean images and calibrates on the other, `calibration_share`.

        Without labels the filter takes the model's predictions for them. ValueError, before anything is
        fitted, for images or labels that do not fit the model and for too few images.
        """
        guard = cls(model, Contrast(filter), fpr, policy)
        guard._check_policy()
        check_clean(model, clean)
        check_recognised(model, clean)
        fitting, calibration = split_clean(clean, calibration_share, seed=seed)
        check_count(fpr, len(calibration), calibration_share)
        filter.fit(model, fitting, checkpoint=checkpoint, on_epoch=on_epoch)
        return guard.calibrate(calibration)

    def calibrate(self, clean: Dataset) -> Self:
        """Sets the threshold from clean images that did not fit the filter; labels only add the clean drop.

        Split conformal: of n scores the ceil((n + 1) * (1 - fpr))-th smallest, so `fpr` holds on average over
        calibrations. ValueError where `fpr` < 1 / (n + 1), which n images cannot promise.
        """
        self._check_policy()
        check_clean(self.model, clean)
        check_count(self.fpr, len(clean))
        rates = contrast_rates(self.monitor.fit(self.model), clean)
        scores = rates.clean_scores
        if not scores.isfinite().all():
            raise ValueError(
                f"{int((~scores.isfinite()).sum())} clean images have no finite score: the classifier or the "
                "filter returns infinities or NaN, so it cannot be guarded; check its weights"
            )
        threshold = 0.0 if self.fpr is None else conformal_threshold(scores.tolist(), self.fpr)
        self.calibration_ = Calibration(
            self.fpr,
            threshold,
            rate_of(scores > threshold),
            rates.fpr_hard,
            tuple(scores.tolist()),
            rates.clean_accuracy,
            rates.clean_drop,
        )
        return self

    @property
    def threshold(self) -> float:
        """The score above which an image alarms; ValueError where the guard is not calibrated for its fpr."""
        if self.fpr is None:
            return 0.0
        if self.calibration_ is None or self.calibration_.fpr != self.fpr:
            raise ValueError(
                f"the guard is not calibrated for fpr={self.fpr}: call calibrate with clean images"
            )
        return self.calibration_.threshold

    def __call__(self, images: Images) -> Decision:
        """Judges a batch in [0, 1]; an image's decision does not depend on its batch mates."""
        self._check_policy()
        threshold = self.threshold
        check_images(self.model, images)
        comparison = self.monitor.fit(self.model).compare(images)
        return decide(
            images,
            comparison,
            threshold=threshold,
            hold=self.policy == "hold",
            replace=self.policy == "replace",
        )

    def module(self) -> GuardedClassifier:
        """A copy of the classifier and its guard as one module in eval mode, for torch.export."""
        self._check_policy()
        network = self.monitor.filter.network_
        probe = torch.rand(2, *self.model.image_shape, generator=torch.Generator().manual_seed(0))
        probe = probe.to(self.model.mean.device)
        module = GuardedClassifier(
            *copy.deepcopy((self.model, network)), threshold=self.threshold, policy=self.policy
        )
        module.to(probe.device).eval().requires_grad_(False)
        with torch.no_grad():
            if not torch.allclose(module.filter_network(probe), self.monitor.filter(probe), atol=1e-5):
                raise ValueError(
                    "the filter is more than its network (it averages samples, say): only a deterministic "
                    "one can be one module; fit it without test_samples"
                )
        return module

    def save(self, folder: Path) -> Path:
        """Writes a folder that holds all of the guard, whole or not at all; an older guard is replaced."""
        return write_guard(
            folder,
            self.model,
            self.monitor.filter,
            policy=self.policy,
            fpr=self.fpr,
            threshold=self.threshold,
            calibration=self.calibration_,
        )

    def _check_policy(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: take one of {', '.join(POLICIES)}")


def load_guard(folder: Path) -> Guard:
    """The guard of a folder, on the CPU; ValueError with the remedy where it is broken or was changed."""
    card, model, purifier = read_guard(folder)
    guard = Guard(model, Contrast(purifier).fit(model), card.fpr, card.policy)
    guard.calibration_ = card.calibration
    if guard.threshold != card.threshold:
        raise ValueError(f"{Path(folder) / GUARD_FILE} was changed after it was saved: fit the guard again")
    return guard


def evaluate(guard: Guard, clean: Dataset, trojaned: TrojanImages | None = None) -> Evaluation:
    """The guard's rates on clean images that it has not seen and, where given, on Trojan images."""
    return contrast_rates(guard.monitor.fit(guard.model), clean, trojaned, threshold=guard.threshold)
