"""Networks come out of real exporters' files as they went in; what cannot be read is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benign_files import compare, difference, recipes
from benign_sources import Outputs, Recipe
from unhorse.checks.expectations import Facts
from unhorse.checks.sniff import sniff
from unhorse.loading.probing import probed
from unhorse.loading.reading import _read, read_task
from unhorse.loading.readouts import LogitsOf, Readout
from unhorse.rules import LoadFailed, LoadRefused

# Keras 3.15 hands torch tensors to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RECIPES = {recipe.name: recipe for recipe in recipes()}
TOLERANCE = 1e-4
FEW = (
    *("small-cnn.pth", "preact-resnet18-checkpoint.pt"),
    *("small-cnn-traced.torchscript", "ulp-vgg-frozen.torchscript", "small-cnn-half.torchscript"),
    *("small-cnn-dynamic.pt2", "small-cnn-one.pt2"),
)
FEW_ONNX = ("small-cnn-11.onnx", "ulp-vgg-last.onnx")
FEW_KERAS = ("digits.keras", "separable.h5", "mixed.keras")
FEW_FOLDERS = ("huggingface-vit", "huggingface-resnet")
LIBRARIES = {
    **dict.fromkeys(FEW_ONNX, ("onnx", "onnxruntime", "onnx2fx")),
    **dict.fromkeys(FEW_KERAS, ("keras", "h5py")),
    **dict.fromkeys(FEW_FOLDERS, ("transformers",)),
}


def files_of(path: Path) -> tuple[list[Path], str]:
    """The files of a model, its weights first, and what to call their format."""
    if path.is_dir():
        return sorted(path.iterdir(), key=lambda file: file.suffix == ".json"), "folder"
    beside = [file for file in path.parent.iterdir() if file.name.startswith(path.name) and file != path]
    return [path, *beside], str(sniff(path))


def reading(path: Path, outputs: Outputs, read: Any = _read, **said: Any) -> Any:
    files, kind = files_of(path)
    streams = [file.open("rb") for file in files]
    shape = None if outputs.tells_size else list(outputs.images.shape[1:])
    try:
        return read(streams, {"format": kind, "names": [f.name for f in files], "image_shape": shape, **said})
    finally:
        for stream in streams:
            stream.close()


def written(name: str, folder: Path) -> tuple[Path, Outputs]:
    for library in LIBRARIES.get(name, ()):
        pytest.importorskip(library, reason=f"needs {library}, which an extra installs")
    return folder / name, RECIPES[name].write(folder / name)


@torch.no_grad()
def answers(found: Readout, images: Tensor) -> Tensor:
    assert found.network is not None
    return torch.cat([found.network(part) for part in images.split(found.batch or len(images))])


@pytest.mark.parametrize("name", [*FEW[2:], *FEW_ONNX, *FEW_KERAS, *FEW_FOLDERS])
def test_network_read_from_a_file_answers_as_its_source(name: str, tmp_path: Path) -> None:
    path, outputs = written(name, tmp_path)
    found = reading(path, outputs)
    logits = answers(found, outputs.images)
    if outputs.squashed:  # the graph's last softmax is cut off only when it is traced
        outputs = outputs._replace(squashed="")
    assert difference(logits, outputs) < TOLERANCE
    assert found.facts.image_shape == tuple(outputs.images.shape[1:])
    assert found.facts.num_classes == outputs.values.shape[1]


@pytest.mark.parametrize("name", FEW[:2])
def test_state_dict_comes_back_as_finite_floats(name: str, tmp_path: Path) -> None:
    path, outputs = written(name, tmp_path)
    found = reading(path, outputs)
    assert found.network is None
    assert {tensor.dtype for tensor in next(iter(found.networks.values())).values()} <= {
        torch.float32,
        torch.int64,
    }
    assert any(
        tensor.shape[0] == outputs.values.shape[1]
        for tensor in next(iter(found.networks.values())).values()
        if tensor.ndim
    )


def test_what_comes_home_is_a_document_and_a_blob(tmp_path: Path) -> None:
    path, outputs = written("small-cnn-traced.torchscript", tmp_path)
    document, blob = reading(path, outputs, read_task)
    assert document["kind"] == "graph"
    sent = json.loads(json.dumps(document, allow_nan=False))
    assert sent["graph"] == document["graph"]
    assert Facts.from_json(sent["facts"]).num_classes == 10
    assert int.from_bytes(blob[:8], "little") < len(blob)


def test_onnx_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, outputs = written("small-cnn-11.onnx", tmp_path)
    from unhorse.loading import onnx_reader

    faithful = onnx_reader.folded

    def with_another_bias(model: Any) -> Any:
        import onnx

        changed = faithful(model)
        bias = next(tensor for tensor in changed.graph.initializer if list(tensor.dims) == [10])
        values = onnx.numpy_helper.to_array(bias) + 0.05
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return changed

    monkeypatch.setattr(onnx_reader, "folded", with_another_bias)
    with pytest.raises(LoadRefused) as refused:
        reading(path, outputs)
    assert refused.value.rule == "LD222"


def test_onnx_metadata_names_the_classes_and_the_normalisation(tmp_path: Path) -> None:
    for library in ("onnx", "onnxruntime", "onnx2fx"):
        pytest.importorskip(library, reason=f"needs {library}, which an extra installs")
    path, outputs = written("ulp-vgg-named.onnx", tmp_path)
    facts = reading(path, outputs).facts
    assert facts.class_names is not None
    assert facts.class_names[:2] == ("kind 0", "kind 1")
    assert (facts.mean, facts.std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def test_onnx_data_that_is_absent_is_said_to_be(tmp_path: Path) -> None:
    path, outputs = written("small-cnn-11.onnx", tmp_path)
    onnx = pytest.importorskip("onnx", reason="needs onnx, which an extra installs")
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(LoadFailed, match="'w.bin'.*is not beside it"):  # not given to the reader
        reading(path, outputs)


def test_keras_reports_the_scaling_that_it_keeps_inside(tmp_path: Path) -> None:
    for library in ("keras", "h5py"):
        pytest.importorskip(library, reason=f"needs {library}, which an extra installs")
    path, outputs = written("residual.keras", tmp_path)
    facts = reading(path, outputs).facts
    assert "Rescaling" in facts.extra["preprocessing"]
    assert (facts.mean, facts.std) == ((0.0,), (1 / 255,))  # the network takes pixels of 0..255


def test_hugging_face_folder_names_classes_and_normalisation(tmp_path: Path) -> None:
    path, outputs = written("huggingface-vit", tmp_path)
    facts = reading(path, outputs).facts
    assert facts.class_names == tuple(f"kind {index}" for index in range(10))
    assert (facts.mean, facts.std) == ((0.5,) * 3, (0.5,) * 3)


def test_folder_of_timm_comes_back_as_tensors_with_its_normalisation(tmp_path: Path) -> None:
    path, outputs = written("timm-resnet18", tmp_path)
    found = reading(path, outputs)
    assert found.network is None
    assert next(iter(found.networks.values()))["fc.weight"].shape == (10, 512)
    assert found.facts.mean == (0.485, 0.456, 0.406)
    assert found.facts.extra["architecture"] == "resnet18"


def test_hugging_face_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, outputs = written("huggingface-resnet", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"depths": [1, 2]}))
    with pytest.raises(LoadRefused) as refused:
        reading(path, outputs)
    assert refused.value.rule == "LD209"


def test_size_is_assumed_where_the_file_tells_none(tmp_path: Path) -> None:
    path, outputs = written("ulp-vgg-frozen.torchscript", tmp_path)
    facts = reading(path, outputs._replace(tells_size=True)).facts
    assert facts.image_shape == (3, 32, 32)
    assert facts.extra["assumed_size"] == "32x32"


class _Returning(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(images.mean((2, 3)).repeat(1, 2))


@pytest.mark.parametrize(
    "answer",
    [
        lambda logits: (logits,),
        lambda logits: {"features": logits[:, :1], "logits": logits},
        lambda logits: [logits.mean(), (logits, logits + 1)],
        lambda logits: logits[:, :, None, None],
    ],
    ids=["tuple", "dictionary", "nested", "map of one pixel"],
)
def test_logits_are_found_in_what_networks_return(answer: Any) -> None:
    images = torch.rand(4, 3, 8, 8)
    wanted = images.mean((2, 3)).repeat(1, 2)
    assert torch.equal(LogitsOf(_Returning(answer))(images), wanted)


def test_network_that_runs_on_no_image_is_refused() -> None:
    network = LogitsOf(nn.Sequential(nn.Flatten(), nn.Linear(7, 3)))
    with pytest.raises(LoadRefused) as refused:
        probed(network, Facts(), {})
    assert refused.value.rule == "LD221"


def test_absent_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, outputs = written("small-cnn-11.onnx", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnx2fx", None)
    with pytest.raises(LoadRefused) as refused:
        reading(path, outputs)
    assert refused.value.rule == "LD224"
    assert "onnx2fx==0.0.1" in refused.value.remedy


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_benign_file_loads_and_answers_as_its_source(recipe: Recipe, tmp_path: Path) -> None:
    outputs = recipe.write(tmp_path / recipe.name)
    assert compare(tmp_path / recipe.name, outputs) < TOLERANCE


def test_corpus_is_as_large_as_promised() -> None:
    assert len(RECIPES) >= 100
