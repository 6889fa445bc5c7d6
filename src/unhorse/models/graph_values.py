"""The values in a network's graph, as JSON has them: numbers, names of nodes and tensors, sizes, types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def check_value(value: object, before: int, tensors: frozenset[str], depth: int = 0) -> None:
    """ValueError unless a value names only what comes earlier and holds only plain numbers."""
    if depth > 4:
        raise ValueError("a value is nested too deeply")
    if isinstance(value, list):
        for item in value:
            check_value(item, before, tensors, depth + 1)
    elif isinstance(value, dict):
        _check_reference(value, before, tensors)
    elif not isinstance(value, str | bool | int | float | None) or (
        type(value) is int and abs(value) >= 2**63
    ):
        raise ValueError(f"{value!r} is no value, or a number of more than 64 bits")


def _check_reference(value: dict[Any, Any], before: int, tensors: frozenset[str]) -> None:
    if len(value) != 1:
        raise ValueError(f"{value!r} is no value")
    ((kind, content),) = value.items()
    if kind in ("node", "input", "tensor"):
        there = {
            "node": type(content) is int and 0 <= content < before,
            "input": type(content) is int and content == 0,
            "tensor": isinstance(content, str) and content in tensors,
        }
        if not there[kind]:
            raise ValueError(f"{kind} {content!r} is not there yet")
    else:
        literal(kind, content, 1)


def literal(kind: str, content: Any, batch: int) -> object:
    if kind == "batch":
        slope, offset = content
        if type(slope) is not int or type(offset) is not int:
            raise ValueError(f"{content!r} is no size")
        return slope * batch + offset
    if kind == "dtype":
        return dtype_named(content)
    if kind == "number" and content in ("inf", "-inf", "nan"):
        return float(content)
    raise ValueError(f"{kind!r} is no kind of value")


def dtype_named(name: object) -> torch.dtype:
    if name not in ("float32", "int64", "int32", "bool", "uint8", "int16", "int8"):
        raise ValueError(f"type {name!r} is not on the list")
    found = getattr(torch, str(name))
    assert isinstance(found, torch.dtype)
    return found


def last_uses(arguments: Sequence[object], output: object) -> dict[int, list[int]]:
    """After which step each value may be forgotten."""
    last: dict[int, int] = {}

    def visit(value: object, index: int) -> None:
        if isinstance(value, dict) and "node" in value:
            last[value["node"]] = index
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item, index)

    for index, step in enumerate(arguments):
        visit(step, index)
    visit(output, len(arguments))
    freed: dict[int, list[int]] = {}
    for node, index in last.items():
        freed.setdefault(index, []).append(node)
    return freed


def number_value(number: float) -> object:
    """A float as a value of a graph: JSON has no infinities."""
    return number if math.isfinite(number) else {"number": str(number)}
