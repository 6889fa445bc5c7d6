"""Writes a captured torch.fx graph down as the graph of a GraphNetwork."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from unhorse.loading.masks import Masks
from unhorse.loading.origins import Origin, Origins
from unhorse.loading.peepholes import Found, layer_of
from unhorse.loading.traced_values import (
    Batch,
    Constant,
    Value,
    attribute,
    examples,
    leaves,
    merge,
    own,
    plain,
    renumbered,
    run,
)
from unhorse.models.graph import OPERATORS
from unhorse.models.graph_values import number_value
from unhorse.rules import LoadRefused

REMEDY = "export the network in eval mode as ONNX or safetensors, in float32 and with a dynamic batch"
_IDENTITIES_LISTED = """
to _to_copy contiguous clone detach alias dropout feature_dropout alpha_dropout resolve_conj resolve_neg
lift_fresh_copy lift_fresh lift positive identity type_as mul div
"""
_IDENTITIES = frozenset(_IDENTITIES_LISTED.split())
_SHAPING = frozenset({"view", "_unsafe_view", "_reshape_copy", "view_copy"})
_SWITCHES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")
_FILLING = frozenset({"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "expand"})


class Traced(NamedTuple):
    """A graph and its tensors, as GraphNetwork loads them; `cut` names what came after the logits.

    `origins` says of tensors that were computed from others how.
    """

    graph: dict[str, Any]
    tensors: dict[str, Tensor]
    num_classes: int
    cut: str = ""
    origins: Mapping[str, Origin] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"MD303 the last {self.cut} was cut off, to have logits",) if self.cut else ()


@dataclass
class Draft:
    """What is written so far."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None
    num_classes: int = 0
    cut: str = ""


class GraphWriter:
    """Writes the nodes of a captured graph, running each, so that what no image reaches is folded away."""

    def __init__(self, captured: Sequence[fx.GraphModule], sizes: Sequence[int], images: Tensor) -> None:
        self.module, self.sizes = captured[0], sizes
        self.steps = [list(module.graph.nodes) for module in captured]
        if len({len(steps) for steps in self.steps}) > 1:
            raise ValueError("the network computes something else for another number of images")
        self.images = images[: sizes[0]]
        self.values: dict[fx.Node, Any] = {}
        self.made = Draft()
        self.constants: dict[int, Constant] = {}
        self.names: dict[int, str] = {}
        self.layers: dict[tuple[Any, ...], int] = {}
        self.origins = Origins(self._write)
        self.masks = Masks(self._named, self._appended, self.origins)

    @torch.no_grad()
    def traced(self) -> Traced:
        """The whole graph; ValueError where the runs differ in more than numbers, LoadRefused LD221."""
        for together in zip(*self.steps, strict=True):
            node = together[0]
            if any(other.op != node.op or str(other.target) != str(node.target) for other in together):
                raise ValueError("the network computes something else for another number of images")
            if node.op == "placeholder":
                self.values[node] = Value({"input": 0}, self.images)
            elif node.op == "get_attr":
                found = attribute(self.module, str(node.target))
                self.values[node] = self.constants.setdefault(id(found), Constant(plain(found)))
            elif node.op == "call_function":
                self._call(node, [(other.args, other.kwargs) for other in together])
            elif node.op == "output":
                self._finish(node.args[0])
        return _assembled(self.made, self.origins)

    def _call(self, node: fx.Node, calls: Sequence[tuple[Any, Any]]) -> None:
        name, in_place = _operator(node)
        if name in _SWITCHES:
            self.values[node] = Constant(None)
            return
        # tensors are the same nodes in each run; numbers may follow the size of the batch
        arguments = merge([call[0] for call in calls], self.sizes, self.values)
        options = merge([call[1] for call in calls], self.sizes, self.values)
        if name == "native_dropout":
            raise LoadRefused("LD221", "the network draws random numbers", REMEDY)
        if name in _IDENTITIES and (same := self._same(name, arguments, options)) is not None:
            self._store(node, same, in_place)
            return
        example = run(name, examples(arguments, self.sizes[0]), examples(options, self.sizes[0]))
        dynamic = leaves(arguments) + leaves(options)
        if not any(isinstance(leaf, Value | Batch) for leaf in dynamic):
            self.origins.add(name, arguments, options, example)
            self._store(node, Constant(example), in_place)
            return
        if name in ("to", "_to_copy"):
            name, arguments, options = "to", [arguments[0], example.dtype], {}
        of_image = any(isinstance(leaf, Value) and leaf.of_image for leaf in dynamic)
        made = self._emit(name, arguments, options, example)
        self._store(node, made._replace(of_image=of_image), in_place)

    def _same(self, name: str, arguments: list[Any], options: dict[str, Any]) -> Any:
        """The first argument, where the operator would hand it on as it is."""
        first = arguments[0]
        example = examples(first, self.sizes[0])
        if "dropout" in name and arguments[2] is not False:
            raise LoadRefused("LD221", "the network draws random numbers: it is not in eval mode", REMEDY)
        if name in ("mul", "div"):
            return first if isinstance(first, Value) and arguments[1:] == [1] else None
        if not isinstance(first, Value) or name not in ("to", "_to_copy", "type_as"):
            return first if isinstance(first, Value) else None
        after = run(name, examples(arguments, self.sizes[0]), examples(options, self.sizes[0]))
        return first if after.dtype == example.dtype else None

    def _store(self, node: fx.Node, value: Any, in_place: bool) -> None:
        self.values[node] = value
        if in_place:  # whoever names the overwritten value later means the new one
            self.values[node.args[0]] = value  # type: ignore[index]

    def _emit(self, name: str, arguments: list[Any], options: dict[str, Any], example: Any) -> Value:
        found = layer_of(name, arguments, options, example, Constant)
        if found is not None:
            return self._layer(found, example)
        if name in ("reshape", "expand"):
            arguments = [arguments[0], self._shape(name, arguments[1], example), *arguments[2:]]
        elif name in _FILLING and len(self.sizes) == 1:
            arguments = [self._generalised(value, self.sizes[0]) for value in arguments]
        if name not in OPERATORS:
            raise LoadRefused("LD221", f"the network uses {name}, which is not on the list", REMEDY)
        arguments, options = self.masks.finite(name, arguments), self.masks.finite(name, options)
        node: dict[str, Any] = {"call": name, "args": self._write(arguments)}
        if options:
            node["kwargs"] = self._write(options)
        return self._appended(node, example)

    def _appended(self, node: dict[str, Any], example: Any) -> Value:
        self.made.nodes.append(node)
        return Value({"node": len(self.made.nodes) - 1}, example)

    def _layer(self, found: Found, example: Any) -> Value:
        key = (found.layer, *(id(tensor) for tensor in found.tensors.values()), str(found.options))
        index = len(self.made.nodes)
        arguments = self._write([found.input])
        if key in self.layers:
            self.made.nodes.append({"use": self.layers[key], "args": arguments})
        else:
            self.layers[key] = index
            self.made.nodes.append({"layer": found.layer, "options": found.options, "args": arguments})
            for name, tensor in found.tensors.items():
                self.made.tensors[f"layers.{index}.{name}"] = tensor
        return Value({"node": index}, example)

    def _shape(self, name: str, shape: list[Any], example: Tensor) -> list[Any]:
        """A shape in which the batch is -1 and all else is a number, so that features can be replaced."""
        if len(self.sizes) == 1:
            shape = self._generalised(shape, self.sizes[0], rows=example.shape[0])
        if name == "expand" or sum(isinstance(size, Batch) for size in shape) != 1:
            return shape
        return [
            -1 if isinstance(size, Batch) else example.shape[place] if size == -1 else size
            for place, size in enumerate(shape)
        ]

    @staticmethod
    def _generalised(shape: Any, batch: int, rows: int | None = None) -> Any:
        """Of a network exported for `batch` images: a leading size of just as many follows the batch."""
        listed = isinstance(shape, list) and bool(shape) and shape[0] == batch
        if not listed or (rows is not None and rows != batch):
            return shape
        return [Batch(1, 0), *shape[1:]]

    def _write(self, value: Any) -> Any:
        if isinstance(value, Constant):
            return {"tensor": self._named(value.tensor)} if isinstance(value.tensor, Tensor) else value.tensor
        if isinstance(value, Value):
            return value.written
        if isinstance(value, Batch):
            return {"batch": [value.slope, value.offset]}
        if isinstance(value, dict):
            kept = ("memory_format", "layout", "device", "pin_memory", "non_blocking", "copy")
            return {name: self._write(item) for name, item in value.items() if name not in kept}
        if isinstance(value, list):
            return [self._write(item) for item in value]
        if isinstance(value, torch.dtype):
            name = str(value).removeprefix("torch.")
            return {"dtype": "float32" if value.is_floating_point else name}
        if isinstance(value, float):
            return number_value(value)
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return None
        if value is None or isinstance(value, bool | int | str):
            return value
        raise LoadRefused("LD221", f"the network passes a {type(value).__name__} on", REMEDY)

    def _named(self, tensor: Tensor) -> str:
        name = self.names.setdefault(id(tensor), f"t{len(self.names)}")
        self.made.tensors[f"constants.-.{name}"] = tensor
        return name

    def _finish(self, returned: Any) -> None:
        value = self.values[returned]
        if not isinstance(value, Value) or not value.of_image:
            raise LoadRefused("LD221", "what the network returns does not depend on the image", REMEDY)
        self.made.num_classes = int(value.example.shape[1])
        self.made.output = value.written
        if "node" in value.written and _squashes(last := self.made.nodes[value.written["node"]]):
            self.made.output = last["args"][0]
            self.made.cut = last["call"].removeprefix("_")


def _operator(node: fx.Node) -> tuple[str, bool]:
    """The name of a node's operator without its variant, and whether it writes into its first argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        name = str(getattr(target, "__name__", target))
        if name != "getitem" and name not in _SWITCHES:
            raise LoadRefused("LD221", f"the network calls {name}, which is not on the list", REMEDY)
        return name, False
    space, _, name = target._schema.name.partition("::")
    if space != "aten":
        raise LoadRefused("LD221", f"the network calls {space}::{name}, which is not on the list", REMEDY)
    in_place = name.endswith("_") and not name.endswith("__")
    name = name.removesuffix("_") if in_place else name
    return ("reshape" if name in _SHAPING else name), in_place  # the layout in memory need not be the same


def _squashes(node: Mapping[str, Any]) -> bool:
    """Whether a node turns logits into probabilities or their like, which changes no decision."""
    name = str(node.get("call", "")).removeprefix("_")
    return name == "sigmoid" or (name.endswith("softmax") and node["args"][1] in (1, -1))


def _assembled(written: Draft, known: Origins) -> Traced:
    """Numbers the nodes that the output needs, and leaves the others out."""
    needed: set[int] = set()
    waiting = [written.output]
    while waiting:
        for index in _references(waiting.pop(), "node") - needed:
            needed.add(index)
            waiting.append({name: written.nodes[index].get(name) for name in ("args", "kwargs")})
            if "use" in written.nodes[index]:
                waiting.append({"node": written.nodes[index]["use"]})
    numbers = {old: new for new, old in enumerate(sorted(needed))}
    nodes = [renumbered(written.nodes[old], numbers) for old in sorted(needed)]
    tensors, listed, origins = {}, {}, {}
    named = _references(nodes, "tensor")
    for name, tensor in written.tensors.items():
        kind, index, weight = name.split(".")
        if kind == "layers" and int(index) in numbers:
            place = f"layers.{numbers[int(index)]}.{weight}"
        elif kind == "constants" and weight in named:
            place = f"constants.value_{weight}"
        else:
            continue
        tensors[place] = kept = own(tensor)
        if kind == "constants":
            listed[weight] = [str(kept.dtype).removeprefix("torch."), list(kept.shape)]
        if (origin := known.of(tensor)) is not None:
            origins[place] = origin
    graph = {"nodes": nodes, "output": renumbered(written.output, numbers), "tensors": listed}
    return Traced(graph, tensors, written.num_classes, written.cut, origins)


def _references(value: Any, kind: str) -> set[Any]:
    """The nodes or tensors that a value, or a node, names."""
    if isinstance(value, dict):
        if value.keys() == {kind}:
            return {value[kind]}
        value = list(value.values())
    return set().union(*(_references(item, kind) for item in value)) if isinstance(value, list) else set()
