"""What unhorse does not open is called by its name and is low; what is incomplete is damaged, not hostile."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from foreign_files import damaged, foreign, rootless, unmarked
from unhorse.checks.inspection import check_task
from unhorse.checks.kinds import LOOKED_INTO, OPENED, REMEDIES, Format
from unhorse.checks.sniff import sniff
from unhorse.cli import run
from unhorse.rulebook import RULES
from unhorse.rules import LoadFailed, LoadRefused, Severity

FOREIGN = foreign()


def refusal_of(data: bytes, name: str) -> LoadRefused | LoadFailed:
    with pytest.raises((LoadRefused, LoadFailed)) as refusal:
        check_task([io.BytesIO(data)], {"name": name})
    return refusal.value


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_format_is_named_with_a_remedy_of_its_own(name: str) -> None:
    kind, content = FOREIGN[name]
    assert sniff(io.BytesIO(content)) is kind
    refusal = refusal_of(content, "a-file-without-a-telling-name")
    assert refusal.rule == "LD235", refusal.reason
    if kind is not Format.HDF5:
        assert str(kind) in refusal.reason and refusal.remedy == REMEDIES[kind]


@pytest.mark.parametrize("name", unmarked())
def test_a_format_without_a_mark_is_guessed_by_its_name_and_said_to_be_guessed(name: str) -> None:
    refusal = refusal_of(unmarked()[name], name)
    assert refusal.rule == "LD235" and "by its name it may be" in refusal.reason
    assert refusal_of(unmarked()[name], "model.bin").rule == "LD202"


@pytest.mark.parametrize("name", damaged())
def test_an_incomplete_file_is_damaged_whatever_its_format(name: str) -> None:
    assert refusal_of(damaged()[name], name).rule == "LD230"


def test_a_page_and_a_pointer_are_called_what_they_are() -> None:
    assert "HTML page" in refusal_of(damaged()["page.pt"], "page.pt").reason
    pointer = refusal_of(damaged()["pointer.safetensors"], "m")
    assert "Git LFS pointer" in pointer.reason and "git lfs pull" in pointer.remedy


def test_a_zip_with_its_pickle_in_no_folder_is_no_hostile_archive() -> None:
    assert refusal_of(rootless(), "m.zip").rule == "LD201"


def test_every_format_that_is_not_opened_has_a_remedy_and_is_low() -> None:
    for kind in set(Format) - set(OPENED) - {Format.BROKEN_ZIP}:
        assert REMEDIES[kind], kind
    assert not set(OPENED) & set(LOOKED_INTO)
    assert {RULES[rule].severity for rule in ("LD201", "LD202", "LD230", "LD235")} == {Severity.LOW}


def test_texts_and_pictures_are_no_pickles() -> None:
    for content in (
        *(b"Copyright 2020 by nobody at all." * 20, b"Import this.\nNow.", b"(The end.)", b"I have 3.\n."),
        *(
            b"class Net:\n    def f(self): return 1\n",
            b"Name,Value\n1,2\n",
            b"UTF-8 text. Really.",
            b"}\n.\n",
        ),
        *(b"N. B.: nothing.", b"Verse one\nVerse two.\n", b"\x89PNG\r\n\x1a\n" + bytes(40)),
        *(b"GIF89a" + bytes(30), b"[1, 2, 3]", b'{"a": 1}', b"code\nutf\nmore text here.\n"),
    ):
        assert sniff(io.BytesIO(content)) is Format.UNKNOWN, content


def test_a_folder_of_foreign_and_damaged_files_is_no_alarm_and_not_a_clean_bill(tmp_path: Path) -> None:
    files = {name: content for name, (_, content) in FOREIGN.items()} | damaged()
    for name, content in files.items():
        (tmp_path / f"{name}.bin").write_bytes(content)
    assert run(["inspect", str(tmp_path), "--json", str(tmp_path / "report.json")]) == 2
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert len(models) == len(files)
    rules = {finding["rule"] for model in models for finding in model["findings"]}
    assert rules == {"LD230", "LD235"}
