"""Recognises formats that unhorse does not open by their bytes, so that each is called by its name.

The marks are those of the formats' own documentation: flatbuffers carry an identifier at byte 4, tables of
LevelDB a number at their end, messages of protocol buffers the fields of their schema.
"""

from __future__ import annotations

import io
import re
from typing import BinaryIO

from unhorse.checks.kinds import Format
from unhorse.checks.zip_directory import read_at

_STARTS = {
    b"GGUF": Format.GGUF,
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg", b"algg"), Format.GGML),
    b"RKNN": Format.RKNN,
    **dict.fromkeys((b"ptrt", b"ftrt"), Format.TENSORRT),
    **dict.fromkeys((b"7767517\n", b"7767517\r", b"\xdd\x85\x76\0"), Format.NCNN),
    b"\x12\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0": Format.MXNET,
    **{
        bytes([0, 0, 0, 0, minor, 0, 0, 0, revision, 0, 0, 0]): Format.DARKNET
        for minor in (1, 2)
        for revision in (0, 5)
    },
    **dict.fromkeys((b"MATLAB 5.0 MAT-file", b"MATLAB 7.3 MAT-file"), Format.MATLAB),
    **dict.fromkeys((b"RDX2\n", b"RDX3\n", b"RDA2\n", b"RDA3\n"), Format.R_DATA),
    **dict.fromkeys((b"X\n\0\0\0\2", b"X\n\0\0\0\3", b"A\n2\n", b"A\n3\n"), Format.R_DATA),
    b"version https://git-lfs.github.com/spec/": Format.LFS_POINTER,
}
_IDENTIFIERS = {b"TFL3": Format.TFLITE, b"ORTM": Format.ORT}
_LEVELDB = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
_CHECKPOINT = re.compile(rb'\s*model_checkpoint_path:\s*"')
_TORCH7 = re.compile(rb"\x04\0\0\0.{4}\x03\0\0\0V 1.{4}(torch\.|nn\.|cudnn\.|nngraph\.)", re.DOTALL)
_MSGPACK = re.compile(rb"(?:[\x81-\x8f]|\xde..)(?:[\xa1-\xbf]|\xd9.)([A-Za-z_][\w/.-]*)", re.DOTALL)
_PAGE = re.compile(rb"\s*(<!--.{0,200}?-->\s*)?<(!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)
_ERROR = re.compile(rb'\s*(<\?xml[^>]*>\s*<Error>|\{\s*"(error|message|detail|errors)"\s*:)')
_OPENVINO = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<net\s[^>]*\bversion=")
_MXNET_SYMBOL = re.compile(rb'\s*\{\s*"nodes"\s*:\s*\[\s*\{\s*"op"\s*:')
MAX_FIELDS = 5_000


def foreign_format(stream: BinaryIO, head: bytes) -> Format:
    """The format of a file that unhorse does not open, by the first bytes and, for some, the rest."""
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head[4:8] in _IDENTIFIERS:
        return _IDENTIFIERS[head[4:8]]
    for pattern, kind in (
        (_PAGE, Format.WEB_PAGE),
        (_ERROR, Format.ERROR_TEXT),
        (_OPENVINO, Format.OPENVINO),
        (_MXNET_SYMBOL, Format.MXNET),
        (_CHECKPOINT, Format.TF_CHECKPOINT),
        (_TORCH7, Format.TORCH7),
    ):
        if pattern.match(head):
            return kind
    if (match := _MSGPACK.match(head)) and len(match[1]) >= 2:
        return Format.MSGPACK
    size = stream.seek(0, io.SEEK_END)
    if size >= 48 and read_at(stream, size - 8, 8) == _LEVELDB:
        return Format.TF_CHECKPOINT
    return _message(stream, head, size)


def _message(stream: BinaryIO, head: bytes, size: int) -> Format:
    """The schema that the fields of a message of protocol buffers are of; UNKNOWN for other bytes."""
    if head[:1] not in (b"\x08", b"\x0a", b"\x12", b"\xa2"):
        return Format.UNKNOWN
    fields = _fields(stream, size)
    numbers = set(fields)
    if not fields:
        return Format.UNKNOWN
    if fields.get(1) == 0 and any(200 <= number < 4000 for number in numbers) and 7 not in numbers:
        return Format.COREML
    first = _inside(stream)
    named = bool(re.fullmatch(rb"[\x20-\x7e]+", first[:40]))
    if 100 in numbers or ({1, 2} <= numbers <= {1, 2, 3, 4, 5, 6, 7, 8} and named):
        return (
            Format.CAFFE
            if numbers <= {*range(1, 9), 100} and set(fields.values()) <= {0, 2}
            else Format.UNKNOWN
        )
    if first.startswith(b"\x08\0\x10") and numbers <= {1, 2, 3, 4, 5}:
        return Format.PADDLE  # block 0, whose parent is block -1
    if re.match(rb"\x0a[\x01-\xff][\x01]?[\w./:^-]+\x12", first, re.DOTALL) and numbers <= {1, 2, 3, 4, 5}:
        return Format.TF_GRAPH  # a node: its name, then its operation
    return Format.UNKNOWN


def _fields(stream: BinaryIO, size: int) -> dict[int, int]:
    """The numbers and wire types of the outermost fields; none unless they fill the file."""
    found: dict[int, int] = {}
    at = 0
    for _ in range(MAX_FIELDS):
        if at >= size:
            return found if at == size else {}
        head = read_at(stream, at, 20)
        tag, taken = _varint(head, 0)
        value, more = _varint(head, taken)
        number, wire = tag >> 3, tag & 7
        if not taken or not number or wire not in (0, 1, 2, 5) or (wire in (0, 2) and not more):
            return {}
        found[number] = wire
        at += taken + {0: more, 1: 8, 2: more + value, 5: 4}[wire]
    return found


def _inside(stream: BinaryIO) -> bytes:
    """What the first field holds, at most 200 bytes of it."""
    head = read_at(stream, 0, 11)
    length, taken = _varint(head, 1)
    return read_at(stream, 1 + taken, min(length, 200))


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and how many bytes it takes, 0 where it does not end."""
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, index + 1
    return 0, 0
