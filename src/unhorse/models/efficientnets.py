"""EfficientNet (Tan and Le, ICML 2019), named as in torchvision."""

from __future__ import annotations

from torch import Tensor, nn

from unhorse.models.layers import Residual, SqueezeExcitation, convolution
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Signs, assumed

EFFICIENT_STAGES = (
    *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
    *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
"""Expansion, kernel size, stride, width and repeats of EfficientNet's stages."""


class EfficientNetB0(nn.Module):
    """EfficientNet-B0 (Tan and Le, ICML 2019) without stochastic depth, which acts in training only."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(image_shape[0], 32, 3, stride=2, activation=nn.SiLU)]
        wide = 32
        for expansion, size, stride, width, repeats in EFFICIENT_STAGES:
            blocks = []
            for index in range(repeats):
                blocks.append(
                    self._block(wide, width, size, stride=1 if index else stride, expansion=expansion)
                )
                wide = width
            layers.append(nn.Sequential(*blocks))
        layers.append(convolution(wide, 1280, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    @staticmethod
    def _block(wide: int, width: int, size: int, *, stride: int, expansion: int) -> nn.Module:
        inner = wide * expansion
        layers: list[nn.Module] = [convolution(wide, inner, 1, activation=nn.SiLU)] if expansion > 1 else []
        layers.append(convolution(inner, inner, size, stride=stride, groups=inner, activation=nn.SiLU))
        layers += [SqueezeExcitation(inner, wide // 4), convolution(inner, width, 1)]
        return Residual("block", nn.Sequential(*layers), skip=stride == 1 and wide == width)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


EFFICIENTNETS = {
    "efficientnet-b0": Architecture(
        EfficientNetB0,
        (3, 224, 224),
        Signs("features.0.0.weight", "classifier.1.weight", assumed(224)),
        IMAGENET,
        family="efficientnet",
    )
}
