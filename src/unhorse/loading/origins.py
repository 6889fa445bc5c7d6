"""How the tensors that were folded away in a traced graph follow from those that the network has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unhorse.loading.traced_values import Constant
from unhorse.models.graph import OPERATORS

_AS_IS = frozenset(
    ("detach", "alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "lift", "dropout", "positive")
)
_CASTS = frozenset(("to", "_to_copy", "type_as"))
_Key = tuple[Any, ...]


class Origin(NamedTuple):
    """Nodes of a graph (models/graph.py) over the tensors t0, t1 ... of the network, and their result."""

    nodes: list[dict[str, Any]]
    output: Any
    leaves: list[Tensor]


class _Step(NamedTuple):
    name: str
    arguments: list[Any]
    options: Mapping[str, Any]
    result: Any


class Origins:
    """Remembers each folded operator; `plain` writes a value that is no tensor as a graph has it."""

    def __init__(self, plain: Callable[[Any], Any]) -> None:
        self.plain = plain
        self.steps: dict[_Key, _Step] = {}

    def add(self, name: str, arguments: list[Any], options: Mapping[str, Any], result: Any) -> None:
        """Operator `name` gave `result` from constants."""
        key = _key(result)
        taken = [_key(value.tensor) for value in arguments if isinstance(value, Constant)]
        if key is not None and key not in taken:  # a view of all of it is what it is a view of
            self.steps.setdefault(key, _Step(name, arguments, options, result))

    def of(self, tensor: Tensor) -> Origin | None:
        """How a tensor is computed; None where it was not, or not by listed operators."""
        turned = tensor.dim() == 2 and _key(tensor) not in self.steps  # a layer may have it transposed
        source = tensor.t() if turned else tensor
        if _key(source) not in self.steps:
            return None
        draft = _Draft(self)
        try:
            output = draft.written(Constant(source))
            output = draft.node("t", [output]) if turned else output
        except (_Unlisted, RecursionError):
            return None
        return Origin(draft.nodes, output, draft.leaves)


class _Unlisted(Exception):
    """An operator that no graph may have."""


class _Draft:
    """The nodes of one origin while they are written."""

    def __init__(self, origins: Origins) -> None:
        self.origins = origins
        self.nodes: list[dict[str, Any]] = []
        self.leaves: list[Tensor] = []
        self.seen: dict[_Key, Any] = {}

    def written(self, value: Any) -> Any:
        if isinstance(value, list | tuple) and not isinstance(value, Constant):
            return [self.written(item) for item in value]
        content = value.tensor if isinstance(value, Constant) else value
        key = _key(content)
        if key is None:
            return self.origins.plain(content)
        if key not in self.seen:
            self.seen[key] = self._tensor(content, self.origins.steps.get(key))
        return self.seen[key]

    def _tensor(self, content: Any, step: _Step | None) -> Any:
        if step is None:
            if not isinstance(content, Tensor):
                raise _Unlisted
            self.leaves.append(content)
            return {"tensor": f"t{len(self.leaves) - 1}"}
        if step.name in _AS_IS:
            return self.written(step.arguments[0])
        arguments = [self.written(value) for value in step.arguments]
        if step.name in _CASTS:
            return self.node("to", [arguments[0], self.origins.plain(step.result.dtype)])
        if step.name in ("_weight_norm", "_weight_norm_interface"):
            return self._weight_norm(step, arguments)
        if step.name not in OPERATORS:
            raise _Unlisted
        options = {
            name: self.written(value)
            for name, value in step.options.items()
            if name not in ("memory_format", "layout", "device", "pin_memory", "non_blocking", "copy")
        }
        return self.node(step.name, arguments, options)

    def _weight_norm(self, step: _Step, arguments: list[Any]) -> Any:
        """The direction v scaled to the length g, along all dimensions but one."""
        direction, length = arguments[:2]
        kept = arguments[2] if len(arguments) > 2 else 0
        count = (step.result[0] if isinstance(step.result, tuple) else step.result).dim()
        others = [index for index in range(count) if index != kept % count]
        norm = self.node("linalg_vector_norm", [direction, 2, others, True])
        scaled = self.node("mul", [direction, self.node("div", [length, norm])])
        return [scaled, norm] if isinstance(step.result, tuple) else scaled

    def node(self, name: str, arguments: list[Any], options: Mapping[str, Any] | None = None) -> Any:
        """Adds a node and gives the value that names it."""
        node: dict[str, Any] = {"call": name, "args": arguments}
        self.nodes.append(node | ({"kwargs": dict(options)} if options else {}))
        return {"node": len(self.nodes) - 1}


def _key(value: Any) -> _Key | None:
    """What tells a tensor, or several that one operator gave, from others alive; None for the rest."""
    if isinstance(value, Tensor):
        return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
    several = isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value)
    return ("several", id(value)) if several and not isinstance(value, torch.Size) else None
