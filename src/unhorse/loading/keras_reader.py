"""Reads Keras files through Keras 3 on its torch backend, whose models are torch modules."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from torch import Tensor, nn

from unhorse.checks.expectations import Facts
from unhorse.extras import install_line
from unhorse.loading.keras_configuration import modern, modern_archive
from unhorse.loading.layouts import BYTES_MEAN, BYTES_STD, Fed, expected
from unhorse.loading.outputs import CLASSIFIER_REMEDY
from unhorse.loading.probing import readout
from unhorse.loading.readouts import LogitsOf, Readout
from unhorse.rules import LoadFailed, LoadRefused

INSTALL_REMEDY = install_line("keras")
_OLDER_REMEDY = "open it with the Keras that wrote it, and export it as ONNX with tf2onnx"
_UNKNOWN_KEY = re.compile(r"(Unrecognized|unexpected) keyword argument.*")
_READ_ERRORS = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, OSError),
    *(NotImplementedError, AssertionError, ImportError, RecursionError),
)


def read_keras_archive(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """A .keras archive, read from the open file; no object of the file's own, no compiled loss."""
    _require_keras()
    from keras.src.saving import saving_lib  # keras.saving takes only paths, and there is none here

    def read() -> Any:
        archive = modern_archive(files[0])
        return saving_lib.load_model(archive, compile=False, safe_mode=True)

    return _readout(_reading(read), options, facts)


def read_keras_hdf5(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """The .h5 file of Keras 1 to 3, read from the open file."""
    _require_keras()
    import h5py
    from keras.src.legacy.saving import legacy_h5_format, saving_options, saving_utils
    from keras.src.saving import serialization_lib

    def read() -> Any:
        # as legacy_h5_format.load_model_from_hdf5, which gives no chance to change the configuration
        with h5py.File(files[0], "r") as opened:
            text = opened.attrs["model_config"]
            config = modern(json.loads(text.decode() if isinstance(text, bytes) else text))
            legacy = saving_options.keras_option_scope(use_legacy_config=True)
            with legacy, serialization_lib.SafeModeScope(True):
                model = saving_utils.model_from_config(config, custom_objects={})
                legacy_h5_format.load_weights_from_hdf5_group(opened["model_weights"], model)
                return model

    return _readout(_reading(read), options, facts)


def _require_keras() -> None:
    """Keras with its torch backend; the choice is made once per process, at the first import."""
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"
        os.environ["KERAS_HOME"] = os.devnull  # no settings of the user's are read, and none written
    try:
        import h5py  # noqa: F401
        import keras
    except ImportError as error:
        raise LoadRefused(
            "LD224", f"this needs {error.name}, which is not installed", INSTALL_REMEDY
        ) from error
    for name in ("tensorflow", "jax"):  # Keras looks whether they are there, not whether they are barred
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
    if keras.backend.backend() != "torch":
        raise LoadFailed("Keras already runs on another backend", "set KERAS_BACKEND=torch")
    keras.config.disable_interactive_logging()


def _reading(read: Any) -> Any:
    try:
        return read()
    except _READ_ERRORS as error:
        if isinstance(error, LoadRefused | LoadFailed):
            raise
        text = str(error).strip()
        if unknown := _UNKNOWN_KEY.search(text):
            what = f"Keras 3 does not know what this file says of a layer: {unknown[0][:200]}"
            raise LoadRefused("LD235", what, _OLDER_REMEDY) from error
        reason = (text.splitlines() or [type(error).__name__])[0]
        raise LoadFailed(f"Keras cannot read it ({reason[:200]})", "save it again with Keras 3") from error


def _readout(model: Any, options: Mapping[str, Any], facts: Facts) -> Readout:
    shapes = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    if len(shapes) != 1:
        raise LoadRefused("LD221", f"the model takes {len(shapes)} inputs, not one", CLASSIFIER_REMEDY)
    layers = list(_layers(model))
    channels_last = all(getattr(layer, "data_format", None) != "channels_first" for layer in layers)
    takes = expected(shapes[0], options.get("image_shape"), channels_last=channels_last)
    facts = replace(facts, image_shape=takes.shape, extra=facts.extra | _scaling(layers))
    if any(_takes_bytes(layer) for layer in layers):
        facts = replace(facts, mean=BYTES_MEAN, std=BYTES_STD)
    for layer in model._flatten_layers():
        if layer.compute_dtype in ("float16", "bfloat16", "float64"):
            layer.dtype_policy = "float32"
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    names = getattr(model, "output_names", ())
    network = LogitsOf(Fed(_Judging(model), takes.layout), options=options, names=names)
    return readout(network, facts, options, batch=takes.batch, notes=takes.notes)


class _Judging(nn.Module):
    """A Keras model called as at test time: no dropout, running statistics, float32 throughout."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images, training=False)


def _layers(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        yield from _layers(layer) if hasattr(layer, "layers") else [layer]


def _takes_bytes(layer: Any) -> bool:
    """Whether a layer brings pixels of 0..255 to 0..1 or -1..1."""
    scale = getattr(layer, "scale", None)
    return type(layer).__name__ == "Rescaling" and isinstance(scale, float) and 1 / 300 < scale < 1 / 100


def _scaling(layers: Sequence[Any]) -> dict[str, str]:
    """What the layers in front of the network do to pixels, in words; they stay inside the network."""
    words = []
    for layer in layers:
        kind = type(layer).__name__
        if kind == "Rescaling":
            words.append(f"Rescaling(scale={layer.scale}, offset={layer.offset})")
        elif kind == "Normalization":
            words.append("Normalization")
    return {"preprocessing": ", ".join(words)} if words else {}
