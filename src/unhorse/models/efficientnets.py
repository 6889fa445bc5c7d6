"""EfficientNet (Tan and Le, ICML 2019) and EfficientNetV2 (ICML 2021), named as in torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from unhorse.models.layers import (
    Residual,
    SqueezeExcitation,
    convolution,
    multiple_of_8,
    require_depths,
    require_widths,
)
from unhorse.models.registry import (
    HALVES,
    IMAGENET,
    Architecture,
    ImageShape,
    Naming,
    Signs,
    State,
    assumed,
)
from unhorse.models.timm_blocks import flat_blocks, staged_blocks

EFFICIENT_STAGES = (
    *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
    *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
"""Expansion, kernel size, stride, width and repeats of EfficientNet's stages."""


class Stage(NamedTuple):
    """Equal blocks, of which the first has the stride; `fused` ones have one convolution for two."""

    expansion: int
    size: int
    stride: int
    width: int
    repeats: int
    fused: bool = False


class EfficientNet(nn.Module):
    """All EfficientNets, without stochastic depth, which acts in training only.

    `eps` is of the batch normalisations; `same` pads as TensorFlow does, of which timm's tf_ networks and
    the package efficientnet-pytorch took their weights.
    """

    def __init__(  # noqa: PLR0913 (one class for the whole family)
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        stages: Sequence[Stage],
        stem: int,
        head: int,
        eps: float = 1e-5,
        same: bool = False,
    ) -> None:
        super().__init__()
        convolve = partial(convolution, eps=float(eps), same=bool(same))
        layers: list[nn.Module] = [convolve(image_shape[0], stem, 3, stride=2, activation=nn.SiLU)]
        wide = stem
        for stage in stages:
            blocks = []
            for index in range(stage.repeats):
                blocks.append(_block(convolve, wide, stage, stride=1 if index else stage.stride))
                wide = stage.width
            layers.append(nn.Sequential(*blocks))
        layers.append(convolve(wide, head, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def _block(convolve: Callable[..., nn.Module], wide: int, stage: Stage, *, stride: int) -> nn.Module:
    inner = wide * stage.expansion
    layers: list[nn.Module] = []
    if stage.fused:
        narrow = stage.width if stage.expansion == 1 else inner
        layers = [convolve(wide, narrow, stage.size, stride=stride, activation=nn.SiLU)]
        layers += [convolve(inner, stage.width, 1)] if stage.expansion > 1 else []
    else:
        layers = [convolve(wide, inner, 1, activation=nn.SiLU)] if stage.expansion > 1 else []
        layers.append(convolve(inner, inner, stage.size, stride=stride, groups=inner, activation=nn.SiLU))
        layers += [SqueezeExcitation(inner, wide // 4), convolve(inner, stage.width, 1)]
    return Residual("block", nn.Sequential(*layers), skip=stride == 1 and wide == stage.width)


def _reader(stages: Sequence[Stage], stem: int, head: int) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        depths = {
            f"features.{place}.{{}}.block.0.0.weight": stage.repeats for place, stage in enumerate(stages, 1)
        }
        require_depths(state, depths)
        last = f"features.{len(stages) + 1}.0.weight"
        require_widths(state, {"features.0.0.weight": stem, last: head})
        return {}

    return read


def _timm(state: State) -> State:
    """timm's names, of EfficientNet and of those it took from TensorFlow."""
    if "conv_stem.weight" not in state or "classifier.weight" not in state:
        raise ValueError("not named as in timm")
    rest = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    return _gathered(state, list(staged_blocks(state)), rest, ("conv_head", "bn2"))


def _package(state: State) -> State:
    """The names of the package efficientnet-pytorch."""
    if "_conv_stem.weight" not in state or "_blocks.0._se_reduce.weight" not in state:
        raise ValueError("not named as in efficientnet-pytorch")
    rest = {"_conv_stem": "features.0.0", "_bn0": "features.0.1", "_fc": "classifier.1"}
    return _gathered(state, list(flat_blocks(state)), rest, ("_conv_head", "_bn1"))


def _gathered(
    state: State,
    blocks: list[tuple[int, int, dict[str, Tensor]]],
    rest: dict[str, str],
    head: tuple[str, str],
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for stage, place, block in blocks:
        renamed |= {f"features.{stage + 1}.{place}.block.{name}": tensor for name, tensor in block.items()}
    last = max(stage for stage, _, _ in blocks) + 2
    rest |= {head[0]: f"features.{last}.0", head[1]: f"features.{last}.1"}
    for name, tensor in state.items():
        if not name.startswith(("blocks.", "_blocks.")):
            layer, _, leaf = name.rpartition(".")
            renamed[f"{rest[layer]}.{leaf}"] = tensor
    return renamed


_TF = (("eps", 1e-3), ("same", True))
_LIKE_TIMM = (
    "MD301 padding and eps assumed as in timm's efficientnet_*: for a tf_efficientnet_*, whose tensors have "
    "the same names, pass --arch tf-efficientnet-..."
)
_LIKE_TF = (
    "MD301 padding, eps and normalisation assumed as in timm's tf_efficientnetv2_*, the ones with weights"
)
_PACKAGE = Naming(change=_package, options=_TF)
_TIMM = Naming(change=_timm, notes=(_LIKE_TIMM,))
_TIMM_V2 = Naming(change=_timm, options=_TF, normal=HALVES, notes=(_LIKE_TF,))
_PLAIN_TIMM = Naming(change=_timm)


class _Plan(NamedTuple):
    """The stages of a network, the widths of the first and the last convolution, torchvision's eps."""

    stages: tuple[Stage, ...]
    stem: int
    head: int
    eps: float

    def architecture(self, namings: tuple[Naming, ...], twin: str = "") -> Architecture:
        """The entry of the registry; a `twin` is the network of the same tensors that is tried before it."""
        signs = Signs(
            "features.0.0.weight",
            "classifier.1.weight",
            assumed(224),
            _reader(self.stages, self.stem, self.head),
            namings,
            (f"features.{len(self.stages) + 1}.0.weight",),
        )
        network = partial(EfficientNet, stages=self.stages, stem=self.stem, head=self.head)
        network = partial(network, eps=1e-3, same=True) if twin else partial(network, eps=self.eps)
        family = "tf-efficientnet" if twin else "efficientnet"
        return Architecture(network, (3, 224, 224), signs, IMAGENET, ("eps", "same"), family, twin)


def _scaled(wide: float, deep: float, eps: float) -> _Plan:
    stages = tuple(
        Stage(expansion, size, stride, multiple_of_8(width * wide), math.ceil(repeats * deep))
        for expansion, size, stride, width, repeats in EFFICIENT_STAGES
    )
    return _Plan(stages, multiple_of_8(32 * wide), 4 * stages[-1].width, eps)


def _second(*stages: tuple[int, int, int, int]) -> _Plan:
    """EfficientNetV2 from expansion, stride, width and repeats of its stages, of which three are fused."""
    listed = tuple(
        Stage(expansion, 3, stride, width, repeats, fused=place < 3)
        for place, (expansion, stride, width, repeats) in enumerate(stages)
    )
    return _Plan(listed, stages[0][2], 1280, 1e-3)


# torchvision trained the first five with the usual eps
_FIRST = {
    "b0": _scaled(1.0, 1.0, 1e-5),
    "b1": _scaled(1.0, 1.1, 1e-5),
    "b2": _scaled(1.1, 1.2, 1e-5),
    "b3": _scaled(1.2, 1.4, 1e-5),
    "b4": _scaled(1.4, 1.8, 1e-5),
    "b5": _scaled(1.6, 2.2, 1e-3),
    "b6": _scaled(1.8, 2.6, 1e-3),
    "b7": _scaled(2.0, 3.1, 1e-3),
}
_SECOND = {
    "v2-s": _second(
        *((1, 1, 24, 2), (4, 2, 48, 4), (4, 2, 64, 4)),
        *((4, 2, 128, 6), (6, 1, 160, 9), (6, 2, 256, 15)),
    ),
    "v2-m": _second(
        *((1, 1, 24, 3), (4, 2, 48, 5), (4, 2, 80, 5)),
        *((4, 2, 160, 7), (6, 1, 176, 14), (6, 2, 304, 18), (6, 1, 512, 5)),
    ),
    "v2-l": _second(
        *((1, 1, 32, 4), (4, 2, 64, 7), (4, 2, 96, 7)),
        *((4, 2, 192, 10), (6, 1, 224, 19), (6, 2, 384, 25), (6, 1, 640, 7)),
    ),
}
EFFICIENTNETS = {
    **{f"efficientnet-{size}": plan.architecture((_TIMM, _PACKAGE)) for size, plan in _FIRST.items()},
    **{f"efficientnet-{size}": plan.architecture((_TIMM_V2,)) for size, plan in _SECOND.items()},
    **{
        f"tf-efficientnet-{size}": plan.architecture((_PLAIN_TIMM, _PACKAGE), f"efficientnet-{size}")
        for size, plan in _FIRST.items()
    },
}
