"""What an ordinary archive holds: the tasks that look into it, in the restricted child."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from unhorse.checks.archive_names import unread
from unhorse.checks.inspection import check
from unhorse.checks.onnx_outline import external_names
from unhorse.checks.sniff import Format
from unhorse.checks.sorting import Sorted, sort
from unhorse.checks.unpacking import Unpacker
from unhorse.rules import LoadFailed, LoadRefused

_CHUNK = 2**20


def contents_task(files: Sequence[BinaryIO], options: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """What lies in the first of the files, an archive: ({"found": [...], "harmless": {...}, ...}, no bytes).

    "found" has an entry for each member that is not harmless: its "name", "format", "size", and either
    "sha256" and "facts" of a model or "rule", "reason" and "remedy". An empty name is that of the archive.
    "archives" counts those inside it that were followed, "parts" the members with the data of an ONNX model.
    """
    unpacker, harmless = Unpacker(), Counter[str]()
    outer = sort(files[0])
    if not outer.archive:
        raise LoadFailed("the file is no archive now", "keep it still and try again")
    found = list(_described(unpacker, files[0], outer, harmless))
    parts = _parts(found)
    told = {"format": outer.archive, "archives": unpacker.archives - 1, "harmless": dict(harmless)}
    kept = [entry for entry in found if entry["name"] not in parts]
    return {**told, "parts": len(parts), "found": kept}, b""


def _described(
    unpacker: Unpacker, stream: BinaryIO, outer: Sorted, harmless: Counter[str]
) -> Iterator[dict[str, Any]]:
    for inner in unpacker.walk(stream, outer):
        if inner.stream is None:
            assert inner.problem is not None
            yield {"name": inner.name, "format": inner.sorted.archive, **_said(inner.problem)}
        elif inner.sorted.harmless:
            harmless[inner.sorted.harmless] += 1
        else:
            yield _looked_at(inner.name, inner.stream, inner.sorted)


def _looked_at(name: str, stream: BinaryIO, found: Sorted) -> dict[str, Any]:
    """A member that is not harmless: what it says of itself, or what speaks against it."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    kind = str(found.kind) if found.kind is not Format.UNKNOWN else found.closed
    entry = {"name": name, "format": kind, "size": size, "sha256": digest.hexdigest()}
    try:
        if found.problem:
            raise found.problem
        if found.closed:
            raise unread(f"the member is a {found.closed}, which unhorse does not read")
        if found.kind is Format.UNKNOWN:
            remedy = "unpack the archive and find out what the file is; leave it out with --exclude"
            raise LoadRefused("LD232", "the member is no kind of file that unhorse knows", remedy)
        return entry | {"facts": check(stream, found.kind, {}, name.rpartition("/")[2]).to_json()}
    except (LoadRefused, LoadFailed) as problem:
        places = sorted(external_names(stream)) if found.kind is Format.ONNX else []
        return entry | _said(problem) | ({"places": places} if places else {})


def _parts(found: Sequence[dict[str, Any]]) -> set[str]:
    """The members in which an ONNX model beside them keeps its data: it is then not opened, and no more."""
    unknown = {entry["name"] for entry in found if entry.get("rule") == "LD232"}
    parts: set[str] = set()
    for entry in found:
        folder = entry["name"].rpartition("/")[0]
        places = {f"{folder}/{place}" if folder else place for place in entry.pop("places", ())}
        if places and places <= unknown:
            parts |= places
            entry.update(_said(unread("the model keeps its data in other members of the archive")))
    return parts


def _said(problem: LoadRefused | LoadFailed) -> dict[str, str]:
    return {"rule": problem.rule, "reason": problem.reason, "remedy": problem.remedy}


def member_task(files: Sequence[BinaryIO], options: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The bytes of the member at the path `options["member"]` of the archive: ({"size": ...}, its bytes)."""
    for inner in Unpacker().walk(files[0], sort(files[0])):
        if inner.name == options["member"] and inner.stream is not None:
            inner.stream.seek(0)
            content = inner.stream.read()
            return {"size": len(content)}, content
    raise LoadFailed(f"the archive has no member {str(options['member'])[:200]!r}", "check its name")
