"""The inverted residual blocks of other code bases, in the order of torchvision's lists of layers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from unhorse.models.registry import State

Block = tuple[str, ...]
"""The names of a block's layers in order: "conv_dw,bn1", a convolution and its norm, is one list entry."""

# kinds of timm's blocks by the layers they have; "se" is the squeeze-excitation
_KINDS: tuple[tuple[frozenset[str], Block], ...] = (
    (frozenset({"conv_pw", "conv_dw", "conv_pwl"}), ("conv_pw,bn1", "conv_dw,bn2", "se", "conv_pwl,bn3")),
    (frozenset({"conv_exp", "conv_pwl"}), ("conv_exp,bn1", "se", "conv_pwl,bn2")),
    (frozenset({"conv_dw", "conv_pw"}), ("conv_dw,bn1", "se", "conv_pw,bn2")),
    (frozenset({"conv"}), ("conv,bn1",)),
)
_PACKAGE_KINDS: tuple[tuple[frozenset[str], Block], ...] = (
    (
        frozenset({"_expand_conv", "_depthwise_conv"}),
        ("_expand_conv,_bn0", "_depthwise_conv,_bn1", "se", "_project_conv,_bn2"),
    ),
    (frozenset({"_depthwise_conv"}), ("_depthwise_conv,_bn1", "se", "_project_conv,_bn2")),
)
_SQUEEZE = (
    ("se.conv_reduce", "fc1"),
    ("se.conv_expand", "fc2"),
    ("_se_reduce", "fc1"),
    ("_se_expand", "fc2"),
)


def staged_blocks(state: State) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Stage, place and renamed tensors ("0.1.weight": norm of the first entry) of timm's blocks.S.I."""
    blocks: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", name):
            blocks.setdefault((int(match[1]), int(match[2])), {})[match[3]] = tensor
    for stage, place in sorted(blocks):
        yield stage, place, _listed(blocks[stage, place], _KINDS)


def flat_blocks(state: State) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """The same of the package efficientnet-pytorch, _blocks.N: a stage ends where the width changes."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(.+)", name):
            blocks.setdefault(int(match[1]), {})[match[2]] = tensor
    stage, place, width = -1, 0, 0
    for number in sorted(blocks):
        block = blocks[number]
        after = len(block["_project_conv.weight"])
        stage, place = (stage, place + 1) if after == width else (stage + 1, 0)
        width = after
        yield stage, place, _listed(block, _PACKAGE_KINDS)


def _listed(block: dict[str, Tensor], kinds: tuple[tuple[frozenset[str], Block], ...]) -> dict[str, Tensor]:
    """The tensors of a block under the numbers of torchvision's list; ValueError for another kind."""
    present = {name.rpartition(".")[0] for name in block}
    layers = next((layers for needed, layers in kinds if needed <= present), None)
    if layers is None:
        raise ValueError(f"a block of {sorted(present)} is of no known kind")
    prefixes: dict[str, str] = {}
    number = 0
    for layer in layers:
        squeezes = [(theirs, ours) for theirs, ours in _SQUEEZE if theirs in present] if layer == "se" else []
        names = layer.split(",")
        prefixes |= {theirs: f"{number}.{ours}" for theirs, ours in squeezes}
        prefixes |= {} if layer == "se" else {name: f"{number}.{entry}" for entry, name in enumerate(names)}
        number += bool(squeezes) or layer != "se"
    renamed = {}
    for name, tensor in block.items():
        layer, _, leaf = name.rpartition(".")
        renamed[f"{prefixes[layer]}.{leaf}"] = tensor  # KeyError: the block has a layer of another network
    return renamed
