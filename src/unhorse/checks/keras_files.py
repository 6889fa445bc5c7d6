"""Keras models, .keras and .h5: the configuration names layers of a closed list and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, BinaryIO

from unhorse.checks import archives, zip_directory
from unhorse.checks.documents import parse_document, walk
from unhorse.checks.expectations import Facts, Sides
from unhorse.checks.hdf5_files import check_hdf5
from unhorse.checks.keras_layers import ACTIVATIONS, CLASSES, COMPILED, LAYERS, MODELS, MODULES, UNREAD
from unhorse.rules import LoadRefused

MAX_LAYERS = 5_000
MAX_OBJECTS = 50_000
MAX_SIDE = 2**20
MAX_ELEMENTS = 2**28

_WHOLE = "save the whole model with model.save('model.keras'), made of Keras's own layers"
_AS_ONNX = "export the classifier as ONNX with tf2onnx, without these layers where they only augment images"
_MEMBERS = {"config.json", "metadata.json", "model.weights.h5"}
_SIZES = {
    *(
        "units",
        "filters",
        "kernel_size",
        "pool_size",
        "strides",
        "dilation_rate",
        "size",
        "padding",
        "cropping",
    ),
    *("batch_shape", "batch_input_shape", "shape", "target_shape", "input_shape", "output_dim", "input_dim"),
    *(
        "n",
        "groups",
        "num_heads",
        "key_dim",
        "value_dim",
        "depth_multiplier",
        "height",
        "width",
        "output_shape",
    ),
}


def check_keras_archive(stream: BinaryIO) -> Facts:
    """The facts of a .keras archive; LD218 for its configuration, LD219 for its weights."""
    directory = zip_directory.read_directory(stream)
    archives.check_members(stream, directory, deflated=lambda name: name in _MEMBERS)
    members = {member.name: member for member in directory.members}
    if extra := sorted(members.keys() - _MEMBERS):
        raise zip_directory.hostile(f"has {extra[0]!r}, which a model of images does not need")
    if missing := sorted(_MEMBERS - members.keys()):
        raise _refused(f"it has no {missing[0]}")
    metadata, config = (
        _document(archives.read_member(stream, members[name]), name)
        for name in ("metadata.json", "config.json")
    )
    check_hdf5(archives.open_member(stream, members["model.weights.h5"]))
    version = metadata.get("keras_version", "") if isinstance(metadata, dict) else ""
    return check_configuration(config, f"Keras {version}")


def check_keras_hdf5(stream: BinaryIO) -> Facts:
    """The facts of a model in one HDF5 file; LD210 for weights without a network."""
    attributes = check_hdf5(stream)
    if "model_config" not in attributes:
        raise LoadRefused(
            "LD210", "the HDF5 file has weights at best, and no network to put them into", _WHOLE
        )
    raw = attributes["model_config"].encode("utf-8", "surrogatepass")
    config = _document(raw, "model_config")
    return check_configuration(config, f"Keras {attributes.get('keras_version', '')}")


def _document(raw: bytes, name: str) -> Any:
    if raw.count(b'"class_name"') > MAX_OBJECTS:
        raise _refused(f"{name} has more than {MAX_OBJECTS} objects")
    return parse_document(raw, name, _refused)


def check_configuration(config: Any, producer: str) -> Facts:
    """The facts of a configuration whose classes, activations and sizes are on our lists; otherwise LD218."""
    if not isinstance(config, dict) or config.get("class_name") not in MODELS:
        raise _refused("it is not that of a Sequential or Functional model")
    config = {key: value for key, value in config.items() if key != "compile_config"}  # never compiled by us
    unread: set[str] = set()
    for _, key, value in walk(config):
        if isinstance(value, dict):
            unread |= _check_object(value)
        elif key in _SIZES and type(value) is int and not -1 <= value <= MAX_SIDE:
            raise _refused(f"{key} {value} is absurd")
        elif key == "activation" and isinstance(value, str) and value not in ACTIVATIONS | {"activation"}:
            raise _refused(f"it has activation {value[:100]!r}, which is not one of Keras")
    if unread:
        listed = ", ".join(sorted(unread)[:5])
        raise LoadRefused("LD235", f"unhorse does not read the Keras layers {listed}", _AS_ONNX)
    try:
        layers = list(_layers(config))
        _check_order(config)
        facts = _facts(config, layers)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, LoadRefused):
            raise
        raise _refused("its layers are not described as Keras does") from error
    return Facts(**{**vars(facts), "producer": producer[:200]})


def _check_object(value: Mapping[str, Any]) -> set[str]:
    """One dictionary of the configuration; where it names a class, that class is on the list, or one of Keras
    that is not read, which is returned.
    """
    name, module, registered = (value.get(key) for key in ("class_name", "module", "registered_name"))
    if "class_name" not in value:
        if module is not None:
            raise _refused(f"it takes something from module {str(module)[:100]!r}")
        return set()
    if name == "function":
        known = value.get("config") if isinstance(value.get("config"), str) else None
        if module not in ("builtins", "keras.activations") or known not in ACTIVATIONS:
            raise _refused(f"it calls the function {str(value.get('config'))[:100]!r}")
        return set()
    if module in COMPILED and isinstance(name, str) and name[:1].isupper() and registered in (None, name):
        return set()  # how an inner model was trained: keras looks such names up among its own
    if not isinstance(name, str) or name not in CLASSES | UNREAD:
        raise _refused(f"it has a {str(name)[:100]}, which is not on the list of layers for images")
    if (
        not isinstance(module, str | None)
        or module not in MODULES
        or (module == "builtins" and name in LAYERS)
    ):
        raise _refused(f"it takes {name} from module {str(module)[:100]!r}")
    if registered not in (None, name, f"keras>{name}"):
        raise _refused(f"it has the custom object {str(registered)[:100]!r}")
    return {name} & UNREAD


def _layers(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The layers of a model and of the models inside it."""
    if depth > 8:
        raise _refused("it nests models too deep")
    inner = config["config"]["layers"] if isinstance(config["config"], dict) else config["config"]
    if len(inner) > MAX_LAYERS:
        raise _refused(f"it has {len(inner)} layers, more than {MAX_LAYERS}")
    for layer in inner:
        if layer["class_name"] in MODELS:
            yield from _layers(layer, depth + 1)
        else:
            _check_elements(layer["config"])
            yield layer


def _check_elements(config: Mapping[str, Any]) -> None:
    for key in ("batch_shape", "batch_input_shape", "target_shape"):
        elements = 1
        for side in config.get(key) or ():
            elements *= max(side or 1, 1)
        if elements > MAX_ELEMENTS:
            raise _refused(f"{key} {str(config[key])[:100]} is absurd")


def _check_order(config: Mapping[str, Any]) -> None:
    """Raises where a call waits for one that waits for it, over which a loader would never come to an end."""
    inner = config["config"]["layers"] if isinstance(config["config"], dict) else config["config"]
    calls: dict[tuple[str, int], set[tuple[str, int]]] = {}
    names = set()
    for layer in inner:
        name = str(layer.get("name") or layer["config"]["name"])
        if layer["class_name"] in MODELS:
            _check_order(layer)
        names.add(name)
        for index, call in enumerate(layer.get("inbound_nodes") or []):
            calls[name, index] = set(_sources(call))
    if len(names) != len(inner):
        raise _refused("two of its layers have the same name")
    try:
        TopologicalSorter(calls).prepare()
    except CycleError as error:
        raise _refused("its layers wait for each other in a circle") from error


def _sources(call: Any) -> Iterator[tuple[str, int]]:
    """Which calls a call takes its inputs from: (layer, index of the call), in both ways of writing it."""
    for _, key, value in walk(call):
        if key == "keras_history" and isinstance(value, list):
            yield str(value[0]), int(value[1])
        elif isinstance(value, list) and len(value) in (3, 4) and isinstance(value[0], str) and key == "":
            yield value[0], int(value[1])


def _facts(config: Mapping[str, Any], layers: list[Mapping[str, Any]]) -> Facts:
    shapes = [
        found
        for layer in layers
        if (found := layer["config"].get("batch_shape") or layer["config"].get("batch_input_shape"))
    ]
    if (
        not shapes
        and isinstance(config["config"], dict)
        and (built := config["config"].get("build_input_shape"))
    ):
        shapes = [built]
    first = any(layer["config"].get("data_format") == "channels_first" for layer in layers)
    shape: Sides | None = None
    if shapes and len(shapes[0]) == 4:
        _, *sides = (side if type(side) is int else None for side in shapes[0])
        shape = (sides[0], sides[1], sides[2]) if first else (sides[2], sides[0], sides[1])
    dense = [layer["config"]["units"] for layer in layers if layer["class_name"] == "Dense"]
    scales = [layer["config"] for layer in layers if layer["class_name"] == "Rescaling"]
    extra = {"rescaling": f"{scales[0].get('scale')} {scales[0].get('offset')}"[:200]} if scales else {}
    operators = tuple(sorted({str(layer["class_name"]) for layer in layers}))
    return Facts(shape, dense[-1] if dense else None, operators=operators, extra=extra)


def _refused(what: str) -> LoadRefused:
    return LoadRefused("LD218", f"the Keras configuration is refused: {what}", _WHOLE)
