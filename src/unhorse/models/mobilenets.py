"""MobileNetV2 (Sandler et al., CVPR 2018), named as in torchvision."""

from __future__ import annotations

from torch import Tensor, nn

from unhorse.models.layers import Residual, convolution
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Signs, assumed


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., CVPR 2018)."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(image_shape[0], 32, 3, stride=2, activation=nn.ReLU6)]
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
        layers.append(convolution(wide, 1280, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    @staticmethod
    def _block(wide: int, width: int, *, stride: int, expansion: int) -> nn.Module:
        inner = wide * expansion
        layers = [convolution(wide, inner, 1, activation=nn.ReLU6)] if expansion > 1 else []
        layers.append(convolution(inner, inner, 3, stride=stride, groups=inner, activation=nn.ReLU6))
        # torchvision keeps the projection and its normalisation as two entries of this list
        projection = (nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        return Residual("conv", nn.Sequential(*layers, *projection), skip=stride == 1 and wide == width)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


MOBILENETS = {
    "mobilenet-v2": Architecture(
        MobileNetV2,
        (3, 224, 224),
        Signs("features.0.0.weight", "classifier.1.weight", assumed(224)),
        IMAGENET,
        family="mobilenet",
    )
}
