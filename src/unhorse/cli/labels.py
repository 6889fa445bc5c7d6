"""Class names from files that users have: one name a line, or JSON as configurations write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

MAX_BYTES = 8 * 2**20


def read_class_names(path: Path) -> list[str]:
    """The names of the classes in their order: of lines (blank ones at the end are none, a byte-order mark is
    no letter), of a JSON list, or of a JSON object that numbers names or names numbers.

    ValueError, with a remedy, for anything else.
    """
    remedy = "give a text file with one class name a line, or a JSON list of names"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} is larger than any list of class names: {remedy}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {remedy}") from error
    names = _of_json(text) if text.lstrip()[:1] in ("[", "{") else None
    if names is None:
        names = [line.strip() for line in text.rstrip().splitlines()]
    if not names:
        raise ValueError(f"{path} names no class: {remedy}")
    if "" in names:
        raise ValueError(f"line {names.index('') + 1} of {path} is empty: {remedy}")
    return names


def _of_json(text: str) -> list[str] | None:
    """The names in a JSON list or object; None where the text is no JSON or numbers the classes with gaps."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, Mapping):
        for key in ("id2label", "label2id", "class_names", "names", "labels", "classes"):
            if isinstance(found.get(key), Mapping | list):
                found = found[key]
                break
    if isinstance(found, Mapping):
        pairs = [(key, value) if str(key).isdigit() else (value, key) for key, value in found.items()]
        if not all(str(number).isdigit() for number, _ in pairs):
            return None
        numbered = {int(number): name for number, name in pairs}
        if sorted(numbered) != list(range(len(found))):
            return None
        found = [numbered[number] for number in range(len(found))]
    # ImageNet's index has [synset, name] for each class
    named = [entry[-1] if isinstance(entry, list) and entry else entry for entry in found]
    return [str(name).strip() for name in named] if all(isinstance(n, str | int) for n in named) else None
