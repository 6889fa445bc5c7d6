"""A folder of ten thousand small files is inspected in the time that a person waits."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hostile_files import Harm
from hostile_graphs import model, network, script
from hostile_keras import keras
from unhorse.cli import run
from unhorse.loading.folders import list_files

PNG = b"\x89PNG\r\n\x1a\n" + bytes(200)


def write_many(folder: Path, count: int = 10_000, models: int = 200) -> None:
    """`count` small files of which `models` are of five formats, a quarter of those without a suffix."""
    folder.mkdir()
    torch.save({"a": torch.zeros(4, 4)}, folder / "source.pt")
    save_file({"a": torch.zeros(4, 4)}, folder / "source.safetensors")
    five = {
        "pt": (folder / "source.pt").read_bytes(),
        "safetensors": (folder / "source.safetensors").read_bytes(),
        "onnx": model(),
        "torchscript": script(network("torch.linear(x, weight)")),
        "keras": keras()(Harm(folder / "marker")),
    }
    for suffix in ("pt", "safetensors"):
        (folder / f"source.{suffix}").unlink()
    for index in range(models):
        suffix = list(five)[index % 5]
        name = f"model{index}" if index < models // 4 else f"model{index}.{suffix}"
        place = folder / f"{index % 20}"
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(five[suffix])
    plain = [b'{"a": 1}', PNG, b"some text\n" * 30, b"a: 1\n", b"1,2,3\n" * 100]
    for index in range(count - models):
        place = folder / f"{index % 20}"
        place.mkdir(exist_ok=True)
        (place / f"file{index}.{('json', 'png', 'txt', 'yaml', 'csv')[index % 5]}").write_bytes(
            plain[index % 5]
        )


def test_many_files_are_all_listed(tmp_path):
    write_many(tmp_path / "many", 500, 20)
    listing = list_files([tmp_path / "many"])
    assert (listing.seen, len(listing.models), listing.harmless.total()) == (500, 20, 480)


@pytest.mark.slow
def test_ten_thousand_files_take_forty_seconds_at_most(tmp_path):
    pytest.importorskip("h5py")
    write_many(tmp_path / "many")
    started = time.perf_counter()
    assert run(["inspect", str(tmp_path / "many"), "--json", str(tmp_path / "a.json")]) == 0
    seconds = time.perf_counter() - started
    print(f"\ninspect of 10,000 files: {seconds:.1f} s")
    counts = json.loads((tmp_path / "a.json").read_text())["files"]
    assert (counts["seen"], counts["models"], counts["harmless"]) == (10_000, 200, 9_800)
    assert seconds < 40 * 4  # forty on idle cores; a busy machine is given time
