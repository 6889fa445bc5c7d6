"""`inspect` and `convert` as a user calls them, and what the cache of scans keeps."""

import json
import pickle
import time
from pathlib import Path

import pytest
import torch

from unhorse.cli import run
from unhorse.core import Bars, ImageGrid, ReconstructedTrigger, ScanResult, Verdict
from unhorse.loading.formats import load_model
from unhorse.model_files import find_models
from unhorse.report import ScannedModel
from unhorse.survey import Request, scan_models
from unhorse.survey_cache import ScanCache, scan_key, stamp

VICTIM = Path(__file__).parent / "victims" / "infected"


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def files(tmp_path):
    """A folder with a good file, one that runs code, and one that is no model."""
    folder = tmp_path / "models"
    folder.mkdir()
    torch.save(load_model(VICTIM).network.state_dict(), folder / "good.pt")
    torch.save({"a": Evil(tmp_path / "marker")}, folder / "evil.pt")
    (folder / "old.bin").write_bytes(pickle.dumps({"a": 1}))
    return folder


def document(path):
    return {Path(model["path"]).name: model for model in json.loads(path.read_text())["models"]}


def test_inspect_says_format_hash_and_findings_and_runs_nothing(files, tmp_path, capsys):
    assert run(["inspect", str(files), "--json", str(tmp_path / "out.json")]) == 1
    seen = document(tmp_path / "out.json")
    assert seen.keys() == {"good.pt", "evil.pt", "old.bin"}
    assert seen["good.pt"]["format"] == "PyTorch state dict" and len(seen["good.pt"]["sha256"]) == 64
    assert "sandbox" in seen["good.pt"]["opened"]
    assert {finding["rule"] for finding in seen["evil.pt"]["findings"]} == {"LD205"}
    assert {finding["rule"] for finding in seen["old.bin"]["findings"]} == {"LD201"}
    assert not (tmp_path / "marker").exists()
    assert "NOT SCANNED" in capsys.readouterr().out


def test_a_good_file_alone_exits_with_0_and_a_missing_one_with_4(files, tmp_path):
    assert run(["inspect", str(files / "good.pt")]) == 0
    assert run(["inspect", str(tmp_path / "nothing.pt")]) == 4
    (tmp_path / "empty").mkdir()
    assert run(["inspect", str(tmp_path / "empty")]) == 3


def test_a_suppression_and_a_baseline_change_the_exit_code(files, tmp_path, monkeypatch):
    (files / "old.bin").unlink()
    config = tmp_path / "unhorse.toml"
    config.write_text('[[ignore]]\nrule = "LD205"\npath = "*.pt"\nreason = "ours"\nexpires = 2999-01-01\n')
    assert run(["inspect", str(files), "--config", str(config)]) == 0
    assert run(["inspect", str(files), "--json", str(tmp_path / "old.json")]) == 1
    assert run(["inspect", str(files), "--baseline", str(tmp_path / "old.json")]) == 0
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", str(files)]) == 0
    config.write_text('[[ignore]]\nrule = "LD205"\nreason = "ours"\n')
    assert run(["inspect", str(files)]) == 4


def test_every_kind_of_report_is_written(files, tmp_path):
    names = {"html": "a.html", "json": "a.json", "sarif": "a.sarif", "junit": "a.xml", "cyclonedx": "a.cdx"}
    flags = [word for kind, name in names.items() for word in (f"--{kind}", str(tmp_path / name))]
    assert run(["inspect", str(files), *flags]) == 1
    assert all((tmp_path / name).stat().st_size > 500 for name in names.values())


@pytest.mark.parametrize("name", ["m.safetensors", "folder", "m.onnx"])
def test_a_converted_file_is_the_same_network(name, files, tmp_path):
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript", reason="writing ONNX needs the extra onnx")
    assert (
        run(
            [
                "convert",
                str(files / "good.pt"),
                "-o",
                str(tmp_path / name),
                "--size",
                "8",
                "8",
                "--channels",
                "1",
            ]
        )
        == 0
    )
    shape = (1, 8, 8)
    images = torch.rand(3, *shape)
    expected = load_model(files / "good.pt", image_shape=shape)(images)
    assert torch.allclose(load_model(tmp_path / name)(images), expected, atol=1e-5)


def test_convert_refuses_what_inspect_refuses(files, tmp_path, capsys):
    assert run(["convert", str(files / "evil.pt"), "-o", str(tmp_path / "m.safetensors")]) == 4
    assert "LD205" in capsys.readouterr().err and not (tmp_path / "m.safetensors").exists()


def test_a_hundred_megabytes_are_inspected_in_seconds(tmp_path):
    torch.save({f"layer{index}": torch.zeros(2**20) for index in range(25)}, tmp_path / "big.pt")
    started = time.perf_counter()
    assert run(["inspect", str(tmp_path / "big.pt")]) == 0
    assert time.perf_counter() - started < 20  # two seconds, and what ten other processes may take


def test_hugging_face_folders_are_one_model_each(files, tmp_path):
    folder = tmp_path / "deep" / "vit"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "model.onnx").write_bytes(b"")  # no part of the model that the folder is
    assert find_models([tmp_path / "deep"]) == [folder, folder / "model.onnx"]


# --- the cache of scans -------------------------------------------------------------------------------------


def scanned():
    trigger = ReconstructedTrigger(torch.ones(1, 2, 2), torch.rand(3, 2, 2), 0.9)
    exhibits = (ImageGrid("maps", torch.rand(2, 3, 2, 2), ("a", "b")), Bars("b", ("x",), (float("nan"),)))
    result = ScanResult(
        Verdict.INFECTED, "s", 1.5, 0.7, triggers={3: trigger}, facts={"n": [1, 2]}, exhibits=exhibits
    )
    return ScannedModel("m.pt", sha256="ab", result=result, class_names=("a", "b"), seconds=2.0)


def test_what_is_kept_comes_back_equal(tmp_path):
    cache, expected = ScanCache(tmp_path), scanned()
    cache.write("key", (expected,))
    (found,) = cache.read("key")
    assert (found.path, found.class_names, found.verdict) == ("m.pt", ("a", "b"), "INFECTED")
    assert torch.equal(found.result.triggers[3].pattern, expected.result.triggers[3].pattern)
    assert torch.equal(found.result.exhibits[0].images, expected.result.exhibits[0].images)
    assert found.result.facts == {"n": [1, 2]} and found.result.verdict is Verdict.INFECTED
    assert cache.read("another") == ()


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_entry_is_as_good_as_none(tmp_path, damage):
    (tmp_path / "key.safetensors").write_bytes(damage)
    assert ScanCache(tmp_path).read("key") == ()


def test_the_key_follows_the_file_and_all_that_was_asked(tmp_path):
    base = scan_key("ab", {"effort": "quick"})
    assert base == scan_key("ab", {"effort": "quick"})
    assert len({base, scan_key("cd", {"effort": "quick"}), scan_key("ab", {"effort": "deep"})}) == 3
    (tmp_path / "a.png").write_bytes(b"1")
    before = stamp(tmp_path)
    (tmp_path / "b.png").write_bytes(b"2")
    assert stamp(tmp_path) != before


def test_a_model_scanned_before_is_not_scanned_again(tmp_path, capsys):
    request = Request(effort="quick")
    (first,) = scan_models([VICTIM], request).models
    (second,) = scan_models([VICTIM], request).models
    assert "scanned before" in capsys.readouterr().err
    assert (second.verdict, second.seconds) == (first.verdict, first.seconds)
    assert second.result.score == first.result.score
