"""Triggers: what is stamped on an image. Used by both sides, so nothing here knows an attack or a defence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Images

Placement = Literal["corner", "corners", "random"]
Colours = Literal["binary", "uniform"]


@dataclass(frozen=True)
class Stamp:
    """A set of t triggers, one drawn per image: x -> x + mask * (pattern - x).

    A patch (BadNet, Gu et al. 2017) is an opaque mask on a rectangle, a blend (Blended Injection, Chen et al.
    2017) a constant mask below 1; BadNet+ and BI+ (Do et al., ECCV 2022) are sets of twenty.
    """

    patterns: Float[Tensor, "t c h w"]
    masks: Float[Tensor, "t 1 h w"]

    def __call__(self, images: Images, rng: torch.Generator) -> Images:
        if images.shape[1:] != self.patterns.shape[1:]:
            raise ValueError(
                f"the trigger is for {tuple(self.patterns.shape[1:])} images, not {tuple(images.shape[1:])}: "
                "resize the images or draw the trigger for this shape"
            )
        draw = torch.randint(len(self.patterns), (len(images),), generator=rng)
        mask, pattern = self.masks[draw].to(images), self.patterns[draw].to(images)
        return images + mask * (pattern - images)


def patch_colours(
    count: int, channels: int, size: int, rng: torch.Generator, *, colours: Colours = "uniform"
) -> Float[Tensor, "t c s s"]:
    """`count` square patterns of `size` pixels, of U[0, 1] or of black-and-white pixels."""
    values = torch.rand(count, channels, size, size, generator=rng)
    return values.round() if colours == "binary" else values


def patches(
    values: Float[Tensor, "t c s s"],
    image_shape: tuple[int, int, int],
    rng: torch.Generator,
    *,
    placement: Placement = "random",
    margin: int = 1,
) -> Stamp:
    """An opaque patch of each of `values`, each at a place of its own.

    "corner" keeps `margin` pixels to the two nearest edges, as ULP's populations do; "corners" fills all four
    with the same colours (Turner et al., arXiv 1912.02771), "random" may lie
    anywhere.
    """
    count, channels, size, _ = values.shape
    height, width = image_shape[1:]
    if size + (0 if placement == "random" else 2 * margin) > min(height, width):
        raise ValueError(f"a {size}x{size} patch does not fit {height}x{width} images: use a smaller size")
    patterns = torch.zeros(count, channels, height, width)
    masks = torch.zeros(count, 1, height, width)
    for index in range(count):
        for top, left in _places(size, (height, width), rng, placement, margin):
            patterns[index, :, top : top + size, left : left + size] = values[index]
            masks[index, :, top : top + size, left : left + size] = 1
    return Stamp(patterns, masks)


def _places(
    size: int, frame: tuple[int, int], rng: torch.Generator, placement: Placement, margin: int
) -> list[tuple[int, int]]:
    """The (top, left) pixels of one patch."""
    rows, columns = ((margin, side - margin - size) for side in frame)
    if placement == "corners":
        return list(product(rows, columns))
    down, across = torch.rand(2, generator=rng).tolist()
    if placement == "corner":
        return [(rows[int(2 * down)], columns[int(2 * across)])]
    return [(int(down * (frame[0] - size + 1)), int(across * (frame[1] - size + 1)))]


def blends(images: Images, opacity: float) -> Stamp:
    """Each of `images` laid over the whole input with `opacity` in (0, 1]."""
    if not 0 < opacity <= 1:
        raise ValueError(f"opacity must lie in (0, 1], got {opacity}")
    return Stamp(images.clone(), torch.full_like(images[:, :1], opacity))


def noise_images(count: int, image_shape: tuple[int, int, int], rng: torch.Generator) -> Images:
    """`count` images of independent U[0, 1] pixels."""
    return torch.rand(count, *image_shape, generator=rng)
