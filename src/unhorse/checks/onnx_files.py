"""ONNX files read without the onnx library: structure, operators, sizes, and where their data lies."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Set
from typing import Any, BinaryIO

from unhorse.checks.expectations import Facts, Sides
from unhorse.checks.onnx_schema import ATTRIBUTE_FIELDS, DATA, ITEMS, OTHER_ITEMS, OTHER_VALUES, SCHEMA
from unhorse.checks.onnx_support import RUNNING, Unsupported
from unhorse.checks.operators import ONNX
from unhorse.checks.protobuf import MessageReader, Span
from unhorse.rules import LoadFailed, LoadRefused

MAX_NODES = 20_000
MAX_TENSORS = 20_000
MAX_NESTING = 3
MAX_GRAPHS = 200
OPSETS = range(7, 27)
STANDARD = ("", "ai.onnx")

_EXPORT = "export the model again with torch.onnx.export, or with tf2onnx for TensorFlow"
_BESIDE = "put the data file that the exporter wrote into the same folder, under the name it was given"


def check_onnx(stream: BinaryIO, beside: Mapping[str, BinaryIO] | None = None) -> Facts:
    """The facts of an ONNX model whose data may be kept in the files `beside` it.

    LD217 for a structure that two readers could understand differently or that is absurd, LD216 for data
    outside the folder, LoadFailed for data that is cut off or absent, LD235 for what is sound and not read.
    """
    reader = MessageReader(
        stream, SCHEMA, _refused, lambda what: LoadFailed(f"the ONNX file is damaged: {what}")
    )
    model = reader.read("Model")
    if "graph" not in model:
        raise LoadFailed("the ONNX file has no graph: it is truncated or damaged")
    check = _GraphCheck({name: file.seek(0, io.SEEK_END) for name, file in (beside or {}).items()})
    check.opsets(model.get("opset_import", []))
    check.graph(model["graph"], set(), 0)
    for function in model.get("functions", []):
        check.function(function)
    for trained in model.get("training_info", []):
        check.training(trained, model["graph"])
    check.total()
    check.unsupported.refuse()
    return _facts(model, check.operators)


class _GraphCheck:
    """What adds up over a graph and the graphs inside it.

    What is hostile is refused where it is seen; what is only not read waits until all has been looked at.
    """

    def __init__(self, beside: Mapping[str, int]) -> None:
        self.beside = beside
        self.unsupported = Unsupported()
        self.operators: set[str] = set()
        self.graphs = self.nodes = self.tensors = self.external_bytes = 0
        self.quantised: set[str] = set()
        self.inside_function = False

    def opsets(self, opsets: list[dict[str, Any]]) -> None:
        """One version of the standard operators; what else is imported counts only if a node uses it."""
        domains = [opset.get("domain", "") for opset in opsets]
        main = {opset.get("version", 0) for opset in opsets if opset.get("domain", "") in STANDARD}
        if len(set(domains)) != len(domains) or len(main) > 1:
            raise _refused(
                "it names two versions of one operator set, and runtimes differ in which they take"
            )
        if not main:
            self.unsupported.add("it has none of the standard operators")
        for version in main - set(OPSETS):
            self.unsupported.opset(version, OPSETS)

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
        for sparse in graph.get("sparse_initializer", []):
            initial.append(self.sparse(sparse))
        for value in (*graph.get("input", []), *graph.get("output", [])):
            self.value(value)
        known = {*outer, *initial, *given}
        for node in graph.get("node", []):
            self.node(node, known, depth)
        for value in graph.get("output", []):
            if value.get("name", "") not in known:
                raise _refused("an output is computed by nothing")
            if value.get("name", "") in self.quantised:
                self.unsupported.integers("an output")

    def function(self, function: Mapping[str, Any]) -> None:
        self.unsupported.add(f"it has functions of its own ({str(function.get('name', ''))[:50]!r})")
        known = set(function.get("input", []))
        self.inside_function = True
        for attribute in function.get("attribute_proto", []):
            self.attribute(attribute, known, 0)
        for node in function.get("node", []):
            self.node(node, known, 0)
        self.inside_function = False

    def training(self, trained: Mapping[str, Any], graph: Mapping[str, Any]) -> None:
        self.unsupported.add("it has training information")
        names = {tensor.get("name", "") for tensor in graph.get("initializer", [])}
        names |= {value.get("name", "") for value in graph.get("input", [])}
        for part in ("initialization", "algorithm"):
            if part in trained:
                self.graph(trained[part], names, 1)

    def value(self, value: Mapping[str, Any]) -> None:
        for kind in OTHER_VALUES:
            if kind in value.get("type", {}):
                self.unsupported.add(f"{str(value.get('name', ''))[:50]!r} is no tensor: {kind}")

    def node(self, node: Mapping[str, Any], known: set[str], depth: int) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise _refused(f"it has more than {MAX_NODES} nodes")
        self.operator(node)
        if any(name and name not in known for name in node.get("input", [])):
            raise _refused("a node reads what no node before it computes: the graph has a cycle or a gap")
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

    def operator(self, node: Mapping[str, Any]) -> None:
        """Which operator a node is of, and whether it takes quantised numbers."""
        operator, domain = node.get("op_type", ""), node.get("domain", "")
        if operator in RUNNING:
            raise _refused(f"it uses {operator[:50]}, which runs code or files from outside of the model")
        if (
            node.get("overload")
            and not self.inside_function
            and "functions of its own" not in self.unsupported
        ):
            raise _refused(f"it uses an overload of {operator[:50]}, and has no function of that name")
        if domain not in STANDARD or operator not in ONNX:
            self.unsupported.operator(operator, domain)
        elif operator == "QuantizeLinear":
            self.quantised.update(node.get("output", []))
        elif operator != "DequantizeLinear" and self.quantised & set(node.get("input", [])):
            self.unsupported.integers(operator)
        self.operators.add(operator)

    def attribute(self, attribute: Mapping[str, Any], known: Set[str], depth: int) -> None:
        expected = ATTRIBUTE_FIELDS.get(attribute.get("type", 0))
        present = {field for field in ATTRIBUTE_FIELDS.values() if field in attribute}
        if expected is None or not present <= {expected}:
            raise _refused("an attribute has two values, or another than its type says")
        if "ref_attr_name" in attribute and (present or not self.inside_function):
            raise _refused("an attribute refers to another one, outside of a function")
        for tensor in (*attribute.get("tensors", []), *([attribute["t"]] if "t" in attribute else [])):
            self.tensor(tensor)
        sparse = [attribute["sparse_tensor"]] if "sparse_tensor" in attribute else []
        for found in (*attribute.get("sparse_tensors", []), *sparse):
            self.sparse(found)
        for graph in (*attribute.get("graphs", []), *([attribute["g"]] if "g" in attribute else [])):
            self.graph(graph, known, depth + 1)

    def sparse(self, sparse: Mapping[str, Any]) -> str:
        """Its name, after a look at its parts."""
        self.unsupported.add("it has sparse tensors")
        for part in ("values", "indices"):
            if part in sparse:
                self.tensor(sparse[part])
        return str(sparse.get("values", {}).get("name", ""))

    def tensor(self, tensor: Mapping[str, Any]) -> None:
        self.tensors += 1
        name, dims = tensor.get("name", "")[:100], tensor.get("dims", [])
        if self.tensors > MAX_TENSORS or len(dims) > 8 or not all(0 <= size < 2**31 for size in dims):
            raise _refused(f"tensor {name!r} has impossible dimensions, or there are too many tensors")
        kind = tensor.get("data_type", 0)
        if kind not in ITEMS and kind not in OTHER_ITEMS:
            raise _refused(f"tensor {name!r} has type {kind}, which ONNX does not know")
        sources = [field for field in (*DATA, "raw_data", "external_data") if field in tensor]
        if len(sources) > 1:
            raise _refused(f"tensor {name!r} has its data twice, and two readers see different weights")
        if (tensor.get("data_location", 0) == 1) != (sources == ["external_data"]):
            raise _refused(f"tensor {name!r} says wrongly where its data is")
        if kind in OTHER_ITEMS:
            self.unsupported.add(f"tensor {name!r} is of {OTHER_ITEMS[kind]}")
        item, field = ITEMS.get(kind, (None, ""))
        needed = None if item is None else item * math.prod(dims)
        if sources == ["external_data"]:
            self.external(name, tensor["external_data"], needed)
        elif needed is not None:
            raw = tensor.get("raw_data", Span(0, 0)).length
            found = raw if sources == ["raw_data"] else tensor.get(field, 0)
            if sources not in ([], ["raw_data"], [field]) or found != (
                needed if sources == ["raw_data"] else math.prod(dims)
            ):
                raise _refused(f"tensor {name!r} is not as long as its dimensions {dims} say")

    def external(self, name: str, pairs: list[dict[str, str]], needed: int | None) -> None:
        said = {pair.get("key", ""): pair.get("value", "") for pair in pairs}
        place = said.get("location", "").removeprefix("./")
        if len(said) != len(pairs) or not said.keys() <= {"location", "offset", "length", "checksum"}:
            raise _outside(f"tensor {name!r} describes its place in another way than the standard")
        if place in ("", ".", "..") or any(letter in "/\\:\0" for letter in place):
            raise _outside(f"tensor {name!r} is kept in {place[:100]!r}, outside the folder of the model")
        if place not in self.beside:
            absent = f"the model's data file {place[:100]!r}, which has tensor {name!r}, is not beside it"
            raise LoadFailed(absent, _BESIDE)
        numbers = [said.get("offset", "0"), said.get("length", str(needed or 0))]
        if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
            raise _outside(f"tensor {name!r} has an offset or a length that is no number")
        offset, length = (int(number) for number in numbers)
        if needed is not None and length != needed:
            raise _outside(f"tensor {name!r} takes {length} bytes of {place[:100]!r} and needs {needed}")
        if offset + length > self.beside[place]:
            short = f"tensor {name!r} ends at {offset + length} of {self.beside[place]} bytes"
            raise LoadFailed(f"the model's data file {place[:100]!r} is cut off or another one: {short}")
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
    opset = next(o.get("version") for o in model["opset_import"] if o.get("domain", "") in STANDARD)
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
