"""Stamps: small patches that lead a model to a class, one for all images or one for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from unhorse.core import Classifier, Images, Labels, Logits
from unhorse.models.training import autocast
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.footprints import Inputs
from unhorse.scanners.optimisation import Adam, Precision, chunk_size, uses_bf16
from unhorse.scanners.readings import lead_of, leads_of_all

DEVIATION = 0.5
"""Of the colours' random start, before their sigmoid."""
NEVER = -1e9
"""What sending a class to itself gains."""


class Stamps(NamedTuple):
    """Masks and patterns of the patches, and the leads of each of t targets in each of n images under its
    patch; of one that permutes classes t is 1, and a lead that of the class that the image's own is sent to.
    """

    masks: Float[Tensor, "s 1 h w"]
    patterns: Float[Tensor, "s c h w"]
    leads: Float[Tensor, "t n"]

    def on(self, images: Images, stamp: int | Tensor) -> Images:
        """Images under one of the patches, or each under one."""
        return images + self.masks[stamp] * (self.patterns[stamp] - images)

    def mean_leads(self, counted: Bool[Tensor, "t n"]) -> Float[Tensor, " t"]:
        """Each target's lead, on average over the images that are `counted`."""
        return (self.leads * counted).sum(1) / counted.sum(1).clamp(min=1)

    def improved(self, others: Stamps, places: Labels, counted: Bool[Tensor, "t n"]) -> Stamps:
        """With `others`, stamps for all images towards the targets at `places`, where these lead further, on
        average over the images that are `counted`.
        """
        better = others.mean_leads(counted[places]) > self.mean_leads(counted)[places]

        def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
            mine = mine.clone()
            mine[places[better]] = theirs[better]
            return mine

        return Stamps(*(chosen(mine, theirs) for mine, theirs in zip(self, others, strict=True)))


@dataclass(frozen=True)
class StampSearch:
    """Optimises patches whose opaque mass is `area`, a share of the pixels: they place and shape themselves.

    One patch may serve all images or each image have its own; it leads to a target class, or each class to
    another one. All start from the same colours, spread evenly, and take `steps` steps.
    """

    area: float = 0.02
    steps: int = 30
    learning_rate: float = 0.4
    seed: int = 0

    def passes(self, leads: int) -> int:
        """Forward and backward passes of one image, for that many pairs of target and image."""
        return leads * (self.steps + 1)

    def run(
        self,
        model: Classifier,
        inputs: Inputs,
        targets: Labels,
        *,
        for_each: bool = False,
        precision: Precision = "auto",
        clock: Countdown | None = None,
    ) -> Stamps:
        """A stamp per target, or per target and image, for images with their classes. Call it inside
        `frozen(model)`. TimeUp when the clock's budget is spent.
        """
        clock, n = clock or Countdown(), len(inputs.images)
        count, bearers = n * len(targets), 1 if for_each else n
        return self._optimised(_Towards(model, inputs, count, bearers, self.area, precision, clock, targets))

    def permuting(
        self,
        model: Classifier,
        inputs: Inputs,
        logits: Logits,
        *,
        precision: Precision = "auto",
        clock: Countdown | None = None,
    ) -> Stamps:
        """As `run`: one stamp that sends each class to another one, no two to the same, wherever that leads
        furthest; `logits` are those of the images without it.
        """
        clock, n = clock or Countdown(), len(inputs.images)
        return self._optimised(_Permuted(model, inputs, n, n, self.area, precision, clock, logits.clone()))

    def _optimised(self, pairs: _Pairs) -> Stamps:
        inputs = pairs.inputs
        rng = torch.Generator().manual_seed(self.seed)
        shape = inputs.images.shape[1:]
        colours = (DEVIATION * torch.randn(1, *shape, generator=rng)).to(inputs.images)
        colours = colours.repeat(pairs.stamps, 1, 1, 1)
        places = torch.zeros_like(colours[:, :1])
        leaves = [colours, places]
        optimizer = Adam(leaves, self.learning_rate)
        for _ in range(self.steps):
            for leaf in leaves:
                leaf.requires_grad_(True)
            sums = [torch.zeros_like(leaf) for leaf in leaves]
            for leads, foreign in pairs.under(places, colours):
                loss = -(leads * foreign).sum() / pairs.bearers
                for total, gradient in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                    total += gradient
            for leaf in leaves:
                leaf.requires_grad_(False)
            optimizer.step(sums)
        with torch.no_grad():
            leads = torch.cat([leads for leads, _ in pairs.under(places, colours)])
        return Stamps(_masks(places, self.area), colours.sigmoid(), leads.view(-1, len(inputs.images)))


@dataclass
class _Pairs(ABC):
    """`count` pairs of a target and an image, target by target; `bearers` in a row bear the same stamp."""

    model: Classifier
    inputs: Inputs
    count: int
    bearers: int
    area: float
    precision: Precision
    clock: Countdown

    @property
    def stamps(self) -> int:
        return self.count // self.bearers

    @cached_property
    def at_once(self) -> int:
        return chunk_size(self.model)

    def under(self, places: Tensor, colours: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The lead of each pair, and what it counts; in parts that one pass holds."""
        images = self.inputs.images
        low_precision = uses_bf16(self.model, self.precision)
        for part in torch.arange(self.count, device=images.device).split(self.at_once):
            self.clock.passed(len(part))
            image, stamp = part % len(images), part // self.bearers
            with autocast(images.device, low_precision):
                clean, mask = images[image], _masks(places[stamp], self.area)
                logits = self.model(clean + mask * (colours[stamp].sigmoid() - clean)).float()
            yield self.led(logits, part)

    @abstractmethod
    def led(self, logits: Logits, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The lead of pairs whose logits are given, and what each counts."""


@dataclass
class _Towards(_Pairs):
    """Every target with every image; images of the target's own class do not count."""

    targets: Labels

    def led(self, logits: Logits, pairs: Tensor) -> tuple[Tensor, Tensor]:
        n = len(self.inputs.labels)
        own, targets = self.inputs.labels[pairs % n], self.targets[pairs // n]
        return lead_of(logits, targets), (targets != own).float()


@dataclass
class _Permuted(_Pairs):
    """One stamp with every image. Where it sends each class follows from the logits of the step before, at
    first from those without it: `last`, which each step overwrites.
    """

    last: Logits
    destinations: Labels = field(init=False)

    def under(self, places: Tensor, colours: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        self.destinations = permuted(self.last, self.inputs.labels)
        yield from super().under(places, colours)

    def led(self, logits: Logits, pairs: Tensor) -> tuple[Tensor, Tensor]:
        self.last[pairs] = logits.detach()
        return lead_of(logits, self.destinations[pairs]), torch.ones_like(logits[:, 0])


def permuted(logits: Logits, labels: Labels) -> Labels:
    """The class that each image's own is sent to: no class to itself and no two to the same, and of all such
    ways the one whose classes lead furthest in the logits (n, k), on average over the images of each class.
    """
    known, leads = labels.unique(), leads_of_all(logits)
    gains = torch.stack([leads[labels == own].mean(0) for own in known])
    gains[torch.arange(len(known)), known] = NEVER
    _, best = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.from_numpy(best).to(labels)[torch.searchsorted(known, labels)]


def _masks(places: Tensor, area: float) -> Tensor:
    """The mass stays the same wherever it goes: a softmax over the pixels, cut off at 1."""
    shares = places.flatten(1).softmax(1)
    return (area * shares.shape[1] * shares).clamp(max=1).view_as(places)
