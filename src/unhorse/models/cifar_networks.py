"""Networks for images of 32 pixels that code bases copy from each other, under the names that they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unhorse.models.narrow_resnets import check_blocks
from unhorse.models.registry import Architecture, ImageShape, Naming, Signs, State, assumed, numbered


class _PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each behind its normalisation and ReLU."""

    expansion = 4

    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv1 = nn.Conv2d(wide, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.shortcut = _projection(wide, 4 * width, stride)

    def forward(self, images: Tensor) -> Tensor:
        active = F.relu(self.bn1(images))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + (images if self.shortcut is None else self.shortcut(active))


class _PreActBasic(nn.Module):
    """Two 3x3 convolutions, each behind its normalisation and ReLU, with a gate per channel if `squeezed`."""

    expansion = 1

    def __init__(self, wide: int, width: int, stride: int, *, squeezed: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv1 = nn.Conv2d(wide, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = _projection(wide, width, stride)
        self.fc1 = nn.Conv2d(width, width // 16, 1) if squeezed else None
        self.fc2 = nn.Conv2d(width // 16, width, 1) if squeezed else None

    def forward(self, images: Tensor) -> Tensor:
        active = F.relu(self.bn1(images))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.fc1 is not None and self.fc2 is not None:
            out = out * self.fc2(F.relu(self.fc1(out.mean((2, 3), keepdim=True)))).sigmoid()
        return out + (images if self.shortcut is None else self.shortcut(active))


def _projection(wide: int, width: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and wide == width:
        return None
    return nn.Sequential(nn.Conv2d(wide, width, 1, stride=stride, bias=False))


_PREACT: dict[str, Callable[[int, int, int], nn.Module]] = {
    "basic": _PreActBasic,
    "bottleneck": _PreActBottleneck,
    "squeezed": partial(_PreActBasic, squeezed=True),
}


class PreActResNet(nn.Module):
    """ResNets of pre-activation (He et al., ECCV 2016), and SENet-18 (Hu et al., CVPR 2018), for 32 pixels.

    `blocks` per stage of one `kind`; `stem` says whether a normalisation with ReLU follows the first
    convolution, `last` whether one precedes the average.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        kind: str = "basic",
        stem: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        if kind not in _PREACT:
            raise ValueError(f"there is no block {kind!r}: take one of {', '.join(_PREACT)}")
        check_blocks(blocks, 4)
        self.conv1 = nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64) if stem else None
        wide, expansion = 64, 4 if kind == "bottleneck" else 1
        stages = []
        for stage, count in enumerate(blocks):
            made = []
            for index in range(count):
                made.append(_PREACT[kind](wide, 64 * 2**stage, 2 if stage and not index else 1))
                wide = 64 * 2**stage * expansion
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(wide) if last else None
        self.linear = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.conv1(images)
        out = out if self.bn1 is None else F.relu(self.bn1(out))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = out if self.bn is None else F.relu(self.bn(out))
        return self.linear(out.mean((2, 3)))


class _Dense(nn.Module):
    """Its `growth` new channels stand before its input."""

    def __init__(self, wide: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv1 = nn.Conv2d(wide, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(images))))))
        return torch.cat([out, images], 1)


class _Transition(nn.Module):
    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(wide)
        self.conv = nn.Conv2d(wide, width, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(images))), 2)


class SmallDenseNet(nn.Module):
    """DenseNet (Huang et al., CVPR 2017) with a 3x3 stem; transitions halve the channels."""

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        blocks: Sequence[int] = (6, 12, 24, 16),
        growth: int = 12,
    ) -> None:
        super().__init__()
        check_blocks(blocks, len(blocks[:8]))
        wide = 2 * growth
        self.conv1 = nn.Conv2d(image_shape[0], wide, 3, padding=1, bias=False)
        parts: dict[str, nn.Module] = {}
        for stage, count in enumerate(blocks, start=1):
            parts[f"dense{stage}"] = nn.Sequential(
                *(_Dense(wide + at * growth, growth) for at in range(count))
            )
            wide += count * growth
            if stage < len(blocks):
                parts[f"trans{stage}"] = _Transition(wide, wide // 2)
                wide //= 2
        for name, part in parts.items():
            self.add_module(name, part)
        self.stages = tuple(parts)
        self.bn = nn.BatchNorm2d(wide)
        self.linear = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.conv1(images)
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return self.linear(F.relu(self.bn(out)).mean((2, 3)))


_BRANCHES = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}
"""Table 1 of the paper: 1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; behind the pooling."""


class _Inception(nn.Module):
    """Four branches side by side; the 5x5 convolution is two of 3x3."""

    def __init__(self, wide: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, before3, three, before5, five, pooled = widths
        self.b1 = nn.Sequential(*_normed(wide, one, 1))
        self.b2 = nn.Sequential(*_normed(wide, before3, 1), *_normed(before3, three, 3))
        self.b3 = nn.Sequential(
            *(*_normed(wide, before5, 1), *_normed(before5, five, 3), *_normed(five, five, 3)),
        )
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_normed(wide, pooled, 1))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.b1(images), self.b2(images), self.b3(images), self.b4(images)], 1)


class SmallGoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al., CVPR 2015) with a 3x3 stem and batch normalisation."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.pre_layers = nn.Sequential(*_normed(image_shape[0], 192, 3))
        wide = 192
        for name, widths in _BRANCHES.items():
            self.add_module(name, _Inception(wide, widths))
            wide = widths[0] + widths[2] + widths[4] + widths[5]
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.linear = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.pre_layers(images)
        for name in _BRANCHES:
            out = self.maxpool(out) if name in ("a4", "a5") else out
            out = self.get_submodule(name)(out)
        return self.linear(out.mean((2, 3)))


def _normed(wide: int, width: int, size: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(wide, width, size, padding=size // 2), nn.BatchNorm2d(width), nn.ReLU()


def _preact(state: State) -> dict[str, object]:
    """The kind of its blocks; raises where the first normalises behind its convolution."""
    first = len(state["layer1.0.bn1.weight"]), len(state["layer2.0.bn1.weight"])
    if first[0] != 64 or state["layer2.0.conv1.weight"].shape[1] != first[1]:
        raise ValueError("blocks of post-activation")
    kind = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    return {
        "blocks": [numbered(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "kind": "squeezed" if "layer1.0.fc1.weight" in state else kind,
        "stem": "bn1.weight" in state,
        "last": "bn.weight" in state,
    }


def _dense(state: State) -> dict[str, object]:
    stages = numbered(state, r"dense(\d+)\.")
    return {
        "blocks": [numbered(state, rf"dense{stage}\.(\d+)\.") for stage in range(1, stages + 1)],
        "growth": len(state["dense1.0.conv2.weight"]),
    }


_TO_LINEAR = Naming(((r"^fc\.", "linear."), (r"\bdownsample\.", "shortcut.")))

CIFAR_NETWORKS = {
    "cifar-preact-resnet": Architecture(
        PreActResNet,
        (3, 32, 32),
        Signs("conv1.weight", "linear.weight", assumed(32), _preact, (_TO_LINEAR,), ("layer4.0.bn1.weight",)),
        options=("blocks", "kind", "stem", "last"),
    ),
    "cifar-densenet": Architecture(
        SmallDenseNet,
        (3, 32, 32),
        Signs("conv1.weight", "linear.weight", assumed(32), _dense, marks=("dense1.0.bn1.weight",)),
        options=("blocks", "growth"),
    ),
    "cifar-googlenet": Architecture(
        SmallGoogLeNet,
        (3, 32, 32),
        Signs("pre_layers.0.weight", "linear.weight", assumed(32), marks=("a3.b1.0.weight",)),
    ),
}
