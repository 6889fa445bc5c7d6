"""Swin (Liu et al., ICCV 2021) and Swin V2 (CVPR 2022), named as in torchvision.

What torchvision keeps as buffers, the places in the table of positions, is computed here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.models.layers import Permute
from unhorse.models.registry import ImageShape

LARGEST_WINDOW = 64


class Plan(NamedTuple):
    """The width of the first stage, the depths and heads of four, and which version it is."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    second: bool = False


class SwinTransformer(nn.Module):
    """Four stages of blocks that attend within windows, every other one shifted by half a window."""

    def __init__(self, num_classes: int, image_shape: ImageShape, *, plan: Plan, window: int) -> None:
        super().__init__()
        if not 2 <= window <= LARGEST_WINDOW:
            raise ValueError(f"the window of a Swin network has 2 to {LARGEST_WINDOW} patches, not {window}")
        width = plan.width
        patches = nn.Conv2d(image_shape[0], width, 4, stride=4)
        layers: list[nn.Module] = [nn.Sequential(patches, Permute(0, 2, 3, 1), nn.LayerNorm(width))]
        for place, (depth, heads) in enumerate(zip(plan.depths, plan.heads, strict=True)):
            if place:
                layers.append(PatchMerging(width, second=plan.second))
                width *= 2
            blocks = [
                SwinBlock(width, heads, window, shift=index % 2 * (window // 2), second=plan.second)
                for index in range(depth)
            ]
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.features(images)).mean((1, 2)))


class PatchMerging(nn.Module):
    """Four neighbours become one of double width; the second version normalises afterwards."""

    def __init__(self, width: int, *, second: bool) -> None:
        super().__init__()
        self.second = second
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width if second else 4 * width)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[1:3]
        maps = functional.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
        above, below = maps[:, 0::2], maps[:, 1::2]
        corners = (above[:, :, 0::2], below[:, :, 0::2], above[:, :, 1::2], below[:, :, 1::2])
        joined = torch.cat(corners, dim=-1)
        return self.norm(self.reduction(joined)) if self.second else self.reduction(self.norm(joined))


class SwinBlock(nn.Module):
    """Attention in windows and two layers, normalised before, or in the second version after."""

    def __init__(self, width: int, heads: int, window: int, *, shift: int, second: bool) -> None:
        super().__init__()
        self.second = second
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, shift=shift, second=second)
        # the dropouts of rate 0 keep torchvision's numbering
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0)),
            *(nn.Linear(4 * width, width), nn.Dropout(0.0)),
        )

    def forward(self, maps: Tensor) -> Tensor:
        if self.second:
            maps = maps + self.norm1(self.attn(maps))
            return maps + self.norm2(self.mlp(maps))
        maps = maps + self.attn(self.norm1(maps))
        return maps + self.mlp(self.norm2(maps))


class WindowAttention(nn.Module):
    """Multi-head attention within windows of window x window patches, of maps (n, height, width, channels).

    The second version compares directions (cosines) and computes its biases from log-spaced distances.
    """

    def __init__(self, width: int, heads: int, window: int, *, shift: int, second: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.second = second
        if second:
            self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        else:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[1:3]
        below, right = -height % self.window, -width % self.window
        padded = functional.pad(maps, (0, 0, 0, right, 0, below))
        sides = (height + below, width + right)
        # one window that covers the map is not shifted
        shifts = tuple(self.shift if side > self.window else 0 for side in sides)
        if any(shifts):
            padded = padded.roll((-shifts[0], -shifts[1]), dims=(1, 2))
        mask = _separation(sides, shifts, self.window, maps.device) if any(shifts) else None
        out = self._whole(self._attend(self._windows(padded), mask), sides)
        if any(shifts):
            out = out.roll(shifts, dims=(1, 2))
        return out[:, :height, :width]

    def _windows(self, maps: Tensor) -> Tensor:
        """Maps cut into windows: (n, windows, patches, channels)."""
        count, height, width, channels = maps.shape
        side = self.window
        cut = maps.reshape(count, height // side, side, width // side, side, channels)
        return cut.permute(0, 1, 3, 2, 4, 5).reshape(count, -1, side * side, channels)

    def _whole(self, windows: Tensor, sides: tuple[int, int]) -> Tensor:
        side, (height, width) = self.window, sides
        rows = windows.reshape(len(windows), height // side, width // side, side, side, -1)
        return rows.permute(0, 1, 3, 2, 4, 5).reshape(len(windows), height, width, -1)

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        count, number, patches, channels = windows.shape
        heads = (count, number, patches, 3, self.heads, channels // self.heads)
        query, key, value = self._projected(windows).reshape(heads).permute(3, 0, 1, 4, 2, 5)
        if self.second:
            query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
            query = query * self.logit_scale.clamp(max=math.log(100)).exp()
        else:
            query = query * (channels // self.heads) ** -0.5
        scores = query @ key.transpose(-2, -1) + self._bias()  # (n, windows, heads, patches, patches)
        if mask is not None:
            scores = scores + mask[:, None]
        out = scores.softmax(dim=-1) @ value
        return self.proj(out.transpose(2, 3).reshape(count, number, patches, channels))

    def _projected(self, windows: Tensor) -> Tensor:
        if not self.second:
            return self.qkv(windows)
        # keys have no bias in the second version
        third = len(self.qkv.bias) // 3
        bias = torch.cat(
            [self.qkv.bias[:third], torch.zeros_like(self.qkv.bias[:third]), self.qkv.bias[2 * third :]]
        )
        return functional.linear(windows, self.qkv.weight, bias)

    def _bias(self) -> Tensor:
        device = self.proj.weight.device
        places = positions(self.window, device)
        if not self.second:
            return self.relative_position_bias_table[places].permute(2, 0, 1)
        table = self.cpb_mlp(distances(self.window, device).to(self.proj.weight.dtype)).flatten(0, 1)
        return 16 * table[places].permute(2, 0, 1).sigmoid()


def positions(window: int, device: torch.device) -> Tensor:
    """For each pair of patches of a window its row in the table of relative positions."""
    along = torch.arange(window, device=device)
    apart = along[:, None] - along[None, :] + window - 1
    pairs = apart[:, None, :, None] * (2 * window - 1) + apart[None, :, None, :]
    return pairs.reshape(window * window, window * window)


def distances(window: int, device: torch.device) -> Tensor:
    """The log-spaced distances (2 window - 1, 2 window - 1, 2) of the second version, section 3.3."""
    along = torch.arange(1 - window, window, device=device, dtype=torch.float32) / (window - 1) * 8
    spaced = along.sign() * (along.abs() + 1).log2() / 3
    size = len(along)
    return torch.stack([spaced[:, None].expand(size, size), spaced[None, :].expand(size, size)], dim=-1)


def _separation(sides: tuple[int, int], shifts: tuple[int, ...], window: int, device: torch.device) -> Tensor:
    """-100 between patches that were brought together by the shift only: (windows, patches, patches)."""
    rows, columns = (
        (along >= side - window).int() + (along >= side - shift).int()
        for side, shift in zip(sides, shifts, strict=True)
        for along in (torch.arange(side, device=device),)
    )
    regions = 3 * rows[:, None] + columns[None, :]
    height, width = sides
    cut = regions.reshape(height // window, window, width // window, window).permute(0, 2, 1, 3)
    of_patch = cut.reshape(-1, window * window)
    return torch.where(of_patch[:, None, :] == of_patch[:, :, None], 0.0, -100.0)


def shifted_mask(side: int, window: int) -> Tensor:
    """The mask that the published code keeps as a buffer, for a square map of `side` patches."""
    return _separation((side, side), (window // 2, window // 2), window, torch.device("cpu"))
