"""Puts configurations that older versions of Keras wrote into words that Keras 3 knows."""

from __future__ import annotations

import inspect
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

_CONFIG = "config.json"
# a key that Keras 3 lacks may go where it only says what is so without it, or how the weights came about
_TRAINING_ENDS = ("_initializer", "_regularizer", "_constraint")
_ANY_VALUE = {"implementation", "fused"}
_ONES = {"groups", "dilation_rate", "strides", "depth_multiplier"}
_ALWAYS_KNOWN = {"name", "trainable", "dtype", "autocast", "activity_regularizer", "input_dim", "input_shape"}
_ALWAYS_KNOWN |= {"batch_shape", "batch_input_shape", "layers", "build_input_shape"}


def modern(config: Any) -> Any:
    """The configuration without keys that a layer of Keras 3 does not know and that change nothing."""
    if isinstance(config, list):
        return [modern(item) for item in config]
    if not isinstance(config, Mapping):
        return config
    found = {key: modern(value) for key, value in config.items()}
    inner = found.get("config")
    known = _known_keys(found.get("class_name"))
    if known is not None and isinstance(inner, dict):
        found["config"] = {
            key: value for key, value in inner.items() if key in known or not _is_idle(key, value)
        }
    return found


def modern_archive(stream: BinaryIO) -> BinaryIO:
    """A .keras archive with a modern configuration: the stream itself where nothing is to be changed."""
    with zipfile.ZipFile(stream) as archive:
        config = json.loads(archive.read(_CONFIG))
        if (changed := modern(config)) == config:
            stream.seek(0)
            return stream
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as copy:
            for name in archive.namelist():
                copy.writestr(name, json.dumps(changed) if name == _CONFIG else archive.read(name))
    made.seek(0)
    return made


def _known_keys(name: object) -> set[str] | None:
    """The arguments of a layer of Keras, those of what it inherits from among them; None for other things."""
    import keras

    kind = getattr(keras.layers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, keras.layers.Layer):
        return None
    known = set(_ALWAYS_KNOWN)
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        known |= {parameter.name for parameter in parameters}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return known


def _is_idle(key: str, value: object) -> bool:
    """Whether a key that is not known says nothing about what the layer computes."""
    if key.endswith(_TRAINING_ENDS) or key in _ANY_VALUE:
        return True
    if key in _ONES and value in (1, [1], [1, 1]):
        return True
    return value is None or value is False or value in ([], {})
