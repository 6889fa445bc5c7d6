"""The opcodes of a pickle with their arguments, read as an unpickler reads them."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

MAX_OPCODES = 1_000_000
MAX_STACK = 10_000
MAX_MEMO = 300_000
MAX_NESTED = 8

READ_ERRORS = (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, AttributeError, TypeError)


def operations(stream: io.BytesIO) -> Iterator[tuple[Any, Any, Any]]:
    """The opcodes with their arguments and places; who takes them may skip bytes of the stream in between.

    Raises EOFError where the bytes end before a STOP, ValueError where they are no opcode.
    """
    while True:
        place = stream.tell()
        code = stream.read(1)
        if not code:
            raise EOFError("it ends before its STOP")
        opcode = pickletools.code2op.get(code.decode("latin-1"))  # type: ignore[attr-defined]
        if opcode is None:
            raise ValueError(f"at {place} stands {code!r}, which is no opcode")
        reader = _READERS.get(opcode.name) or (opcode.arg and opcode.arg.reader)
        yield opcode, reader(stream) if reader else None, place


def _line(stream: io.BytesIO) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError("it ends before its STOP")
    return line[:-1].decode("utf-8", "backslashreplace")


def _whole(stream: io.BytesIO) -> int:
    """A number in text as an unpickler takes it, which takes more than pickletools does."""
    return int(_line(stream).removesuffix("L") or "0", 0)


def _index(stream: io.BytesIO) -> int:
    return int(_line(stream))


def _pair(stream: io.BytesIO) -> str:
    return f"{_line(stream)}\n{_line(stream)}"


def _decimal(stream: io.BytesIO) -> object:
    text = _line(stream)
    return text == "01" if text in ("00", "01") else int(text, 0)


_READERS: dict[str, Callable[[io.BytesIO], object]] = {
    **{"INT": _decimal, "LONG": _whole, "PUT": _index, "GET": _index, "GLOBAL": _pair, "INST": _pair},
}


def ran_out(problem: str) -> bool:
    """Whether pickletools says that the bytes came to an end inside an argument."""
    return "but only" in problem or "not enough data" in problem or "no newline found" in problem
