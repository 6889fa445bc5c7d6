"""Neural attention distillation: a fine-tuned teacher shows the student where to look."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Curve, Dataset, ImageGrid, Images, RepairResult, ScanResult
from unhorse.metrics import accuracy, evaluation
from unhorse.models.stages import Features, Stage, convolution_stages, features_at, watched
from unhorse.models.training import EpochLog, Recipe, train
from unhorse.repairs.fine_tuning import (
    MINIMUM_IMAGES,
    OnEpoch,
    fitting,
    labelled,
    loss_curve,
    outcome,
    recipe_of,
    settled,
    trainable_copy,
)

AttentionMaps = Float[Tensor, "n height width"]
SHOWN = 6


def attention_map(features: Features) -> AttentionMaps:
    """Where a stage looks: squares summed over the channels, then divided by their length as a vector."""
    squares = features.float().square().sum(1)
    return squares / (squares.flatten(1).norm(dim=1)[:, None, None] + 1e-6)


def attention_distance(
    student: Mapping[str, Features], teacher: Mapping[str, Features], betas: Mapping[str, float]
) -> Tensor:
    """The mean square of the difference between two networks' attention maps, weighed by `betas` and summed
    over the stages, which are named by the keys.
    """
    distances = [
        beta * functional.mse_loss(attention_map(student[name]), attention_map(teacher[name]))
        for name, beta in betas.items()
    ]
    return torch.stack(distances).sum()


def stage_weights(stages: Sequence[Stage], betas: Sequence[float]) -> dict[str, float]:
    """The weight of each stage by its name; of fewer stages than betas the last one still has the last."""
    return {stage.name: beta for stage, beta in zip(reversed(stages), reversed(betas), strict=False)}


@dataclass
class AttentionDistillation:
    """NAD (Li et al., ICLR 2021): a copy fine-tuned on clean images teaches another where to look.

    The teacher is the model after `teacher_epochs` of fine-tuning. The student is the model, trained for
    `epochs` by cross-entropy and the distance of its attention maps to the teacher's at the last stages, as
    many as there are `betas`, the last of which is for the last stage. The paper's rate is 0.1, divided by 10
    after 2 epochs (`drop_after`); the teacher is trained by the same settings.
    """

    epochs: int = 20
    teacher_epochs: int = 10
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
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
        """How often `on_epoch` is called: the teacher's epochs come first, and the student's count on."""
        return self.teacher_epochs + self.epochs

    def __call__(
        self,
        model: Classifier,
        clean: Dataset,
        finding: ScanResult | None = None,
        *,
        on_epoch: OnEpoch | None = None,
        checkpoint: Path | None = None,
    ) -> RepairResult:
        """The student; `finding` is not needed. ValueError for a model without convolutional stages."""
        started = time.monotonic()
        if not self.betas or min(self.betas) < 0:
            raise ValueError(
                f"betas are {self.betas}: give a weight of 0 or more per stage, the last one last"
            )
        recipe = recipe_of(self, self.epochs, self.learning_rate, self.drop_after)
        teaching = recipe_of(self, self.teacher_epochs, self.learning_rate, self.drop_after)
        clean, warnings = labelled(model, clean, least=MINIMUM_IMAGES)
        recipe, teaching = fitting(recipe, len(clean)), fitting(teaching, len(clean))
        stages = convolution_stages(model)[-len(self.betas) :]
        # a seed of its own: over the teacher's batches in its order the student would only repeat its steps
        teacher = _taught(model, clean, teaching, self.seed + 1, checkpoint, on_epoch)
        student = trainable_copy(model)
        curve = self._distil(student, teacher, clean, stages, recipe, checkpoint, on_epoch)
        facts, costs = outcome(model, settled(student), clean)
        facts |= {
            "clean_accuracy_teacher": accuracy(teacher, clean),
            "stages": [stage.name for stage in stages],
            "epochs": self.epochs,
            "seconds": round(time.monotonic() - started, 2),
        }
        exhibits = (_maps(model, student, stages[-1], clean), curve)
        return RepairResult("nad", student, facts, exhibits, (*warnings, *costs))

    def _distil(  # noqa: PLR0913
        self,
        student: Classifier,
        teacher: Classifier,
        clean: Dataset,
        stages: Sequence[Stage],
        recipe: Recipe,
        checkpoint: Path | None,
        on_epoch: OnEpoch | None,
    ) -> Curve:
        """Trains the student; the curve of its losses."""
        betas = stage_weights(stages, self.betas)
        with watched(student, stages) as seen, watched(teacher, stages) as shown:
            lesson = _Lesson(teacher, seen, shown, betas, len(clean))

            def after_epoch(entry: EpochLog) -> None:
                lesson.end_epoch()
                if on_epoch is not None:
                    on_epoch(entry._replace(epoch=self.teacher_epochs + entry.epoch))

            log = train(
                student,
                clean,
                recipe,
                seed=self.seed,
                penalty=lesson,
                checkpoint=checkpoint,
                on_epoch=after_epoch,
            )
        if checkpoint is not None:
            _teacher_file(checkpoint).unlink(missing_ok=True)
        return loss_curve(log, attention=lesson.distances)


class _Lesson:
    """The penalty of one training, and its mean over each epoch."""

    def __init__(
        self,
        teacher: Classifier,
        seen: Mapping[str, Features],
        shown: Mapping[str, Features],
        betas: Mapping[str, float],
        images: int,
    ) -> None:
        self.teacher, self.seen, self.shown, self.betas, self.images = teacher, seen, shown, betas, images
        self.total = torch.zeros((), device=teacher.mean.device)
        self.distances: list[float] = []

    def __call__(self, images: Images) -> Tensor:
        with torch.no_grad():
            self.teacher(images)
        distance = attention_distance(self.seen, self.shown, self.betas)
        self.total += distance.detach() * len(images)
        return distance

    def end_epoch(self) -> None:
        self.distances.append(float(self.total) / self.images)
        self.total.zero_()


def _taught(  # noqa: PLR0913
    model: Classifier,
    clean: Dataset,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None,
    on_epoch: OnEpoch | None,
) -> Classifier:
    """The teacher; its weights wait beside the student's checkpoint until that training has ended."""
    teacher = trainable_copy(model)
    ready = None if checkpoint is None else _teacher_file(checkpoint)
    if ready is not None and ready.exists():
        weights = torch.load(ready, weights_only=True, map_location=model.mean.device)
        teacher.load_state_dict(weights)
    else:
        unfinished = None if checkpoint is None else checkpoint.with_name(checkpoint.name + ".teaching")
        train(teacher, clean, recipe, seed=seed, checkpoint=unfinished, on_epoch=on_epoch)
        if ready is not None:
            torch.save(teacher.state_dict(), ready)
    return settled(teacher).requires_grad_(False)


def _teacher_file(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".teacher")


def _maps(model: Classifier, student: Classifier, stage: Stage, clean: Dataset) -> ImageGrid:
    """A few clean images, and where the last stage looks before and after; each map from black to white."""
    first = {} if clean.labels is None else {int(y): i for i, y in reversed(list(enumerate(clean.labels)))}
    chosen = torch.tensor([first[label] for label in sorted(first)][:SHOWN])
    images = clean[chosen].pixels(model.mean.device)
    rows = [images]
    for each in (model, student):
        with evaluation(each):
            maps = attention_map(features_at(each, stage, images))[:, None]
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        drawn = functional.interpolate((maps - low) / (high - low + 1e-12), images.shape[2:], mode="bilinear")
        rows.append(drawn.expand_as(images))
    captions = ("clean image",) * len(images) + ("before",) * len(images) + ("after",) * len(images)
    note = f"Squares of {stage.name}, summed over its channels; white is where it looks most."
    return ImageGrid("Attention", torch.cat(rows).cpu().clone(), captions, columns=len(images), note=note)
