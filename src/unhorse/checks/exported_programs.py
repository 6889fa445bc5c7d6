"""torch.export archives, read but not loaded: their loader unpickles, compiles and evaluates."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

from unhorse.checks import archives, zip_directory
from unhorse.checks.documents import parse_document, walk
from unhorse.checks.expectations import Facts
from unhorse.checks.expressions import is_guard, is_size
from unhorse.checks.operators import is_torch_operator
from unhorse.checks.weight_files import check_root, torch_zip_facts
from unhorse.rules import LoadFailed, LoadRefused

_REMEDY = "export it again with torch.export.save of torch 2.9 or later, or export the weights as safetensors"
_FIXED = {"archive_format", "archive_version", "byteorder", ".format_version", ".storage_alignment"}
_NAME = re.compile(r"[A-Za-z0-9_.\-]*")
_TARGET = re.compile(
    r"torch\.ops\.aten\.(\w+)\.\w+|_operator\.(?:add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|getitem|truediv)"
    r"|torch\.ops\.higher_order\.(?:wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_(?:max|min|int|float|not|ite)|math\.(?:trunc|ceil|floor)"
)
# text that torch keeps beside the graph and neither evaluates nor compiles
_FREE_TEXT = {
    "stack_trace",
    "nn_module_stack",
    "torch_fn",
    "from_node",
    "custom",
    "source_fn_stack",
    "torch_version",
}
_SPECS = {"in_spec", "out_spec"}
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_ITEM_BYTES = {
    **dict.fromkeys((5, 8, 35), 8),
    **dict.fromkeys((4, 7, 34), 4),
    **dict.fromkeys((3, 6, 13, 28), 2),
    **dict.fromkeys((1, 2, 12), 1),
}


def check_exported_program(stream: BinaryIO) -> Facts:
    """The facts of a .pt2 archive; LD215 for what its loader would run, LD206 for sizes that are not true."""
    directory = zip_directory.read_directory(stream)
    for member in directory.members:
        if member.local().startswith("data/aotinductor"):
            raise _refused(f"it carries compiled code, {member.name!r}")
    members = {member.local(): member for member in directory.members}
    models = [name for name in members if re.fullmatch(r"models/\w+\.json", name)]
    if len(models) != 1:
        raise _refused(f"it has {len(models)} models, not one")
    name = models[0][len("models/") : -len(".json")]
    samples = f"data/sample_inputs/{name}.pt"
    archives.check_members(stream, directory, deflated=lambda _: False, nested=[samples])
    check_root(directory)
    _check_names(members, name)
    if archives.read_member(stream, members["archive_version"], 100) != b"0":
        raise _refused("it is of a version of the format that unhorse does not know")
    for folder, kind in (("weights", "weight"), ("constants", "tensor")):
        config = members.get(f"data/{folder}/model_{folder}_config.json") or members.get(
            f"data/{folder}/{name}_{folder}_config.json"
        )
        if config is None:
            raise _refused(f"its {folder} are pickled, or it has none")
        _check_payloads(_document(stream, config), members, folder, kind)
    sample = io.BytesIO(archives.read_member(stream, members[samples])) if samples in members else None
    if sample is not None and sample.getvalue():
        torch_zip_facts(sample, where=samples, only_tensors=True)
    return _check_program(_document(stream, members[models[0]]))


def _check_names(members: Mapping[str, zip_directory.Member], name: str) -> None:
    payload = re.compile(
        r"data/(weights/weight_\d+|constants/tensor_\d+|(weights|constants)/\w+_config\.json)"
    )
    for local, member in members.items():
        known = local in _FIXED or local in (f"models/{name}.json", f"data/sample_inputs/{name}.pt")
        if not known and not local.startswith(("extra/", ".data/")) and not payload.fullmatch(local):
            raise _refused(f"it carries {member.name!r}, which is no tensor and no graph")
    if "archive_version" not in members or "archive_format" not in members:
        raise _refused("it does not say its format and version")


def _document(stream: BinaryIO, member: zip_directory.Member) -> Any:
    return parse_document(archives.read_member(stream, member), member.local(), _refused)


def _check_payloads(config: Any, members: Mapping[str, zip_directory.Member], folder: str, kind: str) -> None:
    """Raises unless every tensor is plain bytes, and as many of them as its sizes say."""
    try:
        for name, entry in config["config"].items():
            if not _NAME.fullmatch(name):
                raise _refused(f"{name[:100]!r} is not the name of a tensor")
            if entry["use_pickle"] is not False:
                raise _refused(f"{name!r} is to be unpickled without limits (use_pickle)")
            place = entry["path_name"]
            if not re.fullmatch(rf"{kind}_\d+", place):
                raise _refused(f"{name!r} is {place!r}: a custom object, which is unpickled, not a tensor")
            if f"data/{folder}/{place}" not in members:
                raise LoadFailed(f"the archive lacks the tensor {name!r}: it is damaged")
            _check_extent(name, entry["tensor_meta"], members[f"data/{folder}/{place}"].size)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, LoadRefused | LoadFailed):
            raise
        raise _refused(f"its list of {folder} is not what torch.export.save writes") from error


def _check_extent(name: str, meta: Any, available: int) -> None:
    sizes, strides = ([item["as_int"] for item in meta[key]] for key in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    counts = (*sizes, *strides, offset)
    if len(sizes) != len(strides) or not all(type(count) is int and count >= 0 for count in counts):
        raise _refused(f"the sizes of {name!r} are not counts")
    if meta["dtype"] not in _ITEM_BYTES or meta["device"]["type"] != "cpu" or meta["layout"] != 7:
        reason = f"tensor {name!r} is not a plain dense tensor of the CPU"
        raise LoadRefused("LD206", reason, "move the model to the CPU and export it again")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    item = _ITEM_BYTES[meta["dtype"]]
    if math.prod(sizes) and (math.prod(sizes) * item > available or (last + 1) * item > available):
        reason = f"tensor {name!r} claims more than the {available} bytes that the file has for it"
        raise LoadRefused("LD206", reason, _REMEDY)


def _check_program(program: Any) -> Facts:
    """The facts of a graph, every text of which is a name, an operator, a size or a remark."""
    try:
        _check_texts(program)
        if program["schema_version"]["major"] != 8:
            raise _refused("it is of a version of the schema that unhorse does not know")
        for guard in program.get("guards_code", []):
            if not is_guard(guard):
                raise _refused(f"it has a guard that torch would run as code, {guard[:100]!r}")
        for text in program.get("range_constraints", {}):
            if not is_size(text):
                raise _refused(f"{text[:100]!r} is not a size")
        graph = program["graph_module"]["graph"]
        operators = {node["target"] for node in graph["nodes"]}
        producer = f"torch {program.get('torch_version', '')}"[:100]
        shapes = _shapes(program["graph_module"], graph)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _refused("its graph is not what torch.export.save writes") from error
    image_shape, num_classes = shapes
    return Facts(image_shape, num_classes, producer=producer, operators=tuple(sorted(operators)))


def _check_texts(program: Any) -> None:
    for _, key, value in walk(program):
        if key == "custom_obj_values" and value:
            raise _refused("it carries custom objects")
        if not isinstance(value, str):
            continue
        if key == "target":
            found = _TARGET.fullmatch(value)
            if not found or (found[1] and not is_torch_operator(found[1])):
                raise _refused(f"its graph calls {value[:100]!r}, an operator outside the list")
        elif key == "expr_str":
            if not is_size(value):
                raise _refused(f"{value[:100]!r} is not a size, and sympy would run it as code")
        elif key in _SPECS:
            _check_spec(value)
        elif key not in _FREE_TEXT | {"guards_code", "range_constraints"} and not _NAME.fullmatch(value):
            raise _refused(f"{value[:100]!r} stands where torch compiles a name into code")


def _check_spec(text: str) -> None:
    """A tree of inputs or outputs made of plain containers; another type would be looked up and built."""
    spec = parse_document(text.encode("utf-8", "replace"), "its tree of inputs", _refused)
    for _, key, value in walk(spec):
        if key == "type" and (not isinstance(value, str | None) or value not in _CONTAINERS | {"type"}):
            raise _refused(f"it takes or returns a {str(value)[:100]}, which is no plain container")
        if key == "context" and isinstance(value, str) and value not in ("null", "context"):
            names = json.loads(value) if value.startswith("[") else None
            if not isinstance(names, list) or not all(_NAME.fullmatch(str(name)) for name in names):
                raise _refused(f"its inputs have the context {value[:100]!r}")


def _shapes(module: Any, graph: Any) -> tuple[tuple[int | None, int | None, int | None] | None, int | None]:
    """(c, h, w) of the only input and the number of classes, as far as the graph says."""
    specs = module["signature"]["input_specs"]
    inputs = [spec["user_input"]["arg"]["as_tensor"]["name"] for spec in specs if "user_input" in spec]
    outputs = [output["as_tensor"]["name"] for output in graph["outputs"] if "as_tensor" in output]
    if len(inputs) != 1:
        return None, None
    sides = [_side(size) for size in graph["tensor_values"][inputs[0]]["sizes"]]
    classes = [_side(size) for size in graph["tensor_values"][outputs[0]]["sizes"]] if outputs else []
    shape = (sides[1], sides[2], sides[3]) if len(sides) == 4 else None
    return shape, classes[1] if len(classes) == 2 else None


def _side(size: Mapping[str, Any]) -> int | None:
    value = size.get("as_int")
    return value if type(value) is int else None


def _refused(what: str) -> LoadRefused:
    return LoadRefused("LD215", f"the .pt2 archive is not a plain graph: {what}", _REMEDY)
