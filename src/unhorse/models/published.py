"""VGG-16, MobileNetV2, EfficientNet-B0, ViT-B/16 (named as in torchvision) and EfficientNet-Lite."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.models.small_networks import ImageShape

EFFICIENT_STAGES = (
    *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
    *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
"""Expansion, kernel size, stride, width and repeats of EfficientNet's stages."""


class VGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman, ICLR 2015), plain or with batch normalisation."""

    def __init__(self, num_classes: int, image_shape: ImageShape, *, batch_norm: bool = False) -> None:
        super().__init__()
        wide = image_shape[0]
        layers: list[nn.Module] = []
        for repeats, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(repeats):
                layers.append(nn.Conv2d(wide, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU())
                wide = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


class _Residual(nn.Module):
    """Layers under `name`, added to their input where the shapes allow it."""

    def __init__(self, name: str, layers: nn.Sequential, *, skip: bool) -> None:
        super().__init__()
        self.add_module(name, layers)
        self.name, self.skip = name, skip

    def forward(self, images: Tensor) -> Tensor:
        out = self.get_submodule(self.name)(images)
        return images + out if self.skip else out


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., CVPR 2018)."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(image_shape[0], 32, 3, stride=2, activation=nn.ReLU6)]
        wide = 32
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expansion, width, repeats, stride in stages:
            for index in range(repeats):
                layers.append(self._block(wide, width, stride=1 if index else stride, expansion=expansion))
                wide = width
        layers.append(_convolution(wide, 1280, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    @staticmethod
    def _block(wide: int, width: int, *, stride: int, expansion: int) -> nn.Module:
        inner = wide * expansion
        layers = [_convolution(wide, inner, 1, activation=nn.ReLU6)] if expansion > 1 else []
        layers.append(_convolution(inner, inner, 3, stride=stride, groups=inner, activation=nn.ReLU6))
        # torchvision keeps the projection and its normalisation as two entries of this list
        projection = (nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        return _Residual("conv", nn.Sequential(*layers, *projection), skip=stride == 1 and wide == width)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all of them (Hu et al., CVPR 2018)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)
        self.activation = nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        gate = self.fc2(self.activation(self.fc1(images.mean((2, 3), keepdim=True))))
        return images * gate.sigmoid()


class EfficientNetB0(nn.Module):
    """EfficientNet-B0 (Tan and Le, ICML 2019) without stochastic depth, which acts in training only."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(image_shape[0], 32, 3, stride=2, activation=nn.SiLU)]
        wide = 32
        for expansion, size, stride, width, repeats in EFFICIENT_STAGES:
            blocks = []
            for index in range(repeats):
                blocks.append(
                    self._block(wide, width, size, stride=1 if index else stride, expansion=expansion)
                )
                wide = width
            layers.append(nn.Sequential(*blocks))
        layers.append(_convolution(wide, 1280, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    @staticmethod
    def _block(wide: int, width: int, size: int, *, stride: int, expansion: int) -> nn.Module:
        inner = wide * expansion
        layers: list[nn.Module] = [_convolution(wide, inner, 1, activation=nn.SiLU)] if expansion > 1 else []
        layers.append(_convolution(inner, inner, size, stride=stride, groups=inner, activation=nn.SiLU))
        layers += [SqueezeExcitation(inner, wide // 4), _convolution(inner, width, 1)]
        return _Residual("block", nn.Sequential(*layers), skip=stride == 1 and wide == width)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite 0 to 4 (Google, 2020): no squeeze-excitation, ReLU6, TensorFlow's padding.

    `wide` and `deep` scale widths and repeats of all stages but the first and last; names are those of the
    PyPI package efficientnet-lite-pytorch.
    """

    def __init__(
        self, num_classes: int, image_shape: ImageShape, *, wide: float = 1.0, deep: float = 1.0
    ) -> None:
        super().__init__()
        self._conv_stem = _SameConvolution(image_shape[0], 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, before = [], 32
        for place, (expansion, size, stride, width, repeats) in enumerate(EFFICIENT_STAGES):
            after = _multiple_of_8(width * wide)
            for index in range(repeats if place in (0, 6) else math.ceil(repeats * deep)):
                blocks.append(
                    _LiteBlock(before, after, size, stride=1 if index else stride, expansion=expansion)
                )
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _SameConvolution(before, 1280, 1)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._activation, self._dropout = nn.ReLU6(), nn.Dropout(0.2)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        images = self._activation(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            images = block(images)
        images = self._activation(self._bn1(self._conv_head(images)))
        return self._fc(self._dropout(images.mean((2, 3))))


class _LiteBlock(nn.Module):
    """Expansion, depthwise convolution and projection, added to the input where the shapes allow it."""

    def __init__(self, before: int, after: int, size: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        if expansion > 1:
            self._expand_conv = _SameConvolution(before, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = _SameConvolution(inner, inner, size, stride=stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = _SameConvolution(inner, after, 1)
        self._bn2 = nn.BatchNorm2d(after, eps=1e-3)
        self._activation = nn.ReLU6()
        self.expands, self.skips = expansion > 1, stride == 1 and before == after

    def forward(self, images: Tensor) -> Tensor:
        out = images
        if self.expands:
            out = self._activation(self._bn0(self._expand_conv(out)))
        out = self._activation(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        return images + out if self.skips else out


class _SameConvolution(nn.Conv2d):
    """Without bias, padded as TensorFlow's "same": of an odd number of rows the larger part goes below."""

    def __init__(self, before: int, after: int, size: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, size, stride=stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max(0, (-side % stride) + size - stride) for side in images.shape[2:])
        around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(functional.pad(images, around) if any(around) else images)


def _multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, and one more where that takes away over a tenth."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


class ViTB16(nn.Module):
    """ViT-B/16 (Dosovitskiy et al., ICLR 2021); the sides of the images are multiples of 16."""

    patch, width, depth = 16, 768, 12

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"vit-b-16 needs sides that are multiples of 16, got {height}x{width}: resize the images"
            )
        patches = (height // self.patch) * (width // self.patch)
        self.conv_proj = nn.Conv2d(channels, self.width, self.patch, stride=self.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.encoder = Encoder(patches + 1, self.width, self.depth)
        self.heads = nn.Sequential(OrderedDict[str, nn.Module](head=nn.Linear(self.width, num_classes)))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)  # (n, patches, width)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.heads(self.encoder(tokens)[:, 0])


class Encoder(nn.Module):
    """Learned positions, a stack of transformer blocks and a final normalisation."""

    def __init__(self, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        blocks = {f"encoder_layer_{index}": EncoderBlock(width) for index in range(depth)}
        self.layers = nn.Sequential(OrderedDict[str, nn.Module](blocks))
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ln(self.layers(tokens + self.pos_embedding))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block with heads of 64 dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        # the dropouts of rate 0 keep torchvision's numbering
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(4 * width, width),
            nn.Dropout(0.0),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.self_attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


def _convolution(
    wide: int,
    width: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    layers = [
        nn.Conv2d(wide, width, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))
