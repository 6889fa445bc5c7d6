"""Recognises the format of a model file by its first bytes and its members, never by its name."""

from __future__ import annotations

import zipfile
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO


class Format(StrEnum):
    """What a model file can be."""

    SAFETENSORS = "safetensors"
    TORCH_ZIP = "PyTorch state dict"
    TORCH_LEGACY_PICKLE = "pickle (PyTorch before 1.6, or a whole pickled model)"
    TORCHSCRIPT = "TorchScript"
    PT2 = "torch.export archive"
    ONNX = "ONNX"
    KERAS_ZIP = "Keras"
    HDF5 = "HDF5 (Keras before 3)"
    BROKEN_ZIP = "zip archive without a readable directory"
    UNKNOWN = "unknown"


_MAGIC = {
    b"\x89HDF\r\n\x1a\n": Format.HDF5,
    **{bytes([0x80, protocol]): Format.TORCH_LEGACY_PICKLE for protocol in range(2, 6)},
}
_ONNX_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42"


def sniff(source: Path | BinaryIO) -> Format:
    """The format of a file, given by path or as an open stream (which is left at its start)."""
    if isinstance(source, Path):
        with source.open("rb") as stream:
            return sniff(stream)
    head = source.read(512)
    source.seek(0)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK\x03\x04"):
        kind = _archive_kind(source)
        source.seek(0)
        return kind
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return Format.SAFETENSORS
    if head[257:262] == b"ustar":
        return Format.TORCH_LEGACY_PICKLE
    # an ONNX file is a protobuf message that opens with field 1, the version of the format
    is_onnx = len(head) > 2 and head[0] == 0x08 and 1 <= head[1] <= 20 and head[2] in _ONNX_FIELDS
    return Format.ONNX if is_onnx else Format.UNKNOWN


def _archive_kind(stream: BinaryIO) -> Format:
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return Format.BROKEN_ZIP
    members = {name.partition("/")[2] for name in names} | set(names)
    if "archive_format" in members or "serialized_exported_program.json" in members:
        return Format.PT2
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        return Format.TORCHSCRIPT
    if "data.pkl" in members:
        return Format.TORCH_ZIP
    return Format.KERAS_ZIP if "config.json" in members else Format.UNKNOWN
