"""The outline of an ONNX file: whether it is one, and which data files it names; read by our own parser."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

from unhorse.checks.protobuf import MessageReader, Span

MAX_NAMES = 4_096
_MODEL_FIELDS = {*range(1, 9), 14, 20, 25, 26}
_GRAPH_FIELDS = {1, 2, 5, *range(10, 17)}
_GRAPH, _BYTES = 7, 2
_VARINT, _MAX_FIELDS = 10, 10_000
# where messages lie that can have tensors, by message: field and what is in it
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "place"},
}


class _Malformed(Exception):
    """The bytes are no message of protocol buffers."""


def is_onnx(stream: BinaryIO) -> bool:
    """Whether a stream has the outline of an ONNX model: only fields of one up to its graph, which begins
    with a field of a graph, and may be cut off.

    Other messages of protocol buffers (CoreML, TensorFlow) have other fields, or another thing in that place.
    """
    size, at = stream.seek(0, io.SEEK_END), 0
    for _ in range(_MAX_FIELDS):
        stream.seek(at)
        head = stream.read(2 * _VARINT)
        tag, length = _varint(head, 0)
        number, wire = tag >> 3, tag & 7
        value, taken = _varint(head, length)
        if number == _GRAPH:
            return _is_graph(stream, at + length + taken) if wire == _BYTES and taken else True
        if number not in _MODEL_FIELDS or not taken or wire not in (0, _BYTES):
            return False
        at += length + taken + (value if wire == _BYTES else 0)
        if at >= size:
            return False
    return False


def _is_graph(stream: BinaryIO, at: int) -> bool:
    stream.seek(at)
    head = stream.read(1)
    return not head or head[0] >> 3 in _GRAPH_FIELDS


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and how many bytes it takes, 0 where it does not end."""
    value = 0
    for index, byte in enumerate(data[at : at + _VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, index + 1
    return 0, 0


def external_names(stream: BinaryIO) -> tuple[str, ...]:
    """The locations of external data that an ONNX file names, sorted, at most 4,096.

    What is no plain name of a file (`is_plain`) must not be opened. A damaged file gives what is read so far.
    """
    names: set[str] = set()
    try:
        for name in _places(_reader(stream), stream):
            names.add(name)
            if len(names) >= MAX_NAMES:
                break
    except _Malformed:
        pass
    stream.seek(0)
    return tuple(sorted(names))


def is_plain(name: str) -> bool:
    """Whether a location is the bare name of a file, which cannot lead out of the folder of the model."""
    return name not in ("", ".", "..") and len(name) < 256 and not any(mark in name for mark in "/\\:\0")


def _reader(stream: BinaryIO) -> MessageReader:
    return MessageReader(stream, {}, _Malformed, _Malformed)


def _places(reader: MessageReader, stream: BinaryIO) -> Iterator[str]:
    waiting: list[tuple[str, Span, int]] = [("model", Span(0, stream.seek(0, io.SEEK_END)), 0)]
    while waiting:
        kind, span, depth = waiting.pop()
        for number, _, value in reader.walk(span):
            inside = _INSIDE[kind].get(number)
            if inside is None or not isinstance(value, Span):
                continue
            if inside != "place":
                if depth < 16:
                    waiting.append((inside, value, depth + 1))
            elif name := _location(reader, value):
                yield name


def _location(reader: MessageReader, place: Span) -> str:
    """The value of a pair whose key is "location"."""
    texts = {
        number: reader.bytes_of(value) for number, _, value in reader.walk(place) if isinstance(value, Span)
    }
    if texts.get(1) != b"location":
        return ""
    return texts.get(2, b"").decode("utf-8", "replace").removeprefix("./")
