"""EfficientNet-Lite (Google, 2020), named as in the PyPI package efficientnet-lite-pytorch."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from unhorse.models.efficientnets import EFFICIENT_STAGES
from unhorse.models.layers import SameConvolution, multiple_of_8
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Signs, assumed


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite 0 to 4 (Google, 2020): no squeeze-excitation, ReLU6, TensorFlow's padding.

    `wide` and `deep` scale widths and repeats of all stages but the first and last; names are those of the
    PyPI package efficientnet-lite-pytorch.
    """

    def __init__(
        self, num_classes: int, image_shape: ImageShape, *, wide: float = 1.0, deep: float = 1.0
    ) -> None:
        super().__init__()
        self._conv_stem = SameConvolution(image_shape[0], 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, before = [], 32
        for place, (expansion, size, stride, width, repeats) in enumerate(EFFICIENT_STAGES):
            after = multiple_of_8(width * wide)
            for index in range(repeats if place in (0, 6) else math.ceil(repeats * deep)):
                blocks.append(
                    _LiteBlock(before, after, size, stride=1 if index else stride, expansion=expansion)
                )
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConvolution(before, 1280, 1)
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
            self._expand_conv = SameConvolution(before, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = SameConvolution(inner, inner, size, stride=stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = SameConvolution(inner, after, 1)
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


def _lite(wide: float, deep: float, side: int) -> Architecture:
    signs = Signs("_conv_stem.weight", "_fc.weight", assumed(side))
    network = partial(EfficientNetLite, wide=wide, deep=deep)
    return Architecture(network, (3, side, side), signs, IMAGENET, family="efficientnet-lite")


EFFICIENTNET_LITES = {
    "efficientnet-lite0": _lite(1.0, 1.0, 224),
    "efficientnet-lite1": _lite(1.0, 1.1, 240),
    "efficientnet-lite2": _lite(1.1, 1.2, 260),
    "efficientnet-lite3": _lite(1.2, 1.4, 280),
    "efficientnet-lite4": _lite(1.4, 1.8, 300),
}
