"""Benign files with their numbers in other ways: flattened, grey, bytes, int8, masks, fixed batches.

What an ONNX file answers is asked of ONNX Runtime, one batch at a time where the file takes only that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benign_sources import BATCH, CLASSES, Outputs, Recipe

DRAW = np.random.default_rng(3)
TO_LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "n c h w": lambda images: images,
    "n h w c": lambda images: images.permute(0, 2, 3, 1),
    "n h w": lambda images: images[:, 0],
    "n d": lambda images: images.flatten(1),
    "n d last": lambda images: images.permute(0, 2, 3, 1).flatten(1),
}


def drawn(*shape: int) -> np.ndarray:
    return (DRAW.normal(size=shape) * 0.3).astype(np.float32)


def images_of(shape: tuple[int, int, int], *, in_bytes: bool = False) -> Tensor:
    images = torch.rand(BATCH, *shape, generator=torch.Generator().manual_seed(7))
    return (images * 255).round() if in_bytes else images


# --- ONNX, node by node -------------------------------------------------------------------------------------


def _file(
    path: Path,
    nodes: list[Any],
    tensors: dict[str, np.ndarray],
    sizes: list[Any],
    *,
    kind: int = 1,
    opset: int = 17,
    domains: tuple[str, ...] = (),
) -> None:
    """Writes an ONNX model of these nodes from x to y."""
    from onnx import helper, numpy_helper, save

    listed = [numpy_helper.from_array(np.asarray(values), name) for name, values in tensors.items()]
    given = helper.make_tensor_value_info("x", kind, sizes)
    answer = helper.make_tensor_value_info("y", 1, [sizes[0], CLASSES])
    graph = helper.make_graph(nodes, "g", [given], [answer], initializer=listed)
    imported = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    save(helper.make_model(graph, opset_imports=imported, ir_version=8), str(path))


def _node(kind: str, inputs: str, output: str, **said: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs.split(), [output], **said)


def _head(source: str, width: int = 6) -> tuple[list[Any], dict[str, np.ndarray]]:
    """The mean of each of some maps and a linear layer."""
    nodes = [
        *(_node("GlobalAveragePool", source, "p"), _node("Flatten", "p", "f")),
        _node("Gemm", "f w2 b2", "y"),
    ]
    return nodes, {"w2": drawn(width, CLASSES), "b2": drawn(CLASSES)}


def _body(source: str, channels: int = 3) -> tuple[list[Any], dict[str, np.ndarray]]:
    nodes, tensors = _head("r")
    first = [_node("Conv", f"{source} w1 b1", "c", kernel_shape=[3, 3]), _node("Relu", "c", "r")]
    return [*first, *nodes], {"w1": drawn(6, channels, 3, 3), "b1": drawn(6), **tensors}


def answered(path: Path, images: Tensor, layout: str = "n c h w", batch: int | None = None) -> Outputs:
    """What ONNX Runtime answers for a file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()[0]
    given = TO_LAYOUT[layout](images).numpy().astype("uint8" if "uint8" in wanted.type else "float32")
    parts = [given[i : i + batch] for i in range(0, len(given), batch)] if batch else [given]
    answers = [session.run(None, {wanted.name: part})[0] for part in parts]
    return Outputs(images, torch.from_numpy(np.concatenate(answers)))


def _plain(path: Path) -> Outputs:
    _file(path, *_body("x"), ["n", 3, 16, 16], domains=("com.microsoft", "ai.onnx.preview"))
    return answered(path, images_of((3, 16, 16)))


def _per_tensor(path: Path) -> Outputs:
    """Each tensor in a file of its own, whose name nothing tells."""
    import onnx

    _file(path, *_body("x"), ["n", 3, 16, 16])
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        tensor.name = f"{path.stem}.{tensor.name}"
    for node in model.graph.node:
        node.input[:] = [f"{path.stem}.{name}" if name[0] in "wb" else name for name in node.input]
    onnx.save(model, str(path), save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    return answered(path, images_of((3, 16, 16)))


def _optimised(path: Path) -> Outputs:
    """As ONNX Runtime saves it after its basic optimisations: it imports every domain that it has."""
    import onnxruntime

    source = path.with_name(f"{path.stem}.source")
    _file(source, *_body("x"), ["n", 3, 16, 16])
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
    source.unlink()
    return answered(path, images_of((3, 16, 16)))


def _fixed(path: Path, rows: int = 1) -> Outputs:
    """Any number of images by its input, and a Reshape that takes one."""
    nodes = [
        *(
            _node("Conv", "x w1 b1", "c", kernel_shape=[3, 3]),
            _node("MaxPool", "c", "p", kernel_shape=[7, 7]),
        ),
        *(_node("Reshape", "p s", "f"), _node("Gemm", "f w2 b2", "y")),
    ]
    tensors = {"w1": drawn(6, 3, 3, 3), "b1": drawn(6), "w2": drawn(6 * 64, CLASSES), "b2": drawn(CLASSES)}
    _file(path, nodes, {**tensors, "s": np.array([rows, -1])}, ["batch", 3, 16, 16])
    return answered(path, images_of((3, 16, 16)), batch=1)


def _masked(path: Path) -> Outputs:
    """Tokens that attend to those before them: the others are masked with minus infinity."""
    nodes, tensors = _head("t4")
    nodes = [
        *(_node("Conv", "x w1 b1", "c", kernel_shape=[4, 4], strides=[4, 4]), _node("Reshape", "c s", "t")),
        *(_node("Transpose", "t", "tt", perm=[0, 2, 1]), _node("MatMul", "tt t", "a")),
        *(_node("Add", "a mask", "am"), _node("Softmax", "am", "as", axis=-1), _node("MatMul", "as tt", "o")),
        *(_node("Transpose", "o", "ot", perm=[0, 2, 1]), _node("Reshape", "ot s4", "t4"), *nodes),
    ]
    mask = np.triu(np.full((16, 16), -np.inf, np.float32), 1)
    sizes = {"s": np.array([0, 6, 16]), "s4": np.array([0, 6, 4, 4])}
    _file(
        path,
        nodes,
        {"w1": drawn(6, 3, 4, 4), "b1": drawn(6), "mask": mask, **sizes, **tensors},
        ["n", 3, 16, 16],
    )
    return answered(path, images_of((3, 16, 16)))


def _rows(path: Path, shape: tuple[int, int, int], form: str) -> Outputs:
    length = shape[0] * shape[1] * shape[2]
    nodes = [_node("Gemm", "r a ab", "h"), _node("Relu", "h", "hr"), _node("Gemm", "hr b bb", "y")]
    tensors = {"a": drawn(length, 16) / 4, "ab": drawn(16), "b": drawn(16, CLASSES), "bb": drawn(CLASSES)}
    if form == "n d":
        nodes[0].input[0] = "x"
    else:
        nodes.insert(0, _node("Flatten", "x", "r"))
    _file(path, nodes, tensors, ["n", length] if form == "n d" else ["n", *shape[1:]])
    return answered(path, images_of(shape), form)


def _bytes(path: Path, form: str) -> Outputs:
    nodes, tensors = _body("xn")
    turned = [_node("Transpose", "xf", "xt", perm=[0, 3, 1, 2])] if form == "n h w c" else []
    first = [
        *(_node("Cast", "x", "xf", to=1), *turned),
        _node("Div", f"{'xt' if turned else 'xf'} s", "xn"),
    ]
    sizes = ["n", 16, 16, 3] if turned else ["n", 3, 16, 16]
    _file(path, [*first, *nodes], {"s": np.float32(255), **tensors}, sizes, kind=2)
    return answered(path, images_of((3, 16, 16), in_bytes=True), form)


# --- int8 ---------------------------------------------------------------------------------------------------


def _pair(source: str, name: str, *, scale: Any, zero: Any, **said: Any) -> tuple[list[Any], dict[str, Any]]:
    """A value rounded to eight bits and back."""
    grid = f"{name}_s {name}_z"
    nodes = [
        _node("QuantizeLinear", f"{source} {grid}", f"{name}_q", **said),
        _node("DequantizeLinear", f"{name}_q {grid}", name, **said),
    ]
    return nodes, {f"{name}_s": np.asarray(scale, np.float32), f"{name}_z": np.asarray(zero)}


def _quantised_weight(*, per_channel: bool) -> tuple[list[Any], dict[str, Any]]:
    weight = drawn(6, 3, 3, 3)
    most = np.abs(weight).reshape(6, -1).max(1) if per_channel else np.abs(weight).max()
    scale = (most / 127).astype(np.float32)
    stored = np.round(weight / (scale[:, None, None, None] if per_channel else scale)).astype(np.int8)
    zero = np.zeros(scale.shape, np.int8)
    nodes = [_node("DequantizeLinear", "wq ws wz", "w1", axis=0)]
    return nodes, {"wq": stored, "ws": scale, "wz": zero}


def _int8(
    path: Path, *, activations: Any = None, per_channel: bool = False, axis: int | None = None
) -> Outputs:
    """Weights in int8 and, with the zero point of `activations`, activations, which saturate."""
    nodes, tensors = _body("xi")
    made, stored = _quantised_weight(per_channel=per_channel)
    del tensors["w1"]
    first: list[Any] = [_node("Identity", "x", "xi")]
    if activations is not None:
        scale = 0.01 if axis is None else np.array([0.004, 0.01, 0.02])
        zero = activations if axis is None else np.full(3, activations)
        first, grid = _pair("x", "xi", scale=scale, zero=zero, **({} if axis is None else {"axis": axis}))
        inner, inside = _pair("c", "cq", scale=0.004, zero=activations)
        at = next(index for index, node in enumerate(nodes) if node.op_type == "Relu")
        nodes[at].input[0] = "cq"
        nodes[at:at] = inner
        tensors |= {**grid, **inside}
    _file(path, [*first, *made, *nodes], {**tensors, **stored}, ["n", 3, 16, 16])
    return answered(path, images_of((3, 16, 16)) * 3 - 1)


def onnx_inputs() -> Iterator[Recipe]:
    """Recipes of .onnx files."""
    yield Recipe("idle-domains.onnx", _plain)
    yield Recipe("per-tensor-data.onnx", _per_tensor)
    yield Recipe("runtime-optimised.onnx", _optimised)
    yield Recipe("fixed-reshape.onnx", _fixed)
    yield Recipe("masked-attention.onnx", _masked)
    for name, shape in (("784", (1, 28, 28)), ("3072", (3, 32, 32)), ("1024", (1, 32, 32))):
        yield Recipe(f"rows-{name}.onnx", partial(_rows, shape=shape, form="n d"))
    yield Recipe("grey.onnx", partial(_rows, shape=(1, 28, 28), form="n h w"))
    for name, form in (("first", "n c h w"), ("last", "n h w c")):
        yield Recipe(f"bytes-{name}.onnx", partial(_bytes, form=form))
    for per_channel in (False, True):
        each = "channels" if per_channel else "tensor"
        yield Recipe(f"int8-weights-{each}.onnx", partial(_int8, per_channel=per_channel))
        for zero in (np.int8(3), np.uint8(128)):
            name = f"int8-activations-{each}-{zero.dtype}.onnx"
            yield Recipe(name, partial(_int8, activations=zero, per_channel=per_channel))
    yield Recipe("int8-axis.onnx", partial(_int8, activations=np.uint8(100), axis=1))


# --- torch --------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Tokens that attend to those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, CLASSES)
        mask = torch.zeros(64, 64).masked_fill_(torch.ones(64, 64).triu(1).bool(), float("-inf"))
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        weights = (tokens @ tokens.transpose(1, 2) + self.mask).softmax(-1)
        return self.head((weights @ tokens).mean(1))


class Rows(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(length, 16), nn.Linear(16, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(functional.relu(self.first(rows.flatten(1))))


class Bytes(nn.Module):
    """Takes (n, h, w, c) of 0..255."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(functional.relu(self.stem(images.permute(0, 3, 1, 2).float() / 255)).mean((2, 3)))


class OneAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6 * 225, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stem(images).view(1, 6 * 225))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], str]] = {
    "masked": (Masked, (3, 32, 32), "n c h w"),
    "rows": (lambda: Rows(784), (1, 28, 28), "n d"),
    "colour-rows": (lambda: Rows(3072), (3, 32, 32), "n d"),
    "grey": (lambda: Rows(784), (1, 28, 28), "n h w"),
    "bytes": (Bytes, (3, 32, 32), "n h w c"),
    "one": (OneAtATime, (3, 32, 32), "n c h w"),
}


@torch.no_grad()
def _torch(path: Path, *, name: str) -> Outputs:
    """A network as TorchScript or torch.export archive, by the suffix of the path."""
    make, shape, layout = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = make().eval()
    in_bytes = name == "bytes"
    images = images_of(shape, in_bytes=in_bytes)
    given = TO_LAYOUT[layout](images)[: 1 if name == "one" else BATCH]
    if path.suffix == ".pt2":
        given = given.to(torch.uint8) if in_bytes else given
        torch.export.save(torch.export.export(network, (given,)), path)
    else:
        torch.jit.trace(network, given).save(str(path))
    answers = [network(part) for part in TO_LAYOUT[layout](images).split(len(given))]
    return Outputs(images, torch.cat(answers), tells_size=path.suffix == ".pt2" or name != "grey")


def torch_inputs() -> Iterator[Recipe]:
    """Recipes of .torchscript and .pt2 files."""
    for name in NETWORKS:
        yield Recipe(f"{name}.pt2", partial(_torch, name=name))
        yield Recipe(f"{name}.torchscript", partial(_torch, name=name))
