"""The two networks of Hussein et al. (arXiv 2306.04877), which judge signatures of one fixed shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from unhorse.models.resnets import Bottleneck, ResNet

Maps = UInt8[Tensor, "n m c h w"]
RESNEXT50 = (3, 4, 6, 3)
EMBEDDING = 256


class Findings(NamedTuple):
    """Two-way logits (benign, trojaned), and one logit per class from networks that judge classes."""

    logits: Float[Tensor, "n 2"]
    classes: Float[Tensor, "n k"] | None = None


class ConvolutionNetwork(nn.Module):
    """The convolution model: all maps of a signature as the channels of one image.

    A grouped 3x3 convolution mixes the colours of each map into one channel; batch normalisation, ReLU, the
    usual max-pool and the stages of ResNeXt-50 32x4d follow.
    The head has 2 outputs, not the public code's 1000.
    """

    def __init__(self, maps: int, channels: int, *, layers: Sequence[int] = RESNEXT50) -> None:
        super().__init__()
        stem = nn.Conv2d(maps * channels, maps, 3, padding=1, groups=maps, bias=False)
        self.backbone = _resnext(2, layers, stem)

    def forward(self, maps: Maps) -> Findings:
        return Findings(self.backbone(_pixels(maps.flatten(1, 2))).float())


class TransformerNetwork(nn.Module):
    """The transformer: a shared ResNeXt-50 embeds each map, three encoder layers read the sequence of maps.

    Grey maps are repeated to three channels. All maps of a batch go through the backbone at once, so batch
    normalisation sees them together; the public code takes the maps of one model at a time.
    """

    positions: Tensor

    def __init__(self, maps: int, channels: int, *, layers: Sequence[int] = RESNEXT50) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"the transformer reads maps of 1 or 3 channels, got {channels}: use kind 'set'")
        self.backbone = _resnext(EMBEDDING, layers, None)
        self.class_token = nn.Parameter(torch.randn(1, 1, EMBEDDING))
        self.register_buffer("positions", sinusoids(maps + 1, EMBEDDING), persistent=False)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(EMBEDDING, 8, 2048, 0.1, batch_first=True) for _ in range(3)
        )
        self.head = nn.Linear(EMBEDDING, 2)

    def forward(self, maps: Maps) -> Findings:
        images = maps.flatten(0, 1).expand(-1, 3, -1, -1)  # (n*m, 3, h, w)
        embedded = self.backbone(_pixels(images)).unflatten(0, maps.shape[:2])
        first = self.class_token.to(embedded.dtype).expand(len(maps), -1, -1)
        tokens = self.dropout(torch.cat([first, embedded], 1) + self.positions)
        for layer in self.layers:
            tokens = layer(tokens)
        return Findings(self.head(tokens[:, 0]).float())


def sinusoids(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sinusoidal positions (Vaswani et al., NeurIPS 2017)."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


def _resnext(outputs: int, layers: Sequence[int], stem: nn.Conv2d | None) -> ResNet:
    return ResNet(
        outputs, (3, 0, 0), block=Bottleneck, layers=layers, groups=32, width_per_group=4, stem=stem
    )


def _pixels(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last).float() / 255
