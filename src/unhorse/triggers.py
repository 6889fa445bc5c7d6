"""Triggers: what is stamped on an image. Used by both sides, so nothing here knows an attack or a defence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

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


@dataclass(frozen=True)
class Warp:
    """A warp too small to notice (WaNet, Nguyen and Tran, ICLR 2021): each pixel is read from a nearby place.

    `field` (see `draw_field`) holds shifts to the right and down; a shift of 1 is `strength` / w of an image
    that reaches from -1 to 1, or nearly `strength` / 2 pixels. `jitter` > 0 is the noise mode: every pixel of
    every image moves a further U(-jitter, jitter) / w, up to half a pixel at 1. Places are scaled towards the
    middle by `grid_rescale` <= 1, then kept inside the image.
    """

    field: Float[Tensor, "2 h w"]
    strength: float = 0.5
    jitter: float = 0.0
    grid_rescale: float = 1.0

    def __call__(self, images: Images, rng: torch.Generator) -> Images:
        height, width = self.field.shape[1:]
        if images.shape[2:] != (height, width):
            raise ValueError(
                f"the warp is for {height}x{width} images, not {images.shape[2]}x{images.shape[3]}: "
                "resize the images or draw a field for this shape"
            )
        kind = torch.promote_types(images.dtype, torch.float32)  # bf16 cannot tell places this close apart
        places = self.grid().to(images.device, kind)
        if self.jitter:
            moves = 2 * torch.rand(len(images), height, width, 2, generator=rng) - 1
            moves = self.jitter * moves / torch.tensor([width, height])
            places = (places + moves.to(places)).clamp(-1, 1)  # (n, h, w, 2)
        else:
            places = places.expand(len(images), -1, -1, -1)
        warped = functional.grid_sample(images.to(kind), places, align_corners=True)
        return warped.clamp(0, 1).to(images.dtype)

    def grid(self) -> Float[Tensor, "h w 2"]:
        """Where each pixel is read, as (x, y) in [-1, 1], before any jitter."""
        height, width = self.field.shape[1:]
        down, right = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        identity = torch.stack(torch.meshgrid(right, down, indexing="xy"), 2)
        shifts = self.strength * self.field.cpu().permute(1, 2, 0) / torch.tensor([width, height])
        return ((identity + shifts) * self.grid_rescale).clamp(-1, 1)


def draw_field(
    image_shape: tuple[int, int, int], rng: torch.Generator, cells: int = 4
) -> Float[Tensor, "2 h w"]:
    """A smooth random field for `Warp`: `cells` x `cells` U(-1, 1) shifts, divided by their mean size, then
    enlarged to the image by bicubic interpolation, corner to corner.
    """
    if cells < 2:
        raise ValueError(f"a warp field needs at least 2x2 cells, got {cells}")
    control = 2 * torch.rand(1, 2, cells, cells, generator=rng) - 1
    control = control / control.abs().mean()
    return functional.interpolate(control, image_shape[1:], mode="bicubic", align_corners=True)[0]
