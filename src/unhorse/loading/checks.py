"""Static checks of a model file before it is parsed, and of its tensors before they are used."""

from __future__ import annotations

import io
import json
import math
import stat
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from picklescan.scanner import scan_pickle_bytes
from torch import Tensor, nn

from unhorse.rules import LoadFailed, LoadRefused

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000
MAX_PICKLE_BYTES = 64 * 2**20
MAX_FILE_BYTES = 4 * 2**30

EXPORT_REMEDY = "export the weights with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
_REBUILDERS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}
_DTYPES = {
    str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)
}


def check_safetensors(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file whose header accounts for every byte; otherwise LD203."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise LoadRefused("LD203", f"the header claims {length} bytes, more than 8 MiB", EXPORT_REMEDY)
    if len(data) < 8 + length:
        raise LoadFailed(f"the safetensors header of {length} bytes is cut off: the file is truncated")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        _check_extents(header, len(data) - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, LoadRefused | LoadFailed):
            raise
        raise LoadRefused("LD203", f"the safetensors header is not valid ({error})", EXPORT_REMEDY) from error
    return metadata


def _check_extents(header: Mapping[str, dict[str, Any]], payload: int) -> None:
    """Raises unless the tensors tile the payload exactly, each as long as its type and shape say."""
    if len(header) > MAX_TENSORS:
        raise LoadRefused("LD203", f"{len(header)} tensors are more than {MAX_TENSORS}", EXPORT_REMEDY)
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
            raise ValueError(f"tensor {name!r} has sizes that are not counts")
        if entry["dtype"] not in _ITEM_BYTES:
            raise ValueError(f"tensor {name!r} has type {entry['dtype']!r}, which unhorse does not read")
        if end - begin != math.prod(shape) * _ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"tensor {name!r} is not as long as its shape {shape} says")
        spans.append((begin, end))
    spans = [(0, 0), *sorted(spans)]
    if any(end != begin for (_, end), (begin, _) in pairwise(spans)):
        raise ValueError("tensors overlap or leave gaps")
    if spans[-1][1] > payload:
        raise LoadFailed(f"the tensors need {spans[-1][1]} bytes and the file has {payload}: it is truncated")
    if spans[-1][1] < payload:
        raise ValueError(f"{payload - spans[-1][1]} bytes belong to no tensor")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def check_torch_zip(data: bytes) -> None:
    """Raises unless the archive is what torch.save writes and its pickle names nothing but tensors."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) != len(names) or len(names) > MAX_TENSORS:
            raise _hostile_archive("has duplicate members or too many of them")
        if sum(member.file_size for member in members) > 1.02 * len(data):
            raise _hostile_archive("unpacks to more than its own size")
        for member in members:
            _check_member(archive, member)
        pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise _hostile_archive(f"has {len(pickles)} pickles, or one beyond 64 MiB")
        _check_pickle(archive.read(pickles[0]))


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    name = member.filename
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise _hostile_archive(f"compresses {name!r}, which torch.save never does")
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise _hostile_archive(f"has {name!r}, a path that leaves the archive")
    if stat.S_ISLNK(member.external_attr >> 16) or member.flag_bits & 1:
        raise _hostile_archive(f"has {name!r}, a link or an encrypted member")
    with archive.open(member) as content:
        if content.read(4) == b"PK\x03\x04":
            raise _hostile_archive(f"has {name!r}, an archive in the archive")


def _hostile_archive(what: str) -> LoadRefused:
    return LoadRefused("LD204", f"the archive {what}", EXPORT_REMEDY)


def _check_pickle(pickled: bytes) -> None:
    """Refuses every global that is not on the list: tensors, storages, types and plain containers."""
    found = scan_pickle_bytes(io.BytesIO(pickled), "data.pkl")
    if found.scan_err:
        raise LoadRefused("LD205", "the pickle in the file cannot be read", EXPORT_REMEDY)
    for use in found.globals:
        if not _is_plain(use.module, use.name):
            raise LoadRefused("LD205", f"the pickle in the file calls {use.module}.{use.name}", EXPORT_REMEDY)


def _is_plain(module: str, name: str) -> bool:
    if module == "torch":
        return name in {"Size", "device", "Tensor"} | _DTYPES or name.endswith("Storage")
    return (
        (module == "torch._utils" and name in _REBUILDERS)
        or (module == "torch.storage" and name in {"TypedStorage", "UntypedStorage"})
        or (module, name)
        in {("collections", "OrderedDict"), ("collections", "Counter"), ("torch.nn.parameter", "Parameter")}
    )


def check_tensors(tensors: Mapping[str, object], file_bytes: int) -> dict[str, Tensor]:
    """Plain CPU tensors of their own, floats as float32 and finite; otherwise LD206, LD207 or LD209."""
    plain = {name: _check_tensor(name, value) for name, value in tensors.items()}
    # tied weights count twice; a file of a thousand views of one tensor would count a thousand times
    if sum(tensor.numel() * tensor.element_size() for tensor in plain.values()) > 4 * file_bytes + 2**20:
        raise LoadRefused("LD206", "the tensors claim more memory than the file has bytes", EXPORT_REMEDY)
    return {name: _as_finite(name, tensor) for name, tensor in plain.items()}


def _check_tensor(name: str, value: object) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter):
        raise LoadRefused("LD209", f"entry {name!r} is a {type(value).__name__}, not a tensor", EXPORT_REMEDY)
    tensor: Tensor = value.detach()  # type: ignore[attr-defined]
    if (
        tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_complex()
    ):
        raise LoadRefused("LD206", f"tensor {name!r} is not a plain dense tensor", EXPORT_REMEDY)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise LoadRefused("LD206", f"tensor {name!r} claims more than the file has", EXPORT_REMEDY)
    return tensor


def _as_finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        remedy = "the training diverged or the file is damaged; export a healthy checkpoint"
        raise LoadRefused("LD207", f"the weights contain NaN or infinity, first in {name!r}", remedy)
    return tensor
