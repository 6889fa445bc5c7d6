"""Recognises the format of a model file by its first bytes and its members, never by its name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from unhorse.checks.foreign_formats import foreign_format
from unhorse.checks.kinds import EXPORT_REMEDY, OPENED, REMEDIES, Format, refusal
from unhorse.checks.old_torch_files import MAGIC as TORCH_OLD
from unhorse.checks.onnx_outline import is_onnx
from unhorse.checks.pickle_start import is_pickle
from unhorse.checks.zip_directory import archive_at_end, read_at, read_directory, stray
from unhorse.rules import LoadFailed

__all__ = ["EXPORT_REMEDY", "OPENED", "REMEDIES", "Format", "refusal", "sniff"]


_HDF5 = b"\x89HDF\r\n\x1a\n"
_MAGIC = {
    _HDF5: Format.HDF5,
    b"\x93NUMPY": Format.NUMPY,
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!"), Format.COMPRESSED),
    **dict.fromkeys((b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\x5d\0\0"), Format.COMPRESSED),
    **dict.fromkeys((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), Format.COMPRESSED),
}


def sniff(source: Path | BinaryIO) -> Format:
    """The format of a file, given by path or as an open stream (which is left at its start).

    Refuses with LD213 a file that another reader would take for a second format.
    """
    if isinstance(source, Path):
        with source.open("rb") as stream:
            return sniff(stream)
    kind = _kind(source, read_at(source, 0, 512))
    source.seek(0)
    return kind


def _kind(stream: BinaryIO, head: bytes) -> Format:
    size = stream.seek(0, io.SEEK_END)
    if head.startswith(b"PK\x03\x04"):
        kinds = {_archive_kind(stream)}
    else:
        kinds = {_plain_kind(head, stream)} - {Format.UNKNOWN}
        if archive_at_end(stream):
            raise stray("the file ends in a zip archive and begins as something else")
    if head[257:262] == b"ustar":
        kinds.add(Format.TAR)
    if kinds != {Format.MATLAB} and _has_user_block(stream, size):  # MATLAB 7.3 writes HDF5 behind its text
        kinds.add(Format.HDF5)
        kinds.add(Format.UNKNOWN)
    if len(kinds) > 1:
        raise stray(f"the file is two things at once: {' and '.join(sorted(kinds))}")
    return kinds.pop() if kinds else Format.UNKNOWN


def _plain_kind(head: bytes, stream: BinaryIO) -> Format:
    # first, because the length of a header may begin with any other magic; a zero byte is no pickle opcode
    if head[8:9] == b"{" and head[4:8] == bytes(4) and int.from_bytes(head[:4], "little"):
        return Format.SAFETENSORS
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if TORCH_OLD.match(head):
        return Format.TORCH_OLD
    if head[:1] == b"\x08" and len(head) > 2:
        if head[1] == 1 and head[2] == 0x12 and foreign_format(stream, head) is not Format.COREML:
            return Format.SAVED_MODEL
        if head[1] <= 30 and is_onnx(stream):
            return Format.ONNX
    foreign = foreign_format(stream, head)
    if foreign is Format.UNKNOWN and is_pickle(stream, head):
        return Format.TORCH_LEGACY_PICKLE
    return foreign


def _has_user_block(stream: BinaryIO, size: int) -> bool:
    """Whether an HDF5 reader, which tries 512, 1024, 2048 ..., would find its file further on."""
    place = 512
    while place < size:
        if read_at(stream, place, 8) == _HDF5:
            return True
        place *= 2
    return False


def _archive_kind(stream: BinaryIO) -> Format:
    try:
        names = [member.name for member in read_directory(stream).members]
    except LoadFailed:
        return Format.BROKEN_ZIP
    signs = model_signs(names)
    if len(signs) > 1:
        raise stray(f"the archive has the members of two formats: {' and '.join(sorted(signs))}")
    return signs.pop() if signs else Format.UNKNOWN


def model_signs(names: Sequence[str]) -> set[Format]:
    """Which formats the names of an archive's members speak for; a richer one includes a plainer one."""
    members, found = {name.partition("/")[2] for name in names} | set(names), set()
    if {"archive_format", "serialized_exported_program.json"} & members:
        found.add(Format.PT2)
    if ".data/extern_modules" in members or ".data/python_version" in members:
        found.add(Format.TORCH_PACKAGE)
    elif "constants.pkl" in members or any(name.startswith("code/") for name in members):
        found.add(Format.TORCHSCRIPT)
    elif any("/" in name and name.partition("/")[2] == "data.pkl" for name in names):
        found.add(Format.TORCH_ZIP)
    elif "data.pkl" in names:
        found.add(Format.PICKLE_ZIP)
    if "MAR-INF/MANIFEST.json" in members:
        found.add(Format.TORCHSERVE)
    if "config.json" in names and "metadata.json" in names:
        found.add(Format.KERAS_ZIP)
    if "saved_model.pb" in members:
        found.add(Format.SAVED_MODEL)
    if not found and names and all(name.endswith(".npy") for name in names):
        found.add(Format.NUMPY_ZIP)
    return found
