"""Static checks of a file of weights before it is parsed, and what it says of itself; torch is not needed."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

from unhorse.checks import archives, pickles, zip_directory
from unhorse.checks.expectations import Facts
from unhorse.checks.metadata import remarks
from unhorse.checks.sniff import EXPORT_REMEDY
from unhorse.rules import LoadFailed, LoadRefused

MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 20_000
MAX_FILE_BYTES = 4 * 2**30

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_NOT_READ = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}
"""Types of the format that classifiers do not use."""
_TORCH_MEMBERS = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment"}


class Header(NamedTuple):
    """The tensors of a safetensors file by name, and the text beside them."""

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]


def check_safetensors(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file whose header accounts for every byte; otherwise LD203."""
    return read_header(io.BytesIO(data)).metadata


def read_header(stream: BinaryIO) -> Header:
    """The header of a safetensors file, which accounts for every byte; no tensor is read. LD203 otherwise."""
    size = stream.seek(0, io.SEEK_END)
    length = int.from_bytes(zip_directory.read_at(stream, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise LoadRefused("LD203", f"the header claims {length} bytes, more than 8 MiB", EXPORT_REMEDY)
    if size < 8 + length:
        raise LoadFailed(f"the safetensors header of {length} bytes is cut off: the file is truncated")
    try:
        raw = stream.read(length)
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
        if b"\\u" in raw:
            json.dumps(header, ensure_ascii=False).encode("utf-8")  # a lone surrogate is a ValueError here
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        _check_extents(header, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, LoadRefused | LoadFailed):
            raise
        raise LoadRefused("LD203", f"the safetensors header is not valid ({error})", EXPORT_REMEDY) from error
    return Header(header, metadata)


def _check_extents(header: Mapping[str, dict[str, Any]], payload: int) -> None:
    """Raises unless the tensors tile the payload exactly, each as long as its type and shape say."""
    if len(header) > MAX_TENSORS:
        raise LoadRefused("LD203", f"{len(header)} tensors are more than {MAX_TENSORS}", EXPORT_REMEDY)
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} has more or less than a type, a shape and a place")
        if not all(type(size) is int and size >= 0 for size in (*shape, begin, end)) or len(shape) > 8:
            raise ValueError(f"tensor {name!r} has sizes that are not counts")
        if end - begin != math.prod(shape) * _item_bytes(name, entry["dtype"]):
            raise ValueError(f"tensor {name!r} is not as long as its shape {shape} says")
        spans.append((begin, end))
    spans = [(0, 0), *sorted(spans)]
    if any(end != begin for (_, end), (begin, _) in pairwise(spans)):
        raise ValueError("tensors overlap or leave gaps")
    if spans[-1][1] > payload:
        raise LoadFailed(f"the tensors need {spans[-1][1]} bytes and the file has {payload}: it is truncated")
    if spans[-1][1] < payload:
        raise ValueError(f"{payload - spans[-1][1]} bytes belong to no tensor")


def _item_bytes(name: str, dtype: object) -> int:
    """The bytes of one number; ValueError for a type that safetensors lacks, LD235 for one not read."""
    what = f"tensor {name!r} has type {dtype!r}, which unhorse does not read"
    if dtype in _NOT_READ:
        raise LoadRefused("LD235", what, "save the weights as float32 or float16")
    if dtype not in _ITEM_BYTES:
        raise ValueError(what)
    return _ITEM_BYTES[str(dtype)]


def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The hook for json.loads that refuses the same key twice, which parsers read differently."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def safetensors_facts(stream: BinaryIO) -> Facts:
    """What a safetensors file says of itself, also in the card that unhorse puts into its metadata."""
    header = read_header(stream)
    parameters = sum(math.prod(entry["shape"]) for entry in header.tensors.values())
    extra = {"tensors": str(len(header.tensors)), "parameters": str(parameters)}
    producer = "unhorse" if "unhorse" in header.metadata else header.metadata.get("format", "")
    facts = Facts(producer=producer[:200], extra=extra, notes=remarks(header.metadata))
    return _with_card(facts, header.metadata["unhorse"]) if "unhorse" in header.metadata else facts


def _with_card(facts: Facts, card: str) -> Facts:
    try:
        said = json.loads(card)
        document = facts.to_json() | {
            "image_shape": said.get("image_shape"),
            "num_classes": len(said["class_names"]),
            "class_names": said["class_names"],
            "mean": said.get("mean"),
            "std": said.get("std"),
        }
        "".join(said["class_names"]).encode("utf-8")
        return Facts.from_json(document)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "remove the card and name the architecture with --arch"
        raise LoadRefused("LD212", f"the card in the metadata is not usable ({error})", remedy) from error


def check_torch_zip(data: bytes) -> None:
    """Raises unless the archive is what torch.save writes and its pickle names nothing but tensors."""
    torch_zip_facts(io.BytesIO(data))


def torch_zip_facts(stream: BinaryIO, where: str = "data.pkl", *, only_tensors: bool = False) -> Facts:
    """What a file of torch.save says of itself: members and pickle are checked, no tensor is read.

    With `only_tensors` nothing but what weights need may be named, at protocol 2, LD205 otherwise: for files
    that torch opens by itself, which it does without restraint where it cannot with.
    """
    directory = zip_directory.read_directory(stream)
    archives.check_members(stream, directory, deflated=lambda name: False)
    check_root(directory)
    for member in directory.members:
        local = member.local()
        if local not in _TORCH_MEMBERS and not local.startswith(("data/", ".data/")):
            raise zip_directory.hostile(f"has {member.name!r}, which torch.save does not write")
    found = [member for member in directory.members if member.local() == "data.pkl"]
    if len(found) != 1:
        raise zip_directory.hostile(f"has {len(found)} pickles")
    pickled = archives.read_member(stream, found[0])
    if only_tensors:
        pickles.check_pickle(pickled, pickles.is_plain, where=where)
    named = pickles.check_checkpoint(pickled, where=where)
    storages = sum(member.local().startswith("data/") for member in directory.members)
    notes = pickles.left_out(named)
    return Facts(producer="torch.save", extra={"storages": str(storages)}, notes=notes)


def check_root(directory: zip_directory.Directory) -> None:
    """Raises LD204 unless all members of a torch archive lie in one folder, as its readers assume."""
    roots = {member.name.partition("/")[0] if "/" in member.name else "" for member in directory.members}
    if len(roots) != 1 or "" in roots:
        raise zip_directory.hostile("has members in several folders")
