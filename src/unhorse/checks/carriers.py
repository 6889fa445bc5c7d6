"""Files that unhorse does not open and that can carry pickles: bare ones, NumPy's, joblib's, compressed ones.

Each is refused: by LD205 where a pickle in it runs code, by LD240 where it calls what nobody knows, and
otherwise by the rule of its format.
"""

from __future__ import annotations

import ast
import bz2
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from unhorse.checks.foreign_formats import foreign_format
from unhorse.checks.kinds import EXPORT_REMEDY, Format, refused_kind
from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_start import is_pickle
from unhorse.checks.pickles import check_whole_pickle
from unhorse.rules import LoadFailed, LoadRefused

MAX_BYTES = 512 * 2**20
MAX_MEMBERS = 10_000
_PACKERS: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(31),
    b"\x78": zlib.decompressobj,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    b"\x5d\0\0": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
}
MAX_CONFIGURATION = 32 * 2**20
_KERAS_CODE = re.compile(rb'"(Lambda|__lambda__|TFOpLambda|SlicingOpLambda)"')
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError, OSError)
_UNPACK_ERRORS = (zlib.error, OSError, EOFError, lzma.LZMAError)


def check_carrier(stream: BinaryIO, kind: Format, name: str) -> None:
    """Refuses a file of a kind that is looked into; LoadFailed where it is damaged."""
    if kind is Format.TORCH_LEGACY_PICKLE:
        data = _read(stream, name)
        _check_networks(data, name)
        check_whole_pickle(data, name, str(kind))
    elif kind is Format.NUMPY:
        _check_array(stream, name)
    elif kind in (Format.NUMPY_ZIP, Format.PICKLE_ZIP):
        _check_members(stream, name)
    elif kind is Format.COMPRESSED:
        _check_compressed(stream, name)
    raise refused_kind(kind, name)


def _read(stream: BinaryIO, name: str) -> bytes:
    stream.seek(0)
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise LoadRefused("LD208", f"{name} is a pickle of more than 512 MiB", EXPORT_REMEDY)
    return data


def _check_networks(data: bytes, name: str) -> None:
    """Refuses a pickled Keras model for code in the archive that it is: Keras opens it without safe mode."""
    if b"keras" not in data:
        return
    for text in follow(data).texts:
        if text.startswith(b"PK"):
            try:
                with zipfile.ZipFile(io.BytesIO(text)) as archive, archive.open("config.json") as opened:
                    config = opened.read(MAX_CONFIGURATION)
            except (*_ZIP_ERRORS, KeyError):
                continue
            if found := _KERAS_CODE.search(config):
                what = f"the Keras model pickled in {name} has a {found[1].decode()}, which is code"
                raise LoadRefused("LD218", what, "ask the publisher for a model of standard layers")


def _check_array(stream: BinaryIO, name: str) -> None:
    """Refuses a NumPy array of objects for the pickle that it is."""
    stream.seek(6)
    major = stream.read(2)[:1]
    length = int.from_bytes(stream.read(2 if major == b"\1" else 4), "little")
    start = stream.tell() + length
    text = stream.read(min(length, 2**20)).decode("latin-1")
    try:
        described = ast.literal_eval(text.strip()).get("descr")
    except (ValueError, SyntaxError, AttributeError, RecursionError, MemoryError):
        described, start = "O", 8  # a reader that takes it all the same finds its pickle in what follows
    if "O" in str(described):
        data = _read(stream, name)
        check_whole_pickle(data[start:], name, "a NumPy array of Python objects, a pickle")


def _check_members(stream: BinaryIO, name: str) -> None:
    """Refuses a zip archive for a pickle or an array of objects in it."""
    stream.seek(0)
    try:
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist()[:MAX_MEMBERS]:
                with archive.open(member) as opened:
                    content = io.BytesIO(opened.read(MAX_BYTES))
                _only_if_grave(content, f"{name}, {member.filename[:100]!r}")
    except _ZIP_ERRORS as error:
        raise LoadFailed(f"{name} cannot be unpacked ({str(error)[:100]})") from error


def _check_compressed(stream: BinaryIO, name: str) -> None:
    """Refuses a compressed file for the pickle in it, as joblib writes one."""
    stream.seek(0)
    head = stream.read(8)
    for start, packer in _PACKERS.items():
        if head.startswith(start):
            stream.seek(0)
            try:
                content = packer().decompress(stream.read(), MAX_BYTES)
            except _UNPACK_ERRORS as error:
                raise LoadFailed(f"{name} cannot be unpacked ({str(error)[:100]})") from error
            inner = io.BytesIO(content)
            found = foreign_format(inner, content[:512])
            if found is not Format.UNKNOWN:
                raise refused_kind(found, f"{name}, unpacked,")
            _only_if_grave(inner, name, all_pickles=True)


def _only_if_grave(content: io.BytesIO, name: str, *, all_pickles: bool = False) -> None:
    """Raises for a pickle among the bytes that runs code, or with `all_pickles` for any."""
    data = content.getvalue()
    try:
        if data.startswith(b"\x93NUMPY"):
            _check_array(content, name)
        elif is_pickle(content, data[:512]):
            check_whole_pickle(data, name, "a compressed pickle (joblib)")
    except LoadRefused as refusal:
        if refusal.rule != "LD201" or all_pickles:
            raise
    except LoadFailed:
        if all_pickles:
            raise
