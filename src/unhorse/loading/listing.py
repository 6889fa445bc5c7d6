"""What was found on a command's paths: models to open, files that were not looked at, and counts of the rest.

The counts add up to the number of files seen: nothing is left out in silence.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from unhorse.checks.sorting import Sorted
from unhorse.checks.unpacking import BETWEEN
from unhorse.loading import archived, sources
from unhorse.loading.archived import Member, Problem
from unhorse.rules import LoadFailed, LoadRefused


class Skipped(NamedTuple):
    """A file that was not looked at, or a member; `more` are further problems of the same archive."""

    path: str
    problem: Problem
    format: str = ""
    size: int = 0
    sha256: str = ""
    more: tuple[Problem, ...] = ()


class Looked(NamedTuple):
    """A model inside an archive, already looked at in a process confined as `tier` says."""

    path: str
    member: Member
    tier: str


@dataclass
class Listing:
    """All files of a command: `models` to open, `looked` at inside archives, `skipped`, and those counted.

    `parts` belong to a model that has several files, `archives` were followed to their end, `links` lead to
    files of the same folder.
    """

    models: list[Path] = field(default_factory=list)
    looked: list[Looked] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    harmless: Counter[str] = field(default_factory=Counter)
    parts: int = 0
    archives: int = 0
    excluded: int = 0

    @property
    def seen(self) -> int:
        """Files, members of archives, and folders that could not be read."""
        found = len(self.models) + len(self.looked) + len(self.skipped) + len(self.links)
        return found + self.harmless.total() + self.parts + self.archives + self.excluded

    def skip(self, path: str | Path, problem: Problem, kind: str = "") -> None:
        self.skipped.append(Skipped(str(path), problem, kind))


class Patterns(NamedTuple):
    """Which files below the paths count: `*` crosses folders, a pattern may leave out leading folders, and
    one that names a folder means all in it. Without `include` every file does; `exclude` wins.
    """

    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    def leave_out(self, name: str) -> bool:
        """Whether a file of that path, with forward slashes, is left out."""
        if _matches(name, self.exclude):
            return True
        return bool(self.include) and not _matches(name, self.include)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    pieces = name.split("/")
    heads = ["/".join(pieces[:count]) for count in range(1, len(pieces) + 1)]
    for pattern in patterns:
        wanted = pattern.removeprefix("./").rstrip("/")
        if any(fnmatchcase(head, wanted) or fnmatchcase(head, f"*/{wanted}") for head in heads):
            return True
    return False


def look_into(path: Path, place: Path, found: Sorted, listing: Listing) -> None:
    """Lists the members of an archive named `path`, whose bytes are at `place`, in the restricted child."""
    try:
        with sources.open_file(place) as file:
            contents = archived.contents(file)
    except (LoadRefused, LoadFailed) as refused:
        listing.skip(path, refused, found.archive)
        return
    listing.harmless.update(contents.harmless)
    listing.parts += contents.parts
    own: dict[str, list[Problem]] = {}
    for member in contents.members:
        name = f"{path.as_posix()}{BETWEEN}{member.name}" if member.name else str(path)
        problem = member.problem
        if problem is not None and not member.sha256:
            own.setdefault(name, []).append(problem)
        elif problem is not None:
            listing.skipped.append(Skipped(name, problem, member.format, member.size, member.sha256))
        elif os.path.lexists(name):
            twice = LoadRefused("LD232", "a file has the same path as this member", "unpack the archive")
            listing.skip(name, twice, member.format)
        else:
            listing.looked.append(Looked(name, member, contents.tier))
    listing.archives += contents.archives + (str(path) not in own)
    listing.skipped += _grouped(own, found.archive)


def _grouped(own: dict[str, list[Problem]], kind: str) -> Iterator[Skipped]:
    """One entry for each archive, or member without bytes, however much speaks against it."""
    for name, problems in own.items():
        first, *more = sorted(problems, key=lambda problem: problem.rule not in ("LD204", "LD213"))
        yield Skipped(name, first, kind, more=tuple(more))
