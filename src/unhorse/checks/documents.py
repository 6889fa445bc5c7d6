"""JSON from a file: bounded in size and depth, without what two parsers read differently."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from unhorse.checks.weight_files import without_duplicates

MAX_DOCUMENT_BYTES = 32 * 2**20
MAX_DEPTH = 100
MAX_VALUES = 3_000_000

Refuse = Callable[[str], Exception]


def parse_document(
    raw: bytes, what: str, refuse: Refuse, *, max_depth: int = MAX_DEPTH, most: int = MAX_VALUES
) -> Any:
    """The value of a JSON text; raises what `refuse` makes of a reason, which names the text by `what`."""
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise refuse(f"{what} has {len(raw)} bytes, more than 32 MiB")
    try:
        found = json.loads(
            raw.decode("utf-8"), object_pairs_hook=without_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise refuse(f"{what} is not JSON that every parser reads alike ({_short(error)})") from error
    for count, (depth, _, value) in enumerate(walk(found)):
        if depth > max_depth or count > MAX_VALUES:
            raise refuse(f"{what} is nested deeper than {max_depth} or has more than {MAX_VALUES} values")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise refuse(f"{what} has text with lone surrogates")
    return found


def walk(document: object) -> Iterator[tuple[int, str, object]]:
    """Every value below a document with its depth and the key that leads to it; keys come as values, too."""
    open_values: list[tuple[int, str, object]] = [(0, "", document)]
    while open_values:
        depth, key, value = open_values.pop()
        yield depth, key, value
        if isinstance(value, dict):
            for name, inner in value.items():
                yield depth, key, name
                open_values.append((depth + 1, name, inner))
        elif isinstance(value, list):
            open_values.extend((depth + 1, key, inner) for inner in value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
