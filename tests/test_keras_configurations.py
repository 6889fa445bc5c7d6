"""Keras files as older versions wrote them open and answer as before; what else they say is not guessed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import benign_sources  # noqa: F401 - chooses the backend of Keras
from unhorse.loading.formats import load_model
from unhorse.rules import LoadRefused

keras = pytest.importorskip("keras", reason="needs keras, which an extra installs")
h5py = pytest.importorskip("h5py", reason="needs h5py, which an extra installs")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*HDF5:UserWarning"),
]


@pytest.fixture(scope="module")
def network() -> Any:
    keras.utils.set_random_seed(1)
    layers, images = keras.layers, keras.Input((16, 16, 3), name="images")
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(images)
    x = layers.BatchNormalization(name="norm")(layers.SeparableConv2D(4, 3, name="separable")(x))
    x = layers.Conv2DTranspose(4, 3, strides=2, name="transposed")(layers.ReLU(name="relu")(x))
    return keras.Model(images, layers.Dense(5, name="last")(layers.GlobalAveragePooling2D(name="mean")(x)))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def edited(network: Any, path: Path, change: Callable[[str, dict[str, Any]], None]) -> Path:
    """The network as a file whose layers were changed: `change` is given each name and configuration."""
    network.save(path)

    def changed(text: str) -> str:
        config = json.loads(text)
        for layer in config["config"]["layers"]:
            change(layer["config"]["name"], layer["config"])
        return json.dumps(config)

    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = changed(file.attrs["model_config"])
        return path
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, changed(content.decode()) if name == "config.json" else content)
    return path


def as_keras_2(name: str, config: dict[str, Any]) -> None:
    """What TensorFlow 2.3 to 2.15 wrote beside what Keras 3 writes."""
    if name in ("depthwise", "separable", "transposed"):
        config |= {"groups": 1, "dilation_rate": [1, 1], "kernel_regularizer": None}
    if name == "separable":
        config |= {"kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}}}
    if name == "norm":
        config |= {"axis": [3], "renorm": False, "fused": True, "virtual_batch_size": None}
    if name == "last":
        config |= {"implementation": 2}
    if name == "images":
        config["batch_input_shape"] = config.pop("batch_shape")
        config |= {"sparse": False, "ragged": False}
    if isinstance(config.get("dtype"), dict):
        config["dtype"] = "float32"


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_what_old_keras_wrote_beside_is_left_out(
    network: Any, images: torch.Tensor, suffix: str, tmp_path: Path
) -> None:
    change = as_keras_2
    if suffix == ".keras":  # written by Keras 3 of another version: keys of its own

        def change(name: str, config: dict[str, Any]) -> None:
            config |= (
                {"groups": 1} if name == "depthwise" else {"quantization": None} if name == "last" else {}
            )

    model = load_model(edited(network, tmp_path / f"m{suffix}", change))
    with torch.no_grad():
        wanted = network(images.permute(0, 2, 3, 1), training=False)
        assert torch.allclose(model.network(images), wanted, atol=1e-4)


@pytest.mark.parametrize(("layer", "said"), [("depthwise", {"groups": 2}), ("last", {"mystery": "x"})])
def test_a_key_that_changes_what_is_computed_is_not_left_out(
    network: Any, layer: str, said: dict[str, Any], tmp_path: Path
) -> None:
    def change(name: str, config: dict[str, Any]) -> None:
        config |= said if name == layer else {}

    with pytest.raises(LoadRefused) as refused:
        load_model(edited(network, tmp_path / "m.h5", change))
    assert refused.value.rule == "LD235" and next(iter(said)) in refused.value.reason
    assert "tf2onnx" in refused.value.remedy


@pytest.mark.parametrize("layer", ["LSTM", "Conv3D", "TFOpLambda", "TimeDistributed"])
def test_a_layer_of_keras_that_is_not_read_is_no_attack(layer: str) -> None:
    from unhorse.checks.keras_files import check_configuration

    def configuration(*names: str) -> dict[str, Any]:
        layers = [{"class_name": name, "config": {"name": f"layer{i}"}} for i, name in enumerate(names)]
        return {"class_name": "Sequential", "config": {"name": "m", "layers": layers}}

    for names, rule in (((layer,), "LD235"), ((layer, "Lambda"), "LD218"), (("Lambda", layer), "LD218")):
        with pytest.raises(LoadRefused) as refused:
            check_configuration(configuration(*names), "Keras")
        assert refused.value.rule == rule
    assert layer in str(refused.value) or rule == "LD218"


@pytest.mark.parametrize(("shape", "flat"), [((28, 28), False), ((784,), True), ((3072,), True)])
def test_keras_images_without_channels_or_flattened_open(
    shape: tuple[int, ...], flat: bool, tmp_path: Path
) -> None:
    keras.utils.set_random_seed(1)
    given = keras.Input(shape)
    inner = given if flat else keras.layers.Flatten()(given)
    network = keras.Model(given, keras.layers.Dense(4)(keras.layers.Dense(8, activation="relu")(inner)))
    network.save(tmp_path / "m.keras")
    model = load_model(tmp_path / "m.keras")
    assert model.image_shape == ((3, 32, 32) if shape == (3072,) else (1, 28, 28))
    images = torch.rand(2, *model.image_shape)
    rows = images.permute(0, 2, 3, 1).reshape(2, *shape)  # Keras flattens channels last
    with torch.no_grad():
        assert torch.allclose(model.network(images), network(rows), atol=1e-4)
    assert any(line.startswith("MD301 input layout") for line in model.assumptions) is flat
