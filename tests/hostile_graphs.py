"""Hostile TorchScript, torch.export and ONNX files: the code and the graphs that they carry."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

from hostile_files import Content, Corpus, Folder, Harm, Link, Piece, zipped
from hostile_pickles import FLOATS, called, state, system, tensor, torch_zip, two

# --- TorchScript --------------------------------------------------------------------------------------------

NET = """class Net(Module):
  __parameters__ = ["weight", ]
  __buffers__ = []
  weight : Tensor
  training : bool
  def forward(self: __torch__.Net,
    x: Tensor) -> Tensor:
    weight = self.weight
    return {expression}
"""
OBJECT = b"c__torch__\nNet\n)\x81}(" + b"X\x06\0\0\0weight" + tensor() + b"X\x08\0\0\0training\x89ub"


def script(code: str, *more: Piece, pickled: bytes | None = None) -> bytes:
    """A TorchScript archive with one class in its code."""
    members = [Piece("m/data.pkl", two(OBJECT) if pickled is None else pickled), Piece("m/data/0", FLOATS)]
    members += [Piece("m/code/__torch__.py", code.encode("utf-8", "surrogatepass"), 8), *more]
    return zipped(*members, Piece("m/constants.pkl", two(b")")), Piece("m/version", b"3\n"))


def network(expression: str) -> str:
    return NET.replace("{expression}", expression)


GOOD_CODE = network("torch.linear(x, weight)")


def _add_torchscript(corpus: Corpus) -> None:
    for name, expression in (
        ("from-file", "torch.from_file('MARKER', True, 4)"),
        ("save", "torch.save(x, 'MARKER')"),
        ("load", "torch.load('MARKER')"),
        ("from-file-by-namespace", "ops.aten.from_file('MARKER', True, 4)"),
        ("python-operator", "ops.prim.PythonOp(x)"),
        ("rpc", "ops.prim.rpc_async('MARKER', x)"),
        ("fork", "torch.fork(x)"),
        ("foreign-namespace", "ops.evil.run('MARKER')"),
        ("quantized-namespace", "ops.quantized.linear(x)"),
        ("as-strided", "torch.as_strided(x, [1000000], [1], 0)"),
        ("set-storage", "torch.set_(x, weight)"),
        ("classes-namespace", "torch.classes.evil.Run('MARKER')"),
        ("method-of-tensor", "(x).from_file('MARKER')"),
        ("getattr-by-foreign-name", 'getattr(x, "from_file")'),
        ("getattr-by-computed-name", "getattr(x, str(1))"),
        ("alias", "[f(x) for f in [torch.from_file]][0]"),
        ("lambda", "(lambda y: y)(x)"),
        ("eval", "eval('MARKER')"),
        ("import-function", "__import__('os').system('touch MARKER')"),
        ("random-seed", "torch.manual_seed(3)"),
    ):
        corpus.add(f"torchscript/{name}", "LD214", lambda h, e=expression: script(marked(network(e), h)))
    for name, code in (
        ("import", "import os\n" + GOOD_CODE),
        ("import-from", "from os import system\n" + GOOD_CODE),
        ("own-method-called-save", GOOD_CODE + "  def save(self, x: Tensor) -> Tensor:\n    return x\n"),
        ("nested-100000-deep", network("(" * 100_000 + "x" + ")" * 100_000)),
        ("not-code", "\0\1\2"),
        ("indented-deep", "def f():\n" + "".join(" " * i + "if x:\n" for i in range(1, 400))),
        ("nine-megabytes", GOOD_CODE + "# " + "x" * 9 * 2**20),
        ("async-function", "async def f(x):\n  return x\n"),
    ):
        corpus.add(f"torchscript/{name}", "LD214" if "mega" not in name else "LD204", script(code))
    corpus.add("torchscript/pickled-os-system", "LD205", lambda h: script(GOOD_CODE, pickled=two(system(h))))
    constants = lambda h: zipped(  # noqa: E731
        *(Piece("m/data.pkl", two(OBJECT)), Piece("m/code/__torch__.py", GOOD_CODE.encode())),
        Piece("m/constants.pkl", two(system(h))),
    )
    corpus.add("torchscript/pickled-constants", "LD205", constants)
    debug = lambda h: script(GOOD_CODE, Piece("m/code/__torch__.py.debug_pkl", two(system(h))))  # noqa: E731
    corpus.add("torchscript/pickled-debug-information", "LD205", debug)
    corpus.add("torchscript/bytecode", "LD204", script(GOOD_CODE, Piece("m/bytecode.pkl", two(b")"))))
    corpus.add("torchscript/deflated-tensor", "LD204", script(GOOD_CODE, Piece("m/data/1", bytes(99), 8)))
    bomb = Piece("m/code/bomb.py", b"#" * (70 * 2**20), 8)
    corpus.add("torchscript/bomb-of-code", "LD204", script(GOOD_CODE, bomb))
    corpus.add("torchscript/truncated", "LD230", script(GOOD_CODE)[:-40])


def marked(code: str, harm: Harm) -> str:
    return code.replace("MARKER", str(harm.marker))


# --- torch.export -------------------------------------------------------------------------------------------


def meta(sizes: list[int], strides: list[int], dtype: int = 7) -> dict[str, Any]:
    listed = [[{"as_int": number} for number in numbers] for numbers in (sizes, strides)]
    device = {"type": "cpu", "index": None}
    return {
        **{"dtype": dtype, "sizes": listed[0], "strides": listed[1], "device": device, "layout": 7},
        **{"requires_grad": False, "storage_offset": {"as_int": 0}},
    }


def program() -> dict[str, Any]:
    """The document of a linear layer, as torch.export.save writes it."""
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    nothing = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    positional = {"type": "builtins.tuple", "context": "null", "children_spec": [leaf]}
    inside = {"type": "builtins.tuple", "context": "null", "children_spec": [positional, nothing]}
    spec, result = json.dumps([1, inside]), json.dumps([1, leaf])
    arguments = [
        {"name": name, "arg": {"as_tensor": {"name": value}}, "kind": 1}
        for name, value in (("input", "x"), ("weight", "p_weight"))
    ]
    node = {"target": "torch.ops.aten.linear.default", "inputs": arguments, "name": "linear", "metadata": {}}
    node |= {"outputs": [{"as_tensor": {"name": "linear"}}], "is_hop_single_tensor_return": None}
    values = {"p_weight": meta([2, 4], [4, 1]), "x": meta([1, 4], [4, 1]), "linear": meta([1, 2], [2, 1])}
    graph = {
        "inputs": [{"as_tensor": {"name": "p_weight"}}, {"as_tensor": {"name": "x"}}],
        **{"outputs": [{"as_tensor": {"name": "linear"}}], "nodes": [node], "tensor_values": values},
        **{"sym_int_values": {}, "sym_bool_values": {}, "sym_float_values": {}, "custom_obj_values": {}},
        "is_single_tensor_return": False,
    }
    inputs = [{"parameter": {"arg": {"name": "p_weight"}, "parameter_name": "weight"}}]
    inputs += [{"user_input": {"arg": {"as_tensor": {"name": "x"}}}}]
    outputs = [{"user_output": {"arg": {"as_tensor": {"name": "linear"}}}}]
    calls = {"inputs": [], "outputs": [], "in_spec": spec, "out_spec": result, "forward_arg_names": ["x"]}
    module = {
        "graph": graph,
        "signature": {"input_specs": inputs, "output_specs": outputs},
        "module_call_graph": [{"fqn": "", "signature": calls}],
        **{"metadata": {}, "treespec_namedtuple_fields": {}},
    }
    return {
        **{
            "graph_module": module,
            "opset_version": {"aten": 10},
            "range_constraints": {},
            "verifiers": ["TRAINING"],
        },
        **{"schema_version": {"major": 8, "minor": 20}, "torch_version": "2.13.0", "guards_code": []},
    }


def weights(**changes: Any) -> dict[str, Any]:
    """The document of the weights: one tensor, with changes to its entry."""
    entry = {
        "path_name": "weight_0",
        "is_param": True,
        "use_pickle": False,
        "tensor_meta": meta([2, 4], [4, 1]),
    }
    return {"config": {"weight": entry | changes}}


SAMPLES = torch_zip(two(tensor((1, 4)) + b"\x85}\x86"))


def exported(
    *more: Piece,
    graph: Mapping[str, Any] | bytes | None = None,
    weight: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
    samples: bytes = SAMPLES,
    version: bytes = b"0",
    stored: bytes = FLOATS,
) -> bytes:
    """A .pt2 archive, good unless told otherwise."""
    document = graph if isinstance(graph, bytes) else json.dumps(graph or program()).encode()
    listed = [json.dumps(found).encode() for found in (weight or weights(), constants or {"config": {}})]
    return zipped(
        *(Piece("m/archive_format", b"pt2"), Piece("m/archive_version", version)),
        *(Piece("m/models/model.json", document), Piece("m/data/weights/weight_0", stored)),
        Piece("m/data/weights/model_weights_config.json", listed[0]),
        Piece("m/data/constants/model_constants_config.json", listed[1]),
        *(Piece("m/data/sample_inputs/model.pt", samples), Piece("m/.data/version", b"6\n")),
        *more,
    )


def changed(path: str, value: Any) -> dict[str, Any]:
    """The program with one value replaced, found by keys and indices."""
    document = copy.deepcopy(program())
    *above, last = path.split("/")
    found: Any = document
    for key in above:
        found = found[int(key)] if isinstance(found, list) else found[key]
    found[int(last) if isinstance(found, list) else last] = value
    return document


NODE = "graph_module/graph/nodes/0"


def _add_exported(corpus: Corpus) -> None:
    flagged = weights(use_pickle=True)
    corpus.add("pt2/use-pickle", "LD215", lambda h: exported(weight=flagged, stored=two(system(h))))
    corpus.add("pt2/use-pickle-in-other-words", "LD215", exported(weight=weights(use_pickle=1)))
    pickled = {"config": {"c": {"path_name": "tensor_0", "use_pickle": True, "tensor_meta": None}}}
    tensor_0 = Piece("m/data/constants/tensor_0", FLOATS)
    corpus.add("pt2/pickled-constant", "LD215", exported(tensor_0, constants=pickled))
    for kind in ("opaque_obj_0", "custom_obj_0"):
        entry = {"config": {"c": {"path_name": kind, "use_pickle": False, "tensor_meta": meta([1], [1])}}}
        corpus.add(f"pt2/constant-{kind[:6]}", "LD215", exported(constants=entry))
        piece = lambda h, k=kind: Piece(f"m/data/constants/{k}", two(system(h)))  # noqa: E731
        corpus.add(f"pt2/member-{kind[:6]}", "LD215", lambda h, p=piece: exported(p(h)))
    corpus.add(
        "pt2/legacy-weights", "LD215", lambda h: exported(Piece("m/data/weights/model.pt", two(system(h))))
    )
    corpus.add("pt2/compiled-code", "LD215", exported(Piece("m/data/aotinductor/model/x.so", b"\x7fELF")))
    corpus.add("pt2/executorch", "LD215", exported(Piece("m/data/executorch/model.pte", b"x")))
    corpus.add(
        "pt2/sample-inputs-os-system", "LD205", lambda h: exported(samples=torch_zip(state(system(h))))
    )
    value = called("argparse", "Namespace")
    corpus.add("pt2/sample-inputs-other-value", "LD205", exported(samples=torch_zip(state(value))))
    corpus.add(
        "pt2/sample-inputs-protocol-4",
        "LD205",
        exported(samples=torch_zip(b"\x80\x04" + state(tensor())[2:])),
    )
    corpus.add("pt2/two-models", "LD215", exported(Piece("m/models/other.json", b"{}")))
    corpus.add("pt2/version-99", "LD215", exported(version=b"99"))
    for name, place in (("path-out-of-the-folder", "../../etc/passwd"), ("path-absolute", "/etc/passwd")):
        corpus.add(f"pt2/{name}", "LD215", exported(weight=weights(path_name=place)))
    for name, sizes, strides in (
        ("stride-0", [10**6, 10**6], [0, 0]),
        ("claims-more-than-the-file", [2, 400], [400, 1]),
        ("strides-beyond-the-file", [2, 4], [10**9, 1]),
    ):
        corpus.add(f"pt2/{name}", "LD206", exported(weight=weights(tensor_meta=meta(sizes, strides))))
    corpus.add("pt2/negative-sizes", "LD215", exported(weight=weights(tensor_meta=meta([-1, 4], [4, 1]))))
    elsewhere = meta([2, 4], [4, 1]) | {"device": {"type": "meta", "index": None}}
    corpus.add("pt2/meta-tensor", "LD206", exported(weight=weights(tensor_meta=elsewhere)))
    run = "__import__('os').system('touch MARKER')"
    size = {"as_expr": {"expr_str": run, "hint": {"as_int": 2}}}
    x = "graph_module/graph/tensor_values/x/sizes/0"
    texts = {
        "symbol-that-runs": (x, size),
        "symbol-with-attribute": (x, {"as_expr": {"expr_str": "Symbol.__init__.__globals__", "hint": None}}),
        "symbol-of-text": (x, {"as_expr": {"expr_str": "Add('print')", "hint": None}}),
        "symbol-of-lambda": (x, {"as_expr": {"expr_str": "(lambda: 1)()", "hint": None}}),
        "symbol-of-huge-power": (x, {"as_expr": {"expr_str": "9**9**9**9", "hint": None}}),
        "range-that-runs": ("range_constraints", {run: {"min_val": 0, "max_val": 1}}),
        "guard-that-runs": ("guards_code", [run]),
        "guard-that-ends-its-call": ("guards_code", ["1, 'x'); import os; (0"]),
        "guard-of-attributes": ("guards_code", ["L['x'].__class__.__init__.__globals__ == 1"]),
        "operator-torch-load": (f"{NODE}/target", "torch.load"),
        "operator-hub": (f"{NODE}/target", "torch.hub.load"),
        "operator-from-file": (f"{NODE}/target", "torch.ops.aten.from_file.default"),
        "operator-builtin": (f"{NODE}/target", "_operator.attrgetter"),
        "operator-foreign": (f"{NODE}/target", "torch.ops.evil.run.default"),
        "operator-extension": (f"{NODE}/target", "#evil:run"),
        "operator-higher-order": (f"{NODE}/target", "torch.ops.higher_order.triton_kernel_wrapper_mutation"),
        "name-that-is-code": (f"{NODE}/name", "x):\n  " + run + "\n  return (x"),
        "input-that-is-code": ("graph_module/graph/inputs/1/as_tensor/name", "x=" + run),
        "argument-that-is-code": (
            "graph_module/module_call_graph/0/signature/forward_arg_names",
            ["x=" + run],
        ),
        "parameter-that-is-code": (
            *("graph_module/signature/input_specs/0/parameter/parameter_name", '"); ' + run + " # "),
        ),
        "custom-objects": ("graph_module/graph/custom_obj_values", {"x": {"class_fqn": "evil"}}),
        "spec-of-another-type": (
            "graph_module/module_call_graph/0/signature/in_spec",
            json.dumps([1, {"type": "evil.Type", "context": "null", "children_spec": []}]),
        ),
        "schema-of-the-future": ("schema_version", {"major": 99, "minor": 0}),
        "graph-without-nodes": ("graph_module/graph", {}),
    }
    for name, (path, value) in texts.items():
        make: Callable[[Harm], Content] = lambda h, p=path, v=value: exported(  # noqa: E731
            graph=marked(json.dumps(changed(p, v)), h).encode()
        )
        corpus.add(f"pt2/{name}", "LD215", make)
    corpus.add("pt2/nested-100000-deep", "LD215", exported(graph=b"[" * 100_000))
    corpus.add("pt2/nested-200-deep", "LD215", exported(graph=b"[" * 200 + b"]" * 200))
    corpus.add("pt2/graph-key-twice", "LD215", exported(graph=b'{"graph_module": 1, "graph_module": 2}'))
    corpus.add("pt2/truncated", "LD230", exported()[:-40])
    corpus.add("pt2/deflated", "LD204", exported(Piece("m/extra/card.json", bytes(99), 8)))


# --- ONNX ---------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def put(number: int, *values: int | str | bytes) -> bytes:
    """Fields of one number: numbers as varints, anything else as byte strings."""
    out = b""
    for value in values:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def weight(*fields: bytes, dims: tuple[int, ...] = (4, 4), kind: int = 1, name: str = "w") -> bytes:
    return put(1, *dims) + put(2, kind) + put(8, name) + b"".join(fields)


RAW = put(9, bytes(64))
OUTSIDE = put(14, 1)


def kept(**said: str) -> bytes:
    """The fields of a tensor whose data lies in another file."""
    return b"".join(put(13, put(1, key) + put(2, value)) for key, value in said.items()) + OUTSIDE


def value(name: str, *dims: int) -> bytes:
    shape = b"".join(put(1, put(1, size)) for size in dims)
    return put(1, name) + put(2, put(1, put(1, 1) + put(2, shape)))


def node(
    kind: str = "MatMul", inputs: tuple[str, ...] = ("x", "w"), output: str = "y", more: bytes = b""
) -> bytes:
    return put(1, *inputs) + put(2, output) + put(4, kind) + more


def model(
    *nodes: bytes,
    tensors: tuple[bytes, ...] = (weight(RAW),),
    more: bytes = b"",
    opset: int = 18,
    graph: bytes = b"",
    sides: tuple[int, ...] = (1, 4),
) -> bytes:
    """An ONNX model of nodes over the input x and these tensors, good unless told otherwise."""
    body = put(1, *(nodes or (node(),))) + put(2, "g") + put(5, *tensors)
    body += put(11, value("x", *sides)) + put(12, value("y", 1, 4)) + graph
    return put(1, 8) + put(2, "maker") + put(7, body) + put(8, put(1, "") + put(2, opset)) + more


def attribute_of(name: str, kind: int, *fields: bytes) -> bytes:
    return put(1, name) + put(20, kind) + b"".join(fields)


def attribute(name: str, kind: int, *fields: bytes) -> bytes:
    return put(5, attribute_of(name, kind, *fields))


def _add_onnx(corpus: Corpus) -> None:
    inner = put(1, node("Identity", ("x",), "z")) + put(2, "i") + put(12, value("z", 1))
    for _ in range(5):
        branch = node("If", ("x",), "z", attribute("then_branch", 5, put(6, inner)))
        inner = put(1, branch) + put(2, "i") + put(12, value("z", 1))
    floats = put(4, struct.pack("<16f", *range(16)))
    graphs = {
        "raw-and-typed-data": model(tensors=(weight(RAW, floats),)),
        "raw-and-external-data": model(tensors=(weight(RAW, kept(location="d")),)),
        "raw-data-twice": model(tensors=(weight(RAW, RAW),)),
        "typed-data-of-another-type": model(tensors=(weight(put(7, *range(16))),)),
        "data-location-without-data": model(tensors=(weight(OUTSIDE),)),
        "tensor-longer-than-its-data": model(tensors=(weight(RAW, dims=(400, 400)),)),
        "tensor-shorter-than-its-data": model(tensors=(weight(RAW, dims=(2, 2)),)),
        "dimensions-of-10-18": model(tensors=(weight(RAW, dims=(10**9, 10**9)),)),
        "negative-dimension": model(tensors=(weight(RAW, dims=(-4, -4)),)),
        "rank-100": model(tensors=(weight(RAW, dims=(1,) * 98 + (4, 4)),)),
        "tensor-of-unknown-type": model(tensors=(weight(RAW, kind=99),)),
        "tensor-in-segments": model(tensors=(weight(RAW, put(3, put(1, 0))),)),
        "two-tensors-of-one-name": model(tensors=(weight(RAW), weight(RAW))),
        "graph-twice": model(more=put(7, b"")),
        "unknown-field": model(more=put(999, b"hidden")),
        "opset-twice": model(more=put(8, put(2, 18))),
        "operator-with-overload": model(node(more=put(8, "evil"))),
        "cycle": model(node(inputs=("y", "w"))),
        "two-nodes-one-result": model(node(), node()),
        "output-of-nothing": model(node(output="z")),
        "attribute-of-two-values": model(node(more=attribute("a", 2, put(3, 1), put(4, b"x")))),
        "attribute-of-another-type": model(node(more=attribute("a", 4, put(3, 1)))),
        "attribute-twice": model(node(more=attribute("a", 2, put(3, 1)) * 2)),
        "attribute-by-reference": model(node(more=put(5, put(1, "a") + put(21, "b")))),
        "attribute-tensor-of-two-data": model(node(more=attribute("value", 4, put(5, weight(RAW, floats))))),
        "graphs-nested-deep": model(node("If", ("x",), more=attribute("then_branch", 5, put(6, inner)))),
        "20001-nodes": model(*(node("Relu", ("x",), f"y{i}") for i in range(20_001))),
        "20001-tensors": model(tensors=tuple(weight(dims=(0,), name=f"w{i}") for i in range(20_001))),
        "text-that-is-not-utf-8": model(more=put(4, b"\xff")),
        "group": put(1, 8) + put(2, "x") + b"\x3b\x3c",
    }
    graphs |= {
        "operator-of-python": model(node("PythonOp", more=put(7, "com.microsoft"))),
        "operator-of-compiled-code": model(node("EPContext", more=put(7, "com.microsoft"))),
        "two-versions-of-one-domain": model(more=put(8, put(1, "com.evil") + put(2, 1)) * 2),
        "text-among-the-numbers": model(tensors=(weight(RAW, put(6, b"x")),)),
        "function-that-runs-python": model(more=put(25, put(1, "f") + put(7, node("PyOp")))),
        "function-with-two-data": model(
            more=put(25, put(1, "f") + put(11, attribute_of("a", 4, put(5, weight(RAW, floats)))))
        ),
        "training-with-two-data": model(more=put(20, put(2, put(5, weight(RAW, floats))))),
        "unsupported-and-hostile": model(node("LSTM"), tensors=(weight(RAW, floats),)),
    }
    for name, content in graphs.items():
        corpus.add(f"onnx/{name}", "LD217", content)
    unread = {
        "tensor-of-text": model(tensors=(weight(put(6, b"x"), dims=(1,), kind=8),)),
        "sparse-tensor": model(graph=put(15, put(1, weight(RAW)))),
        "own-function": model(more=put(25, put(1, "f"))),
        "training-information": model(more=put(20, b"")),
        "foreign-domain": model(node(more=put(7, "com.evil"))),
        "opset-1": model(opset=1),
        "opset-999": model(opset=999),
        "operator-loop": model(node("Loop")),
        "operator-scan": model(node("Scan")),
        "operator-random": model(node("RandomNormal", ())),
        "operator-of-sequences": model(node("SequenceConstruct")),
        "operator-of-text": model(node("StringNormalizer")),
        "tensor-of-int4": model(tensors=(weight(put(9, bytes(8)), kind=22),)),
        "operator-of-onnx-runtime": model(node("FusedConv", more=put(7, "com.microsoft"))),
        "input-of-a-sequence": model(graph=put(11, put(1, "s") + put(2, put(4, b"")))),
    }
    for name, content in unread.items():
        corpus.add(f"onnx/{name}", "LD235", content)
    data = {"data": bytes(64)}
    for name, fields, beside in (
        ("parent-path", {"location": "../data"}, data),
        ("path-through-a-folder", {"location": "sub/../../data"}, data),
        ("absolute-path", {"location": "/etc/passwd"}, data),
        ("backslash-path", {"location": "..\\data"}, data),
        ("file-url", {"location": "file:///etc/passwd"}, data),
        ("without-location", {"offset": "0"}, data),
        ("location-of-this-folder", {"location": "."}, data),
        ("location-with-zero", {"location": "data\0.txt"}, data),
        ("overlong", {"location": "data", "length": "6400"}, data),
        ("negative-offset", {"location": "data", "offset": "-64", "length": "64"}, data),
        ("offset-of-10-30", {"location": "data", "offset": "1" + "0" * 30}, data),
        ("shorter-than-needed", {"location": "data", "length": "32"}, data),
        ("unknown-key", {"location": "data", "basepath": "/etc"}, data),
    ):
        files = {"model": model(tensors=(weight(kept(**fields)),)), **beside}
        corpus.add(f"onnx/external-{name}", "LD216", Folder("model", files))
    for name, fields, content in (
        ("absent", {"location": "nothing"}, {}),
        ("offset-beyond", {"location": "data", "offset": "60", "length": "64"}, data),
    ):
        files = {"model": model(tensors=(weight(kept(**fields)),)), **content}
        corpus.add(f"onnx/external-{name}", "LD230", Folder("model", files))
    linked = {"model": model(tensors=(weight(kept(location="data")),)), "data": Link("/etc/passwd")}
    corpus.add("onnx/external-symbolic-link", "LD216", Folder("model", linked), caught="open")
    twice = weight(put(13, *(put(1, "location") + put(2, place) for place in ("data", "other"))), OUTSIDE)
    corpus.add(
        "onnx/external-location-twice", "LD216", Folder("model", {"model": model(tensors=(twice,)), **data})
    )
    many = tuple(weight(kept(location="data"), dims=(2**19,), name=f"w{i or ''}") for i in range(20))
    amplified = {"model": model(tensors=many), "data": bytes(2**21)}
    corpus.add("onnx/external-a-thousandfold", "LD216", Folder("model", amplified))
    corpus.add("onnx/truncated", "LD230", model()[:-20])
    corpus.add("onnx/number-that-never-ends", "LD230", put(1, 8) + put(2, "x") + b"\x3a" + b"\xff" * 20)
    endless = weight(put(9, struct.pack("<16f", *[float("inf")] * 16)))
    images = model(
        node("Flatten", ("x",), "f"), node(inputs=("f", "w")), tensors=(endless,), sides=(1, 1, 2, 2)
    )
    corpus.add("onnx/infinite-weights", "LD207", images, caught="load")
    numbers = model(
        node("Sub", ("x", "x"), "nothing"),
        node("Div", ("nothing", "nothing"), "d"),
        node("Flatten", ("d",), "f"),
        node(inputs=("f", "w")),
        sides=(1, 1, 2, 2),
    )
    # its answers are no numbers, so they agree with nothing
    corpus.add("onnx/nothing-by-nothing", "LD222", numbers, caught="load")


def fill(corpus: Corpus) -> None:
    """Adds the hostile graphs to the corpus."""
    _add_torchscript(corpus)
    _add_exported(corpus)
    _add_onnx(corpus)
