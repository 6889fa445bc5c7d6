"""Networks that want other than float images (n, c, h, w) open, answer as their files do, and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benign_files import difference
from benign_inputs import Masked, _body, _file, _node, onnx_inputs, torch_inputs
from unhorse.loading.formats import load_model
from unhorse.loading.layouts import Expected, Layout, arranged, expected, square
from unhorse.loading.ranges import takes_bytes
from unhorse.loading.tracing import trace
from unhorse.rules import LoadRefused

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
RECIPES = {recipe.name: recipe for recipe in (*onnx_inputs(), *torch_inputs())}
SAYS = {
    "per-tensor-data.onnx": "",
    "runtime-optimised.onnx": "",
    "fixed-reshape.onnx": "MD301 input batch assumed 1: the file says any number",
    "masked-attention.onnx": "",
    "rows-3072.onnx": "MD301 input layout assumed 3x32x32 flattened, channels first: pass --size",
    "grey.onnx": "",
    "bytes-last.onnx": "",
    "int8-weights-channels.onnx": "",
    "int8-activations-channels-uint8.onnx": "",
    "int8-activations-tensor-int8.onnx": "",
    "int8-axis.onnx": "",
    "bytes.pt2": "",
    "bytes.torchscript": "MD301 input layout assumed n h w c: the network runs on it",
    "rows.torchscript": "",
    "one.torchscript": "MD301 input batch assumed 1",
}
"""What is said of these files; the others, and all again, are among the slow tests of test_readers."""


def need_onnx() -> None:
    for library in ("onnx", "onnxruntime", "onnx2fx"):
        pytest.importorskip(library, reason=f"needs {library}, which an extra installs")


def refusal_of(path: Path, **said: Any) -> LoadRefused:
    with pytest.raises(LoadRefused) as refused:
        load_model(path, **said)
    return refused.value


@pytest.mark.parametrize("name", SAYS)
def test_a_file_answers_as_its_runtime_and_says_what_is_assumed(name: str, tmp_path: Path) -> None:
    if name.endswith(".onnx"):
        need_onnx()
    outputs = RECIPES[name].write(tmp_path / name)
    model = load_model(tmp_path / name)
    with torch.no_grad():
        assert difference(model.network(outputs.images), outputs) < 1e-4
    assert model.num_classes == 10 and model.image_shape == tuple(outputs.images.shape[1:])
    said = [line for line in model.assumptions if "layout" in line or "batch" in line]
    assert len(said) == bool(SAYS[name]) and "".join(said).startswith(SAYS[name])
    if "bytes" in name:
        assert model.std.flatten().tolist() == pytest.approx([1 / 255])
        assert not any("normalisation" in line for line in model.assumptions)


def test_the_user_says_what_rows_of_numbers_are(tmp_path: Path) -> None:
    need_onnx()
    RECIPES["rows-784.onnx"].write(tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx", image_shape=(1, 14, 56))
    assert model.image_shape == (1, 14, 56)
    assert not any("layout" in line for line in model.assumptions)
    refused = refusal_of(tmp_path / "m.onnx", image_shape=(3, 28, 28))
    assert refused.rule == "LD221" and "rows of 784 numbers, not of 3 x 28 x 28" in refused.reason


def test_gradients_reach_the_image_through_int8(tmp_path: Path) -> None:
    need_onnx()
    name = "int8-activations-channels-uint8.onnx"
    RECIPES[name].write(tmp_path / name)
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    load_model(tmp_path / name)(images)[:, 0].sum().backward()
    assert images.grad is not None and float((images.grad != 0).float().mean()) > 0.2


def test_arithmetic_on_int8_is_not_read(tmp_path: Path) -> None:
    need_onnx()
    nodes, tensors = _body("x")
    nodes[0:0] = [_node("QuantizeLinear", "x s z", "q"), _node("DequantizeLinear", "q t z", "xd")]
    nodes[2].input[0] = "xd"
    tensors |= {"s": np.float32(0.1), "t": np.float32(0.2), "z": np.uint8(0)}
    _file(tmp_path / "m.onnx", nodes, tensors, ["n", 3, 16, 16])
    refused = refusal_of(tmp_path / "m.onnx")
    assert refused.rule == "LD235" and "another grid" in refused.reason and "float model" in refused.remedy


# --- infinity -----------------------------------------------------------------------------------------------


def exported(network: nn.Module, path: Path) -> Path:
    program = torch.export.export(network.eval(), (torch.rand(2, 3, 32, 32),))
    torch.export.save(program, path)
    return path


def test_a_mask_may_be_infinite_and_a_weight_may_not(tmp_path: Path) -> None:
    network = Masked()
    model = load_model(exported(network, tmp_path / "mask.pt2"))
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.network(images), network(images), atol=1e-5)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    for value, place in ((float("inf"), "stem"), (float("nan"), "mask")):
        broken = Masked()
        found = broken.mask if place == "mask" else getattr(broken, place).weight
        with torch.no_grad():
            found.view(-1)[0] = value
        refused = refusal_of(exported(broken, tmp_path / f"{place}.pt2"))
        assert refused.rule == "LD207" and place in refused.reason


def test_infinite_weights_of_onnx_are_named(tmp_path: Path) -> None:
    need_onnx()
    nodes, tensors = _body("x")
    tensors["w2"][0, 0] = np.inf
    _file(tmp_path / "m.onnx", nodes, tensors, ["n", 3, 16, 16])
    refused = refusal_of(tmp_path / "m.onnx")
    assert refused.rule == "LD207" and "'w2'" in refused.reason


# --- layouts and ranges -------------------------------------------------------------------------------------


def test_the_layout_follows_from_the_sizes() -> None:
    assert expected((None, 3, 8, 8)) == Expected(None, Layout.FIRST, (3, 8, 8))
    assert expected((1, 8, 8, 3)) == Expected(1, Layout.LAST, (3, 8, 8))
    assert expected((None, 28, 28)) == Expected(None, Layout.GREY, (1, 28, 28))
    assert expected((1, 784)) == Expected(1, Layout.FLAT, (1, 28, 28), expected((1, 784)).notes)
    assert expected((None, 3072), channels_last=True).layout is Layout.FLAT_LAST
    assert expected((None, 3, 8, 8), channels_last=True).shape == (8, 3, 8)
    assert [square(length) for length in (784, 3072, 12, 785, None)] == [
        (1, 28, 28),
        (3, 32, 32),
        None,
        None,
        None,
    ]


@pytest.mark.parametrize("sizes", [(3, 16, 16), (28, 28, 1), (None, 785), (None,), (), (None, 1, 3, 8, 8)])
def test_an_input_that_is_no_batch_of_images_is_named(sizes: tuple[int | None, ...]) -> None:
    with pytest.raises(LoadRefused) as refused:
        expected(sizes)
    assert refused.value.rule == "LD221"
    assert "without a batch" in refused.value.reason or len(sizes) != 3


def test_images_are_arranged_pixel_by_pixel() -> None:
    images = torch.arange(24.0).reshape(1, 3, 2, 4)
    assert arranged(images, Layout.LAST).flatten().tolist()[:3] == [0, 8, 16]
    assert torch.equal(arranged(images, Layout.FLAT_LAST), arranged(images, Layout.LAST).flatten(1))
    assert torch.equal(arranged(images, Layout.FLAT), images.flatten(1))
    assert torch.equal(arranged(images[:, :1], Layout.GREY), images[:, 0])
    with pytest.raises(ValueError, match="without channels"):
        arranged(images, Layout.GREY)


class _First(nn.Module):
    """Some arithmetic, then a convolution."""

    def __init__(self, arithmetic: Any) -> None:
        super().__init__()
        self.arithmetic, self.stem, self.head = arithmetic, nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.register_buffer("mean", torch.tensor([123.7, 116.3, 103.5]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(self.arithmetic(self, images)).mean((2, 3)))


@pytest.mark.parametrize(
    ("arithmetic", "in_bytes"),
    [
        (lambda self, x: x / 255, True),
        (lambda self, x: x * (1 / 127.5) - 1, True),
        (lambda self, x: (x - self.mean) / 58, True),
        (lambda self, x: x.flip(1) - 120, True),
        (lambda self, x: x * 2 - 1, False),
        (lambda self, x: (x - 0.5) / 0.25, False),
        (lambda self, x: 255 * x - 120, False),
        (lambda self, x: x, False),
    ],
    ids=["/255", "/127.5-1", "-mean", "flipped", "2x-1", "standardised", "x255", "none"],
)
def test_a_graph_shows_whether_it_takes_bytes(arithmetic: Any, in_bytes: bool) -> None:
    traced = trace(_First(arithmetic).eval(), (3, 8, 8))
    assert takes_bytes(traced.graph, traced.tensors) is in_bytes


def test_a_batch_normalisation_of_bytes_comes_first() -> None:
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    network = nn.Sequential(
        norm, nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
    assert not takes_bytes(*trace(network, (3, 8, 8))[:2])
    norm.running_mean.fill_(110)
    assert takes_bytes(*trace(network, (3, 8, 8))[:2])
