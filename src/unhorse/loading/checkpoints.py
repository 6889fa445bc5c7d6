"""Every tensor of a checkpoint under one flat name, and which part of it a network wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import Tensor

from unhorse.checks import weight_files
from unhorse.loading.network_imports import refused

_COPIES = ("ema", "shadow", "averaged", "swa", "teacher", "best")
# counters that training and profilers leave, and that no forward pass reads
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
_DEPTH = 10
_SHOWN = 5

Shapes = Mapping[str, tuple[int, ...]]


class Fit(NamedTuple):
    """The part of a checkpoint that a network takes: its prefix, and its tensors."""

    prefix: str
    state: dict[str, Tensor]


def flattened(networks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file's state dicts under one name each: keys and names joined by dots."""
    return {
        f"{key.replace('/', '.')}.{name}" if key else name: tensor
        for key, tensors in networks.items()
        for name, tensor in tensors.items()
    }


def fitting(tensors: Mapping[str, Tensor], wanted: Shapes, key: str | None = None) -> Fit:
    """The tensors below the prefix that fits best; LD226 with the first differences where none fits.

    `wanted` are the names and shapes of the network's own state. `key` keeps to what begins with it.
    """
    if len(tensors) > weight_files.MAX_TENSORS:
        raise refused(
            f"{len(tensors)} tensors are more than {weight_files.MAX_TENSORS}", "save the network alone"
        )
    needed = {name: shape for name, shape in wanted.items() if not name.endswith(_COUNTERS)}
    if not needed:
        raise refused(
            "the network has no weights", "name the class or factory of the network that was trained"
        )
    chosen = "" if key is None else f"{key.replace('/', '.').rstrip('.')}."
    prefixes = [prefix for prefix in _prefixes(tensors) if key is None or prefix.startswith(chosen)]
    if not prefixes:
        raise refused(
            f"nothing in the file is called {key!r}", f"it has {', '.join(sorted(tensors)[:_SHOWN])} …"
        )
    best = min(prefixes, key=lambda prefix: _rank(prefix, tensors, needed))
    state = _below(best, tensors)
    differences = _differences(state, wanted)
    if differences:
        raise _misfit(best, state, wanted, differences)
    return Fit(best, {name: state[name] for name in state if name in wanted})


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """ "" and every beginning of a name up to a dot, in the order of the file."""
    found = {"": None}
    for name in tensors:
        parts = name.split(".")
        found.update({".".join(parts[:count]) + ".": None for count in range(1, min(len(parts), _DEPTH))})
    return list(found)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _rank(prefix: str, tensors: Mapping[str, Tensor], needed: Shapes) -> tuple[int, int, bool, int]:
    """Few missing first, then few too many, then no running average, then the shorter name."""
    below = _below(prefix, tensors)
    common = sum(name in below and tuple(below[name].shape) == shape for name, shape in needed.items())
    known = sum(name in below for name in needed)
    copy = any(word in part for part in prefix.lower().split(".") for word in _COPIES)
    return -2 * common - known, len(below), copy, len(prefix)


def _differences(state: Mapping[str, Tensor], wanted: Shapes) -> list[str]:
    """What keeps a state from being loaded, one line each."""
    absent = [name for name in wanted if name not in state and not name.endswith(_COUNTERS)]
    extra = [name for name in state if name not in wanted and not name.endswith(_COUNTERS)]
    lines = [
        f"{name} is {_sides(state[name].shape)} in the file and {_sides(shape)} in the network"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    lines += [f"{name} is not in the file{_nearest(name, extra)}" for name in absent]
    return lines + [f"{name} has no place in the network{_nearest(name, absent)}" for name in extra]


def _nearest(name: str, others: list[str]) -> str:
    close = get_close_matches(name, others[:2000], n=1, cutoff=0.5)
    return f" (nearest: {close[0]})" if close else ""


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _misfit(prefix: str, state: Mapping[str, Any], wanted: Shapes, lines: list[str]) -> Exception:
    common = sum(name in state and tuple(state[name].shape) == shape for name, shape in wanted.items())
    below = f" below {prefix.rstrip('.')!r}" if prefix else ""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    reason = (
        f"the network does not fit the file: {common} of its {len(wanted)} tensors are there{below}; "
        f"{'; '.join(lines[:_SHOWN])}{more}"
    )
    return refused(reason, "name the class that was trained, and its arguments with --network-args")
