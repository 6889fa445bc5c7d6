"""What the values of a captured graph are while it is written down: constants, sizes, or of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn


class Constant(NamedTuple):
    """A value that no image and no size of batch reaches."""

    tensor: Any


class Value(NamedTuple):
    """A value that depends on the image: as the graph writes it, and as it is for the traced images."""

    written: Any
    example: Any
    of_image: bool = True


class Batch(NamedTuple):
    """A number that follows the size n of the batch: slope * n + offset."""

    slope: int
    offset: int


def merge(calls: Sequence[Any], sizes: Sequence[int], values: Mapping[fx.Node, Any]) -> Any:
    """The arguments of the runs as one: nodes become values, numbers that differ follow the batch."""
    first = calls[0]
    if isinstance(first, fx.Node):
        return values[first]
    if isinstance(first, tuple | list):
        if len({len(call) for call in calls}) > 1:
            raise ValueError("the network computes something else for another number of images")
        return [merge(together, sizes, values) for together in zip(*calls, strict=True)]
    if isinstance(first, Mapping):
        return {name: merge([call[name] for call in calls], sizes, values) for name in first}
    if all(call == first for call in calls):
        return first
    slope, rest = divmod(calls[1] - first, sizes[1] - sizes[0])
    if type(first) is not int or rest:
        raise ValueError(f"{first!r} becomes {calls[1]!r} for another number of images")
    return Batch(slope, first - slope * sizes[0])


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def examples(value: Any, batch: int) -> Any:
    if isinstance(value, Value):
        return value.example
    if isinstance(value, Constant):
        return value.tensor
    if isinstance(value, Batch):
        return value.slope * batch + value.offset
    if isinstance(value, dict):
        return {name: examples(item, batch) for name, item in value.items()}
    return [examples(item, batch) for item in value] if isinstance(value, list) else value


def attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def plain(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()


def own(tensor: Tensor) -> Tensor:
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def renumbered(value: Any, numbers: Mapping[int, int]) -> Any:
    """A value whose nodes have the numbers that `numbers` gives them."""
    if isinstance(value, dict):
        return {
            name: numbers[item] if name in ("node", "use") else renumbered(item, numbers)
            for name, item in value.items()
        }
    return [renumbered(item, numbers) for item in value] if isinstance(value, list) else value


def run(name: str, arguments: list[Any], options: dict[str, Any]) -> Any:
    """What an operator of torch.ops.aten, or an index, gives for these arguments."""
    if name == "getitem":
        return arguments[0][arguments[1]]
    return getattr(torch.ops.aten, name)(*arguments, **options)
