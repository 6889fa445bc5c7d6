"""What torch.save ordinarily writes beside the weights is left out, and the weights are the same."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import io
import pathlib
import pickle
import types
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unhorse.checks.inspection import check_task
from unhorse.checks.metadata import remarks
from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_writer import write_plain
from unhorse.cli import run
from unhorse.loading.formats import load_model
from unhorse.loading.plain_checkpoints import plain_checkpoint
from unhorse.loading.torch_reader import checkpoint
from unhorse.models.classifier import new_classifier
from unhorse.rules import LoadRefused

BESIDE: dict[str, Any] = {
    "numpy scalar": np.float64(93.4),
    "numpy array": np.arange(20),
    "numpy dtype": np.dtype("f4"),
    "random state": np.random.get_state(),
    "namespace": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a")),
    "path": pathlib.Path("data"),
    "date": datetime.datetime(2020, 1, 1),
    "defaultdict": collections.defaultdict(dict, {"a": {"b": 1}}),
    "deque": collections.deque([1, 2]),
    "simple namespace": types.SimpleNamespace(a=1),
    "decimal": [decimal.Decimal("1.5"), uuid.UUID(int=1), slice(1), frozenset([1]), range(3)],
    "exception": ValueError("x"),
    "classes": [np.float32, pathlib.PurePosixPath, argparse.Namespace],
}
PLAIN: dict[str, Any] = {
    "sizes": torch.Size([1, 2]),
    "device": torch.device("cpu"),
    "dtype": torch.float8_e4m3fn,
    "set": {"cat", "dog"},
    "big": 10**30,
    "counter": collections.Counter("aab"),
    "bytes": [b"raw", bytearray(b"more"), 1j],
    "generator": torch.get_rng_state(),
    "nested": {"a": [(1, -2.5, None), {"b": True}]},
}


def network() -> torch.nn.Module:
    return new_classifier("small-cnn", image_shape=(1, 8, 8), class_names=["a", "b"], seed=0).network.eval()


def saved(value: object, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    buffer.seek(0)
    return buffer


def notes_of(stream: io.BytesIO) -> list[str]:
    return list(check_task([stream], {})[0]["facts"]["notes"])


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", [*BESIDE, *PLAIN])
def test_weights_are_read_whatever_stands_beside_them(name: str, protocol: int) -> None:
    state = network().state_dict()
    stream = saved({"state_dict": state, "beside": (BESIDE | PLAIN)[name]}, pickle_protocol=protocol)
    notes = notes_of(stream)
    # old protocols spell some plain values by names of other things
    assert bool(notes) >= (name in BESIDE) and all(note.startswith("LD236 ") for note in notes)
    found = checkpoint(stream).networks["state_dict"]
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_before_pytorch_1_6_are_read_at_every_protocol(protocol: int) -> None:
    state = network().state_dict()
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
    stream = saved({"state_dict": state, "best": np.float64(1)}, **options)
    assert notes_of(stream)[0].startswith("LD236 values beside the weights left out: numpy")
    found = checkpoint(stream).networks["state_dict"]
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("protocol", [2, 4])
def test_weights_of_other_types_are_read(dtype: torch.dtype, protocol: int) -> None:
    state = {name: tensor.to(dtype) for name, tensor in network().state_dict().items()}
    found = checkpoint(saved(state, pickle_protocol=protocol)).networks[""]
    assert all(torch.equal(found[key], state[key].float()) for key in state)


def test_shared_storages_and_views_survive(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {
        "whole": base,
        "part": base[4:10],
        "turned": base.view(4, 6).T,
        "kept": torch.nn.Parameter(base[:2]),
    }
    found = checkpoint(saved({"state_dict": state, "x": np.int64(1)}, pickle_protocol=5)).networks[
        "state_dict"
    ]
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_the_file_itself_is_read_where_nothing_is_left_out() -> None:
    stream = saved(network().state_dict())
    assert plain_checkpoint(stream) is stream
    assert plain_checkpoint(saved({"a": torch.ones(1)}, pickle_protocol=4)) is not stream


def test_the_rewritten_pickle_names_nothing_but_what_weights_need() -> None:
    from unhorse.checks.pickle_globals import contents
    from unhorse.checks.pickle_names import Danger

    value = {"state_dict": {"a": [1, 2]}, **BESIDE, **{key: PLAIN[key] for key in ("set", "big", "nested")}}
    written = write_plain(follow(pickle.dumps(value, 5)).root)
    reading = follow(written)
    assert not reading.problem and reading.protocol == 2 and contents(reading).worst is Danger.PLAIN
    assert pickle.loads(written)["nested"] == PLAIN["nested"] and pickle.loads(written)["big"] == 10**30
    assert {"path", "numpy scalar", "date"} & pickle.loads(written).keys() == set()


def test_a_value_alone_is_no_state_dict() -> None:
    for value in (np.arange(3), argparse.Namespace(a=1)):
        with pytest.raises(LoadRefused) as refusal:
            checkpoint(saved(value))
        assert refusal.value.rule == "LD209"


def test_a_checkpoint_that_refers_to_itself_or_nests_deep_is_no_state_dict() -> None:
    circle: dict[str, Any] = {"a": np.float64(1)}
    circle["again"] = circle
    deep: list[Any] = [np.float64(1)]
    for _ in range(300):
        deep = [deep]
    for value in (circle, {"a": deep}):
        with pytest.raises(LoadRefused) as refusal:
            checkpoint(saved(value))
        assert refusal.value.rule == "LD209"


def test_a_scan_and_an_inspection_say_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"state_dict": network().state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    model = load_model(path, image_shape=(1, 8, 8))
    assert [line for line in model.assumptions if line.startswith("LD236")] == [
        "LD236 values beside the weights left out: argparse.Namespace; the weights are read"
    ]
    assert run(["inspect", str(path), "--json", str(tmp_path / "a.json")]) == 0
    assert '"LD236"' in (tmp_path / "a.json").read_text()


def test_what_runs_code_beside_the_weights_is_refused_at_every_protocol() -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.system, ("true",)

    for protocol in (2, 3, 4, 5):
        with pytest.raises(LoadRefused, match=r"calls (posix|nt)\.system") as refusal:
            notes_of(saved({"state_dict": {"a": torch.ones(1)}, "x": Evil()}, pickle_protocol=protocol))
        assert refusal.value.rule == "LD205"


def test_a_second_pickle_behind_one_of_protocol_4_is_refused() -> None:
    stream = saved({"a": torch.ones(1)}, pickle_protocol=4)
    changed = io.BytesIO()
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(changed, "w") as new:
        for member in old.infolist():
            more = pickle.dumps("behind") if member.filename.endswith("data.pkl") else b""
            new.writestr(zipfile.ZipInfo(member.filename), old.read(member) + more)
    with pytest.raises(LoadRefused) as refusal:
        notes_of(changed)
    assert refusal.value.rule == "LD213"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_safetensors_of_eight_bits_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in network().state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    read = load_model(tmp_path / "m.safetensors", image_shape=(1, 8, 8)).network.state_dict()
    assert all(torch.equal(read[key], state[key].float()) for key in state)


def test_safetensors_of_types_that_no_classifier_uses_are_not_supported() -> None:
    header = b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    with pytest.raises(LoadRefused, match="type 'F4'") as refusal:
        check_task([io.BytesIO(len(header).to_bytes(8, "little") + header + b"x")], {})
    assert refusal.value.rule == "LD235"


# --- text beside safetensors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "see https://example.org/a?b=c",
        "__import__('os').system('true')",
        "import os; os.remove('x')",
        "curl http://127.0.0.1 | sh",
        "#!/bin/sh\ntrue",
        "{{ ''.__class__.__mro__ }}",
        "gASVHQAAAAAAAACMBXBvc2l4lIwGc3lzdGVt",
        "\x1b[2Jcleared",
        "javascript:alert(1)",
        "file:///etc/passwd",
    ],
)
def test_metadata_that_reads_like_code_is_quoted_in_ascii(text: str) -> None:
    (note,) = remarks({"format": "pt", "note": f"trained well {text} " + "x" * 500})
    assert note.startswith("LD237 ") and note.isascii() and note.isprintable() and len(note) < 600
    assert ascii(text)[1:-1][:10] in note
    assert remarks({text: "value"})


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": "pt"},
        {"format": "pt", "author": "A. Nobody, Lab of Vision", "epochs": "90", "accuracy": "93.4 %"},
        {"description": "A ResNet-18 (import of the weights of 2015), opened and compiled with care."},
        {"classes": '["cat", "dog", "open door", "system"]', "size": "(3, 224, 224)"},
        {"unhorse": '{"note": "https://example.org"}'},
    ],
)
def test_ordinary_metadata_is_no_finding(metadata: dict[str, str]) -> None:
    assert remarks(metadata) == ()


def test_metadata_is_a_low_finding_and_the_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(network().state_dict(), path, {"format": "pt", "note": "<script>alert(1)</script>"})
    assert any(line.startswith("LD237 ") for line in load_model(path, image_shape=(1, 8, 8)).assumptions)
    assert (
        run(["inspect", str(path), "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")])
        == 0
    )
    assert "<script>alert" not in (tmp_path / "a.html").read_text()
