"""A step back from the end of a graph, over an operator that keeps the order of the classes in each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unhorse.loading.written_graph import Node, Written

SIGMOIDS = frozenset({"sigmoid", "hardsigmoid", "log_sigmoid"})
STEPS = frozenset({"round", "floor", "ceil", "gt", "ge"})
_RISING = (
    frozenset(
        [
            "tanh",
            "exp",
            "expm1",
            "log",
            "log1p",
            "log2",
            "log10",
            "sqrt",
            "softplus",
            "softsign",
            "hardtanh",
            "relu",
            "relu6",
            "atan",
        ]
    )
    | frozenset({"clamp", "clamp_min", "clamp_max", "to"})
    | SIGMOIDS
    | STEPS
)
"""Operators that nowhere fall, number by number; some of them only where they are defined."""
BLUNT = frozenset({"clamp_min", "clamp_max", "to", "relu"})
"""Those that alone are no sign of logits before them."""
_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "pow"})
SUM, SCALE, ONE_MINUS = "a sum", "a scale", "one minus it"


@dataclass(frozen=True)
class Stop:
    """A place on the way back from the output: its value; what merely shapes it behind that place, from the
    output inwards; whether more of it is more at the output; what is undone there, the last first, and
    whether the step to it was one over a squashing operator. `single` is the place in a pair of probabilities
    that the output is one of.
    """

    value: Any
    shaping: tuple[int, ...] = ()
    rising: bool = True
    undone: tuple[str, ...] = ()
    squash: bool = False
    single: int | None = None

    def before(self, value: Any, word: str, *, squash: bool = False, turned: bool = False) -> Stop:
        """The place before one more operator."""
        return replace(
            self, value=value, undone=(*self.undone, word), squash=squash, rising=self.rising != turned
        )


@dataclass
class Steps:
    """Steps back through a written graph, where an image has `width` numbers: of the classes, or one."""

    written: Written
    width: int

    def before(self, here: Stop) -> Stop | None:
        """The place before the last operator at `here`; None where that operator may change the order."""
        node, name = self.written.node(here.value), self.written.called(here.value)
        if node is None or not node["args"]:
            return None
        if node.get("layer") == "Linear":
            return self._before_linear(here, node)
        arguments, options = node["args"], node.get("kwargs", {})
        if self.written.shapes_only(here.value):
            return replace(
                here, value=arguments[0], shaping=(*here.shaping, here.value["node"]), squash=False
            )
        if self.width == 1 and here.single is None and name in ("select", "slice"):
            return self._before_choice(here, arguments)
        if name in ("slice", "flip", "index_select"):
            return self._before_arranging(here, arguments)
        return self._before_function(here, name, arguments, options)

    def _before_function(
        self, here: Stop, name: str, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> Stop | None:
        """Before an operator on the numbers of an image that keeps their order or turns it round."""
        if name.endswith("softmax"):
            over_classes = self._over_classes(arguments)
            return here.before(arguments[0], name.removeprefix("_"), squash=True) if over_classes else None
        if name in _RISING:
            return self._before_rising(here, name, arguments, options)
        if name == "neg":
            return here.before(arguments[0], "a minus", turned=True)
        if name == "reciprocal" and self.written.sign(arguments[0]) > 0:
            return here.before(arguments[0], name, squash=True, turned=True)
        return self._before_arithmetic(here, name, arguments, options) if name in _ARITHMETIC else None

    def _before_rising(
        self, here: Stop, name: str, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> Stop | None:
        """Before an operator on each number alone, if it is the same one for all classes."""
        others = [*arguments[1:], *options.values()]
        if name != "to" and any(each is not None and self.written.level(each) is None for each in others):
            return None
        bounded = name != "clamp" or len([each for each in others if each is not None]) == 2
        return here.before(arguments[0], name, squash=bounded and name not in BLUNT)

    def _before_arithmetic(
        self, here: Stop, name: str, arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> Stop | None:
        """Before a sum, product, quotient or power with a number that all classes of an image share."""
        alpha = options.get("alpha", 1)
        if len(arguments) < 2 or options.keys() - {"alpha"} or type(alpha) not in (int, float) or alpha <= 0:
            return None
        for own, other in ((0, 1), (1, 0)):
            value, shared = arguments[own], arguments[other]
            level = self.written.level(shared)
            if not self._is_wide(value) or (level is None and not self._is_shared(shared)):
                continue
            if name in ("add", "sub", "rsub"):
                turned = (name, own) in (("sub", 1), ("rsub", 0))
                return here.before(value, ONE_MINUS if turned and level == 1 else SUM, turned=turned)
            sign = self.written.sign(shared)
            if name == "pow":
                fits = own == 0 and sign > 0 and self.written.sign(value) > 0
                return here.before(value, "a power", squash=True) if fits else None
            inverse = name == "div" and own == 1
            if sign == 0 or (inverse and self.written.sign(value) <= 0):
                return None
            word = "a quotient" if inverse else SCALE if level is not None else "a length"
            return here.before(value, word, squash=level is None, turned=(sign < 0) != inverse)
        return None

    def _before_linear(self, here: Stop, node: Node) -> Stop | None:
        """Before a layer that scales all classes alike and adds what they share: a x + (r . x + b) 1."""
        place = here.value["node"]
        weight, bias = (self.written.tensors.get(f"layers.{place}.{name}") for name in ("weight", "bias"))
        if weight is None or weight.shape[0] != weight.shape[1] or len(weight) < 2:
            return None
        scale = float(weight[0, 0] - weight[1, 0])
        rest = weight - scale * torch.eye(len(weight))
        near = 1e-6 * float(weight.abs().max())
        alike = float((rest - rest[:1]).abs().max()) <= near
        level = bias is None or float(bias.max() - bias.min()) <= 1e-6 * float(bias.abs().max())
        if not alike or not level or abs(scale) <= near:
            return None
        return here.before(node["args"][0], SCALE, turned=scale < 0)

    def _before_choice(self, here: Stop, arguments: Sequence[Any]) -> Stop | None:
        """Before one of two probabilities was chosen."""
        pair, dimension, index = [*arguments, 0, 0][:3]
        example = self.written.example(pair)
        if example is None or example.ndim != 2 or example.shape[1] != 2 or dimension not in (1, -1):
            return None
        if index not in (0, 1, -1, -2) or self.written.called(pair) not in ("softmax", "_softmax"):
            return None
        self.width = 2
        return replace(here, value=pair, shaping=(), squash=False, single=index % 2)

    def _before_arranging(self, here: Stop, arguments: Sequence[Any]) -> Stop | None:
        """Before some of the classes were left out, or all put in another order."""
        example, dimension = self.written.example(arguments[0]), [*arguments, None][1]
        dimension = dimension[0] if isinstance(dimension, list) and len(dimension) == 1 else dimension
        fixed = all(type(each) is int or self.written.constant(each) is not None for each in arguments[2:])
        if example is None or example.ndim != 2 or dimension not in (1, -1) or not fixed or self.width < 2:
            return None
        self.width = example.shape[1]
        return replace(here, value=arguments[0], shaping=(*here.shaping, here.value["node"]), squash=False)

    # --- what the classes share -----------------------------------------------------------------------------

    def _is_wide(self, value: Any) -> bool:
        example = self.written.example(value)
        return example is not None and example[0].numel() == self.width

    def _is_shared(self, value: Any) -> bool:
        """Whether all classes of an image meet one number, another one for each image."""
        return self.width > 1 and self.written.per_image(value)

    def _over_classes(self, arguments: Sequence[Any]) -> bool:
        example, dimension = self.written.example(arguments[0]), [*arguments, None][1]
        if example is None or type(dimension) is not int or example.ndim < 2 or self.width < 2:
            return False
        return dimension % example.ndim != 0 and example.shape[dimension] == example[0].numel() == self.width
