"""Benign ONNX files: both exporters of torch, the opsets they write, and what other tools do to a graph."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benign_sources import BATCH, CLASSES, EXPORTED, SHAPES, Outputs, Recipe, outputs_of, torch_network


class _Softmax(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).softmax(1)


def onnx_files() -> Iterator[Recipe]:
    """Recipes of .onnx files, some with their weights in a file beside them."""
    for opset in (9, *range(11, 21)):
        yield Recipe(f"small-cnn-{opset}.onnx", partial(_onnx, name="small-cnn", opset=opset))
    for name in EXPORTED[1:]:
        yield Recipe(f"{name}-17.onnx", partial(_onnx, name=name, opset=17))
        yield Recipe(f"{name}-18.onnx", partial(_onnx, name=name, opset=18, dynamo=True))
    for opset in (19, 20, 21):
        yield Recipe(
            f"small-cnn-dynamo-{opset}.onnx", partial(_onnx, name="small-cnn", opset=opset, dynamo=True)
        )
    for form in ("dynamic", "external", "softmax", "last", "handed-on", "named"):
        yield Recipe(f"ulp-vgg-{form}.onnx", partial(_onnx, name="ulp-vgg", form=form))
    yield Recipe("small-cnn-half.onnx", partial(_onnx, name="small-cnn", form="half"))
    yield Recipe(
        "small-cnn-dynamo-dynamic.onnx", partial(_onnx, name="small-cnn", dynamo=True, form="dynamic")
    )
    yield Recipe(
        "small-cnn-dynamo-external.onnx", partial(_onnx, name="small-cnn", dynamo=True, form="external")
    )


def _onnx(path: Path, *, name: str, opset: int = 17, dynamo: bool = False, form: str = "") -> Outputs:
    import onnx

    network = torch_network(name)
    outputs = outputs_of(network, SHAPES[name])
    options: dict[str, Any] = {"opset_version": opset, "dynamo": dynamo}
    if form == "dynamic" and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("n", min=1, max=512)},)
    elif form == "dynamic":
        options |= {"input_names": ["images"], "dynamic_axes": {"images": {0: "n"}}}
    images = torch.rand(BATCH, *SHAPES[name])
    if form == "half":
        halved = copy.deepcopy(network).half()
        outputs = outputs_of(copy.deepcopy(halved).float(), SHAPES[name])
        network, images = halved, images.half()
    if form == "softmax":
        outputs = outputs._replace(values=outputs.values.softmax(1), squashed="softmax")
        network = _Softmax(network).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet = {"verbose": False, "external_data": form == "external"} if dynamo else {}
        torch.onnx.export(network, (images,), str(path), **options, **quiet)
    if form in ("external", "last", "handed-on", "named") and not dynamo:
        model = onnx.load(str(path))
        _ONNX_EDITS[form](onnx, model)
        external = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
        onnx.save(model, str(path), **(external if form == "external" else {}))
    return outputs


def _channels_last(onnx: Any, model: Any) -> None:
    """As tf2onnx writes it: the image comes in as (n, h, w, c) and is transposed first."""
    image = model.graph.input[0]
    inner = f"{image.name}_nchw"
    for node in model.graph.node:
        node.input[:] = [inner if name == image.name else name for name in node.input]
    n, c, h, w = (size.dim_value for size in image.type.tensor_type.shape.dim)
    for size, value in zip(image.type.tensor_type.shape.dim, (n, h, w, c), strict=True):
        size.dim_value = value
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", [image.name], [inner], perm=[0, 3, 1, 2]))


def _hand_on(onnx: Any, model: Any) -> None:
    """As exporters do with equal weights: kept once, and handed to the others through Identity."""
    node = onnx.helper.make_node
    first = next(tensor for tensor in model.graph.initializer if tensor.dims and len(tensor.dims) == 1)
    model.graph.node.insert(0, node("Identity", [first.name], ["handed_on"]))
    for other in model.graph.node[1:]:
        other.input[:] = ["handed_on" if name == first.name else name for name in other.input]


def _name_classes(onnx: Any, model: Any) -> None:
    names = json.dumps({index: f"kind {index}" for index in range(CLASSES)})
    onnx.helper.set_model_props(model, {"names": names, "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"})


_ONNX_EDITS: dict[str, Callable[[Any, Any], None]] = {
    "external": lambda onnx, model: None,
    "last": _channels_last,
    "handed-on": _hand_on,
    "named": _name_classes,
}
