"""How a network wants its images: channels first or last, without channels, flattened, in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor, nn

from unhorse.checks.expectations import Sides
from unhorse.rules import LoadRefused

_REMEDY = "export a network that maps a batch of images (n, c, h, w) to logits (n, k)"
_SHAPE_REMEDY = "say the shape of the images with --size HEIGHT WIDTH --channels CHANNELS"
BYTES_MEAN, BYTES_STD = (0.0,), (1 / 255,)
"""The normalisation of a network that takes pixels of 0..255, for pixels in 0..1."""


class Layout(StrEnum):
    """The order of what a network is given; we always have (n, c, h, w)."""

    FIRST = "n c h w"
    LAST = "n h w c"
    GREY = "n h w"
    FLAT = "n (c h w)"
    FLAT_LAST = "n (h w c)"


class Expected(NamedTuple):
    """What a file says of its input: the batch (None: any), the layout, (c, h, w) with None where open."""

    batch: int | None
    layout: Layout
    shape: Sides
    notes: tuple[str, ...] = ()


class Fed(nn.Module):
    """A network of any layout as one that takes (n, c, h, w)."""

    def __init__(self, network: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.network, self.layout = network, layout
        self.training = False

    def forward(self, images: Tensor) -> Any:
        return self.network(arranged(images, self.layout))

    def train(self, mode: bool = True) -> Fed:
        """Stays as it is: exported programs refuse to change, and nothing here may train."""
        return self


def arranged(images: Tensor, layout: Layout) -> Tensor:
    """Images (n, c, h, w) in another layout; ValueError where they have channels and it has none."""
    if layout in (Layout.LAST, Layout.FLAT_LAST):
        images = images.permute(0, 2, 3, 1)
    if layout in (Layout.FLAT, Layout.FLAT_LAST):
        return images.flatten(1)
    if layout is Layout.GREY:
        if images.shape[1] != 1:
            raise ValueError(f"it takes images without channels, not with {images.shape[1]}")
        return images.flatten(1, 2)
    return images


def expected(
    sizes: Sequence[int | None], said: Sequence[int] | None = None, *, channels_last: bool | None = None
) -> Expected:
    """What an input of these sizes, the batch among them, stands for; otherwise LD221.

    `said` is the (c, h, w) of the user; `channels_last` is None where the sizes must tell.
    """
    if len(sizes) == 4:
        return _of_images(sizes, channels_last)
    if len(sizes) == 3 and sizes[0] != 3 and sizes[-1] not in (1, 3):
        return Expected(sizes[0], Layout.GREY, (1, sizes[1], sizes[2]))
    if len(sizes) == 2:
        return _of_rows(sizes, said, channels_last=bool(channels_last))
    listed = "x".join("?" if size is None else str(size) for size in sizes) or "a scalar"
    alone = " (one image without a batch)" if len(sizes) == 3 else ""
    raise LoadRefused("LD221", f"the model takes {listed}{alone}, not a batch of images", _REMEDY)


def _of_images(sizes: Sequence[int | None], channels_last: bool | None) -> Expected:
    batch, first, second, third = sizes
    if channels_last is None:
        channels_last = third in (1, 3) and first not in (1, 3)
    if channels_last:
        return Expected(batch, Layout.LAST, (third, first, second))
    return Expected(batch, Layout.FIRST, (first, second, third))


def _of_rows(sizes: Sequence[int | None], said: Sequence[int] | None, *, channels_last: bool) -> Expected:
    """Flattened images; without a word of the user, square ones of one channel or three."""
    batch, length = sizes
    shape = tuple(said) if said is not None else square(length)
    if shape is None or (length is not None and math.prod(shape) != length):
        counted = " x ".join(map(str, said)) if said is not None else "no square image of 1 or 3 channels"
        what = f"the model takes rows of {length} numbers, and {counted} has as many"
        if said is not None:
            what = f"the model takes rows of {length} numbers, not of {counted}"
        raise LoadRefused("LD221", what, _SHAPE_REMEDY)
    channels, height, width = shape
    last = channels_last and channels > 1
    order = ", channels last" if last else ", channels first" if channels > 1 else ""
    note = (
        f"MD301 input layout assumed {channels}x{height}x{width} flattened{order}: pass --size and --channels"
    )
    notes = () if said is not None and channels == 1 else (note,)
    return Expected(batch, Layout.FLAT_LAST if last else Layout.FLAT, (channels, height, width), notes)


def square(length: int | None) -> tuple[int, int, int] | None:
    """The (c, h, w) of a square image of 1 or 3 channels of so many numbers, at least 4x4, or None."""
    for channels in (1, 3):
        side = math.isqrt((length or 0) // channels)
        if side >= 4 and channels * side * side == length:
            return channels, side, side
    return None
