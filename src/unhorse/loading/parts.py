"""The layers of a state dict: tensors that belong together, in the order of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Size, Tensor

from unhorse.rules import LoadRefused

MAX_PARTS = 400
_COUNTER = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")
_REMEDY = "pass --network FILE.py:NAME, or export the network as ONNX"


@dataclass(frozen=True)
class Part:
    """One layer with weights: `kind` is conv, linear or bn; `wide` what goes in (per group), `width` what
    comes out.
    """

    name: str
    kind: str
    tensors: Mapping[str, Tensor]

    @property
    def weight(self) -> Tensor:
        return self.tensors["weight"]

    @property
    def width(self) -> int:
        return len(self.weight)

    @property
    def wide(self) -> int:
        return self.weight.shape[1] if self.weight.dim() > 1 else len(self.weight)

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def biased(self) -> bool:
        return "bias" in self.tensors

    @property
    def said(self) -> str:
        """Its weight with its shape, as a message names it."""
        shape = "x".join(map(str, self.weight.shape))
        return f"{self.name or 'the'}{'.' if self.name else ' '}weight ({shape})"


def parts_of(state: Mapping[str, Tensor]) -> tuple[Part, ...]:
    """The layers in the order of the file, or of their names where the file has sorted them; LoadRefused
    LD210 for a tensor that belongs to no convolution, linear layer or batch normalisation.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for name in sorted(state, key=_natural) if order_lost(state) else state:
        layer, _, tensor = name.rpartition(".")
        grouped.setdefault(layer, {})[tensor] = state[name]
    if len(grouped) > MAX_PARTS:
        raise LoadRefused("LD210", f"{len(grouped)} layers are more than a chain of {MAX_PARTS}", _REMEDY)
    return tuple(_part(name, tensors) for name, tensors in grouped.items())


def order_lost(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are sorted, as those of safetensors always are."""
    return list(state) == sorted(state)


def interchangeable(parts: Sequence[Part]) -> tuple[Part, Part] | None:
    """Two layers of which neither shapes nor numbers in their names tell which is first."""
    alike: dict[tuple[str, Size], Part] = {}
    for part in parts:
        other = alike.setdefault((part.kind, part.weight.shape), part)
        if _unnumbered(other.name) != _unnumbered(part.name):
            return other, part
    return None


def listed(parts: Sequence[Part]) -> str:
    """Their names, for messages; the first dozen."""
    return ", ".join(part.name or "(no name)" for part in parts[:12]) + " ..." * (len(parts) > 12)


def _part(name: str, tensors: dict[str, Tensor]) -> Part:
    kind = _kind(tensors)
    if kind is None:
        key = ".".join(filter(None, (name, next(iter(tensors)))))
        shape = "x".join(map(str, next(iter(tensors.values())).shape))
        reason = f"the tensor {key!r} ({shape}) is of no layer that a plain chain has"
        raise LoadRefused("LD210", reason, _REMEDY)
    return Part(name, kind, tensors)


def _kind(tensors: Mapping[str, Tensor]) -> str | None:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or not weight.numel():
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    others = tensors.keys() - {"weight", "bias"}
    if weight.dim() == 1:
        statistics = [tensors.get(name) for name in _STATISTICS]
        whole = bias is not None and others - {_COUNTER} == set(_STATISTICS)
        return "bn" if whole and all(s is not None and s.shape == weight.shape for s in statistics) else None
    if others:
        return None
    if weight.dim() == 4 and weight.shape[2] == weight.shape[3]:
        return "conv"
    return "linear" if weight.dim() == 2 else None


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts conv2 before conv10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
