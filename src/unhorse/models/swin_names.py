"""How the state dicts of Swin networks are named, and what their buffers must hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unhorse.models.layers import require_depths, require_widths
from unhorse.models.registry import IMAGENET, Architecture, Naming, Renames, Signs, State, assumed
from unhorse.models.swins import Plan, SwinTransformer, distances, positions, shifted_mask

_FOREIGN: Renames = (
    *((r"^patch_embed\.proj\.", "features.0.0."), (r"^patch_embed\.norm\.", "features.0.2.")),
    *((r"^layers\.(\d)\.blocks\.", r"stage\1."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3.")),
    *((r"^layers\.(\d)\.downsample\.", r"merging\1."), (r"^head\.fc\.", "head.")),
)
_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")


def _without_buffers(state: State, window: int) -> dict[str, Tensor]:
    """The state without its constants; ValueError where one is not what this window makes it.

    A network of that code would compute with whatever the file has there, and this one would not.
    """
    kept: dict[str, Tensor] = {}
    wanted: dict[tuple[str, torch.Size], Tensor] = {}
    for name, tensor in state.items():
        kind = name.rpartition(".")[2]
        if kind not in _BUFFERS:
            kept[name] = tensor
            continue
        place = (kind, tensor.shape)
        if place not in wanted:
            wanted[place] = _constant(kind, tensor.shape, window)
        # outlines have shapes only
        if not tensor.is_meta and not torch.allclose(tensor.double(), wanted[place].double(), atol=1e-4):
            raise ValueError(f"{name} is not the constant of a window of {window}")
    return kept


def _constant(kind: str, shape: torch.Size, window: int) -> Tensor:
    cpu = torch.device("cpu")
    if kind == "relative_position_index":
        return positions(window, cpu).reshape(shape)
    if kind == "relative_coords_table":
        return distances(window, cpu).reshape(shape)
    return shifted_mask(window * math.isqrt(shape[0]), window).reshape(shape)


def _window_of(state: State) -> int:
    """The window of the first version, from the size of a table of positions."""
    tables = (value for name, value in state.items() if name.endswith("relative_position_bias_table"))
    table = next(tables, None)
    if table is None:
        raise ValueError("no table of positions")
    return (math.isqrt(len(table)) + 1) // 2


def _window_told(state: State) -> int | None:
    """The window of the second version, from the size of a buffer, if the file has one."""
    for name, value in state.items():
        if name.endswith("relative_coords_table"):
            return (value.shape[1] + 1) // 2
        if name.endswith("relative_position_index"):
            return math.isqrt(math.isqrt(value.numel()))
    return None


def _named_here(state: State, window: int | None = None) -> State:
    return _without_buffers(state, _required(state, window))


def _required(state: State, window: int | None) -> int:
    """The window of a state; ValueError unless the buffers tell the one that is asked for."""
    if window is None:
        return _window_of(state)
    if _window_told(state) != window:
        raise ValueError(f"nothing in the file says that the window is {window}")
    return window


def _guessed(state: State) -> State:
    if _window_told(state):
        raise ValueError("the file tells the window")
    return _placed(dict(state))


def _named_elsewhere(state: State, window: int | None = None) -> State:
    return _placed(_without_buffers(state, _required(state, window)))


def _placed(state: dict[str, Tensor]) -> State:
    """The names of Microsoft's code and timm's, old and new, after `_FOREIGN`."""
    merged = {int(match[1]) for name in state if (match := re.match(r"merging(\d)\.", name))}
    first = 0 if 0 in merged else 1  # timm moved the merging from the end of a stage to the start of the next
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"stage(\d)\.(.+)", name):
            name = f"features.{2 * int(match[1]) + 1}.{match[2]}"
        elif match := re.fullmatch(r"merging(\d)\.(.+)", name):
            name = f"features.{2 * (int(match[1]) - first) + 2}.{match[2]}"
        renamed[name] = tensor
    for name in [name for name in renamed if name.endswith(".q_bias")]:
        start = name.removesuffix("q_bias")
        query, value = renamed.pop(name), renamed.pop(start + "v_bias")
        renamed[start + "qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return renamed


_UNKNOWN = "MD301 a window of 8 patches is assumed: the file has no buffer that tells it"
_FIRST = (Naming(change=_named_here), Naming(_FOREIGN, _named_elsewhere))
_SECOND = (
    *(
        Naming(renames, partial(change, window=size), (("window", size),))
        for size in (8, 16)
        for renames, change in (((), _named_here), (_FOREIGN, _named_elsewhere))
    ),
    Naming(_FOREIGN, _guessed, notes=(_UNKNOWN,)),
)


def _reader(plan: Plan) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        stages = enumerate(plan.depths)
        require_depths(
            state, {f"features.{2 * place + 1}.{{}}.norm1.weight": depth for place, depth in stages}
        )
        require_widths(state, {"features.0.0.weight": plan.width})
        return {} if plan.second or _window_of(state) == 7 else {"window": _window_of(state)}

    return read


def _side(state: State) -> tuple[int, bool]:
    return 32 * _window_of(state), False


def _swin(width: int, third: int, heads: int, *, second: bool = False) -> Architecture:
    plan = Plan(width, (2, 2, third, 2), tuple(heads * 2**place for place in range(4)), second)
    window = 8 if second else 7
    side = 32 * window
    attention = "features.1.0.attn." + ("logit_scale" if second else "relative_position_bias_table")
    signs = Signs(
        *("features.0.0.weight", "head.weight", assumed(256) if second else _side, _reader(plan)),
        *(_SECOND if second else _FIRST, (attention,)),
    )
    network = partial(SwinTransformer, plan=plan, window=window)
    family = "swin-v2" if second else "swin"
    return Architecture(network, (3, side, side), signs, IMAGENET, ("window",), family)


SWINS = {
    "swin-t": _swin(96, 6, 3),
    "swin-s": _swin(96, 18, 3),
    "swin-b": _swin(128, 18, 4),
    "swin-l": _swin(192, 18, 6),
    "swin-v2-t": _swin(96, 6, 3, second=True),
    "swin-v2-s": _swin(96, 18, 3, second=True),
    "swin-v2-b": _swin(128, 18, 4, second=True),
}
