"""Rewrites an ONNX graph into the form that converters expect; what it computes stays the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from unhorse.rules import LoadFailed, LoadRefused

if TYPE_CHECKING:
    import onnx

EXTERNAL_REMEDY = (
    "put the data file beside the model, or save it with onnx.save(..., save_as_external_data=False)"
)


_FLOAT_TYPES = (1, 10, 11, 16)  # float, half, double, bfloat16
_WEIGHED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "PRelu", "LayerNormalization")


def with_data(model: onnx.ModelProto, beside: Mapping[str, BinaryIO]) -> None:
    """Puts the external data of every tensor into the model, from open files, never by path.

    LoadFailed where a file is absent or too short, LD216 where the place of a tensor is none.
    """
    import onnx

    sizes = {name: stream.seek(0, 2) for name, stream in beside.items()}
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "").removeprefix("./")
        if location not in beside:
            raise LoadFailed(f"tensor {tensor.name!r} lies in {location!r}, absent here", EXTERNAL_REMEDY)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or sizes[location] - offset)
        except ValueError as error:
            raise LoadRefused(
                "LD216", f"tensor {tensor.name!r} has no number as its place", EXTERNAL_REMEDY
            ) from error
        if offset < 0 or length < 0 or offset + length > sizes[location]:
            raise LoadRefused("LD216", f"tensor {tensor.name!r} reaches beyond {location!r}", EXTERNAL_REMEDY)
        beside[location].seek(offset)
        data = beside[location].read(length)
        if len(data) != length:
            raise LoadFailed(f"{location!r} ends within tensor {tensor.name!r}")
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = data


def without_idle_domains(model: onnx.ModelProto) -> None:
    """Drops what the model imports and no node uses, as ONNX Runtime writes it: converters look it up."""
    used = {"", "ai.onnx", *(node.domain for node in _nodes(model.graph))}
    _replace(model.opset_import, [opset for opset in model.opset_import if opset.domain in used])


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph)


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without what trips converters.

    Equal weights that an exporter kept once and hands out through Identity nodes are named directly;
    `training_mode=0`, the default, is left out; inputs that only repeat an initialiser are dropped.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    weights = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        source = node.input[0] if node.op_type == "Identity" else ""
        source = renamed.get(source, source)
        if source in weights and node.output[0] not in outputs:
            renamed[node.output[0]] = source
            continue
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for index in reversed(range(len(node.attribute))):
            attribute = node.attribute[index]
            if attribute.name == "training_mode" and attribute.i == 0:
                del node.attribute[index]
        kept.append(node)
    _replace(graph.node, kept)
    _replace(graph.input, [value for value in graph.input if value.name not in weights])
    return copy


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float32 wherever the model says half precision, bfloat16 or double."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    other = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    for tensor in _tensors(copy.graph):
        if tensor.data_type in other:
            values = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.type.tensor_type.elem_type in other:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "stash_type") and attribute.i in other:
                attribute.i = onnx.TensorProto.FLOAT
    return copy


def check_weights(model: onnx.ModelProto) -> None:
    """LD207 where a weight of a layer is not finite, or any constant is NaN; masks may be infinite."""
    import numpy
    import onnx

    weights = {name for node in model.graph.node if node.op_type in _WEIGHED for name in node.input}
    for tensor in _tensors(model.graph):
        if tensor.data_type not in _FLOAT_TYPES:
            continue
        values = onnx.numpy_helper.to_array(tensor).astype("float32", copy=False)
        if numpy.isnan(values).any() or (tensor.name in weights and not numpy.isfinite(values).all()):
            remedy = "the training diverged or the file is damaged; export a healthy checkpoint"
            what = f"the weights contain NaN or infinity, first in {tensor.name[:100]!r}"
            raise LoadRefused("LD207", what, remedy)


def is_narrow(model: onnx.ModelProto) -> bool:
    """Whether any weight is in half precision or bfloat16, whose results differ by more than rounding."""
    import onnx

    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return any(tensor.data_type in narrow for tensor in _tensors(model.graph))


def _replace(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)
