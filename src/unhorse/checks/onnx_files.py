"""ONNX files read without the onnx library: structure, operators, sizes, and where their data lies."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Set
from typing import Any, BinaryIO

from unhorse.checks.expectations import Facts, Sides
from unhorse.checks.operators import ONNX
from unhorse.checks.protobuf import Entry, MessageReader, Schema, Span
from unhorse.rules import LoadFailed, LoadRefused

MAX_NODES = 20_000
MAX_TENSORS = 20_000
MAX_NESTING = 3
MAX_GRAPHS = 200
OPSETS = range(7, 27)

_EXPORT = "export the model again with torch.onnx.export, or with tf2onnx for TensorFlow"
_BESIDE = "put the data file that the exporter wrote into the same folder, under the name it was given"
_TEXT, _INT, _SPAN = "text", "int", "span"
_PAIRS = Entry("metadata_props", "Pair", True)

_SCHEMA: Schema = {
    "Model": {
        **{
            1: Entry("ir_version", _INT),
            2: Entry("producer_name", _TEXT),
            3: Entry("producer_version", _TEXT),
        },
        **{4: Entry("domain", _TEXT), 5: Entry("model_version", _INT), 6: Entry("doc_string", _SPAN)},
        **{7: Entry("graph", "Graph"), 8: Entry("opset_import", "Opset", True), 14: _PAIRS},
        **{20: Entry("training_info", _SPAN, True), 25: Entry("functions", _SPAN, True)},
    },
    "Opset": {1: Entry("domain", _TEXT), 2: Entry("version", _INT)},
    "Pair": {1: Entry("key", _TEXT), 2: Entry("value", _TEXT)},
    "Graph": {
        **{1: Entry("node", "Node", True), 2: Entry("name", _TEXT), 5: Entry("initializer", "Tensor", True)},
        **{10: Entry("doc_string", _SPAN), 11: Entry("input", "Value", True), 16: _PAIRS},
        **{12: Entry("output", "Value", True), 13: Entry("value_info", _SPAN, True)},
    },
    "Node": {
        **{1: Entry("input", _TEXT, True), 2: Entry("output", _TEXT, True), 3: Entry("name", _TEXT)},
        **{4: Entry("op_type", _TEXT), 7: Entry("domain", _TEXT), 8: Entry("overload", _TEXT)},
        **{5: Entry("attribute", "Attribute", True), 6: Entry("doc_string", _SPAN)},
        **{9: Entry("metadata_props", _SPAN, True)},
    },
    "Attribute": {
        **{1: Entry("name", _TEXT), 13: Entry("doc_string", _SPAN), 20: Entry("type", _INT)},
        **{2: Entry("f", "float"), 3: Entry("i", _INT), 4: Entry("s", _SPAN), 5: Entry("t", "Tensor")},
        **{
            6: Entry("g", "Graph"),
            7: Entry("floats", "count-4", True),
            8: Entry("ints", "count-varint", True),
        },
        **{9: Entry("strings", _SPAN, True)},
    },
    "Tensor": {
        **{1: Entry("dims", _INT, True), 2: Entry("data_type", _INT), 8: Entry("name", _TEXT)},
        **{4: Entry("float_data", "count-4", True), 5: Entry("int32_data", "count-varint", True)},
        **{7: Entry("int64_data", "count-varint", True), 9: Entry("raw_data", _SPAN)},
        **{10: Entry("double_data", "count-8", True), 11: Entry("uint64_data", "count-varint", True)},
        **{12: Entry("doc_string", _SPAN), 13: Entry("external_data", "Pair", True)},
        **{14: Entry("data_location", _INT), 16: Entry("metadata_props", _SPAN, True)},
    },
    "Value": {
        **{1: Entry("name", _TEXT), 2: Entry("type", "Type"), 3: Entry("doc_string", _SPAN)},
        **{4: Entry("metadata_props", _SPAN, True)},
    },
    "Type": {1: Entry("tensor_type", "TensorType"), 6: Entry("denotation", _SPAN)},
    "TensorType": {1: Entry("elem_type", _INT), 2: Entry("shape", "Shape")},
    "Shape": {1: Entry("dim", "Dimension", True)},
    "Dimension": {1: Entry("value", _INT), 2: Entry("param", _TEXT), 3: Entry("denotation", _SPAN)},
}
_ATTRIBUTE_FIELDS = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings"}
# bytes of an item and the field for items that are not raw bytes, by the number of the type
_TYPES = {
    **{1: (4, "float_data"), 11: (8, "double_data"), 7: (8, "int64_data"), 13: (8, "uint64_data")},
    **{12: (4, "uint64_data"), 6: (4, "int32_data"), 2: (1, "int32_data"), 3: (1, "int32_data")},
    **{4: (2, "int32_data"), 5: (2, "int32_data"), 9: (1, "int32_data"), 10: (2, "int32_data")},
    **{16: (2, "int32_data")},
}
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_IMPORTED = {"", "ai.onnx", "ai.onnx.ml", "pkg.onnxscript.torch_lib", "pkg.onnxscript.torch_lib.common"}


def check_onnx(stream: BinaryIO, beside: Mapping[str, BinaryIO] | None = None) -> Facts:
    """The facts of an ONNX model; LD217 for its structure, LD216 for data kept in the files `beside` it."""
    reader = MessageReader(
        stream, _SCHEMA, _refused, lambda what: LoadFailed(f"the ONNX file is damaged: {what}")
    )
    model = reader.read("Model")
    if "graph" not in model:
        raise LoadFailed("the ONNX file has no graph: it is truncated or damaged")
    for part, what in (("functions", "functions of its own"), ("training_info", "training information")):
        if part in model:
            raise _refused(f"it has {what}, which an exported classifier does not need")
    _check_opsets(model.get("opset_import", []))
    check = _GraphCheck({name: file.seek(0, io.SEEK_END) for name, file in (beside or {}).items()})
    check.graph(model["graph"], set(), 0)
    check.total()
    return _facts(model, check.operators)


def _check_opsets(opsets: list[dict[str, Any]]) -> None:
    domains = [opset.get("domain", "") for opset in opsets]
    main = [opset.get("version", 0) for opset in opsets if opset.get("domain", "") in ("", "ai.onnx")]
    if len(main) != 1 or main[0] not in OPSETS:
        raise _refused(f"it is for operator sets {main}, not for one of {OPSETS[0]} to {OPSETS[-1]}")
    if not set(domains) <= _IMPORTED:
        raise _refused(f"it needs the operators of {sorted(set(domains) - _IMPORTED)[0][:100]!r}")


class _GraphCheck:
    """What adds up over a graph and the graphs inside it."""

    def __init__(self, beside: Mapping[str, int]) -> None:
        self.beside = beside
        self.operators: set[str] = set()
        self.graphs = self.nodes = self.tensors = self.external_bytes = 0

    def graph(self, graph: Mapping[str, Any], outer: Set[str], depth: int) -> None:
        self.graphs += 1
        if depth > MAX_NESTING or self.graphs > MAX_GRAPHS:
            raise _refused(f"its graphs are nested deeper than {MAX_NESTING}, or more than {MAX_GRAPHS}")
        initial = [tensor.get("name", "") for tensor in graph.get("initializer", [])]
        given = [value.get("name", "") for value in graph.get("input", [])]
        if len(set(initial)) != len(initial) or len(set(given)) != len(given):
            raise _refused("two of its tensors have the same name")
        for tensor in graph.get("initializer", []):
            self.tensor(tensor)
        known = {*outer, *initial, *given}
        for node in graph.get("node", []):
            self.node(node, known, depth)
        for value in graph.get("output", []):
            if value.get("name", "") not in known:
                raise _refused("an output is computed by nothing")

    def node(self, node: Mapping[str, Any], known: set[str], depth: int) -> None:
        self.nodes += 1
        operator = node.get("op_type", "")
        if self.nodes > MAX_NODES:
            raise _refused(f"it has more than {MAX_NODES} nodes")
        if node.get("domain", "") not in ("", "ai.onnx") or operator not in ONNX or node.get("overload"):
            raise _refused(
                f"it uses {node.get('domain', '')[:50]} {operator[:50]}, an operator outside the list"
            )
        if any(name and name not in known for name in node.get("input", [])):
            raise _refused("a node reads what no node before it computes: the graph has a cycle or a gap")
        self.operators.add(operator)
        names = set()
        for attribute in node.get("attribute", []):
            self.attribute(attribute, known, depth)
            names.add(attribute.get("name", ""))
        if len(names) != len(node.get("attribute", [])):
            raise _refused("a node has two attributes of one name")
        for name in node.get("output", []):
            if name and name in known:
                raise _refused("two nodes compute one result")
            known.add(name)

    def attribute(self, attribute: Mapping[str, Any], known: Set[str], depth: int) -> None:
        expected = _ATTRIBUTE_FIELDS.get(attribute.get("type", 0))
        present = {field for field in _ATTRIBUTE_FIELDS.values() if field in attribute}
        if expected is None or not present <= {expected}:
            raise _refused("an attribute has two values, or another than its type says")
        if "t" in attribute:
            self.tensor(attribute["t"])
        if "g" in attribute:
            self.graph(attribute["g"], known, depth + 1)

    def tensor(self, tensor: Mapping[str, Any]) -> None:
        self.tensors += 1
        name, dims = tensor.get("name", "")[:100], tensor.get("dims", [])
        if self.tensors > MAX_TENSORS or len(dims) > 8 or not all(0 <= size < 2**31 for size in dims):
            raise _refused(f"tensor {name!r} has impossible dimensions, or there are too many tensors")
        if tensor.get("data_type", 0) not in _TYPES:
            raise _refused(f"tensor {name!r} has type {tensor.get('data_type', 0)}, which is no plain number")
        item, field = _TYPES[tensor["data_type"]]
        count = math.prod(dims)
        sources = [field for field in (*_TYPED, "raw_data", "external_data") if field in tensor]
        if len(sources) > 1:
            raise _refused(f"tensor {name!r} has its data twice, and two readers see different weights")
        if (tensor.get("data_location", 0) == 1) != (sources == ["external_data"]):
            raise _refused(f"tensor {name!r} says wrongly where its data is")
        if sources == ["external_data"]:
            self.external(name, tensor["external_data"], count * item)
            return
        found = tensor.get("raw_data", Span(0, 0)).length if sources == ["raw_data"] else tensor.get(field, 0)
        if sources not in ([], ["raw_data"], [field]) or found != (
            item * count if sources == ["raw_data"] else count
        ):
            raise _refused(f"tensor {name!r} is not as long as its dimensions {dims} say")

    def external(self, name: str, pairs: list[dict[str, str]], needed: int) -> None:
        said = {pair.get("key", ""): pair.get("value", "") for pair in pairs}
        place = said.get("location", "")
        if len(said) != len(pairs) or not said.keys() <= {"location", "offset", "length", "checksum"}:
            raise _outside(f"tensor {name!r} describes its place in another way than the standard")
        if place in ("", ".", "..") or any(letter in "/\\:\0" for letter in place):
            raise _outside(f"tensor {name!r} is kept in {place[:100]!r}, outside the folder of the model")
        if place not in self.beside:
            raise _outside(
                f"tensor {name!r} is kept in {place[:100]!r}, which is not there or is no regular file"
            )
        numbers = [said.get("offset", "0"), said.get("length", str(needed))]
        if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
            raise _outside(f"tensor {name!r} has an offset or a length that is no number")
        offset, length = (int(number) for number in numbers)
        if length != needed or offset + length > self.beside[place]:
            raise _outside(
                f"tensor {name!r} needs {needed} bytes at {offset}; {place[:100]!r} does not have them"
            )
        self.external_bytes += length

    def total(self) -> None:
        # tied weights count twice; a file of a thousand views of one tensor would count a thousand times
        if self.external_bytes > 4 * sum(self.beside.values()) + 2**20:
            raise _outside("the tensors claim far more than the files beside the model have")


def _facts(model: Mapping[str, Any], operators: set[str]) -> Facts:
    graph = model["graph"]
    initial = {tensor.get("name", "") for tensor in graph.get("initializer", [])}
    inputs = [value for value in graph.get("input", []) if value.get("name", "") not in initial]
    outputs = [_sides(value) for value in graph.get("output", [])]
    sides = _sides(inputs[0]) if len(inputs) == 1 else []
    shape: Sides | None = (sides[1], sides[2], sides[3]) if len(sides) == 4 else None
    if shape is not None and sides[3] in (1, 3) and sides[1] not in (1, 3):
        shape = (sides[3], sides[1], sides[2])  # from TensorFlow: channels last
    pairs = [(pair.get("key", ""), pair.get("value", "")) for pair in model.get("metadata_props", [])]
    opset = next(o.get("version") for o in model["opset_import"] if o.get("domain", "") in ("", "ai.onnx"))
    return Facts(
        shape,
        outputs[0][1] if outputs and len(outputs[0]) == 2 else None,
        producer=f"{model.get('producer_name', '')} {model.get('producer_version', '')}".strip()[:200],
        operators=tuple(sorted(operators)),
        extra={"opset": str(opset)} | {key[:100]: value[:10_000] for key, value in pairs[:50]},
    )


def _sides(value: Mapping[str, Any]) -> list[int | None]:
    dims = value.get("type", {}).get("tensor_type", {}).get("shape", {}).get("dim", [])
    return [dim["value"] if 0 < dim.get("value", 0) < 2**31 else None for dim in dims]


def _refused(what: str) -> LoadRefused:
    return LoadRefused("LD217", f"the ONNX model is not a plain graph: {what}", _EXPORT)


def _outside(what: str) -> LoadRefused:
    return LoadRefused("LD216", what, _BESIDE)
