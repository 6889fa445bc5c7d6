"""Models in archives, from the side of the process that asks: what an archive holds, and one member of it.

A member's path is that of the archive, `!` and the path inside: models.zip!vit/model.safetensors. Archives
are read in the restricted child only; a member comes home as bytes and lies in memory, never in a file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from unhorse.checks.expectations import Facts
from unhorse.checks.unpacking import BETWEEN
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import server
from unhorse.sandbox.confinement import Limits

_LIMITS = Limits(memory=4 * 2**30, cpu_seconds=180, wall_seconds=400, document=16 * 2**20)
_MEMFD = getattr(os, "memfd_create", None)
_MOST = 20_000

Problem = LoadRefused | LoadFailed


class Member(NamedTuple):
    """One member that is a model, or that was not looked at for a `problem`; an empty name: the archive."""

    name: str
    format: str = ""
    size: int = 0
    sha256: str = ""
    facts: Facts | None = None
    problem: Problem | None = None


class Contents(NamedTuple):
    """What an archive holds; `archives` counts those inside it, `parts` files that belong to a member."""

    members: tuple[Member, ...]
    harmless: Mapping[str, int]
    archives: int
    parts: int
    tier: str


def contents(file: BinaryIO) -> Contents:
    """What an open archive holds. LoadRefused and LoadFailed only where nothing of it could be read."""
    parcel = server.run("contents", [file], {}, heavy=False, limits=_LIMITS)
    try:
        said = parcel.document
        members = tuple(_member(entry) for entry in said["found"][:_MOST])
        harmless = {str(word)[:20]: int(count) for word, count in said["harmless"].items()}
        return Contents(members, harmless, int(said["archives"]), int(said["parts"]), parcel.tier)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LoadFailed("the sandbox sent back no usable list of members") from error


def _member(entry: Mapping[str, Any]) -> Member:
    """A member as the child describes it: hostile text, of which only the types are believed."""
    known = Member(
        str(entry["name"]), str(entry["format"]), int(entry.get("size", 0)), str(entry.get("sha256", ""))
    )
    if "facts" in entry:
        return known._replace(facts=Facts.from_json(entry["facts"]))
    rule, reason, remedy = (str(entry[key]) for key in ("rule", "reason", "remedy"))
    refused = rule != LoadFailed.rule
    return known._replace(
        problem=LoadRefused(rule, reason, remedy) if refused else LoadFailed(reason, remedy)
    )


def divided(path: Path) -> tuple[Path, str] | None:
    """The archive and the path inside it, where `path` is that of a member; None where it is a file's own."""
    whole = path.as_posix()
    if BETWEEN not in whole or os.path.lexists(path):
        return None
    place = whole.find(BETWEEN)
    while place > 0:
        archive = Path(whole[:place])
        try:
            regular = stat.S_ISREG(archive.lstat().st_mode)
        except (OSError, ValueError):
            regular = False
        if regular and whole[place + 1 :]:
            return archive, whole[place + 1 :]
        place = whole.find(BETWEEN, place + 1)
    return None


def open_member(archive: BinaryIO, member: str) -> BinaryIO:
    """A member's bytes as an open file that lies in memory alone, at its start."""
    if _MEMFD is None:
        reason = "a model is scanned inside an archive only where files can lie in memory (Linux)"
        raise LoadRefused("LD233", reason, "unpack the archive and scan the file")
    parcel = server.run("member", [archive], {"member": member}, heavy=False, limits=_LIMITS)
    with os.fdopen(_MEMFD("member", os.MFD_CLOEXEC), "wb") as file:
        file.write(parcel.blob)
        file.flush()
        # a second, read-only description of the same bytes: nothing can write to them through it
        return os.fdopen(os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC), "rb")
