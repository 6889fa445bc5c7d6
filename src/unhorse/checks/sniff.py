"""Recognises the format of a model file by its first bytes and its members, never by its name."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from unhorse.checks.old_torch_files import MAGIC
from unhorse.checks.onnx_outline import is_onnx
from unhorse.checks.zip_directory import archive_at_end, read_at, read_directory, stray
from unhorse.rules import LoadFailed, LoadRefused


class Format(StrEnum):
    """What a model file can be."""

    SAFETENSORS = "safetensors"
    TORCH_ZIP = "PyTorch state dict"
    TORCH_OLD = "PyTorch state dict (before 1.6)"
    TORCH_LEGACY_PICKLE = "pickle (a whole pickled model, or joblib)"
    TORCHSCRIPT = "TorchScript"
    PT2 = "torch.export archive"
    ONNX = "ONNX"
    KERAS_ZIP = "Keras"
    HDF5 = "HDF5 (Keras before 3)"
    TORCH_PACKAGE = "torch.package archive"
    TORCHSERVE = "TorchServe archive"
    NUMPY = "NumPy file"
    SAVED_MODEL = "TensorFlow SavedModel"
    GGUF = "GGUF"
    TAR = "tar archive"
    COMPRESSED = "compressed file (joblib, or an archive)"
    BROKEN_ZIP = "zip archive without a readable directory"
    UNKNOWN = "unknown"


OPENED = (
    *(Format.SAFETENSORS, Format.TORCH_ZIP, Format.TORCHSCRIPT, Format.PT2, Format.ONNX),
    *(Format.KERAS_ZIP, Format.HDF5, Format.TORCH_OLD),
)

EXPORT_REMEDY = "export the weights with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
_TRUSTED = "where you trust its author completely, load it on a machine without secrets and "
REMEDIES = {
    Format.TORCH_LEGACY_PICKLE: f"it runs code by design: {_TRUSTED}{EXPORT_REMEDY}",
    Format.TORCH_PACKAGE: f"it carries its own code: {_TRUSTED}{EXPORT_REMEDY}",
    Format.TORCHSERVE: "unpack the .mar archive and give the model file inside",
    Format.NUMPY: "build the network in PyTorch and " + EXPORT_REMEDY,
    Format.SAVED_MODEL: "run `python -m tf2onnx.convert --saved-model FOLDER --output model.onnx`",
    Format.GGUF: "GGUF holds language models; unhorse scans image classifiers",
    Format.TAR: "unpack it and give the model file inside; a tar that torch.save wrote before 0.2 runs code",
    Format.COMPRESSED: "unpack it and give the model file inside; joblib files run code by design",
    Format.UNKNOWN: "give a .safetensors, .pt, .pt2, .onnx, .keras or .h5 file, or a Hugging Face folder",
}

_HDF5 = b"\x89HDF\r\n\x1a\n"
_MAGIC = {
    _HDF5: Format.HDF5,
    MAGIC: Format.TORCH_OLD,
    **{bytes([0x80, protocol]): Format.TORCH_LEGACY_PICKLE for protocol in range(1, 7)},
    b"GGUF": Format.GGUF,
    b"\x93NUMPY": Format.NUMPY,
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!"), Format.COMPRESSED),
    **dict.fromkeys((b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\x5d\0\0"), Format.COMPRESSED),
    **dict.fromkeys((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), Format.COMPRESSED),
}
# protocols 0 and 1 have no magic: an empty container or mark, or a global on two lines
_OLD_PICKLE = re.compile(
    rb"\(?[()\]}]*(c[A-Za-z_][\w.]*\n[\w.]+\n|[(\]}][dltp(q]|i[a-z_][\w.]*\n\w+\n|[SVIF]['\w.-]+\n)"
)


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


def refusal(kind: Format, name: str) -> LoadRefused | LoadFailed | None:
    """Why a file of this kind, called `name`, is not opened and what to do; None if it can be."""
    if kind in OPENED:
        return None
    if kind is Format.BROKEN_ZIP:
        return LoadFailed(f"{name} is a {kind}: it is truncated or damaged")
    if kind is Format.UNKNOWN:
        return LoadRefused("LD202", f"{name} is not a model file", REMEDIES[kind])
    return LoadRefused("LD201", f"{name} is {kind}, which unhorse does not open", REMEDIES[kind])


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
    if _has_user_block(stream, size):
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
    if head[:1] == b"\x08" and len(head) > 2:
        if head[1] == 1 and head[2] == 0x12:
            return Format.SAVED_MODEL
        return Format.ONNX if head[1] <= 30 and is_onnx(stream) else Format.UNKNOWN
    return Format.TORCH_LEGACY_PICKLE if _OLD_PICKLE.match(head) else Format.UNKNOWN


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
    signs = _signs({name.partition("/")[2] for name in names} | set(names), names)
    if len(signs) > 1:
        raise stray(f"the archive has the members of two formats: {' and '.join(sorted(signs))}")
    return signs.pop() if signs else Format.UNKNOWN


def _signs(members: set[str], names: Iterable[str]) -> set[Format]:
    """Which formats the names of the members speak for; a richer format includes a plainer one."""
    found = set()
    if {"archive_format", "serialized_exported_program.json"} & members:
        found.add(Format.PT2)
    if ".data/extern_modules" in members or ".data/python_version" in members:
        found.add(Format.TORCH_PACKAGE)
    elif "constants.pkl" in members or any(name.startswith("code/") for name in members):
        found.add(Format.TORCHSCRIPT)
    elif "data.pkl" in members:
        found.add(Format.TORCH_ZIP)
    if "MAR-INF/MANIFEST.json" in members:
        found.add(Format.TORCHSERVE)
    if "config.json" in names and "metadata.json" in names:
        found.add(Format.KERAS_ZIP)
    if "saved_model.pb" in members:
        found.add(Format.SAVED_MODEL)
    if not found and names and all(name.endswith(".npy") for name in names):
        found.add(Format.NUMPY)
    return found
