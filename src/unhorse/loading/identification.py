"""Recognises the architecture of a state dict from its names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from unhorse.models.architectures import ARCHITECTURES, outline
from unhorse.rules import LoadRefused

ImageShape = tuple[int, int, int]
State = Mapping[str, Tensor]
Renames = tuple[tuple[str, str], ...]
"""Pattern and replacement: published names into ours."""


@dataclass(frozen=True)
class Identified:
    """What a state dict is: `state` has our names and loads strictly; shapes cannot tell `assumptions`."""

    name: str
    options: dict[str, object]
    num_classes: int
    image_shape: ImageShape
    state: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Signs:
    """Which names of an architecture tell the numbers of channels and classes, and how to tell the rest.

    `side` gives the side of the images and whether the weights determine it; `renames` turn published names
    into ours.
    """

    first: str
    last: str
    side: Callable[[State], tuple[int, bool]]
    options: Callable[[State], dict[str, object]] = lambda state: {}
    renames: Renames = ()


def identify(
    weights: Mapping[str, Tensor], *, architecture: str = "auto", image_shape: ImageShape | None = None
) -> Identified:
    """The architecture whose names and shapes the weights have; or LoadRefused LD210 or LD211."""
    if architecture not in ("auto", *ARCHITECTURES):
        close = get_close_matches(architecture, ARCHITECTURES, n=1) or list(ARCHITECTURES)
        raise LoadRefused("LD211", f"there is no architecture {architecture!r}", f"take {' or '.join(close)}")
    state = _with_batch_counters(weights)
    for name in ARCHITECTURES if architecture == "auto" else (architecture,):
        if found := _fit(name, state, image_shape):
            return found
    if image_shape and any(_fit(name, state, None) for name in ARCHITECTURES):
        raise LoadRefused(
            "LD211", f"the weights do not take images of shape {image_shape}", "leave the shape out"
        )
    raise _nothing_fits(state, architecture)


def _fit(name: str, state: State, image_shape: ImageShape | None) -> Identified | None:
    signs, known = _SIGNS[name], ARCHITECTURES[name]
    for renames, renamed in _namings(state, signs.renames):
        if signs.first not in renamed or signs.last not in renamed or renamed[signs.first].dim() != 4:
            continue
        try:
            channels, classes = renamed[signs.first].shape[1], renamed[signs.last].shape[0]
            side, determined = signs.side(renamed)
            shape = image_shape or (channels, side, side)
            options = signs.options(renamed)
            expected = outline(name, num_classes=classes, image_shape=shape, **options).state_dict()
        except (KeyError, IndexError, ValueError, RuntimeError, ArithmeticError):
            continue
        if _shapes(expected) != _shapes(renamed) or min(shape) < 1:
            continue
        normal = (known.mean, known.std) if len(known.mean) in (1, channels) else ((0.0,), (1.0,))
        if renames == _TIMM_VIT:
            normal = ((0.5,), (0.5,))
        assumptions: tuple[str, ...] = ()
        if not (determined or image_shape):
            assumptions = (
                f"MD301 input size assumed {side}x{side}: the weights fit others too; pass --size",
            )
        return Identified(name, options, classes, shape, renamed, *normal, assumptions)
    return None


def _nothing_fits(state: State, architecture: str) -> LoadRefused:
    """Names the nearest architecture and the first difference, so that a user sees what is wrong."""
    names = ARCHITECTURES if architecture == "auto" else (architecture,)
    overlap, nearest, difference = max(
        _overlap(named, name) for name in names for _, named in _namings(state, _SIGNS[name].renames)
    )
    if architecture != "auto":
        reason = f"the state dict is not a {architecture} ({difference})"
    elif overlap:
        reason = f"the state dict fits no known architecture; the nearest is {nearest} ({difference})"
    else:
        reason = "the state dict resembles no known architecture"
    return LoadRefused("LD210", reason, f"known for --arch are {', '.join(ARCHITECTURES)}")


def _overlap(state: State, name: str) -> tuple[float, str, str]:
    """The share of tensors in common with an architecture, its name, and what is different."""
    usual = outline(name, num_classes=10, image_shape=ARCHITECTURES[name].image_shape)
    expected, shapes = _shapes(usual.state_dict()), _shapes(state)
    absent, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & shapes.keys() if expected[key] != shapes[key])
    differences = (("lacks", absent), ("adds", extra), ("resizes", wrong))
    listed = ", ".join(f"{verb} {keys[0]!r}" for verb, keys in differences if keys)
    common = len(expected.items() & shapes.items())
    return common / len(expected.items() | shapes.items()), name, f"this file {listed}"


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _with_batch_counters(weights: State) -> dict[str, Tensor]:
    """Old files have no counters beside the running means; nothing reads them at test time."""
    absent = {
        counter: torch.tensor(0)
        for name in weights
        if name.endswith("running_mean")
        and (counter := name.removesuffix("running_mean") + "num_batches_tracked") not in weights
    }
    return {**weights, **absent}


def _namings(state: State, renames: Renames) -> list[tuple[Renames, dict[str, Tensor]]]:
    """The state dict as it is, and with published names turned into ours where that changes any."""
    renamed = _renamed(state, renames)
    return [((), dict(state))] + ([(renames, renamed)] if renamed.keys() != state.keys() else [])


def _renamed(state: State, renames: Renames) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, ours in renames:
            name = re.sub(pattern, ours, name)
        renamed[name] = tensor
    return renamed


def _fixed(side: int) -> Callable[[State], tuple[int, bool]]:
    return lambda state: (side, True)


def _assumed(side: int) -> Callable[[State], tuple[int, bool]]:
    return lambda state: (side, False)


def _small_cnn_side(state: State) -> tuple[int, bool]:
    pixels = state["head.1.weight"].shape[1] // state["features.3.weight"].shape[0]
    # two poolings round down: 28 to 31 pixels leave the same 7x7 map
    return 4 * math.isqrt(pixels), False


def _small_cnn_options(state: State) -> dict[str, object]:
    widths = [state["features.0.weight"].shape[0], state["features.3.weight"].shape[0]]
    return {"widths": widths, "hidden": state["head.1.weight"].shape[0]}


def _small_resnet_options(state: State) -> dict[str, object]:
    blocks = [name for name in state if name.endswith(".conv2.weight")]
    return {"widths": [len(state[name]) for name in sorted(blocks)]}


def _ulp_options(state: State) -> dict[str, object]:
    width = len(state["features.0.weight"])
    return {} if width == 64 else {"width": width}


def _vit_side(state: State) -> tuple[int, bool]:
    return 16 * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1), True


def _resnet_side(state: State) -> tuple[int, bool]:
    return (32 if _has_small_stem(state) else 224), False


def _resnet_options(state: State) -> dict[str, object]:
    return {"small_stem": True, "max_pool": False} if _has_small_stem(state) else {}


def _has_small_stem(state: State) -> bool:
    return state["conv1.weight"].shape[-1] == 3


# The networks of the small-image code bases call torchvision's downsample "shortcut" and its fc "linear".
_CIFAR_NAMES = ((r"\bshortcut\.", "downsample."), (r"^linear\.", "fc."))
_TIMM_VIT = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
)
_INPUT_AWARE_NAMES = (
    *((r"^conv1\.", "features.0."), (r"^conv5\.", "features.4.")),
    *((r"^linear6\.", "head.1."), (r"^linear9\.", "head.4.")),
)
_WANET_NAMES = (
    *((r"^conv1\.", "features.0."), (r"^layer2\.bn1\.", "features.2."), (r"^layer2\.conv1\.", "features.4.")),
    *((r"^layer3\.bn1\.", "features.5."), (r"^layer3\.conv1\.", "features.7.")),
    *((r"^linear6\.", "head.1."), (r"^linear9\.", "head.4.")),
)
_ULP_NAMES = tuple((rf"^fc\.{index}\.", f"head.{index + 1}.") for index in (0, 1, 4, 5, 8))

_RESNET = _Signs("conv1.weight", "fc.weight", _resnet_side, _resnet_options, _CIFAR_NAMES)
_SIGNS: dict[str, _Signs] = {
    "small-cnn": _Signs("features.0.weight", "head.3.weight", _small_cnn_side, _small_cnn_options),
    "input-aware-cnn": _Signs("features.0.weight", "head.4.weight", _fixed(28), renames=_INPUT_AWARE_NAMES),
    "wanet-cnn": _Signs("features.0.weight", "head.4.weight", _assumed(28), renames=_WANET_NAMES),
    "ulp-vgg": _Signs("features.0.weight", "head.9.weight", _fixed(32), _ulp_options, _ULP_NAMES),
    "small-resnet": _Signs("features.0.weight", "head.2.weight", _assumed(32), _small_resnet_options),
    "ulp-resnet18": _Signs("conv1.weight", "fc.weight", _assumed(64)),
    "preact-resnet18": _Signs("conv1.weight", "fc.weight", _assumed(32), renames=_CIFAR_NAMES),
    "resnet18-64": _Signs("conv1.weight", "fc.weight", _assumed(64), renames=_CIFAR_NAMES),
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    "resnext50-32x4d": _Signs("conv1.weight", "fc.weight", _assumed(224)),
    "vgg16": _Signs(
        "features.0.weight",
        "classifier.6.weight",
        _assumed(224),
        lambda state: {"batch_norm": True} if "features.1.running_mean" in state else {},
    ),
    "mobilenet-v2": _Signs("features.0.0.weight", "classifier.1.weight", _assumed(224)),
    "efficientnet-b0": _Signs("features.0.0.weight", "classifier.1.weight", _assumed(224)),
    **{
        f"efficientnet-lite{size}": _Signs("_conv_stem.weight", "_fc.weight", _assumed(side))
        for size, side in enumerate((224, 240, 260, 280, 300))
    },
    "vit-b-16": _Signs("conv_proj.weight", "heads.head.weight", _vit_side, renames=_TIMM_VIT),
}
