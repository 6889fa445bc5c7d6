"""Writes constants with infinities, such as masks of attention, so that every tensor of a graph is finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from unhorse.loading.origins import Origins
from unhorse.loading.traced_values import Constant, Value
from unhorse.models.graph_values import number_value

_TAKERS_LISTED = """
add sub rsub where masked_fill clamp clamp_min clamp_max maximum minimum scaled_dot_product_attention
constant_pad_nd expand expand_as repeat reshape slice select unsqueeze squeeze index index_select gather cat
transpose permute
"""
TAKERS = frozenset(_TAKERS_LISTED.split())
"""Operators that are given infinity on purpose: as a mask, a bound or padding. Weights are not among them."""


class Masks:
    """The infinite constants of a graph that is written: `named` keeps a tensor, `appended` adds a node."""

    def __init__(
        self,
        named: Callable[[Tensor], str],
        appended: Callable[[dict[str, Any], Any], Value],
        origins: Origins,
    ) -> None:
        self._named, self._appended, self._origins = named, appended, origins
        self._written: dict[int, Value] = {}

    def finite(self, operator: str, value: Any) -> Any:
        """The arguments of an operator, in which infinite constants are finite ones that are filled."""
        if operator not in TAKERS:
            return value
        if isinstance(value, dict):
            return {name: self.finite(operator, item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.finite(operator, item) for item in value]
        tensor = value.tensor if isinstance(value, Constant) else None
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.isinf().any():
            return value
        if id(tensor) not in self._written:
            self._written[id(tensor)] = self._filled(tensor)
        return self._written[id(tensor)]

    def _filled(self, tensor: Tensor) -> Value:
        signs = (float("inf"), float("-inf"))
        places, finite = [tensor == sign for sign in signs], tensor
        for sign, place in zip(signs, places, strict=True):
            self._origins.add("eq", [Constant(tensor), sign], {}, place)
            before, finite = finite, finite.masked_fill(place, 0.0)
            self._origins.add("masked_fill", [Constant(before), Constant(place), 0.0], {}, finite)
        written: Any = {"tensor": self._named(finite)}
        for sign, place in zip(signs, places, strict=True):
            arguments = [written, {"tensor": self._named(place)}, number_value(sign)]
            written = self._appended({"call": "masked_fill", "args": arguments}, tensor).written
        return Value(written, tensor, of_image=False)
