"""RegNetX and RegNetY (Radosavovic et al., CVPR 2020), named as in torchvision."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from unhorse.models.layers import SqueezeExcitation, convolution, require_depths, require_widths
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Naming, Signs, State, assumed


class Plan(NamedTuple):
    """The depths and widths of four stages, the width of a group, and whether there is squeeze-excitation."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group: int
    squeeze: bool


class RegNetBlock(nn.Module):
    """A bottleneck of full width with grouped 3x3 convolution; the gate's width follows the block's input."""

    def __init__(self, wide: int, width: int, *, stride: int, group: int, squeeze: bool) -> None:
        super().__init__()
        self.proj = convolution(wide, width, 1, stride=stride) if (wide, 1) != (width, stride) else None
        groups = width // min(group, width)
        parts: dict[str, nn.Module] = {
            "a": convolution(wide, width, 1, activation=nn.ReLU),
            "b": convolution(width, width, 3, stride=stride, groups=groups, activation=nn.ReLU),
        }
        if squeeze:
            parts["se"] = SqueezeExcitation(width, round(wide / 4), activation=nn.ReLU)
        parts["c"] = convolution(width, width, 1)
        self.f = nn.Sequential(OrderedDict[str, nn.Module](parts))

    def forward(self, maps: Tensor) -> Tensor:
        return functional.relu(self.f(maps) + (maps if self.proj is None else self.proj(maps)))


class RegNet(nn.Module):
    """A stem and four stages, each halving the images."""

    def __init__(self, num_classes: int, image_shape: ImageShape, *, plan: Plan) -> None:
        super().__init__()
        self.stem = convolution(image_shape[0], 32, 3, stride=2, activation=nn.ReLU)
        stages: dict[str, nn.Module] = {}
        wide = 32
        for place, (depth, width) in enumerate(zip(plan.depths, plan.widths, strict=True), 1):
            blocks: dict[str, nn.Module] = {}
            for index in range(depth):
                blocks[f"block{place}-{index}"] = RegNetBlock(
                    wide, width, stride=1 if index else 2, group=plan.group, squeeze=plan.squeeze
                )
                wide = width
            stages[f"block{place}"] = nn.Sequential(OrderedDict[str, nn.Module](blocks))
        self.trunk_output = nn.Sequential(OrderedDict[str, nn.Module](stages))
        self.fc = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.trunk_output(self.stem(images)).mean((2, 3)))


def _plan(squeeze: bool, depth: int, first: int, slope: float, step: float, group: int) -> Plan:
    """The widths of the paper's section 3.3: linear, quantised to powers of `step`, to 8, then to groups."""
    quantised = []
    for index in range(depth):
        power = round(math.log((first + slope * index) / first) / math.log(step))
        quantised.append(round(first * step**power / 8) * 8)
    widths = sorted(set(quantised))
    fitting = tuple(_multiple_of(width, min(group, width)) for width in widths)
    return Plan(tuple(quantised.count(width) for width in widths), fitting, group, squeeze)


def _multiple_of(width: int, group: int) -> int:
    rounded = max(group, int(width + group / 2) // group * group)
    return rounded if rounded >= 0.9 * width else rounded + group


def _reader(plan: Plan) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        names = {place: f"trunk_output.block{place}.block{place}-" for place in range(1, 5)}
        require_depths(state, {names[place] + "{}.f.a.0.weight": plan.depths[place - 1] for place in names})
        require_widths(state, {names[place] + "0.f.a.0.weight": plan.widths[place - 1] for place in names})
        if (names[1] + "0.f.se.fc1.weight" in state) != plan.squeeze:
            raise ValueError("squeeze-excitation is in the one and not in the other")
        return {}

    return read


def _timm(state: State) -> State:
    """timm numbers the blocks of a stage from 1 and calls the layers conv1 to conv3."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"s(\d)\.b(\d+)\.(.+)", name):
            rest = re.sub(r"^downsample\.", "proj.", match[3])
            rest = re.sub(r"^conv([123])\.", lambda found: f"f.{'abc'[int(found[1]) - 1]}.", rest)
            rest = re.sub(r"^se\.", "f.se.", rest)
            name = f"trunk_output.block{match[1]}.block{match[1]}-{int(match[2]) - 1}.{rest}"
        name = re.sub(r"^head\.fc\.", "fc.", name)
        renamed[re.sub(r"\bconv\.(?=\w+$)", "0.", re.sub(r"\bbn\.(?=\w+$)", "1.", name))] = tensor
    return renamed


_NAMINGS = (Naming(change=_timm),)


def _regnet(squeeze: bool, *numbers: float) -> Architecture:
    depth, first, slope, step, group = numbers
    plan = _plan(squeeze, int(depth), int(first), slope, step, int(group))
    marks = ("trunk_output.block4.block4-0.f.a.0.weight",)
    signs = Signs("stem.0.weight", "fc.weight", assumed(224), _reader(plan), _NAMINGS, marks)
    family = "regnet-y" if squeeze else "regnet-x"
    return Architecture(partial(RegNet, plan=plan), (3, 224, 224), signs, IMAGENET, family=family)


# depth, first width, slope, step and width of a group of the paper's tables; the numbers of torchvision
_X = {
    "400mf": (22, 24, 24.48, 2.54, 16),
    "800mf": (16, 56, 35.73, 2.28, 16),
    "1-6gf": (18, 80, 34.01, 2.25, 24),
    "3-2gf": (25, 88, 26.31, 2.25, 48),
    "8gf": (23, 80, 49.56, 2.88, 120),
    "16gf": (22, 216, 55.59, 2.1, 128),
    "32gf": (23, 320, 69.86, 2.0, 168),
}
_Y = {
    "400mf": (16, 48, 27.89, 2.09, 8),
    "800mf": (14, 56, 38.84, 2.4, 16),
    "1-6gf": (27, 48, 20.71, 2.65, 24),
    "3-2gf": (21, 80, 42.63, 2.66, 24),
    "8gf": (17, 192, 76.82, 2.19, 56),
    "16gf": (18, 200, 106.23, 2.48, 112),
    "32gf": (20, 232, 115.89, 2.53, 232),
    "128gf": (27, 456, 160.83, 2.52, 264),
}
REGNETS = {
    **{f"regnet-x-{size}": _regnet(False, *numbers) for size, numbers in _X.items()},
    **{f"regnet-y-{size}": _regnet(True, *numbers) for size, numbers in _Y.items()},
}
