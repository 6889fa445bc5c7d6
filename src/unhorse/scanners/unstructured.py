"""Images without structure, and which classes a model sees in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Images
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.optimisation import chunk_size

COARSE = 4
"""Blocks and gradients are this many random pixels wide and high, enlarged."""
FAINT = 0.1
"""Deviation of faint noise."""
KINDS = ("noise", "one colour", "blocks", "smooth", "faint noise")


@dataclass(frozen=True)
class Unstructured:
    """`count` images of each of KINDS: noise in every pixel, one colour each, four by four blocks of colour,
    the same smoothly blended, and one colour with faint noise.

    None of them looks like any class. The target of a trigger that covers the image, such as a blend, tends
    to take them all the same, and so may a class that a network falls back on. That noise leads to the target
    was first used by Erichson et al. (SDM 2021, arXiv 2008.00123), who add more and more of it to clean
    images; here there are none.
    """

    count: int = 64
    seed: int = 0

    @property
    def total(self) -> int:
        """How many images of all kinds."""
        return len(KINDS) * self.count

    def draw(self, image_shape: tuple[int, int, int]) -> Images:
        """All of them, (5 count, c, h, w) in [0, 1], in the order of KINDS."""
        (channels, *size), rng = image_shape, torch.Generator().manual_seed(self.seed)

        def random(height: int, width: int) -> Tensor:
            return torch.rand(self.count, channels, height, width, generator=rng)

        several = [
            random(*size),
            random(1, 1).expand(-1, -1, *size),
            functional.interpolate(random(COARSE, COARSE), size, mode="nearest"),
            functional.interpolate(random(COARSE, COARSE), size, mode="bilinear"),
        ]
        noise = FAINT * torch.randn(several[0].shape, generator=rng)
        return torch.cat([*several, (random(1, 1) + noise).clamp(0, 1)])

    def seen_by(self, model: Classifier, clock: Countdown | None = None) -> Float[Tensor, " k"]:
        """The share of them that `model` sees as each class; TimeUp when the clock's budget is spent."""
        clock, images = clock or Countdown(), self.draw(model.image_shape).to(model.mean.device)
        counts = images.new_zeros(model.num_classes)
        for some in images.split(chunk_size(model)):
            with torch.no_grad():
                counts += model(some).argmax(1).bincount(minlength=model.num_classes)
            clock.passed(len(some))
        return counts / len(images)
