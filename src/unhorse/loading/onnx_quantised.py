"""Makes floats of the int8 numbers in an ONNX graph: weights are folded, pairs around activations become one.

https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html: x is divided by the scale, rounded half to even,
moved by the zero point and saturated to the type of the zero point; `axis` says where scales are per channel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from unhorse.rules import LoadRefused

if TYPE_CHECKING:
    import numpy
    import onnx

DOMAIN = "unhorse"
_REMEDY = "give the float model that it was made from; int8 weights and QuantizeLinear pairs are read"
_DEFAULT_TYPE = 2  # uint8


class _Grid(NamedTuple):
    """The numbers that a value is rounded to: (q - zero) * scale for q from `low` to `high`."""

    scale: numpy.ndarray
    zero: numpy.ndarray
    axis: int
    block: int
    low: int
    high: int

    def same_as(self, other: _Grid) -> bool:
        import numpy

        return self[2:] == other[2:] and all(
            numpy.array_equal(mine, theirs) for mine, theirs in zip(self[:2], other[:2], strict=True)
        )


def has_quantised_activations(model: onnx.ModelProto) -> bool:
    """Whether numbers that depend on the image are rounded to a grid."""
    constants = _constants(model.graph)
    return any(n.op_type == "QuantizeLinear" and n.input[0] not in constants for n in model.graph.node)


def dequantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in floats: DequantizeLinear of a constant is computed, a pair of QuantizeLinear and
    DequantizeLinear becomes one operator of ours. LD235 where arithmetic is done on int8 numbers.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants, grids = _constants(copy.graph), {}
    kept: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        if node.op_type == "QuantizeLinear":
            grids[node.output[0]] = (node.input[0], _grid(node, constants))
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            values = _dequantise(constants[node.input[0]], _grid(node, constants))
            copy.graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        elif node.op_type == "DequantizeLinear":
            source, grid = node.input[0], _grid(node, constants)
            if source in grids:
                source, before = grids[source]
                if not before.same_as(grid):
                    raise _refused(f"{node.output[0]!r} is read on another grid than it was written on")
            kept.append(_node(node, source, grid, rounds=node.input[0] in grids))
        elif any(name in grids for name in node.input):
            raise _refused(f"{node.op_type} computes with int8 numbers")
        else:
            kept.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    copy.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return copy


def register_quantisers() -> None:
    """Teaches the converter our two operators."""
    from onnx2fx.op_registry import register

    @register("Round", domain=DOMAIN)
    def rounds(builder: Any, node: onnx.NodeProto) -> Any:
        return builder.call_function(_rounded, args=(builder.get_value(node.input[0]), *_settings(node)))

    @register("Scale", domain=DOMAIN)
    def scales(builder: Any, node: onnx.NodeProto) -> Any:
        return builder.call_function(_scaled, args=(builder.get_value(node.input[0]), *_settings(node)))


def _constants(graph: onnx.GraphProto) -> dict[str, numpy.ndarray]:
    """What is known before any image comes in, by name."""
    import onnx

    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                found[node.output[0]] = onnx.numpy_helper.to_array(attribute.t)
    return found


def _grid(node: onnx.NodeProto, constants: dict[str, numpy.ndarray]) -> _Grid:
    import numpy
    import onnx

    names = [name for name in node.input[1:] if name]
    if not set(names) <= constants.keys():
        raise _refused("a scale is computed from the image")
    said = {attribute.name: attribute.i for attribute in node.attribute}
    scale = constants[names[0]].astype(numpy.float32)
    if len(names) > 1:
        zero = constants[names[1]]
        kind = zero.dtype
    else:
        kind = onnx.helper.tensor_dtype_to_np_dtype(said.get("output_dtype", 0) or _DEFAULT_TYPE)
        zero = numpy.zeros(scale.shape, kind)
    if kind.kind not in "iu":
        raise _refused(f"numbers are rounded to {kind}")
    limits = numpy.iinfo(kind)
    return _Grid(
        scale, zero, said.get("axis", 1), said.get("block_size", 0), int(limits.min), int(limits.max)
    )


def _dequantise(values: numpy.ndarray, grid: _Grid) -> numpy.ndarray:
    import numpy

    axis = grid.axis % max(values.ndim, 1)
    scale, zero = (numpy.asarray(part, numpy.float32) for part in (grid.scale, grid.zero))
    if grid.block:
        taken = [slice(None)] * axis + [slice(values.shape[axis])]
        scale, zero = (numpy.repeat(part, grid.block, axis)[tuple(taken)] for part in (scale, zero))
    elif scale.size > 1:
        sides = [-1 if place == axis else 1 for place in range(values.ndim)]
        scale, zero = scale.reshape(sides), zero.reshape(sides)
    return ((values.astype(numpy.float32) - zero) * scale).astype(numpy.float32)


def _node(node: onnx.NodeProto, source: str, grid: _Grid, *, rounds: bool) -> onnx.NodeProto:
    import onnx

    if grid.block or grid.scale.ndim > 1 or not all(map(math.isfinite, grid.scale.flat)):
        raise _refused("a value that depends on the image is rounded in blocks, or on no grid")
    kind = "Round" if rounds else "Scale"
    made = onnx.helper.make_node(kind, [source], list(node.output), domain=DOMAIN, axis=grid.axis)
    for name, content in (
        ("scale", onnx.numpy_helper.from_array(grid.scale)),
        ("zero", onnx.numpy_helper.from_array(grid.zero.astype("int32"))),
        ("low", grid.low),
        ("high", grid.high),
    ):
        made.attribute.append(onnx.helper.make_attribute(name, content))
    return made


def _settings(node: onnx.NodeProto) -> tuple[list[float], list[int], int, int, int]:
    import onnx

    said = {attribute.name: attribute for attribute in node.attribute}
    scale, zero = (onnx.numpy_helper.to_array(said[name].t) for name in ("scale", "zero"))
    numbers = (said["axis"].i, said["low"].i, said["high"].i)
    return [float(value) for value in scale.flat], [int(value) for value in zero.flat], *numbers


def _rounded(value: Tensor, scale: list[float], zero: list[int], axis: int, low: int, high: int) -> Tensor:
    """On the grid in the forward pass; backwards as if it were not rounded, and flat where it saturates."""
    value = value.float()
    if len(scale) == 1:
        return torch.fake_quantize_per_tensor_affine(value, scale[0], zero[0], low, high)
    scales, zeros = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(value, scales, zeros, axis % value.ndim, low, high)


def _scaled(value: Tensor, scale: list[float], zero: list[int], axis: int, low: int, high: int) -> Tensor:
    sides = [-1 if place == axis % value.ndim else 1 for place in range(value.ndim)]
    sides = sides if len(scale) > 1 else [1]
    zeros, scales = (torch.tensor(part, dtype=torch.float32).reshape(sides) for part in (zero, scale))
    return (value.float() - zeros) * scales


def _refused(what: str) -> LoadRefused:
    return LoadRefused("LD235", f"unhorse does not read this int8 model: {what}", _REMEDY)
