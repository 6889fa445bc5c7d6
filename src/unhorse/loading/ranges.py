"""Whether a network brings pixels of 0..255 to its own range before its first layer, as its graph shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_SAME_LISTED = """
permute transpose reshape flatten to squeeze unsqueeze select slice flip index_select narrow split chunk
getitem cat constant_pad_nd upsample_bilinear2d upsample_nearest2d upsample_bicubic2d expand unbind
"""
_SAME = frozenset(_SAME_LISTED.split())
_MOVES, _SCALES = ("sub", "subtract", "add"), ("div", "divide", "true_divide")
LEAST_MEAN, BYTE_SPAN = 20.0, (100.0, 300.0)
"""A mean of pixels in 0..1 is at most 1, of bytes about 120; bytes are divided by 255, 256, 127.5 or 128."""


def takes_bytes(graph: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the first arithmetic on the image subtracts a mean of bytes, or divides by some 127 to 256."""
    follow: set[Any] = {("input", 0)}
    for index, node in enumerate(graph["nodes"]):
        name = node.get("call", node.get("layer", ""))
        arguments = node.get("args", [])
        if not any(_key(value) in follow for value in _flat(arguments)):
            continue
        if name in _SAME:
            follow.add(("node", index))
            continue
        if name == "BatchNorm2d":
            mean = tensors.get(f"layers.{index}.running_mean")
            return mean is not None and float(mean.abs().mean()) >= LEAST_MEAN
        return _is_for_bytes(name, arguments, follow, tensors)
    return False


def _is_for_bytes(name: str, arguments: Any, follow: set[Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether an operator on the image has a constant of the size that bytes call for."""
    constants = [value for value in arguments[:2] if _key(value) not in follow]
    size = _size(constants[0], tensors) if len(constants) == 1 else None
    if size is None:
        return False
    if name in _MOVES:
        return size >= LEAST_MEAN
    if name in _SCALES:
        return _key(arguments[0]) in follow and BYTE_SPAN[0] < size < BYTE_SPAN[1]
    return name in ("mul", "multiply") and size > 0 and BYTE_SPAN[0] < 1 / size < BYTE_SPAN[1]


def _size(value: Any, tensors: Mapping[str, Tensor]) -> float | None:
    if isinstance(value, int | float):
        return abs(float(value))
    if isinstance(value, dict) and "tensor" in value:
        tensor = tensors.get(f"constants.value_{value['tensor']}")
        return None if tensor is None or not tensor.numel() else float(tensor.float().abs().mean())
    return None


def _key(value: Any) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        return (kind, content) if kind in ("input", "node") else None
    return None


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]
