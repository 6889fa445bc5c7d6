"""Pruning: the channels that clean images leave asleep are switched off."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unhorse.core import Bars, Classifier, Curve, Dataset, Exhibit, RepairResult, ScanResult
from unhorse.metrics import evaluation
from unhorse.models.stages import Stage, convolution_stages, features_at, head
from unhorse.models.training import train
from unhorse.repairs.fine_tuning import (
    BATCH,
    MINIMUM_IMAGES,
    OnEpoch,
    fitting,
    labelled,
    outcome,
    recipe_of,
    settled,
    trainable_copy,
)
from unhorse.repairs.masking import Channels, is_baked, mask_without, masked, pruned

SINGLY, POINTS = 128, 100
"""Up to so many channels are pruned one by one; more of them in groups that give about so many points."""


class PruneCurve(NamedTuple):
    """What pruning costs: `accuracies[i]` is the clean accuracy without the first `counts[i]` of `order`.

    `order` ranks the channels of `stage` by their mean activation over clean images, lowest first.
    """

    stage: Stage
    activations: Float[Tensor, " channels"]
    order: Int[Tensor, " channels"]
    counts: tuple[int, ...]
    accuracies: tuple[float, ...]

    def point_within(self, clean_drop: float) -> int:
        """The last point before the accuracy has dropped by more than `clean_drop` for the first time."""
        least = self.accuracies[0] - clean_drop - 1e-9
        costly = (index for index, value in enumerate(self.accuracies) if value < least)
        return next(costly, len(self.counts)) - 1

    def channels_within(self, clean_drop: float) -> Channels:
        """The channels pruned up to that point."""
        return self.order[: self.counts[self.point_within(clean_drop)]]


@dataclass
class Pruning:
    """Network pruning, and with `fine_tune_epochs` Fine-Pruning (Liu et al., RAID 2018): a Trojan lives in
    channels that clean images do not use.

    Channels of the last convolutional stage are switched off in the order of their mean activation over the
    clean images, until one more would cost more than `clean_drop` (a fraction) of the accuracy on them.
    """

    clean_drop: float = 0.1
    fine_tune_epochs: int = 0
    batch_size: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    crop: int = 0
    flip: bool = False
    cutout: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    @property
    def total_epochs(self) -> int:
        """How often `on_epoch` is called."""
        return self.fine_tune_epochs

    def __call__(
        self,
        model: Classifier,
        clean: Dataset,
        finding: ScanResult | None = None,
        *,
        on_epoch: OnEpoch | None = None,
        checkpoint: Path | None = None,
    ) -> RepairResult:
        """A pruned copy; `finding` is not needed. ValueError for a model without convolutional stages."""
        started = time.monotonic()
        if not 0 <= self.clean_drop < 1:
            raise ValueError(f"clean_drop is {self.clean_drop}: give a fraction from 0 to 1, such as 0.1")
        recipe = recipe_of(self, self.fine_tune_epochs, self.learning_rate) if self.fine_tune_epochs else None
        clean, warnings = labelled(model, clean, least=MINIMUM_IMAGES)
        curve = prune_curve(model, clean)
        channels = curve.channels_within(self.clean_drop)
        tuned = model
        if recipe is not None:
            tuned, recipe = trainable_copy(model), fitting(recipe, len(clean))
            with masked(tuned, curve.stage, channels):
                train(tuned, clean, recipe, seed=self.seed, checkpoint=checkpoint, on_epoch=on_epoch)
            settled(tuned)
        repaired = pruned(tuned, curve.stage, channels)
        facts, costs = outcome(model, repaired, clean)
        facts |= {
            "stage": curve.stage.name,
            "channels": curve.stage.channels,
            "channels_pruned": len(channels),
            "epochs": self.fine_tune_epochs,
            "seconds": round(time.monotonic() - started, 2),
        }
        name = "fine-pruning" if self.fine_tune_epochs else "pruning"
        exhibits = _exhibits(curve, self.clean_drop)
        return RepairResult(
            name, repaired, facts, exhibits, (*warnings, *_limits(curve, repaired, len(channels)), *costs)
        )


def prune_curve(model: Classifier, clean: Dataset) -> PruneCurve:
    """Clean accuracy over the number of pruned channels of the last convolutional stage.

    The features of the images are computed once and kept (n x channels x height x width floats); each point
    then costs a pass of what follows the stage. ValueError where the images have no labels.
    """
    stage = convolution_stages(model)[-1]
    device = model.mean.device
    kept, answers = [], []
    with evaluation(model):
        for images, labels in clean.batches(BATCH, device):
            kept.append(features_at(model, stage, images))
            answers.append(labels)
        activations = torch.stack([part.sum((0, 2, 3)) for part in kept]).sum(0)
        activations = activations / (len(clean) * stage.height * stage.width)
        order = ranking(activations)
        group = 1 if stage.channels <= SINGLY else math.ceil(stage.channels / POINTS)
        counts = tuple(sorted({*range(0, stage.channels, group), stage.channels}))
        masks = [mask_without(stage, order[:count], device) for count in counts]
        right = torch.zeros(len(counts), device=device)
        for features, labels in zip(kept, answers, strict=True):
            logits = (head(model, stage, features * mask) for mask in masks)
            right += torch.stack([(each.argmax(1) == labels).sum() for each in logits])
    accuracies = tuple((right / len(clean)).tolist())
    return PruneCurve(stage, activations.cpu().clone(), order.cpu().clone(), counts, accuracies)


def ranking(activations: Float[Tensor, " channels"]) -> Int[Tensor, " channels"]:
    """The order of pruning: the lowest mean activation first, its sign kept."""
    return activations.argsort(stable=True)


def _limits(curve: PruneCurve, repaired: Classifier, count: int) -> tuple[str, ...]:
    warnings = []
    if not is_baked(repaired):
        warnings.append(
            f"no layer around {curve.stage.name} could take the pruning into its weights: a mask does it, "
            "and the copy cannot be saved as the same architecture"
        )
    if not count:
        warnings.append("nothing was pruned: the first channels cost more than clean_drop")
    return tuple(warnings)


def _exhibits(curve: PruneCurve, clean_drop: float) -> tuple[Exhibit, ...]:
    point = curve.point_within(clean_drop)
    stop, ranked = curve.counts[point], curve.order.tolist()
    series = {
        "clean accuracy": (curve.counts, curve.accuracies),
        f"stop at {stop} channels": ((stop, stop), (0.0, curve.accuracies[point])),
    }
    values = tuple(curve.activations[curve.order].tolist())
    labels = tuple(str(channel) for channel in ranked)
    note = f"Mean over the clean images; the {stop} marked channels are switched off."
    return (
        Curve("Clean accuracy while pruning", series, "channels pruned", "clean accuracy"),
        Bars("Activation of each channel", labels, values, None, tuple(range(stop)), "channel", note),
    )
