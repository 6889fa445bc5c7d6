"""DenseNet (Huang et al., CVPR 2017), named as in torchvision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.models.layers import require_depths, require_widths
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Naming, Signs, State, assumed


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution, each after normalisation and ReLU; its maps are appended to its input."""

    def __init__(self, wide: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(wide), nn.Conv2d(wide, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.conv1(functional.relu(self.norm1(maps)))
        return torch.cat([maps, self.conv2(functional.relu(self.norm2(out)))], dim=1)


class DenseNet(nn.Module):
    """Dense blocks of `depths` layers with halving transitions between them."""

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        depths: tuple[int, ...],
        growth: int = 32,
        stem: int = 64,
    ) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "conv0": nn.Conv2d(image_shape[0], stem, 7, stride=2, padding=3, bias=False),
            "norm0": nn.BatchNorm2d(stem),
            "relu0": nn.ReLU(),
            "pool0": nn.MaxPool2d(3, stride=2, padding=1),
        }
        wide = stem
        for place, depth in enumerate(depths, 1):
            dense = {
                f"denselayer{index + 1}": DenseLayer(wide + index * growth, growth) for index in range(depth)
            }
            layers[f"denseblock{place}"] = nn.Sequential(OrderedDict[str, nn.Module](dense))
            wide += depth * growth
            if place < len(depths):
                layers[f"transition{place}"] = _transition(wide, wide // 2)
                wide //= 2
        layers["norm5"] = nn.BatchNorm2d(wide)
        self.features = nn.Sequential(OrderedDict[str, nn.Module](layers))
        self.classifier = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(functional.relu(self.features(images)).mean((2, 3)))


def _transition(wide: int, width: int) -> nn.Sequential:
    parts: dict[str, nn.Module] = {
        "norm": nn.BatchNorm2d(wide),
        "relu": nn.ReLU(),
        "conv": nn.Conv2d(wide, width, 1, bias=False),
        "pool": nn.AvgPool2d(2),
    }
    return nn.Sequential(OrderedDict[str, nn.Module](parts))


def _options(depths: tuple[int, ...], stem: int) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        blocks = enumerate(depths, 1)
        # the layers are numbered from 1
        require_depths(
            state,
            {f"features.denseblock{place}.denselayer{{}}.conv1.weight": depth + 1 for place, depth in blocks},
        )
        require_widths(state, {"features.conv0.weight": stem})
        return {}

    return read


# files of torchvision before 0.3 write norm.1 for norm1
_OLD = Naming(((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),))


def _densenet(*depths: int, growth: int = 32, stem: int = 64) -> Architecture:
    marks = ("features.norm5.weight",)
    first, last = "features.conv0.weight", "classifier.weight"
    signs = Signs(first, last, assumed(224), _options(depths, stem), (_OLD,), marks)
    network = partial(DenseNet, depths=depths, growth=growth, stem=stem)
    return Architecture(network, (3, 224, 224), signs, IMAGENET, family="densenet")


DENSENETS = {
    "densenet121": _densenet(6, 12, 24, 16),
    "densenet161": _densenet(6, 12, 36, 24, growth=48, stem=96),
    "densenet169": _densenet(6, 12, 32, 32),
    "densenet201": _densenet(6, 12, 48, 32),
}
