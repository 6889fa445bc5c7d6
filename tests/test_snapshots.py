"""What is hashed is what is read, and who reads it learns nothing of where it lies."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unhorse.loading import formats, snapshots
from unhorse.loading.formats import open_networks
from unhorse.loading.sources import Source, opened
from unhorse.models.classifier import new_classifier
from unhorse.rules import LoadFailed
from unhorse.sandbox import server
from unhorse.sandbox.server import Server

TASKS = Path(__file__).with_name("server_tasks.py")


def state(seed: int) -> dict[str, Tensor]:
    model = new_classifier("small-cnn", image_shape=(3, 8, 8), class_names=list("abc"), seed=seed)
    return dict(model.network.state_dict())


def write(path: Path, seed: int) -> str:
    """Into the file that is there, as it is: no other file takes its place."""
    draft = path.with_name("draft")
    save_file(state(seed), draft) if path.suffix == ".safetensors" else torch.save(state(seed), draft)
    content = draft.read_bytes()
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(content)
        file.truncate()
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_a_file_rewritten_after_it_was_hashed_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    first = write(path, 0)
    with opened(path) as source:
        write(path, 1)
        seen = formats.read(source)
    model = seen.networks[0].model
    assert model is not None and seen.sha256 == first
    assert torch.equal(model.network.state_dict()["head.3.weight"], state(0)["head.3.weight"])
    assert open_networks(path).sha256 != first


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_a_file_too_large_to_copy_is_hashed_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MAX_COPIED", 0)
    path = tmp_path / name
    first = write(path, 0)
    assert open_networks(path).sha256 == first
    with opened(path) as source, pytest.raises(LoadFailed, match="written while it was read"):
        write(path, 1)
        formats.read(source)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux keeps such copies")
def test_nobody_can_write_to_the_copy(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", 0)
    with opened(tmp_path / "m.safetensors") as source:
        with pytest.raises(PermissionError):
            os.pwrite(source.files[0].fileno(), b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(source.files[0].fileno(), 1)


def test_the_child_learns_neither_path_nor_folder_nor_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, f"{os.environ.get(name, '')}{os.pathsep}{tmp_path}/secret".lstrip(":"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "whose_model_this_is.pth"
    write(path, 0)
    child = Server(heavy=False, arguments=["--tasks", str(TASKS)])
    try:
        with opened(path) as source:
            told = child.run("surroundings", source.files, source.options()).document
            assert source.options()["names"] == ["the file"]
    finally:
        child.close()
    assert told["folder"] == "/" and told["environment"]["HOME"] == "/nonexistent"
    assert not told["environment"].keys() & {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "PYTHONUSERBASE"}
    said = " ".join([*told["environment"].values(), *told["links"], str(told["options"])])
    assert str(tmp_path) not in said and "whose_model" not in said


def test_readers_are_told_no_name_but_of_files_that_they_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    run = server.run

    def listening(task: str, files: Any, options: dict[str, object], **more: Any) -> server.Parcel:
        asked.append(options)
        return run(task, files, options, **more)

    monkeypatch.setattr(server, "run", listening)
    write(tmp_path / "whose_model_this_is.pth", 0)
    open_networks(tmp_path / "whose_model_this_is.pth")
    assert asked and "whose_model" not in str(asked)


def test_sources_that_are_not_copies_are_compared(tmp_path: Path) -> None:
    write(tmp_path / "m.pth", 0)
    with opened(tmp_path / "m.pth") as source:
        assert isinstance(source, Source) and source.kept == hasattr(os, "memfd_create")
        source.verify()
