"""SqueezeNet (Iandola et al., 2016) and ShuffleNetV2 (Ma et al., ECCV 2018), named as in torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.models.layers import convolution, require_depths, require_widths
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Signs, State, assumed


class Fire(nn.Module):
    """A 1x1 convolution, then a 1x1 and a 3x3 one side by side, each with ReLU."""

    def __init__(self, wide: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(wide, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        squeezed = functional.relu(self.squeeze(maps))
        sides = (functional.relu(self.expand1x1(squeezed)), functional.relu(self.expand3x3(squeezed)))
        return torch.cat(sides, dim=1)


class SqueezeNet(nn.Module):
    """SqueezeNet with a first convolution of `stem` maps and `size`; `pools`: the fires before a pooling."""

    def __init__(
        self, num_classes: int, image_shape: ImageShape, *, stem: int, size: int, pools: tuple[int, ...]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_shape[0], stem, size, stride=2), nn.ReLU(), _pool()]
        wide = stem
        for number, squeezed in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
            layers.append(Fire(wide, squeezed, 4 * squeezed))
            layers += [_pool()] if number in pools else []
            wide = 8 * squeezed
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(wide, num_classes, 1), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images)).mean((2, 3))


def _pool() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)


class ShuffleBlock(nn.Module):
    """Two branches whose channels are mixed; with stride 1 the first of them passes half of the input on."""

    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        half = width // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                *convolution(wide, wide, 3, stride=stride, groups=wide),
                *convolution(wide, half, 1, activation=nn.ReLU),
            )
        self.branch2 = nn.Sequential(
            *convolution(wide if stride > 1 else half, half, 1, activation=nn.ReLU),
            *convolution(half, half, 3, stride=stride, groups=half),
            *convolution(half, half, 1, activation=nn.ReLU),
        )

    def forward(self, maps: Tensor) -> Tensor:
        left, right = (maps, maps) if self.stride > 1 else maps.chunk(2, dim=1)
        sides = torch.stack([self.branch1(left), self.branch2(right)], dim=2)  # (n, half, 2, h, w)
        return sides.flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 with stages of these widths; `head` is the width of the last convolution."""

    def __init__(
        self, num_classes: int, image_shape: ImageShape, *, widths: tuple[int, ...], head: int
    ) -> None:
        super().__init__()
        self.conv1 = convolution(image_shape[0], 24, 3, stride=2, activation=nn.ReLU)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        wide, stages = 24, []
        for width, repeats in zip(widths, _REPEATS, strict=True):
            blocks = [ShuffleBlock(wide, width, 2)]
            blocks += [ShuffleBlock(width, width, 1) for _ in range(repeats - 1)]
            stages.append(nn.Sequential(*blocks))
            wide = width
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = convolution(wide, head, 1, activation=nn.ReLU)
        self.fc = nn.Linear(head, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(images)))))
        return self.fc(self.conv5(maps).mean((2, 3)))


_REPEATS = (4, 8, 4)


def _squeeze(stem: int, size: int, *pools: int) -> Architecture:
    marks = (f"features.{10 + len(pools)}.squeeze.weight",)
    signs = Signs("features.0.weight", "classifier.1.weight", assumed(224), marks=marks)
    network = partial(SqueezeNet, stem=stem, size=size, pools=pools)
    return Architecture(network, (3, 224, 224), signs, IMAGENET, family="squeezenet")


def _shuffle(*widths: int, head: int = 1024) -> Architecture:
    signs = Signs(
        "conv1.0.weight", "fc.weight", assumed(224), _reader(widths, head), marks=("conv5.0.weight",)
    )
    network = partial(ShuffleNetV2, widths=widths, head=head)
    return Architecture(network, (3, 224, 224), signs, IMAGENET, family="shufflenet-v2")


def _reader(widths: tuple[int, ...], head: int) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        stages = tuple(enumerate(zip(widths, _REPEATS, strict=True), 2))
        require_depths(
            state, {f"stage{place}.{{}}.branch2.0.weight": repeats for place, (_, repeats) in stages}
        )
        halves = {f"stage{place}.0.branch2.0.weight": width // 2 for place, (width, _) in stages}
        require_widths(state, {**halves, "conv5.0.weight": head})
        return {}

    return read


SQUEEZENETS = {"squeezenet1-0": _squeeze(96, 7, 2, 6), "squeezenet1-1": _squeeze(64, 3, 1, 3)}
SHUFFLENETS = {
    "shufflenet-v2-x0-5": _shuffle(48, 96, 192),
    "shufflenet-v2-x1-0": _shuffle(116, 232, 464),
    "shufflenet-v2-x1-5": _shuffle(176, 352, 704),
    "shufflenet-v2-x2-0": _shuffle(244, 488, 976, head=2048),
}
