"""The training loop for a stack: what `train` does to one classifier, done to many in each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Dataset
from unhorse.models.stacking import StackedClassifier
from unhorse.models.training import (
    Augmentation,
    EpochLog,
    Recipe,
    autocast,
    bf16_pays,
    forked_randomness,
    learning_rate_factor,
    optimizer_of,
)

Draws = Mapping[str, Tensor]
StackedImages = Float[Tensor, "n m c h w"]
StackedLabels = Int[Tensor, "n m"]
WINDOW = 16  # batches drawn and moved to the device at once: WaNet's noise for 64 models is then 0.2 GB


class Treatment(Protocol):
    """What happens to a batch of several models before the network sees it: its draws are made ahead."""

    def draw(self, labels: StackedLabels, rngs: Sequence[torch.Generator]) -> Draws:
        """The draws of one batch, on the CPU, as each model alone would make them."""
        ...

    def apply(
        self, images: StackedImages, labels: StackedLabels, draws: Draws
    ) -> tuple[StackedImages, StackedLabels]: ...


class StackedPoisoning(Treatment, Protocol):
    """The attacks of several models, of one kind, at once."""

    @property
    def poisons_before_augmentation(self) -> bool: ...

    def prepare(
        self,
        models: Sequence[Classifier],
        data: Dataset,
        rows: Sequence[Tensor],
        rngs: Sequence[torch.Generator],
    ) -> None: ...


class Part(NamedTuple):
    """`size` consecutive models of a stack whose attacks are of one kind; None: benign."""

    size: int
    poisoning: StackedPoisoning | None = None


def train_stack(
    models: Sequence[Classifier],
    data: Dataset,
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    rows: Sequence[Tensor] | None = None,
    parts: Sequence[Part] = (),
) -> list[list[EpochLog]]:
    """Trains `models` in place at once and leaves them in eval mode; a log for each.

    Model j sees the images `rows[j]` of `data` (all, without rows) with the order, augmentation and poison
    that `train` would draw from `seeds[j]`, so in fp32 on a CPU it ends with the same weights but for
    rounding; on another device its dropout is drawn otherwise. All models need equally many images.
    """
    if data.labels is None or len(data) == 0:
        raise ValueError(f"data set {data.name!r} has no labelled images to train on")
    rows = [torch.arange(len(data))] * len(models) if rows is None else rows
    if len({len(own) for own in rows}) != 1:
        raise ValueError("the models of a stack have different numbers of images: stack those of equal size")
    run = _Run(models, data, recipe, seeds, rows, list(parts) or [Part(len(models))])
    with forked_randomness():
        logs = [run.epoch(epoch) for epoch in range(recipe.epochs)]
    run.stack.unstack(models)
    for model in models:
        model.eval()
    return [list(log) for log in zip(*logs, strict=True)] if logs else [[] for _ in models]


class _Run:
    """One stack in training."""

    def __init__(  # noqa: PLR0913
        self,
        models: Sequence[Classifier],
        data: Dataset,
        recipe: Recipe,
        seeds: Sequence[int],
        rows: Sequence[Tensor],
        parts: Sequence[Part],
    ) -> None:
        assert data.labels is not None and sum(part.size for part in parts) == len(models) == len(seeds)
        self.recipe, self.seeds, self.rows = recipe, seeds, rows
        self.device = device = models[0].mean.device
        self.labels_here, self.labels = data.labels.cpu(), data.labels.to(device)
        self.images = data.images.to(device)
        self.rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.places = _places(parts)
        self.treatments = [_treatments(part, recipe.augmentation) for part in parts]
        for part, place in zip(parts, self.places, strict=True):
            if part.poisoning is not None:
                part.poisoning.prepare(models[place], data, rows[place], self.rngs[place])
        single = models[0]
        self.low = bf16_pays(single, device) if recipe.precision == "auto" else recipe.precision == "bf16"
        self.stack = StackedClassifier(models).train()
        if self.low:
            self.stack.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # one kernel for all weights where there are kernels
        self.optimizer = optimizer_of(self.stack.network, recipe, fused=device.type == "cuda" or None)
        steps = math.ceil(len(rows[0]) / recipe.batch_size)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, learning_rate_factor(recipe, steps))

    def epoch(self, epoch: int) -> list[EpochLog]:
        """One pass of every model over its images."""
        seeds = [seed * 1009 + epoch for seed in self.seeds]
        torch.manual_seed(seeds[0])
        if self.device.type == "cpu":
            self.stack.seed_dropout(seeds)
        order = torch.stack(
            [
                own[torch.randperm(len(own), generator=rng)]
                for own, rng in zip(self.rows, self.rngs, strict=True)
            ],
            1,
        )  # (images of an epoch, m)
        sums = torch.zeros(2, len(self.seeds), device=self.device)
        for window in order.split(WINDOW * self.recipe.batch_size):
            for chosen, draws in self._drawn(window):
                sums += self._step(chosen, draws)
        losses, shares = (sums / len(order)).tolist()
        return [EpochLog(epoch, loss, share) for loss, share in zip(losses, shares, strict=True)]

    def _drawn(self, window: Int[Tensor, "images m"]) -> Iterator[tuple[Tensor, list[list[Draws]]]]:
        """(rows of the data set, draws per part and treatment) of each batch, moved to the device at once."""
        batches = window.split(self.recipe.batch_size)
        moved: list[list[list[Draws]]] = []
        for place, treatments in zip(self.places, self.treatments, strict=True):
            drawn = []
            for batch in batches:
                labels = self.labels_here[batch[:, place]]
                drawn.append([each.draw(labels, self.rngs[place]) for each in treatments])
            moved.append([_moved(each, self.device) for each in zip(*drawn, strict=True)])
        there = window.to(self.device).split(self.recipe.batch_size)
        for index, chosen in enumerate(there):
            yield chosen, [[of_batch[index] for of_batch in part] for part in moved]

    def _step(self, chosen: StackedLabels, draws: list[list[Draws]]) -> Tensor:
        """One optimizer step; returns (sum of losses, number correct) per model (2, m)."""
        images, labels = self._treated(self.images[chosen].float() / 255, self.labels[chosen], draws)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.low):
            logits = self.stack(images.flatten(0, 1))
        losses = (
            functional.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape).mean(0)
        )
        losses.sum().backward()
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            correct = (logits.argmax(1).view(labels.shape) == labels).sum(0)
            return torch.stack([losses.detach() * len(labels), correct.float()])

    def _treated(
        self, images: StackedImages, labels: StackedLabels, draws: list[list[Draws]]
    ) -> tuple[StackedImages, StackedLabels]:
        done = []
        for place, treatments, drawn in zip(self.places, self.treatments, draws, strict=True):
            own = images[:, place], labels[:, place]
            for treatment, its_draws in zip(treatments, drawn, strict=True):
                own = treatment.apply(*own, its_draws)
            done.append(own)
        if len(done) == 1:
            return done[0]
        return torch.cat([own[0] for own in done], 1), torch.cat([own[1] for own in done], 1)


@dataclass(frozen=True)
class _Augmenting:
    """The recipe's augmentation as a treatment."""

    augmentation: Augmentation

    def draw(self, labels: StackedLabels, rngs: Sequence[torch.Generator]) -> Draws:
        each = [self.augmentation.draw(len(labels), rng) for rng in rngs]
        return {name: torch.stack([drawn[name] for drawn in each], 1) for name in each[0]}

    def apply(
        self, images: StackedImages, labels: StackedLabels, draws: Draws
    ) -> tuple[StackedImages, StackedLabels]:
        flat = {name: drawn.flatten() for name, drawn in draws.items()}
        return self.augmentation.apply(images.flatten(0, 1), flat).view(images.shape), labels


def _treatments(part: Part, augmentation: Augmentation) -> list[Treatment]:
    treatments: list[Treatment] = [] if augmentation == Augmentation() else [_Augmenting(augmentation)]
    if part.poisoning is not None:
        treatments.insert(
            0 if part.poisoning.poisons_before_augmentation else len(treatments), part.poisoning
        )
    return treatments


def _places(parts: Sequence[Part]) -> list[slice]:
    places, start = [], 0
    for part in parts:
        places.append(slice(start, start + part.size))
        start += part.size
    return places


def _moved(draws: Sequence[Draws], device: torch.device) -> list[Draws]:
    """The draws of several batches on the device, each name in one transfer."""
    moved: list[dict[str, Tensor]] = [{} for _ in draws]
    for name in draws[0]:
        sizes = [len(drawn[name]) for drawn in draws]
        parts = torch.cat([drawn[name] for drawn in draws]).to(device).split(sizes)
        for batch, part in zip(moved, parts, strict=True):
            batch[name] = part
    return list(moved)
