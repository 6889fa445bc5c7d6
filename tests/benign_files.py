"""Benign model files by real exporters in every format, each with what its source network answers."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benign_inputs import onnx_inputs, torch_inputs
from benign_onnx import onnx_files
from benign_sources import (
    BATCH,
    CLASSES,
    EXPORTED,
    KERAS,
    LARGE,
    SHAPES,
    TRANSFORMERS,
    Outputs,
    Recipe,
    keras_network,
    outputs_of,
    torch_network,
    transformers_network,
)


def compare(path: Path, outputs: Outputs) -> float:
    """The largest difference between the model that unhorse loads and the source network."""
    from unhorse.loading.formats import load_model

    shape = None if outputs.tells_size else tuple(outputs.images.shape[1:])
    model = load_model(path, image_shape=shape)
    with torch.no_grad():
        return difference(model.network(outputs.images), outputs)


def difference(logits: Tensor, outputs: Outputs) -> float:
    """Between logits and what the source answered, which may be a softmax of its logits."""
    if outputs.squashed == "softmax":
        logits = logits.softmax(1)
    if outputs.squashed == "log_softmax":
        logits = logits.log_softmax(1)
    return float((logits - outputs.values).abs().max())


def recipes() -> Iterator[Recipe]:
    """Every benign file; one that cannot be exported with the installed libraries is no recipe."""
    yield from _state_dicts()
    yield from _torchscripts()
    yield from _exported_programs()
    yield from onnx_files()
    yield from onnx_inputs()
    yield from torch_inputs()
    for name in KERAS:
        yield Recipe(f"{name}.keras", partial(_keras, name=name))
        yield Recipe(f"{name}.h5", partial(_keras, name=name))
    for name in TRANSFORMERS:
        yield Recipe(f"huggingface-{name}", partial(_folder, name=name))
    yield Recipe("huggingface-bin", partial(_folder, name="vit", form="bin"))
    yield Recipe("huggingface-sharded", partial(_folder, name="convnext", form="sharded"))
    yield Recipe("timm-resnet18", _timm)
    yield Recipe("huggingface-half", partial(_folder, name="resnet", form="half"))


# --- state dicts -------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "half": lambda state: {name: _floats_as(torch.float16, tensor) for name, tensor in state.items()},
    "bfloat16": lambda state: {name: _floats_as(torch.bfloat16, tensor) for name, tensor in state.items()},
    "double": lambda state: {name: _floats_as(torch.float64, tensor) for name, tensor in state.items()},
    "data-parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "parameters": lambda state: {
        name: nn.Parameter(tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    },
    "checkpoint": lambda state: {
        **{"epoch": 3, "best": 0.93, "arch": "resnet18", "state_dict": state},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    },
    "wrapped": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    "net": lambda state: {"net": state, "acc": 93.1},
    "protocol-4": lambda state: state,
    "before-1.6-protocol-4": lambda state: state,
    "numpy-beside": lambda state: {"state_dict": state, "best": np.float64(93.4), "index": np.arange(20)},
    "arguments-beside": lambda state: {
        **{"state_dict": state, "args": argparse.Namespace(lr=0.1, data=Path("data")), "epoch": 2},
        **{"when": datetime.datetime(2020, 1, 1), "sched": collections.defaultdict(dict)},
    },
}
SAVED: dict[str, dict[str, Any]] = {
    "protocol-4": {"pickle_protocol": 4},
    "before-1.6-protocol-4": {"pickle_protocol": 4, "_use_new_zipfile_serialization": False},
    "arguments-beside": {"pickle_protocol": 5},
}
"""How torch.save is asked to write a form, where that is not as usual."""
SHORTENED = {"half": torch.float16, "bfloat16": torch.bfloat16}


def _floats_as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _state_dicts() -> Iterator[Recipe]:
    for name in SHAPES:
        large = name in LARGE
        form = "half" if large else "plain"
        yield Recipe(f"{name}.pth", partial(_state_dict, name=name, form=form), large)
        if not large:
            yield Recipe(f"{name}.safetensors", partial(_state_dict, name=name, form="plain"))
    for form in FORMS:
        yield Recipe(f"preact-resnet18-{form}.pt", partial(_state_dict, name="preact-resnet18", form=form))
    yield Recipe("small-cnn-half.safetensors", partial(_state_dict, name="small-cnn", form="half"))
    yield Recipe("ulp-vgg-bfloat16.safetensors", partial(_state_dict, name="ulp-vgg", form="bfloat16"))


def _state_dict(path: Path, *, name: str, form: str) -> Outputs:
    network = torch_network(name)
    if form in SHORTENED:  # the source is the network that the file can hold
        network.load_state_dict(
            {key: _floats_as(SHORTENED[form], value) for key, value in network.state_dict().items()}
        )
    state = FORMS[form](network.state_dict())
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path, **SAVED.get(form, {}))
    return outputs_of(network, SHAPES[name], tells_size=False)


# --- TorchScript and torch.export --------------------------------------------------------------------


def _torchscripts() -> Iterator[Recipe]:
    for name in EXPORTED:
        scriptable = name not in ("mobilenet-v2", "efficientnet-b0")
        for form in ("traced", "scripted", "frozen") if scriptable else ("traced", "frozen-trace"):
            yield Recipe(f"{name}-{form}.torchscript", partial(_torchscript, name=name, form=form))
    yield Recipe("small-cnn-half.torchscript", partial(_torchscript, name="small-cnn", form="half"))


def _torchscript(path: Path, *, name: str, form: str) -> Outputs:
    network = torch_network(name)
    images = torch.rand(BATCH, *SHAPES[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        if form == "half":
            network = network.half()
            torch.jit.save(torch.jit.trace(network, images.half(), check_trace=False), path)
            return outputs_of(network.float(), SHAPES[name], tells_size=False)
        made = torch.jit.trace(network, images) if "trace" in form else torch.jit.script(network)
        torch.jit.save(torch.jit.freeze(made) if "frozen" in form else made, path)
    return outputs_of(network, SHAPES[name], tells_size=False)


def _exported_programs() -> Iterator[Recipe]:
    for name in EXPORTED:
        for form in ("static", "dynamic"):
            yield Recipe(f"{name}-{form}.pt2", partial(_exported_program, name=name, form=form))
    yield Recipe("small-cnn-one.pt2", partial(_exported_program, name="small-cnn", form="one"))
    yield Recipe(
        "preact-resnet18-training.pt2", partial(_exported_program, name="preact-resnet18", form="training")
    )


def _exported_program(path: Path, *, name: str, form: str) -> Outputs:
    network = torch_network(name)
    outputs = outputs_of(network, SHAPES[name])
    if form == "training":
        network.train()
    images = torch.rand(1 if form == "one" else BATCH, *SHAPES[name])
    sizes = ({0: torch.export.Dim("n", min=1, max=512)},) if form == "dynamic" else None
    program = torch.export.export(network, (images,), dynamic_shapes=sizes)
    torch.export.save(program, path)
    return outputs


# --- Keras and Hugging Face --------------------------------------------------------------------------


@torch.no_grad()
def _keras(path: Path, *, name: str) -> Outputs:
    model = keras_network(name)
    model.save(path)
    for layer in model.layers:  # computed in float32, as unhorse does, whatever the file says
        layer.dtype_policy = "float32"
    images = torch.rand(BATCH, *model.input_shape[1:], generator=torch.Generator().manual_seed(7))
    last = model.layers[-1]
    squashed = getattr(getattr(last, "activation", None), "__name__", "")
    squashed = "softmax" if type(last).__name__ == "Softmax" else squashed
    squashed = squashed if squashed in ("softmax", "log_softmax") else ""
    return Outputs(images.permute(0, 3, 1, 2), model(images, training=False).detach(), squashed)


@torch.no_grad()
def _folder(path: Path, *, name: str, form: str = "") -> Outputs:
    model: Any = transformers_network(name)
    if form == "half":
        model = model.half()
    model.save_pretrained(path, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form == "bin":
        (path / "model.safetensors").unlink()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    side = model.config.image_size if name == "levit" else 32
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": side, "width": side}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings | {"rescale_factor": 1 / 255}))
    images = torch.rand(BATCH, 3, side, side, generator=torch.Generator().manual_seed(7))
    return Outputs(images, model.float().eval()(images).logits)


def _timm(path: Path) -> Outputs:
    """A folder as timm pushes it to the hub: its own configuration, and torchvision's names of weights."""
    network, shape = torch_network("resnet18"), SHAPES["resnet18"]
    path.mkdir()
    save_file(network.state_dict(), path / "model.safetensors")
    settings = {"input_size": list(shape), "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config = {"architecture": "resnet18", "num_classes": CLASSES, "pretrained_cfg": settings}
    (path / "config.json").write_text(json.dumps(config))
    return outputs_of(network, shape)
