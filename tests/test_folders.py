"""A folder hides nothing: every file is opened, known, excluded or reported, whatever its name."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

import unhorse.report
from benign_onnx import _onnx
from hostile_files import Harm
from hostile_graphs import kept, model, weight
from odd_files import HIDDEN, system, write_all
from unhorse import survey
from unhorse.checks.harmless import harmless, is_text, runs_nothing
from unhorse.checks.sorting import sort
from unhorse.cli import run
from unhorse.core import ScanResult, Verdict
from unhorse.loading import folders, sources
from unhorse.loading.folders import list_files
from unhorse.loading.formats import load_model
from unhorse.loading.listing import Patterns
from unhorse.model_files import find_models
from unhorse.rules import LoadRefused

VICTIM = Path(__file__).parent / "victims" / "infected"
SCHEMA = json.loads(Path(unhorse.report.__file__).with_suffix(".schema.json").read_text())
PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)


@pytest.fixture
def folder(tmp_path):
    """A folder with one good model."""
    place = tmp_path / "models"
    place.mkdir()
    torch.save(load_model(VICTIM).network.state_dict(), place / "good.pt")
    return place


def inspected(folder: Path, *flags: str) -> tuple[int, dict]:
    """The exit code and the JSON of an inspection, whose counts add up."""
    output = folder.parent / "report.json"
    code = run(["inspect", str(folder), "--json", str(output), *flags])
    document = json.loads(output.read_text())
    jsonschema.validate(document, SCHEMA)
    counts = document["files"]
    parts = ("models", "not_scanned", "parts", "archives", "harmless", "links", "excluded")
    assert counts["seen"] == sum(counts[part] for part in parts)
    assert counts["models"] + counts["not_scanned"] == len(document["models"])
    assert counts["harmless"] == sum(counts["harmless_kinds"].values())
    return code, document


def rules(document: dict) -> dict[str, set[str]]:
    """The rules found in each file, without what is only assumed."""
    return {
        Path(model["path"]).name: {found["rule"] for found in model["findings"] if found["rule"][:2] != "MD"}
        for model in document["models"]
    }


# --- nothing is hidden --------------------------------------------------------------------------------------


def test_hostile_files_of_all_kinds_beside_a_good_one_are_all_reported(folder, tmp_path):
    write_all(folder, {name: make(Harm(tmp_path / "marker")) for name, make in HIDDEN.items()})
    code, document = inspected(folder)
    assert code == 1 and not (tmp_path / "marker").exists()
    named = {path.split("!")[0] for path in rules(document)}
    inside = {Path(model["path"].partition("!")[0]).name for model in document["models"]}
    assert named | inside >= {"good.pt", *HIDDEN}
    assert all(found for name, found in rules(document).items() if name != "good.pt")
    assert document["files"]["not_scanned"] == len(HIDDEN)


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hostile_file_beside_a_good_one_never_exits_with_0(name, folder, tmp_path):
    (folder / name).write_bytes(HIDDEN[name](Harm(tmp_path / "marker")))
    code, document = inspected(folder)
    assert code in (1, 2) and document["files"]["not_scanned"] == 1
    assert run(["inspect", str(folder / name)]) in (1, 2)
    assert not (tmp_path / "marker").exists()


def test_a_scan_lists_what_it_did_not_look_at_and_exits_with_2(tmp_path, monkeypatch):
    found = ScanResult(Verdict.NO_SIGN_FOUND, "stand-in", score=0.0, threshold=1.0)
    monkeypatch.setattr(survey, "scan_with", lambda *given, **named: found)
    monkeypatch.setattr(survey, "doubts", lambda *given: ())
    place = tmp_path / "models"
    place.mkdir()
    (place / "benign.safetensors").write_bytes((VICTIM.parent / "benign" / "model.safetensors").read_bytes())
    (place / "scores.raw").write_bytes(bytes(range(192, 256)) * 9)
    (place / "README.md").write_text("# a model")
    reports = {"json": "a.json", "sarif": "a.sarif", "junit": "a.xml", "html": "a.html"}
    flags = [word for kind, name in reports.items() for word in (f"--{kind}", str(tmp_path / name))]
    code = run(["scan", str(place), "--no-cache", *flags])
    document = json.loads((tmp_path / "a.json").read_text())
    assert code == 2
    (unknown,) = (model for model in document["models"] if model["path"].endswith("scores.raw"))
    assert unknown["verdict"] == "NOT SCANNED" and unknown["error_rule"] == "LD232"
    assert (document["files"]["models"], document["files"]["harmless_kinds"]) == (1, {"text": 1})
    for name in ("a.sarif", "a.xml", "a.html"):
        assert "scores.raw" in (tmp_path / name).read_text() and "LD232" in (tmp_path / name).read_text()
    log = json.loads((tmp_path / "a.sarif").read_text())
    assert log["runs"][0]["properties"]["files"]["not_scanned"] == 1
    assert '<property name="not_scanned" value="1"' in (tmp_path / "a.xml").read_text()
    assert "3 files: 1 model, 1 NOT SCANNED, 1 harmless (1 text)" in (tmp_path / "a.html").read_text()


def test_models_are_found_without_a_suffix_and_under_a_wrong_one(folder):
    good = (folder / "good.pt").read_bytes()
    write_all(folder, {"weights": good, "notes.txt": good, "deep/er/picture.png": good})
    code, document = inspected(folder)
    assert code == 0 and document["files"]["models"] == 4


# --- harmless files -----------------------------------------------------------------------------------------

HARMLESS = {
    **{"README.md": b"# A model\n\nf\xc3\xbcr alle\n", "labels.txt": b"cat\ndog\nbird\n", "empty": b""},
    **{"config.json": b"{}", "a.yaml": b"a: 1\n", "train.py": b"import os\nos.getcwd()\n", "a.csv": b"1,2\n"},
    **{"picture.png": PNG, "p.jpg": b"\xff\xd8\xff\xe0" + bytes(20), "a.gif": b"GIF89a" + bytes(20)},
    **{"a.webp": b"RIFF\x10\0\0\0WEBPVP8 " + bytes(20), "a.bmp": b"BM\x1e\0\0\0" + bytes(24)},
    **{"latin.txt": "Größe der Bilder in Zürich\n".encode("latin-1") * 9},
    **{"wide.txt": "a table".encode("utf-16"), "LICENSE": b"Apache License", ".gitignore": b"*.pt\n"},
    **{
        "data.parquet": b"PAR1" + bytes(50) + b"PAR1",
        "x.txt": b"x^2 + y^2 = z^2\n",
        "i.txt": b"in\nthe\nend",
    },
    **{"index.html": b"<!DOCTYPE html><p>", "answer.json": b'{"error": 1}'},
    **{".git/HEAD": b"ref: refs/heads/main\n", ".git/index": b"DIRC" + bytes(30)},
    ".git/objects/0a/" + 38 * "b": b"x\x01" + bytes(range(100)),
    ".git/objects/pack/pack-1.pack": b"PACK" + bytes(30),
}


def test_pictures_text_and_git_are_counted_and_change_no_exit_code(folder):
    write_all(folder, HARMLESS)
    code, document = inspected(folder)
    assert code == 0 and len(document["models"]) == 1
    kinds = document["files"]["harmless_kinds"]
    assert kinds == {"text": 15, "image": 5, "empty": 1, "table": 1, "git": 3}
    assert document["files"]["harmless"] == len(HARMLESS)


def test_a_folder_of_harmless_files_alone_exits_with_3(tmp_path):
    assert run(["inspect", str(write_all(tmp_path / "notes", {"a.txt": b"a", "b.png": PNG}))]) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"text, and then" + bytes(3)),
        ("picture.png", b"\x89PNX" + bytes(40)),
        ("a.webp", b"RIFF\x10\0\0\0WAVEfmt " + bytes(20)),
        ("a.bmp", b"BM" + bytes(range(128, 200))),
        ("module.pyc", b"\xa7\r\r\n" + bytes(12) + b"\xe3" + bytes(20)),
        ("long.txt", b"a" * 2**17 + bytes([0, 1, 2])),
        (".git/evil", bytes(range(200, 256))),
        (".git/objects/evil", b"x\x01" + bytes(range(200, 256))),
    ],
)
def test_what_only_looks_harmless_is_reported(name, content, folder):
    write_all(folder, {name: content})
    code, document = inspected(folder)
    assert code in (1, 2) and document["files"]["not_scanned"] == 1


def test_a_picture_that_ends_as_an_archive_is_two_things_at_once(folder, tmp_path):
    (folder / "cat.png").write_bytes(PNG + HIDDEN["table.dat"](Harm(tmp_path / "marker")))
    code, document = inspected(folder)
    assert code == 1 and rules(document)["cat.png"] == {"LD213"}


@pytest.mark.parametrize("content", [b"cat\ndog\nbird\nfrog\n", b"in\nthe\nend\n", b"cthe\nend\nof a line"])
def test_lines_that_open_like_a_pickle_are_text(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with (tmp_path / "a.txt").open("rb") as stream:
        assert sort(stream).harmless == "text"


@pytest.mark.parametrize(
    "content", [b"cos\nsystem\n(S'true'\ntR.", b"(S'true'\nios\nsystem\n.", b"N0cos\nsystem\n(S'true'\ntR."]
)
def test_pickles_written_as_text_are_no_text(content, tmp_path):
    assert not runs_nothing(content)
    (tmp_path / "labels.txt").write_bytes(content)
    (tmp_path / "empty.txt").write_bytes(b"")
    assert run(["inspect", str(tmp_path)]) == 1


def test_text_is_told_from_bytes():
    assert is_text("Grüße".encode()) and is_text("Grüße".encode()[:-2], cut=True)
    assert not is_text(b"\x00") and not is_text(b"\x7fELF") and not is_text(bytes(range(128, 256)))


def test_an_empty_file_is_harmless_unless_its_name_promises_a_model(folder):
    write_all(folder, {"__init__.py": b"", "model.safetensors": b"", "page.onnx": b"<html>not found</html>"})
    code, document = inspected(folder)
    assert code == 2 and document["files"]["harmless_kinds"] == {"empty": 1}
    assert rules(document)["model.safetensors"] == {"LD202"} and rules(document)["page.onnx"] == {"LD230"}


def test_a_pointer_of_git_lfs_is_reported_whatever_its_name(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12\n"
    write_all(folder, {"weights": pointer})
    code, document = inspected(folder)
    assert code == 2 and "git lfs pull" in document["models"][-1]["reason"]


# --- models of several files --------------------------------------------------------------------------------


def hugging_face(place: Path) -> Path:
    place.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, place / "model.safetensors")
    (place / "config.json").write_text(
        '{"model_type": "vit", "architectures": ["ViTForImageClassification"]}'
    )
    return place


def test_other_weights_in_a_hugging_face_folder_are_looked_at(folder, tmp_path):
    place = hugging_face(folder / "vit")
    (place / "pytorch_model.bin").write_bytes(HIDDEN["table.dat"](Harm(tmp_path / "marker")))
    (place / "training_args.bin").write_bytes(HIDDEN["table.dat"](Harm(tmp_path / "marker")))
    (place / "README.md").write_text("# ViT")
    code, document = inspected(folder)
    assert code == 1
    assert rules(document)["training_args.bin"] == {"LD205"}
    assert any(found == {"LD205"} for name, found in rules(document).items() if name != "training_args.bin")
    assert not (tmp_path / "marker").exists()


def test_a_folder_of_ours_is_one_model_and_hides_nothing_beside_it(tmp_path):
    place = tmp_path / "victim"
    write_all(place, {path.name: path.read_bytes() for path in VICTIM.iterdir()})
    (place / "more").write_bytes(HIDDEN["weights"](Harm(tmp_path / "marker")))
    code, document = inspected(place)
    assert code in (1, 2) and document["files"]["models"] == 1 and document["files"]["parts"] == 2
    assert rules(document)["more"]


@pytest.mark.parametrize("name", ["data.bin", "net.onnx.data", "weights"])
def test_the_data_of_an_onnx_model_is_a_part_of_it(name, folder, tmp_path):
    onnx = pytest.importorskip("onnx")
    _onnx(tmp_path / "net.onnx", name="small-cnn")
    network = onnx.load(tmp_path / "net.onnx")
    onnx.save(network, folder / "net.onnx", save_as_external_data=True, location=name, size_threshold=0)
    (folder / "other.bin").write_bytes(bytes(range(192, 256)))
    listing = list_files([folder])
    assert listing.parts == 1 and folder / "net.onnx" in listing.models
    assert [Path(skipped.path).name for skipped in listing.skipped] == ["other.bin"]


def test_a_pickle_that_an_onnx_model_claims_as_its_data_is_looked_at(folder, tmp_path):
    (folder / "net.onnx").write_bytes(model(tensors=(weight(kept(location="weights")),)))
    (folder / "weights").write_bytes(system(Harm(tmp_path / "marker")))
    listing = list_files([folder])
    assert listing.parts == 0 and folder / "weights" in listing.models


def test_a_saved_model_is_one_entry_with_its_variables(folder):
    files = {"saved_model.pb": b"\x08\x01\x12" + bytes(20), "fingerprint.pb": b"\x0a\x01\xff\xff"}
    files |= {
        f"variables/variables.{end}": bytes(range(200, 250)) for end in ("index", "data-00000-of-00001")
    }
    write_all(folder, {**files, "variables/evil": bytes(range(200, 250))})
    code, document = inspected(folder)
    assert code == 2 and rules(document)["saved_model.pb"] == {"LD235"}
    assert document["files"]["parts"] == 3 and rules(document)["evil"] == {"LD232"}


# --- links, special files, what cannot be read --------------------------------------------------------------


def test_links_are_named_followed_by_nothing_and_end(folder, tmp_path):
    (folder / "again").symlink_to("good.pt")
    (folder / "loop").symlink_to(".")
    (folder / "self").symlink_to("self")
    (folder / "out").symlink_to("/etc/passwd")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "gone").symlink_to("nothing")
    code, document = inspected(folder)
    assert code == 1 and document["files"]["models"] == 1
    assert {Path(link["path"]).name for link in document["files"]["linked"]} == {"again", "loop"}
    found = rules(document)
    assert found["out"] == found["outside"] == {"LD234"} and found["gone"] == found["self"] == {"LD232"}


def test_a_cache_of_the_hub_is_read_through_its_links_once(tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, cache / "blobs" / "1a")
    (cache / "blobs" / "2b").write_bytes((cache / "blobs" / "1a").read_bytes())
    (cache / "blobs" / "3c").write_text("# a model")
    commit = cache / "snapshots" / "abc"
    (commit / "deep").mkdir(parents=True)
    (commit / "model.safetensors").symlink_to("../../blobs/1a")
    (commit / "deep" / "more.safetensors").symlink_to("../../../blobs/2b")
    (commit / "README.md").symlink_to("../../blobs/3c")
    (commit / "evil").symlink_to("../../../../../etc/passwd")
    for root in (cache, commit):
        code, document = inspected(root)
        assert document["files"]["models"] == 2 and rules(document)["evil"] == {"LD234"}
        assert code == 1
    assert document["files"]["harmless_kinds"] == {"text": 1}
    assert run(["inspect", str(commit / "model.safetensors")]) == 0


def test_pipes_and_sockets_are_named_and_never_opened(folder, monkeypatch):
    os.mkfifo(folder / "pipe.pt")
    monkeypatch.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        code, document = inspected(folder)
    assert code == 1 and rules(document)["pipe.pt"] == rules(document)["socket"] == {"LD223"}


def test_what_cannot_be_read_is_reported(folder, monkeypatch):
    (folder / "locked").mkdir()
    (folder / "secret").write_bytes(b"x")
    scandir, opened = os.scandir, os.open

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def locked(path, *rest, **named):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **named)

    monkeypatch.setattr(folders.os, "scandir", refuse)
    monkeypatch.setattr(sources.os, "open", locked)
    code, document = inspected(folder)
    assert code == 2 and rules(document)["locked"] == rules(document)["secret"] == {"LD232"}
    assert "Permission denied" in document["models"][-1]["reason"]


def test_names_that_no_terminal_should_see_are_escaped_and_exact_in_json(folder, capsys):
    name = os.fsdecode(b"we\x1b[31mi\xffrd\n.dat")
    (folder / name).write_bytes(bytes(range(200, 256)))
    code, document = inspected(folder)
    assert code == 2 and document["models"][-1]["path"] == str(folder / name)
    assert "\x1b[31m" not in capsys.readouterr().out


# --- patterns -----------------------------------------------------------------------------------------------


def test_excluded_files_are_counted_and_change_no_exit_code(folder, monkeypatch, tmp_path):
    write_all(folder, {"a.dat": b"\xc0\xc1\xc2", "deep/b.dat": b"\xc0\xc1\xc2", "data/c": b"\xc0\xc1\xc2"})
    assert inspected(folder)[0] == 2
    code, document = inspected(folder, "--exclude", "*.dat", "--exclude", "data")
    assert code == 0 and document["files"]["excluded"] == 3
    config = tmp_path / "unhorse.toml"
    config.write_text('exclude = ["*.dat", "data/"]\n')
    assert inspected(folder, "--config", str(config))[0] == 0
    config.write_text('exclude = "*.dat"\n')
    assert run(["inspect", str(folder), "--config", str(config)]) == 4
    code, document = inspected(folder, "--include", "*.pt")
    assert code == 0 and document["files"]["excluded"] == 3


def test_a_pattern_means_a_name_a_path_or_a_folder():
    assert Patterns(("*.bin",)).leave_out("a/b/c.bin")
    assert Patterns(("b",)).leave_out("a/b/c.bin") and Patterns(("a/b/",)).leave_out("a/b/c.bin")
    assert Patterns(("./a/*.bin",)).leave_out("a/c.bin") and not Patterns(("c",)).leave_out("a/c.bin")
    assert Patterns((), ("*.pt",)).leave_out("a.bin") and not Patterns((), ("*.pt",)).leave_out("a.pt")
    assert Patterns(("a.pt",), ("*.pt",)).leave_out("a.pt")


# --- paths that are none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "scan"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing.pt", "no such file: nothing.pt"),
        ("./deep/nothing", "no such file"),
        ("https://example.org/a/model.pt", "curl -LO https://example.org/a/model.pt"),
        ("https://huggingface.co/google/vit", "huggingface-cli download google/vit --local-dir vit"),
        ("s3://bucket/model.pt", "aws s3 cp s3://bucket/model.pt ."),
        ("hf://google/vit", "huggingface-cli download google/vit --local-dir vit"),
        ("google/vit-base", "huggingface-cli download google/vit-base --local-dir vit-base"),
        ("hub:google/vit-base", "huggingface-cli download google/vit-base --local-dir vit-base"),
    ],
)
def test_a_path_that_is_none_exits_with_4_and_says_what_to_do(
    command, path, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run([command, path]) == 4
    assert said in capsys.readouterr().err


def test_a_missing_file_beside_a_good_one_exits_with_4(folder, capsys):
    assert run(["inspect", str(folder / "good.pt"), str(folder / "lost.pt")]) == 4
    assert "lost.pt" in capsys.readouterr().err


def test_models_are_found_by_their_bytes_in_order(folder):
    write_all(folder, {"b": (folder / "good.pt").read_bytes(), "a.txt": b"text"})
    assert find_models([folder]) == [folder / "b", folder / "good.pt"]


def test_an_unknown_kind_is_harmless_to_nobody(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)))
    with (tmp_path / "a").open("rb") as stream:
        assert harmless(stream) == "" and not sort(stream).is_model
    assert isinstance(list_files([tmp_path]).skipped[0].problem, LoadRefused)
