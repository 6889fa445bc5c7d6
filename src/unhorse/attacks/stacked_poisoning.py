"""Attacks on the models of a stack: stamps, warps and clean-label poison for many victims in one operation.

Every draw is the one that the attack alone would make, so a stacked victim sees the poison that it would see
alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from unhorse.attacks.poisoning import CleanLabelPoisoning, Poisoning
from unhorse.attacks.wanet import WaNet
from unhorse.core import Attack, Classifier, Dataset
from unhorse.models.stacked_training import (
    Draws,
    Part,
    StackedImages,
    StackedLabels,
    StackedPoisoning,
    train_stack,
)
from unhorse.models.stacking import StackedClassifier
from unhorse.triggers import Stamp


@dataclass
class _Stamps:
    """Dirty-label poisoning of several models, each with its own triggers, rate, mode, source and target."""

    attacks: Sequence[Poisoning]

    poisons_before_augmentation = False

    def prepare(
        self,
        models: Sequence[Classifier],
        data: Dataset,
        rows: Sequence[Tensor],
        rngs: Sequence[torch.Generator],
    ) -> None:
        """The triggers of all models in one tensor, on the models' device."""
        device = models[0].mean.device
        self._triggers = _Triggers([attack.trigger for attack in self.attacks], device)
        self._rates = torch.tensor([attack.rate for attack in self.attacks], device=device)
        sources = [-1 if attack.source is None else attack.source for attack in self.attacks]
        self._sources = torch.tensor(sources, device=device)
        self._relabel = _Relabel(self.attacks, device)

    def draw(self, labels: StackedLabels, rngs: Sequence[torch.Generator]) -> Draws:
        uniform, which = [], []
        for attack, rng in zip(self.attacks, rngs, strict=True):
            uniform.append(torch.rand(len(labels), generator=rng))
            which.append(torch.randint(len(attack.trigger.patterns), (len(labels),), generator=rng))
        return {"uniform": torch.stack(uniform, 1), "which": torch.stack(which, 1)}

    def apply(
        self, images: StackedImages, labels: StackedLabels, draws: Draws
    ) -> tuple[StackedImages, StackedLabels]:
        chosen = (draws["uniform"] < self._rates) & ((labels == self._sources) | (self._sources < 0))
        stamped = torch.where(chosen[:, :, None, None, None], self._triggers(images, draws["which"]), images)
        return stamped, torch.where(chosen, self._relabel(labels), labels)


@dataclass
class _Warps:
    """WaNet on several models: the first images of a batch warped and relabelled, the next ones warped with
    noise.
    """

    attacks: Sequence[WaNet]

    poisons_before_augmentation = True

    def prepare(
        self,
        models: Sequence[Classifier],
        data: Dataset,
        rows: Sequence[Tensor],
        rngs: Sequence[torch.Generator],
    ) -> None:
        """Each model's field is drawn, if it has none."""
        device = models[0].mean.device
        for attack, model, rng in zip(self.attacks, models, rngs, strict=True):
            attack.prepare(model, data, rng)
        warps = [attack.probes()["trojan"] for attack in self.attacks]
        self._places = torch.stack([warp.grid() for warp in warps]).to(device)  # type: ignore[attr-defined]
        self._sides = torch.tensor(self._places.shape[2:0:-1], device=device)  # (width, height)
        self._relabel = _Relabel(self.attacks, device)

    def draw(self, labels: StackedLabels, rngs: Sequence[torch.Generator]) -> Draws:
        poisoned, touched = self._counts(len(labels))
        height, width = self._places.shape[1:3]
        moves = [torch.rand(touched - poisoned, height, width, 2, generator=rng) for rng in rngs]
        return {"moves": torch.stack(moves, 1)}

    def apply(
        self, images: StackedImages, labels: StackedLabels, draws: Draws
    ) -> tuple[StackedImages, StackedLabels]:
        poisoned, touched = self._counts(len(labels))
        moves = (2 * draws["moves"] - 1) / self._sides
        noisy = (self._places + moves).clamp(-1, 1)  # (n, m, h, w, 2)
        parts = [
            _warped(images[:poisoned], self._places.expand(poisoned, -1, -1, -1, -1)),
            _warped(images[poisoned:touched], noisy),
            images[touched:],
        ]
        return torch.cat(parts), torch.cat([self._relabel(labels[:poisoned]), labels[poisoned:]])

    def _counts(self, images: int) -> tuple[int, int]:
        """How many of a batch are poisoned, and how many of it are warped at all."""
        poisoned = int(self.attacks[0].rate * images)
        return poisoned, poisoned + int(self.attacks[0].noise_ratio * poisoned)


@dataclass
class _CleanLabels:
    """Clean-label poisoning of several models; their surrogates are a stack of their own."""

    attacks: Sequence[CleanLabelPoisoning]
    _surrogates: StackedClassifier | None = field(default=None, repr=False)

    poisons_before_augmentation = False

    def prepare(
        self,
        models: Sequence[Classifier],
        data: Dataset,
        rows: Sequence[Tensor],
        rngs: Sequence[torch.Generator],
    ) -> None:
        """The surrogates, trained at once."""
        surrogates = [copy.deepcopy(model) for model in models]
        seeds = [int(torch.randint(2**31, (), generator=rng)) for rng in rngs]
        train_stack(surrogates, data, self.attacks[0].recipe, seeds=seeds, rows=rows)
        for attack, surrogate in zip(self.attacks, surrogates, strict=True):
            attack.surrogate_ = surrogate.requires_grad_(False)
        self._surrogates = StackedClassifier(surrogates).eval()
        device = models[0].mean.device
        self._triggers = _Triggers([attack.trigger for attack in self.attacks], device)
        self._targets = torch.tensor([attack.target for attack in self.attacks], device=device)

    def draw(self, labels: StackedLabels, rngs: Sequence[torch.Generator]) -> Draws:
        """The rows to poison, padded to those of the model that has most with the row behind the last."""
        count, shape = len(labels), self.attacks[0].trigger.patterns.shape[1:]
        rows, noise, which = [], [], []
        for attack, own, rng in zip(self.attacks, labels.unbind(1), rngs, strict=True):
            chosen = (own == attack.target) & (torch.rand(count, generator=rng) < attack.rate)
            rows.append(chosen.nonzero()[:, 0])
            if len(rows[-1]):
                noise.append(torch.rand(len(rows[-1]), *shape, generator=rng))
                which.append(torch.randint(len(attack.trigger.patterns), (len(rows[-1]),), generator=rng))
            else:
                noise.append(torch.zeros(0, *shape))
                which.append(torch.zeros(0, dtype=torch.long))
        pad = torch.nn.utils.rnn.pad_sequence
        return {"rows": pad(rows, padding_value=count), "noise": pad(noise), "which": pad(which)}

    def apply(
        self, images: StackedImages, labels: StackedLabels, draws: Draws
    ) -> tuple[StackedImages, StackedLabels]:
        if not len(draws["rows"]):
            return images, labels
        # a row more, where the padding goes
        padded = torch.cat([images, images.new_zeros(1, *images.shape[1:])])
        columns = torch.arange(images.shape[1], device=images.device)
        perturbed = self._off_their_class(padded[draws["rows"], columns], draws["noise"])
        padded[draws["rows"], columns] = self._triggers(perturbed, draws["which"])
        return padded[:-1], labels

    def _off_their_class(self, images: StackedImages, noise: Tensor) -> StackedImages:
        assert self._surrogates is not None
        epsilon, steps = self.attacks[0].epsilon, self.attacks[0].steps
        labels = self._targets.expand(images.shape[:2]).flatten()
        moved = (images + (noise * 2 - 1) * epsilon).clamp(0, 1)
        for _ in range(steps):
            moved.requires_grad_(True)
            loss = functional.cross_entropy(self._surrogates(moved.flatten(0, 1)), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + 2.5 * epsilon / steps * gradient.sign()
            moved = (images + (moved - images).clamp(-epsilon, epsilon)).clamp(0, 1)
        return moved


class _Triggers:
    """The triggers of several models, one after the other."""

    def __init__(self, stamps: Sequence[Stamp], device: torch.device) -> None:
        self.patterns = torch.cat([stamp.patterns for stamp in stamps]).to(device)
        self.masks = torch.cat([stamp.masks for stamp in stamps]).to(device)
        counts = torch.tensor([len(stamp.patterns) for stamp in stamps])
        self.first = (counts.cumsum(0) - counts).to(device)

    def __call__(self, images: StackedImages, which: Tensor) -> StackedImages:
        """Every image under trigger number `which` (n, m) of its model."""
        rows = which + self.first
        return images + self.masks[rows] * (self.patterns[rows] - images)


class _Relabel:
    """What the attackers of several models want of an image."""

    def __init__(self, attacks: Sequence[Poisoning | WaNet], device: torch.device) -> None:
        self.classes = attacks[0].num_classes
        self.target = torch.tensor([attack.target for attack in attacks], device=device)
        self.next = torch.tensor([attack.mode == "all-target" for attack in attacks], device=device)
        self.kept = torch.tensor([attack.mode == "placebo" for attack in attacks], device=device)

    def __call__(self, labels: StackedLabels) -> StackedLabels:
        wanted = torch.where(self.next, (labels + 1) % self.classes, self.target)
        return torch.where(self.kept, labels, wanted)


def _warped(images: StackedImages, places: Tensor) -> StackedImages:
    if not len(images):
        return images
    warped = functional.grid_sample(images.flatten(0, 1), places.flatten(0, 1), align_corners=True)
    return warped.clamp(0, 1).view(images.shape)


def kind_of(attack: Attack | None) -> tuple[object, ...]:
    """Attacks of one kind can be one part of a stack; ValueError for one that has no stacked form."""
    if attack is None or isinstance(attack, Poisoning):
        return (type(attack).__name__,)
    if isinstance(attack, WaNet):
        return ("WaNet", attack.rate, attack.noise_ratio)
    if isinstance(attack, CleanLabelPoisoning):
        return ("CleanLabelPoisoning", attack.epsilon, attack.steps, attack.recipe)
    raise ValueError(f"{type(attack).__name__} has no stacked form: train its victims one by one")


def part_of(attacks: Sequence[Attack | None]) -> Part:
    """The part of a stack whose models have these attacks, all of one kind."""
    poisoning: StackedPoisoning | None = None
    kinds = {kind_of(attack) for attack in attacks}
    assert len(kinds) == 1, kinds
    if isinstance(attacks[0], Poisoning):
        poisoning = _Stamps(attacks)  # type: ignore[arg-type]
    elif isinstance(attacks[0], WaNet):
        poisoning = _Warps(attacks)  # type: ignore[arg-type]
    elif isinstance(attacks[0], CleanLabelPoisoning):
        poisoning = _CleanLabels(attacks)  # type: ignore[arg-type]
    return Part(len(attacks), poisoning)
