"""Archives are looked into in memory: models in them are reported and scanned, what is not read is said."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fuzz_tasks import _damaged
from hostile_files import Harm, Piece, zipped
from hostile_graphs import kept, model, weight
from odd_files import (
    HIDDEN,
    PACKERS,
    bomb,
    encrypted,
    joblib_like,
    system,
    tar_link,
    tar_of,
    write_all,
    zip_of,
)
from test_folders import inspected, rules
from unhorse.checks import unpacking
from unhorse.checks.archive_contents import contents_task
from unhorse.cli import run
from unhorse.loading import archived
from unhorse.loading.folders import list_files
from unhorse.loading.formats import load_model
from unhorse.rules import LoadFailed, LoadRefused

VICTIM = Path(__file__).parent / "victims" / "infected" / "model.safetensors"


@pytest.fixture
def members(tmp_path):
    """A good model, one that calls os.system, a text."""
    hostile = HIDDEN["table.dat"](Harm(tmp_path / "marker"))
    return {"deep/good": VICTIM.read_bytes(), "evil.bin": hostile, "README.md": b"# models\n"}


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


# --- every kind of archive ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", PACKERS)
def test_models_in_an_archive_are_looked_at_where_they_lie(end, members, place, tmp_path):
    (place / f"models.{end}").write_bytes(PACKERS[end](members))
    code, document = inspected(place)
    assert code == 1 and not (tmp_path / "marker").exists()
    found = {model["path"].rpartition("!")[2]: model for model in document["models"]}
    assert {finding["rule"] for finding in found["evil.bin"]["findings"]} == {"LD205"}
    assert found["deep/good"]["format"] == "safetensors" and found["deep/good"]["error_rule"] == ""
    assert found["deep/good"]["size"] == VICTIM.stat().st_size
    assert document["files"]["harmless_kinds"] == {"text": 1}
    assert document["files"]["archives"] == (2 if "-in" in end else 1)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        f"models.{end}",
        "report.json",
    ]


@pytest.mark.parametrize("end", ["zip", "tar.gz", "zip-in.zip"])
def test_a_member_opens_as_the_same_model(end, members, place):
    (place / f"models.{end}").write_bytes(PACKERS[end](members))
    inside = "inner.zip!deep/good" if "-in" in end else "deep/good"
    loaded = load_model(place / f"models.{end}!{inside}")
    for name, tensor in load_model(VICTIM).network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor)
    with pytest.raises(LoadFailed, match="no member"):
        load_model(place / f"models.{end}!lost")


def test_a_member_in_a_format_for_the_sandbox_opens_too(place, tmp_path):
    raw = io.BytesIO()
    torch.save(load_model(VICTIM).network.state_dict(), raw)
    (place / "a.zip").write_bytes(zip_of({"net.pt": raw.getvalue()}))
    loaded = load_model(place / "a.zip!net.pt", image_shape=(1, 8, 8))
    assert loaded.num_classes == load_model(VICTIM).num_classes


def test_the_models_of_a_scan_are_those_inside_archives_too(members, place):
    (place / "a.zip").write_bytes(zip_of({name: members[name] for name in ("deep/good", "README.md")}))
    listing = list_files([place])
    assert [looked.path for looked in listing.looked] == [f"{place.as_posix()}/a.zip!deep/good"]
    assert listing.seen == 3 and not listing.models and not listing.skipped


def test_without_files_in_memory_the_archive_is_to_be_unpacked(members, place, monkeypatch):
    (place / "a.zip").write_bytes(zip_of(members))
    monkeypatch.setattr(archived, "_MEMFD", None)
    with pytest.raises(LoadRefused, match="LD233.*unpack"):
        load_model(place / "a.zip!deep/good")


def test_a_file_of_the_same_path_hides_no_member(members, place):
    (place / "a.zip").write_bytes(zip_of({"net": members["deep/good"]}))
    (place / "a.zip!net").write_text("nothing")
    code, document = inspected(place)
    assert code == 2 and document["files"]["not_scanned"] == 1


def test_a_compressed_pickle_of_joblib_is_looked_into(place, tmp_path):
    (place / "model").write_bytes(joblib_like(Harm(tmp_path / "marker")))
    code, document = inspected(place)
    assert code == 1 and rules(document)["model!content"] == {"LD205"}


# --- what is a finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("up.zip", zip_of({"../../up": b"text"}), "LD204"),
        ("absolute.zip", zip_of({"/etc/passwd": b"text"}), "LD204"),
        ("windows.zip", zip_of({"..\\up": b"text", "C:\\a": b"text"}), "LD204"),
        ("up.tar", tar_of({"../up": b"text"}), "LD204"),
        ("absolute.tar.gz", gzip.compress(tar_of({"/etc/passwd": b"text"})), "LD204"),
        ("twice.zip", zipped(Piece("a", b"text"), Piece("a", b"more")), "LD204"),
        ("renamed.zip", zipped(Piece("a", b"text", local_name="b")), "LD204"),
        ("link.zip", zipped(Piece("a", b"/etc/passwd", mode=0o120777)), "LD234"),
        ("link.tar", tar_of({}, tar_link("a", "/etc/passwd")), "LD234"),
        ("hard.tar", tar_of({"b": b"text"}, tar_link("a", "b", tarfile.LNKTYPE)), "LD234"),
        ("pipe.tar", tar_of({}, tar_link("a", "", tarfile.FIFOTYPE)), "LD223"),
        ("before.zip", zipped(Piece("a", b"text"), Piece("b", b"text", behind=bytes(99))), "LD213"),
        ("behind.zip", zip_of({"a": b"text"}, comment=b"\x80\x04K\x01."), "LD213"),
        ("behind.tar", tar_of({"a": b"text"}) + b"\x80\x04K\x01.", "LD213"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_archive_made_to_harm_is_a_finding(name, content, rule, place):
    (place / name).write_bytes(content)
    code, document = inspected(place)
    found = {one for path, these in rules(document).items() if path.startswith(name) for one in these}
    assert code == 1 and rule in found


def test_several_findings_of_an_archive_stand_in_one_entry(place):
    (place / "a.tar").write_bytes(tar_of({"../up": b"text"}, tar_link("a", "/etc/passwd")))
    code, document = inspected(place)
    assert rules(document) == {"a.tar": {"LD204", "LD234"}} and document["files"]["not_scanned"] == 1


# --- what is not read ---------------------------------------------------------------------------------------

NESTED = zip_of({"c.zip": zip_of({"d.txt": b"text"})})
UNREAD = {
    "encrypted.zip": encrypted("a", b"text"),
    "cut.zip": zip_of({"a": b"text" * 50})[:-30],
    "cut.tar": tar_of({"a": b"text" * 5000})[:9000],
    "endless.tar": tar_of({"a": b"text"})[:1024],
    "cut.tar.gz": gzip.compress(tar_of({"a": bytes(range(256)) * 9}))[:-9],
    "bomb.zip": bomb(),
    "bomb.gz": gzip.compress(bytes(40 * 2**20)),
    "nested.zip": zip_of({"b.zip": NESTED}),
    "nested.gz": gzip.compress(gzip.compress(gzip.compress(b"text"))),
    "a.7z": HIDDEN["backup.7z"](Harm(Path("marker"))),
    "a.rar": b"Rar!\x1a\x07\x01\0" + bytes(40),
    "a.zst": b"\x28\xb5\x2f\xfd" + bytes(40),
    "odd.zip": zipped(Piece("a", b"text", method=97)),
    "unknown.zip": zip_of({"a": bytes(range(192, 256))}),
    "seven.zip": zip_of({"a.7z": HIDDEN["backup.7z"](Harm(Path("marker")))}),
}


@pytest.mark.parametrize("name", UNREAD)
def test_an_archive_that_is_not_read_to_its_end_exits_with_2(name, place):
    (place / name).write_bytes(UNREAD[name])
    code, document = inspected(place)
    assert code == 2 and document["files"]["not_scanned"] >= 1
    assert all(
        unread["reason"] and unread["verdict"] in ("NOT SCANNED", "FAILED") for unread in document["models"]
    )
    assert run(["inspect", str(place / name)]) == 2


def test_what_lies_before_the_cut_is_looked_at_all_the_same(place, tmp_path):
    packed = gzip.compress(HIDDEN["forest.model"](Harm(tmp_path / "marker")) * 2, 0)
    (place / "a.gz").write_bytes(packed[:-6])
    code, document = inspected(place)
    assert code == 1 and rules(document) == {"a.gz": {"LD233"}, "a.gz!content": {"LD205"}}


def test_limits_hold_for_members_and_bytes_in_all(monkeypatch):
    def problems(content: bytes) -> list[str]:
        from unhorse.checks.sorting import sort

        stream = io.BytesIO(content)
        walked = unpacking.Unpacker().walk(stream, sort(stream))
        return [str(inner.problem) for inner in walked if inner.problem]

    many = zip_of({f"{index}.txt": b"some text" for index in range(30)})
    assert problems(many) == []
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 20)
    assert any("more than 20 members" in problem for problem in problems(many))
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 100)
    monkeypatch.setattr(unpacking, "MAX_BYTES", 200)
    assert any("unpacks to more than" in problem for problem in problems(many))
    assert any("unpacks to more than" in problem for problem in problems(zip_of({"a.zip": many})))


def test_ten_thousand_and_one_members_are_too_many(place):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for index in range(10_001):
            archive.writestr(zipfile.ZipInfo(f"{index}"), b"a")
    (place / "many.zip").write_bytes(raw.getvalue())
    code, document = inspected(place)
    assert code == 2 and "10000 members" in document["models"][0]["reason"]


# --- zips and tars that are models --------------------------------------------------------------------------


def test_archives_that_are_models_are_not_taken_apart(place, tmp_path):
    raw = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, raw)
    write_all(place, {"torch.zip": raw.getvalue(), "keras": HIDDEN["net.keras.zip"](Harm(tmp_path / "m"))})
    write_all(place, {"server": zip_of({"MAR-INF/MANIFEST.json": b"{}", "net.pt": raw.getvalue()})})
    listing = list_files([place])
    assert [path.name for path in listing.models if path.name != "server"] == ["keras", "torch.zip"]
    assert listing.archives == 0
    code, document = inspected(place)
    assert code == 1 and rules(document)["server"]


def test_a_tar_of_torch_before_0_2_is_named_and_its_pickles_are_read(place, tmp_path):
    pickles = {
        "pickle": system(Harm(tmp_path / "marker")),
        "storages": b"\x80\x02K\0.",
        "tensors": b"\x80\x02K\0.",
    }
    (place / "old.tar").write_bytes(tar_of(pickles))
    code, document = inspected(place)
    found = rules(document)
    assert code == 1 and "LD201" in found["old.tar"] and found["old.tar!pickle"] == {"LD205"}


def test_an_onnx_model_with_its_data_in_another_member_is_not_called_hostile(place):
    outside = model(tensors=(weight(kept(location="w.data")),))
    (place / "a.zip").write_bytes(
        zip_of({"net/a.onnx": outside, "net/w.data": struct.pack("<16f", *[-3e38] * 16)})
    )
    code, document = inspected(place)
    assert code == 2 and rules(document) == {"a.onnx": {"LD233"}} and document["files"]["parts"] == 1
    (place / "a.zip").write_bytes(zip_of({"net/a.onnx": model(tensors=(weight(kept(location="../w")),))}))
    assert inspected(place)[0] == 1


def test_a_hugging_face_folder_in_an_archive_is_looked_at(place):
    weights = save({"a": torch.zeros(2)})
    (place / "hf.tar").write_bytes(tar_of({"vit/model.safetensors": weights, "vit/config.json": b"{}"}))
    code, document = inspected(place)
    assert code == 0 and document["files"]["models"] == 1
    assert json.loads((place.parent / "report.json").read_text())["schema"] == "unhorse-report-3"


@pytest.mark.parametrize("end", PACKERS)
def test_a_damaged_archive_is_listed_or_refused(end, members):
    whole = PACKERS[end](members)
    for number in range(25):
        stream = io.BytesIO(_damaged(whole, random.Random(number)))
        try:
            document, blob = contents_task([stream], {})
        except (LoadRefused, LoadFailed):
            continue  # no archive any more
        assert blob == b"" and json.dumps(document)
        assert all(
            {"rule", "reason", "remedy"} <= entry.keys() or "facts" in entry for entry in document["found"]
        )
