"""Protocol-buffer messages read field by field from a stream; long byte strings are measured, not read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

MAX_FIELDS = 1_000_000
MAX_TEXT = 16 * 2**20
_CHUNK = 1 << 16


class Span(NamedTuple):
    """Where a byte string lies in the stream."""

    start: int
    length: int


class Entry(NamedTuple):
    """One field of a message: its `name`, and its `kind`: int, float, text, count-4, count-8, count-varint,
    span, or the name of a message. A repeated field makes a list, or adds up a count.
    """

    name: str
    kind: str
    repeated: bool = False


Schema = Mapping[str, Mapping[int, Entry]]
Refuse = Callable[[str], Exception]


class MessageReader:
    """Reads messages of a schema into dictionaries; `refuse` makes the error for what the schema excludes."""

    def __init__(self, stream: BinaryIO, schema: Schema, refuse: Refuse, broken: Refuse) -> None:
        self._stream, self._schema, self._refuse, self._broken = stream, schema, refuse, broken
        self._size = stream.seek(0, io.SEEK_END)
        self._base, self._buffer = 0, b""
        self._fields = 0

    def read(self, kind: str) -> dict[str, Any]:
        """The message that fills the stream."""
        return self._message(kind, 0, self._size, 0)

    def walk(self, span: Span | None = None) -> Iterator[tuple[int, int, int | Span]]:
        """(number, wire type, value) of each field in a place, or in the whole stream, by no schema."""
        start, length = span or (0, self._size)
        return self._walk(start, start + length)

    def bytes_of(self, span: Span) -> bytes:
        """The bytes of a place, which must not be longer than any text."""
        return self._bytes(span)

    def _message(self, kind: str, start: int, end: int, depth: int) -> dict[str, Any]:
        if depth > 16:
            raise self._refuse("messages are nested too deep")
        found: dict[str, Any] = {}
        entries = self._schema[kind]
        for number, wire, value in self._walk(start, end):
            entry = entries.get(number)
            if entry is None:
                raise self._refuse(f"a {kind} has field {number}, which no image classifier needs")
            if not entry.repeated and entry.name in found:
                raise self._refuse(f"a {kind} has two of {entry.name!r}, and parsers differ in which counts")
            content = self._content(entry, wire, value, depth)
            if not entry.repeated:
                found[entry.name] = content
            elif entry.kind.startswith("count"):
                found[entry.name] = found.get(entry.name, 0) + content
            else:
                found.setdefault(entry.name, []).extend(content if isinstance(content, list) else [content])
        return found

    def _content(self, entry: Entry, wire: int, value: int | Span, depth: int) -> Any:
        if isinstance(value, Span):
            return self._string(entry, value, depth)
        expected = {"int": (0,), "count-varint": (0,), "float": (5,), "count-4": (5,), "count-8": (1,)}
        if wire not in expected.get(entry.kind, ()):
            raise self._refuse(f"field {entry.name!r} is of another type than it should be")
        if entry.kind.startswith("count"):
            return 1
        return value - 2**64 if entry.kind == "int" and value >= 2**63 else value

    def _string(self, entry: Entry, span: Span, depth: int) -> Any:
        if entry.kind == "span":
            return span
        if entry.kind == "text":
            return self._text(span)
        if entry.kind in self._schema:
            return self._message(entry.kind, span.start, span.start + span.length, depth + 1)
        if not entry.repeated:
            raise self._refuse(f"field {entry.name!r} is of another type than it should be")
        if entry.kind in ("count-4", "count-8", "float"):
            width = 8 if entry.kind == "count-8" else 4
            if span.length % width:
                raise self._broken(f"field {entry.name!r} is cut off")
            return [] if entry.kind == "float" else span.length // width
        packed = self._bytes(span)
        ends = sum(byte < 0x80 for byte in packed)
        if entry.kind == "count-varint":
            return ends
        return list(self._packed(packed))

    def _packed(self, packed: bytes) -> Iterator[int]:
        value, shift = 0, 0
        for byte in packed:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                value &= 2**64 - 1
                yield value - 2**64 if value >= 2**63 else value
                value, shift = 0, 0

    def _text(self, span: Span) -> str:
        try:
            return self._bytes(span).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._refuse("it has text that is not UTF-8") from error

    def _bytes(self, span: Span) -> bytes:
        if span.length > MAX_TEXT:
            raise self._refuse(f"it has a text or a list of {span.length} bytes")
        self._stream.seek(span.start)
        return self._stream.read(span.length)

    def _walk(self, start: int, end: int) -> Iterator[tuple[int, int, int | Span]]:
        """(number, wire type, value) of each field; the value of a byte string is where it lies."""
        at = start
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise self._refuse(f"it has more than {MAX_FIELDS} fields")
            tag, at = self._varint(at, end)
            wire, value = tag & 7, 0
            if wire == 0:
                value, at = self._varint(at, end)
                yield tag >> 3, wire, value
            elif wire == 2:
                length, at = self._varint(at, end)
                yield tag >> 3, wire, Span(at, self._inside(at, length, end))
                at += length
            elif wire in (1, 5):
                width = 8 if wire == 1 else 4
                self._inside(at, width, end)
                yield tag >> 3, wire, int.from_bytes(self._peek(at)[:width], "little")
                at += width
            else:
                raise self._refuse("it has groups, which protocol buffers gave up")

    def _inside(self, at: int, length: int, end: int) -> int:
        if at + length > end:
            raise self._broken("a message ends beyond its end: it is truncated")
        return length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value, head = 0, self._peek(at)
        for index in range(min(10, end - at, len(head))):
            value |= (head[index] & 0x7F) << (7 * index)
            if head[index] < 0x80:
                return value & (2**64 - 1), at + index + 1
        raise self._broken("a number does not end: it is truncated")

    def _peek(self, at: int) -> bytes:
        """At least the 10 bytes from a place, fewer only at the end of the stream."""
        if not self._base <= at <= self._base + len(self._buffer) - 10:
            self._stream.seek(at)
            self._base, self._buffer = at, self._stream.read(_CHUNK)
        return self._buffer[at - self._base : at - self._base + 10]
