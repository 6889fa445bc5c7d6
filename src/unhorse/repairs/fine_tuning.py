"""Fine-tuning: the plainest repair, the control of the others, and the part of it that they share."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch

from unhorse.core import Classifier, Curve, Dataset, Images, RepairResult, ScanResult
from unhorse.inputs import check_clean, check_recognised
from unhorse.metrics import accuracy, evaluation
from unhorse.models.training import Augmentation, EpochLog, Recipe, train

MINIMUM_IMAGES = 20
WORTH_A_WARNING = 0.1
BATCH = 256
OnEpoch = Callable[[EpochLog], None]


class Settings(Protocol):
    """The fields of every repair that trains."""

    batch_size: int
    weight_decay: float
    crop: int
    flip: bool
    cutout: int
    precision: Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class CutoutAugmentation(Augmentation):
    """Cutout (DeVries and Taylor, arXiv 1708.04552) last: a black square per image, `hole` pixels wide.

    Its centre is anywhere in the image, so that it may hang over the edge.
    """

    hole: int = 0

    def __call__(self, images: Images, rng: torch.Generator) -> Images:
        images = super().__call__(images, rng)
        if not self.hole:
            return images
        sides = []
        for axis, length in enumerate(images.shape[2:]):
            first = torch.randint(length, (len(images), 1), generator=rng) - self.hole // 2
            places = torch.arange(length)
            inside = (places >= first) & (places < first + self.hole)
            sides.append(inside[:, :, None] if axis == 0 else inside[:, None])
        cut = (sides[0] & sides[1])[:, None].to(images.device)  # (n, 1, h, w)
        return images.masked_fill(cut, 0)


@dataclass
class FineTuning:
    """Plain fine-tuning on clean images, by cross-entropy alone: the control that other repairs must beat.

    The schedule is that of NAD (Li et al., ICLR 2021): SGD with Nesterov's momentum, the rate divided by 10
    after `drop_after` epochs (0: never). Batch normalisation learns as in training.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.01
    drop_after: int = 0
    weight_decay: float = 1e-4
    crop: int = 0
    flip: bool = False
    cutout: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    @property
    def total_epochs(self) -> int:
        """How often `on_epoch` is called."""
        return self.epochs

    def __call__(
        self,
        model: Classifier,
        clean: Dataset,
        finding: ScanResult | None = None,
        *,
        on_epoch: OnEpoch | None = None,
        checkpoint: Path | None = None,
    ) -> RepairResult:
        """A fine-tuned copy; `finding` is not needed. With a checkpoint a killed training goes on."""
        started = time.monotonic()
        recipe = recipe_of(self, self.epochs, self.learning_rate, self.drop_after)
        clean, warnings = labelled(model, clean, least=MINIMUM_IMAGES)
        tuned = trainable_copy(model)
        fitted = fitting(recipe, len(clean))
        log = train(tuned, clean, fitted, seed=self.seed, checkpoint=checkpoint, on_epoch=on_epoch)
        facts, costs = outcome(model, settled(tuned), clean)
        facts |= {"epochs": self.epochs, "seconds": round(time.monotonic() - started, 2)}
        return RepairResult("fine-tuning", tuned, facts, (loss_curve(log),), (*warnings, *costs))


def recipe_of(settings: Settings, epochs: int, learning_rate: float, drop_after: int = 0) -> Recipe:
    """SGD with Nesterov's momentum 0.9; ValueError for settings that nothing can be trained with."""
    if epochs < 1 or settings.batch_size < 2 or learning_rate <= 0:
        raise ValueError(
            f"epochs {epochs}, batch_size {settings.batch_size}, learning_rate {learning_rate}: give at "
            "least 1 epoch, batches of 2 or more, and a rate above 0"
        )
    return Recipe(
        epochs=epochs,
        batch_size=settings.batch_size,
        optimizer="nesterov",
        learning_rate=learning_rate,
        schedule="steps" if drop_after else "constant",
        milestones=(drop_after,) if drop_after else (),
        weight_decay=settings.weight_decay,
        augmentation=CutoutAugmentation(crop=settings.crop, flip=settings.flip, hole=settings.cutout),
        precision=settings.precision,
    )


def fitting(recipe: Recipe, count: int) -> Recipe:
    """The recipe with batches of which none is a single image: batch normalisation cannot train on one."""
    size = recipe.batch_size
    while count % size == 1:
        size += 1
    return replace(recipe, batch_size=size)


def labelled(model: Classifier, clean: Dataset, *, least: int = 1) -> tuple[Dataset, tuple[str, ...]]:
    """`clean` once it is known to fit the model, labelled by the model itself where it has no labels, with a
    warning.
    """
    if clean.images.dtype != torch.uint8:
        raise ValueError(f"the clean images are {clean.images.dtype}: give uint8 pixels from 0 to 255")
    check_clean(model, clean)
    if len(clean) < least:
        raise ValueError(f"{len(clean)} clean images: give at least {least}, better some hundreds")
    check_recognised(model, clean)
    if clean.labels is not None:
        return clean, ()
    device = model.mean.device
    with evaluation(model):
        parts = [model(part.to(device).float() / 255).argmax(1).cpu() for part in clean.images.split(BATCH)]
    warning = "the clean images have no labels: the model's own answers stand in, its mistakes included"
    return replace(clean, labels=torch.cat(parts).clone()), (warning,)


def trainable_copy(model: Classifier) -> Classifier:
    """A copy of which every weight may be trained."""
    return copy.deepcopy(model).requires_grad_(True)


def settled(model: Classifier) -> Classifier:
    """A trained copy as it is given back: in eval mode, laid out as when loaded."""
    model.zero_grad(set_to_none=True)
    return model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def outcome(
    model: Classifier, repaired: Classifier, clean: Dataset
) -> tuple[dict[str, object], tuple[str, ...]]:
    """Facts on the clean images, and a warning where the repair cost much on them."""
    before, after = accuracy(model, clean), accuracy(repaired, clean)
    facts: dict[str, object] = {
        "clean_images": len(clean),
        "clean_accuracy_before": before,
        "clean_accuracy_after": after,
    }
    if before - after <= WORTH_A_WARNING:
        return facts, ()
    warning = f"the repair took clean accuracy from {before:.1%} to {after:.1%}: use a milder setting"
    return facts, (warning,)


def loss_curve(log: list[EpochLog], **more: list[float]) -> Curve:
    """Cross-entropy by epoch, and what else was lost in the last epochs."""
    series = {"cross-entropy": [entry.loss for entry in log]} | more
    drawn = {
        name: (tuple(range(len(log) - len(values) + 1, len(log) + 1)), tuple(values))
        for name, values in series.items()
    }
    return Curve("Loss while training", drawn, "epoch", "loss")
