"""Hugging Face folders: which files hold the weights, and that no second set is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unhorse.inspection import inspect_models
from unhorse.loading.formats import load_model, open_networks
from unhorse.loading.hub_folders import weights
from unhorse.loading.sources import opened
from unhorse.models.classifier import new_classifier
from unhorse.report import exit_code
from unhorse.rules import LoadFailed, LoadRefused

SHAPE = (3, 8, 8)
# as timm writes it: a folder that needs no library to be read
CONFIG = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 8, 8]}}


def state(seed: int = 0) -> dict[str, Tensor]:
    model = new_classifier("small-cnn", image_shape=SHAPE, class_names=list("abc"), seed=seed)
    return dict(model.network.state_dict())


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def sharded(path: Path, stem: str, suffix: str) -> Path:
    """Two shards and their index."""
    folder(path)
    names = list(state())
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    files = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        part = {name: state()[name] for name in half}
        save_file(part, path / file) if suffix == "safetensors" else torch.save(part, path / file)
    places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def opens_as(path: Path, seed: int = 0, **options: str) -> bool:
    found = load_model(path, **options).network.state_dict()  # type: ignore[arg-type]
    return all(torch.equal(found[name], tensor) for name, tensor in state(seed).items())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize("stem, suffix", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_are_put_together_and_stale_ones_named(tmp_path: Path, stem: str, suffix: str) -> None:
    path = sharded(tmp_path / "m", stem, suffix)
    assert opens_as(path)
    stale = path / f"{stem}-00001-of-00003.{suffix}"
    stale.write_bytes(b"left over")
    assert opens_as(path)
    assert any(stale.name in line for line in load_model(path).assumptions)
    (path / f"{stem}-00002-of-00002.{suffix}").unlink()
    with pytest.raises(LoadRefused, match="lacks") as refusal:
        load_model(path)
    assert refusal.value.rule == "LD202"


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "net.safetensors"])
def test_weights_under_another_name_are_found(tmp_path: Path, name: str) -> None:
    save_file(state(), folder(tmp_path / "m") / name)
    assert opens_as(tmp_path / "m")


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.bin"}}', "{"]
)
def test_an_index_that_is_none_is_an_error_of_its_own(tmp_path: Path, index: str) -> None:
    path = folder(tmp_path / "m")
    (path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises((LoadRefused, LoadFailed)):
        load_model(path)


def two_sets(path: Path, second: dict[str, Tensor]) -> Path:
    save_file(state(), folder(path) / "model.safetensors")
    torch.save(second, path / "pytorch_model.bin")
    return path


def test_equal_weights_in_two_formats_count_once(tmp_path: Path) -> None:
    path = two_sets(tmp_path / "m", state())
    assert opens_as(path)
    assert any("model.safetensors and pytorch_model.bin" in line for line in load_model(path).assumptions)


def test_different_weights_in_two_formats_are_two_networks(tmp_path: Path) -> None:
    path = two_sets(tmp_path / "m", state(1))
    assert [one.key for one in open_networks(path).networks] == ["model.safetensors", "pytorch_model.bin"]
    with pytest.raises(LoadRefused) as refusal:
        load_model(path)
    assert refusal.value.rule == "LD228"
    assert opens_as(path, 0, key="model.safetensors") and opens_as(path, 1, key="pytorch_model.bin")


def test_a_hostile_second_set_is_found_by_inspect_and_by_loading(tmp_path: Path) -> None:
    path = two_sets(tmp_path / "m", {"a": Evil()})  # type: ignore[dict-item]
    report = inspect_models([path])
    assert [model.error_rule for model in report.models] == ["LD205"] and exit_code(report) == 1
    with pytest.raises(LoadRefused) as refusal:
        load_model(path)
    assert refusal.value.rule == "LD205"
    assert [one.error and one.error.rule for one in open_networks(path).networks] == [None, "LD205"]


def test_a_link_of_a_hubs_cache_is_followed_and_no_other(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_file(state(), repository / "blobs" / "deadbeef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/deadbeef")
    assert opens_as(snapshot / "model.safetensors")
    save_file(state(), tmp_path / "elsewhere.safetensors")
    (snapshot / "other.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    (repository / "plain.safetensors").symlink_to("blobs/deadbeef")
    for path in (snapshot / "other.safetensors", repository / "plain.safetensors"):
        with pytest.raises(LoadRefused) as refusal:
            load_model(path)
        assert refusal.value.rule == "LD223"


def test_the_hash_of_a_folder_is_of_both_sets(tmp_path: Path) -> None:
    path = two_sets(tmp_path / "m", state())
    with opened(path) as source:
        first = source.sha256
        assert weights(path)[0] == (("model.safetensors",), ("pytorch_model.bin",)) == source.sets
    torch.save(state(1), path / "pytorch_model.bin")
    with opened(path) as source:
        assert source.sha256 != first
