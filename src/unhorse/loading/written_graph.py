"""A graph as far as it is written, and what can be said of its values: shapes, signs, what classes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Node = dict[str, Any]

_SAME_NUMBERS = frozenset(["reshape", "flatten", "squeeze", "unsqueeze", "view", "unflatten"])
_POSITIVE = frozenset(["exp", "sigmoid", "softmax", "_softmax", "softplus", "hardsigmoid"])
_NOT_NEGATIVE = (
    frozenset(["linalg_vector_norm", "norm", "abs", "square", "relu", "relu6", "sqrt"]) | _POSITIVE
)
_KEEPS_SIGN = _SAME_NUMBERS | frozenset(
    ["sum", "mean", "amax", "amin", "sqrt", "expand", "expand_as", "max", "to", "repeat"]
)
_OTHER_NAMES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
}
_DEPTH = 8


class Written(NamedTuple):
    """Nodes, what each gave for the traced images, and all tensors by their names in the draft."""

    nodes: list[Node]
    examples: list[Any]
    tensors: Mapping[str, Tensor]

    def node(self, value: Any) -> Node | None:
        """The node that a value is the result of."""
        place = value.get("node") if isinstance(value, dict) else None
        return None if place is None else self.nodes[place]

    def called(self, value: Any) -> str:
        """The name of the operator that a value is the result of; empty for a layer or none."""
        node = self.node(value)
        name = "" if node is None else str(node.get("call", ""))
        return _OTHER_NAMES.get(name, name)

    def example(self, value: Any) -> Tensor | None:
        """What a value was for the traced images."""
        found = self.examples[value["node"]] if self.node(value) is not None else None
        return found if isinstance(found, Tensor) and found.ndim > 0 else None

    def constant(self, value: Any) -> Tensor | None:
        """The numbers that a value is whatever the image."""
        if type(value) in (int, float):
            return torch.tensor(float(value))
        name = value.get("tensor") if isinstance(value, dict) else None
        return None if name is None else self.tensors.get(f"constants.-.{name}")

    def constants_in(self, value: Any) -> Any:
        """A value with its constants as tensors, as an operator takes it."""
        return self.constant(value) if isinstance(value, dict) else value

    def level(self, value: Any) -> float | None:
        """The one number that a constant holds everywhere."""
        constant = self.constant(value)
        if constant is None or not constant.numel() or not bool((constant == constant.flatten()[0]).all()):
            return None
        return float(constant.flatten()[0])

    def per_image(self, value: Any) -> bool:
        """Whether a value is one number for each image, perhaps repeated for each class."""
        while self.called(value) in ("expand", "expand_as", "repeat"):
            value = self.nodes[value["node"]]["args"][0]
        example = self.example(value)
        return example is not None and example.numel() == len(example)

    def shapes_only(self, value: Any) -> bool:
        """Whether a value has the numbers of another one, image by image, in another shape."""
        if self.called(value) not in _SAME_NUMBERS:
            return False
        after, before = self.example(value), self.example(self.nodes[value["node"]]["args"][0])
        if before is None or after is None:
            return False
        return before.numel() == after.numel() and len(before) == len(after)

    def unshaped(self, value: Any) -> Any:
        """The value of the same numbers before it was shaped."""
        while self.shapes_only(value):
            value = self.nodes[value["node"]]["args"][0]
        return value

    def sign(self, value: Any, depth: int = 0) -> int:
        """1 where a value is nowhere below 0, -1 where it is below everywhere, 0 where that is not known."""
        constant = self.constant(value)
        if constant is not None and constant.numel():
            return 1 if float(constant.min()) > 0 else -1 if float(constant.max()) < 0 else 0
        name = self.called(value)
        if not name or depth > _DEPTH:
            return 0
        arguments = self.nodes[value["node"]]["args"]
        if name in _NOT_NEGATIVE:
            return 1
        if name in ("clamp", "clamp_min") and len(arguments) > 1 and self.sign(arguments[1]) > 0:
            return 1
        if name in _KEEPS_SIGN:
            return self.sign(arguments[0], depth + 1)
        if name == "getitem":
            return self.sign(arguments[0], depth + 1)
        if name == "pow" and len(arguments) > 1 and arguments[1] in (2, 2.0):
            return 1
        if name in ("add", "mul", "maximum", "div") and len(arguments) > 1:
            return 1 if all(self.sign(each, depth + 1) > 0 for each in arguments[:2]) else 0
        return 0

    def same(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Whether two values are computed in the same way from the same ones."""
        if one == other:
            return True
        here, there = self.node(one), self.node(other)
        if here is None or there is None or depth > _DEPTH:
            return False
        own, theirs = here["args"], there["args"]
        return (
            "call" in here
            and here["call"] == there.get("call")
            and here.get("kwargs") == there.get("kwargs")
            and len(own) == len(theirs)
            and all(self.same(each, its, depth + 1) for each, its in zip(own, theirs, strict=True))
        )

    def append(self, name: str, arguments: list[Any], example: Tensor) -> Any:
        """The value of one more operator, and what it gives."""
        self.nodes.append({"call": name, "args": arguments})
        self.examples.append(example)
        return {"node": len(self.nodes) - 1}
