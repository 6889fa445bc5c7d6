"""Writes tests/seeds: the smallest valid file of each format, from which scripts/fuzz makes its mutants.

They are kept, not made when needed, so that the number of a mutant always means the same bytes.
"""

from __future__ import annotations

import argparse
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from foreign_files import foreign

SEEDS = Path(__file__).with_name("seeds")


def write_seeds(folder: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    ).eval()
    images = torch.rand(2, 1, 8, 8)
    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "tiny.safetensors", {"format": "pt"})
    torch.save(network.state_dict(), folder / "tiny.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, images), folder / "tiny.torchscript")
        torch.export.save(torch.export.export(network, (images,)), folder / "tiny.pt2")
        torch.onnx.export(network, (images,), str(folder / "tiny.onnx"), dynamo=False, opset_version=17)
    write_pickles(folder, network)
    write_other_inputs(folder)
    _write_keras(folder)


def write_pickles(folder: Path, network: nn.Module) -> None:
    """A checkpoint with values beside the weights, one of before PyTorch 1.6, and files not opened."""
    checkpoint = {
        "state_dict": network.state_dict(),
        "best": np.float64(1),
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(checkpoint, folder / "values.pt", pickle_protocol=4)
    torch.save(network.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    arrays = {"a": np.arange(8.0), "b": np.array(["x", None], dtype=object), "c": np.arange(3, dtype="u1")}
    joblib.dump(arrays, folder / "arrays.joblib")
    (folder / "text.pkl").write_bytes(pickle.dumps({"a": np.arange(3), "b": [1, "two", 3.0]}, 0))
    np.save(folder / "objects.npy", arrays["b"])
    (folder / "tiny.mlmodel").write_bytes(foreign()["net.mlmodel"][1])


def write_other_inputs(folder: Path) -> None:
    """ONNX that takes bytes, channels last, with weights and activations in int8."""
    from onnx import TensorProto, helper, numpy_helper, save

    def node(kind: str, inputs: str, output: str, **said: Any) -> Any:
        return helper.make_node(kind, inputs.split(), [output], **said)

    tensors = {
        "w": np.arange(27, dtype=np.int8).reshape(1, 3, 3, 3),
        **{"ws": np.full(1, 0.02, np.float32), "wz": np.zeros(1, np.int8), "div": np.float32(255)},
        **{"s": np.float32(0.01), "z": np.uint8(7), "head": np.ones((1, 2), np.float32)},
    }
    nodes = [
        *(node("Cast", "x", "xf", to=1), node("Transpose", "xf", "xt", perm=[0, 3, 1, 2])),
        *(node("Div", "xt div", "xd"), node("QuantizeLinear", "xd s z", "q")),
        *(node("DequantizeLinear", "q s z", "xq"), node("DequantizeLinear", "w ws wz", "k", axis=0)),
        *(node("Conv", "xq k", "c"), node("GlobalAveragePool", "c", "p"), node("Flatten", "p", "f")),
        node("MatMul", "f head", "y"),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 8, 8, 3])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    listed = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "g", [given], [answer], initializer=listed)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(folder / "bytes.onnx"))


def _write_keras(folder: Path) -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    layers = [
        keras.layers.Input((8, 8, 1)),
        keras.layers.Conv2D(2, 3, activation="relu"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential(layers)
    model.save(folder / "tiny.keras")
    model.save(folder / "tiny.h5")


if __name__ == "__main__":
    write_seeds(SEEDS)
