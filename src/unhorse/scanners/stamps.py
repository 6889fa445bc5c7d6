"""Universal stamps: how much of what a model sees one small patch on every image takes away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Classifier, Labels, Logits
from unhorse.models.training import autocast
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.footprints import Inputs
from unhorse.scanners.optimisation import Adam, Precision, chunk_size, uses_bf16
from unhorse.scanners.readings import lead_of_others


class Stamp(NamedTuple):
    """A patch whose mask adds up to a share `area` of the pixels, and the logits of the images that it was
    made for, under it.
    """

    area: float
    mask: Float[Tensor, "1 h w"]
    pattern: Float[Tensor, "c h w"]
    logits: Logits


@dataclass(frozen=True)
class StampSearch:
    """Optimises patches that lead away from what the model sees in every image, wherever that leads.

    A trigger of any kind is such a patch: of one target, of all targets, for one source class. Its opaque
    mass is one of `areas`, a share of the pixels, and it places and shapes itself. The smallest takes `steps`
    steps, and each larger one goes on from there for `more_steps`. The best of `restarts` counts.
    """

    areas: tuple[float, ...] = (0.005, 0.01, 0.02, 0.04)
    restarts: int = 2
    steps: int = 20
    more_steps: int = 10
    learning_rate: float = 0.4
    seed: int = 0

    def passes(self, images: int) -> int:
        """Forward and backward passes of one image."""
        further = (len(self.areas) - 1) * self.more_steps
        return images * self.restarts * (self.steps + further + len(self.areas))

    def run(
        self,
        model: Classifier,
        inputs: Inputs,
        precision: Precision = "auto",
        clock: Countdown | None = None,
    ) -> tuple[Stamp, ...]:
        """A stamp per area for images with their classes; call it inside `frozen(model)`. TimeUp when the
        clock's budget is spent.
        """
        return tuple(self._grown(_Bearers(model, inputs, precision, clock or Countdown(), chunk_size(model))))

    def _grown(self, bearers: _Bearers) -> Iterator[Stamp]:
        images, labels = bearers.inputs
        rng = torch.Generator().manual_seed(self.seed)
        shape = (self.restarts, *images.shape[1:])
        colours = (0.5 * torch.randn(shape, generator=rng)).to(images)
        places = (0.1 * torch.randn(shape[0], 1, *shape[2:], generator=rng)).to(images)
        leaves = [colours, places]
        for place, area in enumerate(self.areas):
            optimizer = Adam(leaves, self.learning_rate)
            for _ in range(self.more_steps if place else self.steps):
                for leaf in leaves:
                    leaf.requires_grad_(True)
                sums = [torch.zeros_like(leaf) for leaf in leaves]
                for logits, own in bearers.under(places, colours, area):
                    loss = -lead_of_others(logits, own).sum() / len(images)
                    for total, gradient in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                        total += gradient
                for leaf in leaves:
                    leaf.requires_grad_(False)
                optimizer.step(sums)
            with torch.no_grad():
                several = torch.cat([logits for logits, _ in bearers.under(places, colours, area)])
                several = several.view(self.restarts, len(images), -1)
                leads = torch.stack([lead_of_others(logits, labels).mean() for logits in several])
                best = int(leads.argmax())
                yield Stamp(area, _masks(places, area)[best], colours[best].sigmoid(), several[best])


@dataclass(frozen=True)
class _Bearers:
    """The images that bear the stamps, once per restart."""

    model: Classifier
    inputs: Inputs
    precision: Precision
    clock: Countdown
    chunk: int

    def under(self, places: Tensor, colours: Tensor, area: float) -> Iterator[tuple[Logits, Labels]]:
        """Logits under the stamp of the first restart, then of the next; in parts that one pass holds."""
        images, labels = self.inputs
        low_precision = uses_bf16(self.model, self.precision)
        for part in torch.arange(len(places) * len(images), device=images.device).split(self.chunk):
            restart, image = part // len(images), part % len(images)
            self.clock.passed(len(part))
            with autocast(images.device, low_precision):
                clean, mask = images[image], _masks(places, area)[restart]
                logits = self.model(clean + mask * (colours.sigmoid()[restart] - clean))
            yield logits.float(), labels[image]


def _masks(places: Tensor, area: float) -> Tensor:
    """The mass stays the same wherever it goes: a softmax over the pixels, cut off at 1."""
    shares = places.flatten(1).softmax(1)
    return (area * shares.shape[1] * shares).clamp(max=1).view_as(places)
