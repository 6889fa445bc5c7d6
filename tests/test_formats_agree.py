"""The same trained network in every format: the same answers, verdict, target and score."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from unhorse.core import Classifier, Verdict
from unhorse.loading.assembly import Said
from unhorse.loading.formats import open_model
from unhorse.models.classifier import save_weights
from unhorse.scanners.activation_outlier import EFFORTS
from unhorse.survey import Request, scan_models

FORMATS = (
    *(
        "model.safetensors",
        "state_dict.pt",
        "traced.pt",
        "scripted.pt",
        "frozen.pt",
        "model.pt2",
        "dynamic.pt2",
    ),
    *("dynamo.onnx", "legacy.onnx", "model.keras", "model.h5", "hugging_face"),
)
SAID = Said(image_shape=(1, 8, 8))
SCANNER = replace(EFFORTS["standard"], precision="fp32")


def write(model: Classifier, path):
    """`model` in the format that the name of `path` tells; a test needs the libraries of all of them."""
    network, images = copy.deepcopy(model.network).eval(), torch.rand(2, *model.image_shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WRITERS[path.name](network, images, path, model)
    return path


def onnx_with(**options):
    def write_onnx(network, images, path, model):
        pytest.importorskip("onnxscript")
        torch.onnx.export(network, (images,), str(path), input_names=["images"], verbose=False, **options)

    return write_onnx


def write_keras(network, images, path, model):
    keras = pytest.importorskip("keras")
    layers, weights = [keras.Input(images.shape[2:] + images.shape[1:2])], []
    for module in [*network.features, *network.head]:
        if isinstance(module, nn.Conv2d):
            padding = "same" if module.padding != (0, 0) else "valid"
            layers.append(keras.layers.Conv2D(module.out_channels, module.kernel_size, padding=padding))
            weights += [module.weight.permute(2, 3, 1, 0), module.bias]
        elif isinstance(module, nn.Linear):
            layers.append(keras.layers.Dense(module.out_features))
            weights += [module.weight.T, module.bias]
        elif isinstance(module, nn.Flatten):  # PyTorch flattens channels first
            layers += [keras.layers.Permute((3, 1, 2)), keras.layers.Flatten()]
        elif isinstance(module, nn.MaxPool2d):
            layers.append(keras.layers.MaxPooling2D(module.kernel_size))
        elif isinstance(module, nn.ReLU):
            layers.append(keras.layers.ReLU())
        else:
            raise AssertionError(f"the digits network has a {type(module).__name__}")
    layers.append(keras.layers.Softmax())
    copied = keras.Sequential(layers)
    copied.set_weights([weight.detach().numpy() for weight in weights])
    copied.save(path)


def write_folder(network, images, path, model):
    path.mkdir()
    save_weights(model, path / "model.safetensors")
    pretrained = {"input_size": list(model.image_shape), "mean": [0.0], "std": [1.0], "num_classes": 10}
    config = {"architecture": "small_cnn", "num_classes": 10, "pretrained_cfg": pretrained}
    (path / "config.json").write_text(json.dumps(config))


WRITERS = {
    "model.safetensors": lambda network, images, path, model: save_weights(model, path),
    "state_dict.pt": lambda network, images, path, model: torch.save(network.state_dict(), path),
    "traced.pt": lambda network, images, path, model: torch.jit.trace(network, images).save(path),
    "scripted.pt": lambda network, images, path, model: torch.jit.script(network).save(path),
    "frozen.pt": lambda network, images, path, model: torch.jit.freeze(torch.jit.trace(network, images)).save(
        path
    ),
    "model.pt2": lambda network, images, path, model: torch.export.save(
        torch.export.export(network, (images[:1],)), path
    ),
    "dynamic.pt2": lambda network, images, path, model: torch.export.save(
        torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("n", max=512)},)), path
    ),
    "dynamo.onnx": onnx_with(dynamo=True, external_data=True),
    "legacy.onnx": onnx_with(dynamo=False, dynamic_axes={"images": {0: "n"}}),
    "model.keras": write_keras,
    "model.h5": write_keras,
    "hugging_face": write_folder,
}


@pytest.fixture(scope="module")
def scanned(trained):
    return {name: SCANNER.scan(trained[name].model) for name in ("infected", "benign")}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["infected", "benign"])
def test_verdict_target_and_score_do_not_depend_on_the_format(kind, name, trained, scanned, tmp_path):
    original = trained[kind].model
    file = open_model(write(original, tmp_path / name), SAID)
    images = torch.rand(20, *original.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(file.model(images), original(images), atol=1e-4)
    found, expected = SCANNER.scan(file.model), scanned[kind]
    assert (found.verdict, found.target) == (expected.verdict, expected.target)
    assert found.score == pytest.approx(expected.score, rel=0.01)


def test_the_trained_victims_are_told_apart(scanned):
    assert scanned["infected"].verdict is Verdict.INFECTED and scanned["infected"].target == 3
    assert scanned["benign"].verdict is Verdict.NO_SIGN_FOUND


def test_a_scan_says_where_a_file_was_opened(trained, tmp_path):
    files = [write(trained["benign"].model, tmp_path / name) for name in ("model.safetensors", "model.pt2")]
    request = Request(effort="quick", loading={"image_size": (8, 8), "channels": 1})
    plain, program = scan_models(files, request).models
    assert (plain.opened, plain.format) == ("here", "safetensors")
    assert "sandbox" in program.opened and program.architecture.startswith("graph of")
    assert "MD301" in " ".join(program.assumptions)
