"""The files of class names that users have."""

from __future__ import annotations

import json

import pytest

from unhorse.cli.labels import read_class_names

NAMES = ["cat", "dog", "great white shark"]


@pytest.mark.parametrize(
    "content",
    [
        "cat\ndog\ngreat white shark",
        "cat\ndog\ngreat white shark\n\n  \n",
        "\ufeffcat\r\ndog\r\ngreat white shark\r\n",
        json.dumps(NAMES),
        json.dumps({"0": "cat", "2": "great white shark", "1": "dog"}),
        json.dumps({"dog": 1, "cat": 0, "great white shark": 2}),
        json.dumps({"id2label": {"0": "cat", "1": "dog", "2": "great white shark"}, "model_type": "vit"}),
        json.dumps({"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "great white shark"]}),
        json.dumps({"names": NAMES}),
    ],
    ids=[
        "lines",
        "blank end",
        "mark and returns",
        "list",
        "numbered",
        "numbers",
        "config",
        "synsets",
        "names",
    ],
)
def test_names_are_read_however_they_are_written(content, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(content.encode())
    assert read_class_names(path) == NAMES


@pytest.mark.parametrize("content", ["[cat]\n[dog]\n[great white shark]\n", "{a\nb\nc"])
def test_text_that_only_begins_like_json_is_lines(content, tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text(content, encoding="utf-8")
    assert read_class_names(path) == content.split("\n")[:3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n\n", "names no class"),
        (b"cat\n\ndog\n", "line 2"),
        (b"\xff\xfe\x00", "UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_list_of_names_is_refused_with_a_remedy(content, words, tmp_path):
    path = tmp_path / "labels.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        read_class_names(path)
    assert "one class name a line" in str(refused.value)


def test_an_object_that_leaves_a_class_out_is_no_list(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"0": "cat", "2": "dog"}', encoding="utf-8")
    assert read_class_names(path) == ['{"0": "cat", "2": "dog"}']
