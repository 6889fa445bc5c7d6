"""Footprints: a mask and a pattern that turn other classes' images into one class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Images, Labels, ReconstructedTrigger
from unhorse.models.training import autocast
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.optimisation import Adam, Precision, chunk_size, uses_bf16

Family = Literal["patch", "blend"]


class Footprints(NamedTuple):
    """One footprint per target class: masks (t, 1, h, w), patterns (t, c, h, w), flip rates (t,)."""

    family: Family
    masks: Float[Tensor, "t 1 h w"]
    patterns: Float[Tensor, "t c h w"]
    flip_rates: Float[Tensor, " t"]

    def trigger(self, index: int) -> ReconstructedTrigger:
        rate = float(self.flip_rates[index])
        return ReconstructedTrigger(self.masks[index].cpu(), self.patterns[index].cpu(), rate)


class Inputs(NamedTuple):
    """Images (n, c, h, w) and the class that the model gives each."""

    images: Images
    labels: Labels


@dataclass(frozen=True)
class FootprintSearch:
    """Searches, per target class, one mask and pattern that send images of all other classes there.

    A "patch" covers at most `area` of the pixels (four at least), opaquely; a "blend" covers all of them with
    `opacity`. A patch is searched as in Neural Cleanse (Wang et al., S&P 2019): for `steps` steps a soft mask
    with an L1 `price` and its pattern; then the highest pixels become the mask and the pattern alone goes on
    for `refine` steps. It counts as demonstrated when it flips at least `flip_rate` of unseen images and
    `lead` more than those of `rivals` other classes and ten random footprints. At most `inputs` images are
    used, half of them to search: with 1000 classes there is a map of each.
    """

    area: float = 0.05
    opacity: float = 0.2
    steps: int = 14
    refine: int = 6
    learning_rate: float = 0.5
    price: float = 1.0
    rivals: int = 3
    random: int = 10
    inputs: int = 128
    flip_rate: float = 0.7
    lead: float = 0.25

    def passes(self, inputs: int) -> tuple[int, int]:
        """Passes of a search on `inputs` images at least, and with the rivals."""
        seen = (min(inputs, self.inputs) + 1) // 2
        once = (self.steps + self.refine) * seen
        return 2 * once, (2 + self.rivals) * once

    def drawn(self, count: int, rng: torch.Generator) -> Int[Tensor, " n"]:
        """Which of `count` images are used, in what order; the first half is searched on."""
        return torch.randperm(count, generator=rng)[: self.inputs]

    def search(
        self,
        model: Classifier,
        inputs: Inputs,
        targets: Int[Tensor, " t"],
        family: Family,
        precision: Precision,
        clock: Countdown | None = None,
    ) -> Footprints:
        """Footprints for `targets`, found on `inputs`; `tested` measures their flip rates."""
        images = inputs.images
        shape = (len(targets), *images.shape[1:])
        colours = torch.zeros(shape, device=images.device)
        descent = _Descent(model, inputs, targets, self.learning_rate, precision, clock or Countdown())
        if family == "blend":
            masks = torch.full_like(colours[:, :1], self.opacity)
            colours = descent.colours(colours, masks, self.steps + self.refine)
        else:
            weights, colours = descent.masks_and_colours(colours, self.steps, self.price)
            most = max(4, int(self.area * shape[2] * shape[3]))
            masks = densest(weights, most)
            colours = descent.colours(colours, masks, self.refine)
        return Footprints(family, masks, torch.sigmoid(colours), torch.zeros(len(targets)))


class _Descent(NamedTuple):
    """Adam on masks and patterns under the mean cross-entropy to each target over other classes' images."""

    model: Classifier
    inputs: Inputs
    targets: Int[Tensor, " t"]
    learning_rate: float
    precision: Precision
    clock: Countdown

    def masks_and_colours(self, colours: Tensor, steps: int, price: float) -> tuple[Tensor, Tensor]:
        """Soft masks (t, 1, h, w) in (0, 1) and unbounded colours, moved together."""
        weights = torch.full_like(colours[:, :1], -1.0).requires_grad_(True)
        colours = colours.clone().requires_grad_(True)
        optimizer = Adam([weights, colours], self.learning_rate, betas=(0.5, 0.9))
        parts = self._parts()
        for _ in range(steps):
            gradients = []
            for place, part in enumerate(parts):
                masks = torch.sigmoid(weights)
                loss = self._loss(part, masks, torch.sigmoid(colours))
                if place == 0:
                    loss = loss + price * masks.mean((1, 2, 3)).sum()
                gradients.append(torch.autograd.grad(loss, (weights, colours)))
            optimizer.step([_total(several) for several in zip(*gradients, strict=True)])
        return torch.sigmoid(weights.detach()), colours.detach()

    def colours(self, colours: Tensor, masks: Tensor, steps: int) -> Tensor:
        """Unbounded colours under fixed masks."""
        colours = colours.clone().requires_grad_(True)
        optimizer = Adam([colours], self.learning_rate, betas=(0.5, 0.9))
        parts = self._parts()
        for _ in range(steps):
            losses = (self._loss(part, masks, torch.sigmoid(colours)) for part in parts)
            optimizer.step([_total([torch.autograd.grad(loss, [colours])[0] for loss in losses])])
        return colours.detach()

    def _parts(self) -> list[Inputs]:
        return list(_parts(self.model, self.inputs, len(self.targets)))

    def _loss(self, part: Inputs, masks: Tensor, patterns: Tensor) -> Tensor:
        """The share of `part` in the loss over all inputs."""
        images, labels = part
        self.clock.passed(len(images) * len(self.targets))
        with autocast(images.device, uses_bf16(self.model, self.precision)):
            logits = self.model(stamped(images, masks, patterns))
        wanted = self.targets.repeat_interleave(len(images))
        losses = functional.cross_entropy(logits.float(), wanted, reduction="none").view(
            len(self.targets), -1
        )
        others = _others(labels, self.targets).float()
        total = _others(self.inputs.labels, self.targets).float().sum(1, keepdim=True)
        return (losses * others / total.clamp(min=1)).sum()


def _parts(model: Classifier, inputs: Inputs, footprints: int) -> Iterator[Inputs]:
    """Inputs in parts that one backward pass holds under each footprint."""
    size = max(1, chunk_size(model) // footprints)
    for images, labels in zip(inputs.images.split(size), inputs.labels.split(size), strict=True):
        yield Inputs(images, labels)


def _total(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(gradients)).sum(0) if len(gradients) > 1 else gradients[0]


def stamped(images: Images, masks: Tensor, patterns: Tensor) -> Images:
    """Every image under every footprint."""
    return (images + masks[:, None] * (patterns[:, None] - images)).flatten(0, 1)  # (t*n, c, h, w)


def _others(labels: Labels, targets: Int[Tensor, " t"]) -> Bool[Tensor, "t n"]:
    return labels != targets[:, None]  # a class is no victim of its own trigger


def densest(weights: Tensor, count: int) -> Tensor:
    """0/1 masks of the `count` highest pixels of each."""
    flat = weights.flatten(1)
    return torch.zeros_like(flat).scatter_(1, flat.topk(count, 1).indices, 1.0).view_as(weights)


@torch.no_grad()
def tested(
    model: Classifier,
    found: Footprints,
    inputs: Inputs,
    targets: Int[Tensor, " t"],
    precision: Precision = "auto",
) -> Footprints:
    """The footprints with their flip rates on `inputs`: which share of other classes' images they convert."""
    with autocast(inputs.images.device, uses_bf16(model, precision)):
        answers = torch.cat(
            [
                model(stamped(part.images, found.masks, found.patterns)).argmax(1).view(len(targets), -1)
                for part in _parts(model, inputs, len(targets))
            ],
            1,
        )
    others = _others(inputs.labels, targets)
    rates = ((answers == targets[:, None]) & others).sum(1) / others.sum(1).clamp(min=1)
    return found._replace(flip_rates=rates.cpu())
