"""GoogLeNet (Szegedy et al., CVPR 2015) and Inception v3 (CVPR 2016), named as in torchvision.

Their auxiliary heads act in training only: where a file has them they are left out. torchvision's trained
ones rescale their input from ImageNet's normalisation to mean and deviation 0.5 ("transform_input"); here
that is the normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.models.registry import HALVES, Architecture, ImageShape, Naming, Signs, State, assumed


class Unit(nn.Module):
    """Convolution without bias, normalisation, ReLU; with stride 1 it keeps the size of the maps."""

    def __init__(
        self, wide: int, width: int, kernel: tuple[int, int], *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(wide, width, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, maps: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(maps)))


class GoogLeNetBlock(nn.Module):
    """Four branches side by side; torchvision's branch of 5x5 has 3x3, and so have its weights."""

    def __init__(self, wide: int, widths: Sequence[int]) -> None:
        super().__init__()
        plain, reduced3, width3, reduced5, width5, pooled = widths
        self.branch1 = Unit(wide, plain, (1, 1))
        self.branch2 = nn.Sequential(Unit(wide, reduced3, (1, 1)), Unit(reduced3, width3, (3, 3)))
        self.branch3 = nn.Sequential(Unit(wide, reduced5, (1, 1)), Unit(reduced5, width5, (3, 3)))
        pool = nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True)
        self.branch4 = nn.Sequential(pool, Unit(wide, pooled, (1, 1)))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat(
            [self.branch1(maps), self.branch2(maps), self.branch3(maps), self.branch4(maps)], dim=1
        )


# the widths of the branches, and the pooling before a block
_GOOGLENET = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
_GOOGLENET_POOLS = {"inception3a": 3, "inception4a": 3, "inception5a": 2}


class GoogLeNet(nn.Module):
    """GoogLeNet with batch normalisation."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.conv1 = Unit(image_shape[0], 64, (7, 7), stride=2)
        self.conv2, self.conv3 = Unit(64, 64, (1, 1)), Unit(64, 192, (3, 3))
        wide = 192
        for name, widths in _GOOGLENET.items():
            self.add_module(name, GoogLeNetBlock(wide, widths))
            wide = widths[0] + widths[2] + widths[4] + widths[5]
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = functional.max_pool2d(self.conv1(images), 3, stride=2, ceil_mode=True)
        maps = self.conv3(self.conv2(maps))
        for name in _GOOGLENET:
            if size := _GOOGLENET_POOLS.get(name):
                maps = functional.max_pool2d(maps, size, stride=2, ceil_mode=True)
            maps = self.get_submodule(name)(maps)
        return self.fc(self.dropout(maps.mean((2, 3))))


class Step(NamedTuple):
    """A unit of a branch; one with stride 2 is not padded."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Branch(NamedTuple):
    """Steps one after the other, then `ends` side by side."""

    steps: tuple[Step, ...]
    ends: tuple[Step, ...] = ()


class Mixed(nn.Module):
    """Branches side by side; the last is an average pooling and a unit, or a halving one without `pooled`."""

    def __init__(self, wide: int, branches: Sequence[Branch], pooled: int = 0) -> None:
        super().__init__()
        self.branches = tuple(branches)
        self.width = pooled or wide
        for branch in self.branches:
            before = wide
            for step in branch.steps:
                self._add(before, step)
                before = step.width
            for end in branch.ends:
                self._add(before, end)
            self.width += sum(end.width for end in branch.ends) or before
        self.branch_pool = Unit(wide, pooled, (1, 1)) if pooled else None

    def _add(self, wide: int, step: Step) -> None:
        unit = Unit(wide, step.width, step.kernel, stride=step.stride, padded=step.stride == 1)
        self.add_module(step.name, unit)

    def forward(self, maps: Tensor) -> Tensor:
        out = []
        for branch in self.branches:
            along = maps
            for step in branch.steps:
                along = self.get_submodule(step.name)(along)
            out += [self.get_submodule(end.name)(along) for end in branch.ends] or [along]
        if self.branch_pool is None:
            out.append(functional.max_pool2d(maps, 3, stride=2))
        else:
            out.append(self.branch_pool(functional.avg_pool2d(maps, 3, stride=1, padding=1)))
        return torch.cat(out, dim=1)


def _mixed_35(wide: int, pooled: int) -> Mixed:
    five = (Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5)))
    double = (Step("branch3x3dbl_1", 64), *(Step(f"branch3x3dbl_{place}", 96, (3, 3)) for place in (2, 3)))
    return Mixed(wide, (Branch((Step("branch1x1", 64),)), Branch(five), Branch(double)), pooled)


def _mixed_to_17(wide: int) -> Mixed:
    double = (
        *(Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, (3, 3))),
        Step("branch3x3dbl_3", 96, (3, 3), 2),
    )
    return Mixed(wide, (Branch((Step("branch3x3", 384, (3, 3), 2),)), Branch(double)))


def _mixed_17(wide: int, inner: int) -> Mixed:
    seven = (
        *(Step("branch7x7_1", inner), Step("branch7x7_2", inner, (1, 7))),
        Step("branch7x7_3", 192, (7, 1)),
    )
    double = (
        *(Step("branch7x7dbl_1", inner), Step("branch7x7dbl_2", inner, (7, 1))),
        *(Step("branch7x7dbl_3", inner, (1, 7)), Step("branch7x7dbl_4", inner, (7, 1))),
        Step("branch7x7dbl_5", 192, (1, 7)),
    )
    return Mixed(wide, (Branch((Step("branch1x1", 192),)), Branch(seven), Branch(double)), 192)


def _mixed_to_8(wide: int) -> Mixed:
    three = (Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), 2))
    seven = (
        *(Step("branch7x7x3_1", 192), Step("branch7x7x3_2", 192, (1, 7))),
        *(Step("branch7x7x3_3", 192, (7, 1)), Step("branch7x7x3_4", 192, (3, 3), 2)),
    )
    return Mixed(wide, (Branch(three), Branch(seven)))


def _mixed_8(wide: int) -> Mixed:
    three = Branch(
        (Step("branch3x3_1", 384),),
        (Step("branch3x3_2a", 384, (1, 3)), Step("branch3x3_2b", 384, (3, 1))),
    )
    double = Branch(
        (Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, (3, 3))),
        (Step("branch3x3dbl_3a", 384, (1, 3)), Step("branch3x3dbl_3b", 384, (3, 1))),
    )
    return Mixed(wide, (Branch((Step("branch1x1", 320),)), three, double), 192)


class InceptionV3(nn.Module):
    """Inception v3; images of 299x299, or of 75x75 and more."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(image_shape[0], 32, (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
            _mixed_35(192, 32),
            _mixed_35(256, 64),
            _mixed_35(288, 64),
        )
        self.Mixed_6a = _mixed_to_17(288)
        self.Mixed_6b, self.Mixed_6c = _mixed_17(768, 128), _mixed_17(768, 160)
        self.Mixed_6d, self.Mixed_6e = _mixed_17(768, 160), _mixed_17(768, 192)
        self.Mixed_7a = _mixed_to_8(768)
        self.Mixed_7b, self.Mixed_7c = _mixed_8(1280), _mixed_8(2048)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        maps = functional.max_pool2d(maps, 3, stride=2)
        maps = functional.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(maps)), 3, stride=2)
        maps = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(maps)))
        maps = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(maps)))))
        maps = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(maps)))
        return self.fc(self.dropout(maps.mean((2, 3))))


def _without_heads(state: State) -> State:
    return {
        name: value for name, value in state.items() if not name.startswith(("aux1.", "aux2.", "AuxLogits."))
    }


_RESCALED = (
    "MD301 normalisation assumed that of torchvision's trained weights, which rescale their input "
    "(transform_input); for a network trained without, pass --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
)
_HEADS = Naming(change=_without_heads, notes=(_RESCALED,))


def _inception(network: type[nn.Module], side: int, first: str, mark: str) -> Architecture:
    signs = Signs(first, "fc.weight", assumed(side), namings=(_HEADS,), marks=(mark,))
    return Architecture(network, (3, side, side), signs, HALVES)


INCEPTIONS = {
    "googlenet": _inception(GoogLeNet, 224, "conv1.conv.weight", "inception5b.branch4.1.conv.weight"),
    "inception-v3": _inception(
        InceptionV3, 299, "Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.conv.weight"
    ),
}
