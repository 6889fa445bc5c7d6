"""Class names and normalisation that ONNX exporters put into the metadata of a file as text."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unhorse.checks.expectations import Facts

_NAMES = ("class_names", "names", "classes", "labels", "id2label")


def with_metadata(facts: Facts) -> Facts:
    """The facts with class names and normalisation, where the texts in `extra` (metadata_props) parse."""
    texts = facts.extra
    names = next((found for key in _NAMES if (found := names_in(texts.get(key, "")))), None)
    mean, std = _numbers_in(texts.get("mean", "")), _numbers_in(texts.get("std", ""))
    return replace(facts, class_names=names, mean=mean, std=std)


def names_in(text: str) -> tuple[str, ...] | None:
    """Class names from JSON, a Python literal or lines: a list, or a mapping from whole numbers to names."""
    found = _value_of(text)
    if isinstance(found, Mapping):
        try:
            found = [found[key] for key in sorted(found, key=int)]
        except (TypeError, ValueError):
            return None
    if isinstance(found, list | tuple) and len(found) > 1 and all(isinstance(name, str) for name in found):
        return tuple(found)
    return None


def _numbers_in(text: str) -> tuple[float, ...] | None:
    found = _value_of(text)
    if isinstance(found, list | tuple) and found and all(type(value) in (int, float) for value in found):
        return tuple(float(value) for value in found)
    return None


def _value_of(text: str) -> Any:
    if not text:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    parts = [part.strip() for part in (text.splitlines() if "\n" in text else text.split(","))]
    return [part for part in parts if part]
