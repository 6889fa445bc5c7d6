"""Writes a captured torch.fx graph down as the graph of a GraphNetwork."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from unhorse.loading.drafts import Draft, Traced, assembled
from unhorse.loading.masks import Masks
from unhorse.loading.origins import Origins
from unhorse.loading.outputs import ONE_NUMBER
from unhorse.loading.peepholes import Found, layer_of
from unhorse.loading.probabilities import squash_behind
from unhorse.loading.tails import Tail
from unhorse.loading.traced_values import (
    Batch,
    Constant,
    Value,
    attribute,
    examples,
    leaves,
    merge,
    plain,
    run,
)
from unhorse.loading.written_graph import Written
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


class GraphWriter:
    """Writes the nodes of a captured graph, running each, so that what no image reaches is folded away."""

    def __init__(
        self,
        captured: Sequence[fx.GraphModule],
        sizes: Sequence[int],
        images: Tensor,
        *,
        classes: int | None = None,
    ) -> None:
        self.module, self.sizes, self.classes = captured[0], sizes, classes
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
        return assembled(self.made, self.origins)

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
        self.made.examples.append(example)
        return Value({"node": len(self.made.nodes) - 1}, example)

    def _layer(self, found: Found, example: Any) -> Value:
        key = (found.layer, *(id(tensor) for tensor in found.tensors.values()), str(found.options))
        index = len(self.made.nodes)
        arguments = self._write([found.input])
        if key in self.layers:
            return self._appended({"use": self.layers[key], "args": arguments}, example)
        self.layers[key] = index
        for name, tensor in found.tensors.items():
            self.made.tensors[f"layers.{index}.{name}"] = tensor
        return self._appended({"layer": found.layer, "options": found.options, "args": arguments}, example)

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
        made, width = self.made, int(value.example.shape[1])
        written = Written(made.nodes, made.examples, made.tensors)
        found = Tail(written, width).undone(value.written, two=self.classes == 2)
        if found.classes < 2:
            raise LoadRefused("LD221", "the network answers with a single number per image", ONE_NUMBER)
        made.returned, made.output, made.num_classes = value.written, found.value, found.classes
        made.cut = ", ".join(dict.fromkeys(found.words))
        made.hidden = squash_behind(written, found.value, found.classes)


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
