"""Finds the networks in what a checkpoint holds, whatever the dictionaries around them are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unhorse.checks import weight_files
from unhorse.checks.sniff import EXPORT_REMEDY
from unhorse.loading.tensors import check_size
from unhorse.rules import LoadRefused

MAX_DEPTH = 4
_MAX_CONTAINERS = 200_000
_CONTAINERS = (Mapping, list, tuple)
# what optimisers keep for a weight: tensors of its shape under these names, and never under a dotted one
_OPTIMISER = {
    *("exp_avg", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "prev", "step_size", "ax", "mu", "eta", "master_param", "step"),
}


@dataclass
class Contents:
    """What a file holds: the tensors of each network under its key, and in words what else it has of tensors.

    A key is the path of dictionary keys, joined by "/"; the file's own dictionary has the key "".
    """

    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


class _Mapping(NamedTuple):
    """The tensors that one dictionary or list holds itself."""

    key: str
    depth: int
    tensors: dict[str, Tensor]
    in_optimiser: bool


def contents(found: object, file_bytes: int) -> Contents:
    """The networks in an unpickled object; LD209 where it has none, LD206 where the file is too small.

    A network is a dictionary of names and tensors, one of them of two or more dimensions, at most MAX_DEPTH
    levels down. Single layers and dictionaries whose names have dots, as modules write them, go first.
    """
    mappings = [mapping for mapping in _mappings(found) if mapping.tensors]
    near = [mapping for mapping in mappings if mapping.depth <= MAX_DEPTH]
    chosen = [
        mapping
        for mapping in near
        if _has_matrix(mapping.tensors, dotted=True) or (is_layer(mapping.tensors) and mapping.depth)
    ]
    if not chosen:
        plain = [mapping for mapping in near if not mapping.in_optimiser and not _is_list(mapping.tensors)]
        chosen = [mapping for mapping in plain if _has_matrix(mapping.tensors, dotted=False)]
    checked = [tensor for mapping in chosen or mappings for tensor in mapping.tensors.values()]
    check_size(checked, file_bytes)
    if not chosen:
        raise _nothing(found, mappings)
    count = sum(len(mapping.tensors) for mapping in chosen)
    if count > weight_files.MAX_TENSORS:
        raise LoadRefused("LD209", f"{count} tensors are more than {weight_files.MAX_TENSORS}", EXPORT_REMEDY)
    kept = {mapping.key for mapping in chosen}
    beside = [mapping for mapping in mappings if mapping.key not in kept]
    return Contents({mapping.key: mapping.tensors for mapping in chosen}, _in_words(beside))


def size_in_words(tensors: Sequence[Tensor]) -> str:
    """For instance "12 tensors, 3.1 MB"."""
    count, size = len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    amount = (
        f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB" if size >= 1000 else f"{size} B"
    )
    return f"{count} tensor{'s' * (count != 1)}, {amount}"


def is_layer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether it is one linear layer."""
    return sorted(tensors) in (["bias", "weight"], ["weight"]) and tensors["weight"].dim() == 2


def is_matrix(tensor: Tensor) -> bool:
    """Whether it can be the weight of a layer: two dimensions or more, and no whole numbers."""
    return tensor.dim() >= 2 and (
        tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.int8
    )


def _mappings(found: object) -> Iterator[_Mapping]:
    """Every dictionary and list in an object, each once, the outer ones first; a pickle may hold cycles."""
    waiting = [(found, "", 0, False)] if isinstance(found, _CONTAINERS) else []
    seen: set[int] = set()
    while waiting:
        container, key, depth, in_optimiser = waiting.pop(0)
        if id(container) in seen:
            continue
        seen.add(id(container))
        if len(seen) > _MAX_CONTAINERS:
            raise LoadRefused(
                "LD206", f"the file holds more than {_MAX_CONTAINERS} dictionaries", EXPORT_REMEDY
            )
        entries = _entries(container)
        in_optimiser = in_optimiser or "param_groups" in entries
        tensors = {name: tensor for name, value in entries.items() if (tensor := _tensor(value)) is not None}
        yield _Mapping(key, depth, tensors, in_optimiser)
        for name, value in entries.items():
            if name not in tensors and isinstance(value, _CONTAINERS):
                waiting.append((value, f"{key}/{name}" if key else name, depth + 1, in_optimiser))


def _entries(container: object) -> dict[str, object]:
    """What a dictionary or a list holds, under text; two keys of the same text are kept apart."""
    pairs = container.items() if isinstance(container, Mapping) else enumerate(container)  # type: ignore[arg-type]
    entries: dict[str, object] = {}
    for key, value in pairs:
        name = key if isinstance(key, str) else str(key)
        while name in entries:
            name += "'"
        entries[name] = value
    return entries


def _tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative:
        return torch.from_numpy(value.copy())
    return None


def _has_matrix(tensors: Mapping[str, Tensor], *, dotted: bool) -> bool:
    return any(
        is_matrix(tensor) and ("." in name or not dotted) and name not in _OPTIMISER
        for name, tensor in tensors.items()
    )


def _is_list(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have numbers for names, as the items of a list have."""
    return all(name.isdecimal() for name in tensors)


def _in_words(mappings: Sequence[_Mapping]) -> list[str]:
    """The tensors of dictionaries that are no network, summed up under the outermost key."""
    outermost: dict[str, list[Tensor]] = {}
    for mapping in mappings:
        for name, tensor in mapping.tensors.items():
            outermost.setdefault((mapping.key or name).partition("/")[0], []).append(tensor)
    return [f"{key} ({size_in_words(tensors)})" for key, tensors in outermost.items()]


def _nothing(found: object, mappings: Sequence[_Mapping]) -> LoadRefused:
    kind = type(found).__name__
    what, remedy = f"the file holds a {kind}, not a state dict", EXPORT_REMEDY
    if any(_is_list(mapping.tensors) for mapping in mappings):
        what = "the file holds a list of tensors without names, which say nothing of their layers"
    elif any(mapping.depth > MAX_DEPTH for mapping in mappings):
        what = f"the file has tensors, but more than {MAX_DEPTH} dictionaries deep"
    elif mappings:
        what = (
            f"the file holds a {kind} with no weight of a layer in it: {', '.join(_in_words(mappings)[:8])}"
        )
    elif isinstance(found, Mapping) and found:
        some = ", ".join(str(key)[:40] for key in list(found)[:8])
        what = f"the file holds a {kind} without tensors, not a state dict; its keys are {some}"
    return LoadRefused("LD209", what, remedy)
