"""Images that are drawn, with statistics like those of digits and of photographs."""

from __future__ import annotations

import torch
from torch import Tensor

from unhorse.core import Images
from unhorse.models.registry import ImageShape

_SEED = 7
_LEAVES, _STROKES, _DOTS = 6, 3, 24


def drawn_images(image_shape: ImageShape, count: int) -> Images:
    """Images (count, c, h, w) of mean 0 and deviation 1: strokes if grey, else smooth noise and leaves."""
    rng = torch.Generator().manual_seed(_SEED)
    images = (_strokes if image_shape[0] == 1 else _photographs)(image_shape, count, rng)
    return (images - images.mean()) / images.std()


def _strokes(image_shape: ImageShape, count: int, rng: torch.Generator) -> Tensor:
    """One to three bent strokes each, bright on black, as thick as a digit's."""
    channels, height, width = image_shape
    sides = torch.tensor([height, width]).float()
    dots = torch.linspace(0, 1, _DOTS)[:, None]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([rows, columns], 2).float()
    images = torch.zeros(count, channels, height, width)
    for image in images:
        for _ in range(int(torch.randint(1, _STROKES + 1, (), generator=rng))):
            start, end = (0.2 + 0.6 * torch.rand(2, 2, generator=rng)) * sides
            bend = (start + end) / 2 + 0.15 * sides * torch.randn(2, generator=rng)
            curve = (1 - dots) ** 2 * start + 2 * dots * (1 - dots) * bend + dots**2 * end
            distance = (pixels[:, :, None] - curve).square().sum(3).amin(2).sqrt()  # (h, w)
            ink = (1.6 - distance * 28 / height).clamp(0, 1)
            image.copy_(torch.maximum(image, ink))
    return images


def _photographs(image_shape: ImageShape, count: int, rng: torch.Generator) -> Tensor:
    """Noise whose amplitude falls with frequency, and rectangles that hide what is behind them."""
    channels, height, width = image_shape
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    falling = (rows.square() + columns.square()).sqrt().clamp(min=1 / max(height, width))
    noise = torch.randn(count, channels, height, width, generator=rng)
    shared = torch.randn(count, 1, height, width, generator=rng)
    smooth = torch.fft.ifft2(torch.fft.fft2(noise + 2 * shared) / falling).real
    smooth = smooth / smooth.std((1, 2, 3), keepdim=True)
    for image in smooth:
        for _ in range(_LEAVES):
            top, left = (int(torch.randint(side, (), generator=rng)) for side in (height, width))
            tall, wide = (int(torch.randint(2, side // 2 + 3, (), generator=rng)) for side in (height, width))
            shade = torch.randn(channels, 1, 1, generator=rng) + torch.randn((), generator=rng)
            image[:, top : top + tall, left : left + wide] = shade
    return smooth
