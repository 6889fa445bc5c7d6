"""The answer of a restricted process: frames that a child writes, and that a parent reads as if they lied."""

from __future__ import annotations

import io
import json
import os
import re
import select
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox.confinement import LimitExceeded, Limits, Tier

TIER, PROGRESS, DOCUMENT, BLOB, FAILURE = b"T", b"P", b"D", b"B", b"E"
MAX_FILES = 240  # of a request: the kernel hands over 253 at a time
LENGTH = struct.Struct("<Q")  # of a request, before its JSON
_HEADER = struct.Struct("<cQ")
MEMORY_WORDS = (
    *("can't allocate memory", "bad_alloc", "Cannot allocate memory", "failed to map segment"),
    "can't start new thread",
)
"""In the text of an exception: memory ran out."""
_SHORT, _ALL_PROGRESS = 4096, 2**20
_RULE = re.compile(r"LD\d{3}")


class Answer(NamedTuple):
    """What a restricted process said: its tier, its document and its blob."""

    tier: str
    document: dict[str, Any]
    blob: bytes


class Ended(Exception):
    """The answer stopped before its end; why, the process that started the child knows."""


class Late(Exception):
    """The wall clock ran out."""


def send(descriptor: int, kind: bytes, content: bytes) -> None:
    """Writes one frame."""
    write_all(descriptor, _HEADER.pack(kind, len(content)))
    write_all(descriptor, content)


def write_all(descriptor: int, content: bytes) -> None:
    """Writes all of it."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def send_json(descriptor: int, kind: bytes, value: object) -> None:
    send(descriptor, kind, json.dumps(value, allow_nan=False).encode())


def send_progress(descriptor: int, text: str) -> None:
    send(descriptor, PROGRESS, text.encode("utf-8", "replace")[:_SHORT])


def receive(
    descriptor: int, limits: Limits, deadline: float, progress: Callable[[str], None] | None
) -> Answer:
    """The answer, every size checked against `limits` before memory is given to it.

    Raises what the child raised, LimitExceeded for an answer that no task gives, Ended and Late.
    """
    reader = _Reader(descriptor, deadline)
    tier = _tier(reader.frame({TIER: 64})[1])
    told = 0
    while True:
        kind, content = reader.frame({PROGRESS: _SHORT, DOCUMENT: limits.document, FAILURE: 16 * _SHORT})
        if kind != PROGRESS:
            break
        told += len(content) + _HEADER.size
        if told > _ALL_PROGRESS:
            raise LimitExceeded("answer", "the restricted process reported progress without end")
        if progress:
            progress(content.decode("utf-8", "replace"))
    value = _parsed(content)
    if kind == FAILURE:
        raise _raised(value)
    return Answer(tier, value, reader.frame({BLOB: limits.blob})[1])


class _Reader:
    """Reads frames from a pipe until a deadline."""

    def __init__(self, descriptor: int, deadline: float) -> None:
        self.descriptor, self.deadline = descriptor, deadline
        self.ready = select.poll()
        self.ready.register(descriptor, select.POLLIN)

    def frame(self, largest: dict[bytes, int]) -> tuple[bytes, bytes]:
        kind, length = _HEADER.unpack(self.bytes(_HEADER.size))
        if kind not in largest:
            raise LimitExceeded(
                "answer", "the restricted process answered with something else than an answer"
            )
        if length > largest[kind]:
            raise LimitExceeded("answer", f"the answer is {length} bytes long, more than {largest[kind]}")
        return kind, self.bytes(length)

    def bytes(self, length: int) -> bytes:
        received = io.BytesIO()
        while received.tell() < length:
            remaining = self.deadline - time.monotonic()
            if remaining <= 0 or not self.ready.poll(1000 * remaining):
                raise Late
            chunk = os.read(self.descriptor, min(length - received.tell(), 2**20))
            if not chunk:
                raise Ended
            received.write(chunk)
        return received.getvalue()


def _tier(content: bytes) -> str:
    text = content.decode("ascii", "replace")
    if text not in set(Tier):
        raise LimitExceeded("answer", "the restricted process named no tier")
    return text


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise LimitExceeded("answer", "the answer is not valid JSON") from error
    if not isinstance(value, dict):
        raise LimitExceeded("answer", "the answer is not a JSON object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _raised(value: dict[str, Any]) -> LoadRefused | LoadFailed:
    """The exception that a failure frame describes."""
    kind, said = next(iter(value.items()), ("", None))
    fields = said if isinstance(said, dict) else {}
    reason, remedy = str(fields.get("reason", ""))[:_SHORT], str(fields.get("remedy", ""))[:_SHORT]
    rule = str(fields.get("rule", ""))
    if kind == "refused" and _RULE.fullmatch(rule):
        return LoadRefused(rule, reason, remedy)
    if kind == "failed":
        return LoadFailed(reason, remedy)
    if kind == "memory":
        return out_of_memory()
    return LimitExceeded("answer", "the restricted process failed without saying how")


def out_of_memory() -> LimitExceeded:
    return LimitExceeded("memory", "opening the file took more memory than it may")
