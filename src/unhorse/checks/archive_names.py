"""The names of an archive's members, and whether its bytes all belong to them, for ordinary archives.

Stricter rules for the archives of models are in archives.py.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from unhorse.checks.harmless import is_text
from unhorse.checks.zip_directory import read_at
from unhorse.rules import LoadRefused

UNPACK = "unpack it on a machine without secrets, and inspect the folder"


def unread(what: str) -> LoadRefused:
    """The refusal of an archive that was not followed to its end: LD233."""
    return LoadRefused("LD233", what, UNPACK)


def tidy(name: str) -> str:
    """A member's name as a path: forward slashes, no empty parts; `..` stays for all to see."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".")) or "member"


class Names:
    """The names of an archive's members, and those that are findings."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.outside: list[str] = []
        self.double: list[str] = []
        self.links: list[str] = []
        self.special: list[str] = []

    def add(self, name: str, *, link: bool = False, special: bool = False, folder: bool = False) -> None:
        plain, parts = tidy(name), name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or name[1:2] == ":" or ".." in parts or "\0" in name:
            self.outside.append(name)
        if plain in self.seen and not folder:
            self.double.append(name)
        if link:
            self.links.append(name)
        if special:
            self.special.append(name)
        if not folder:
            self.seen.add(plain)

    def is_link(self, name: str) -> bool:
        return name in self.links

    def problems(self) -> Iterator[LoadRefused]:
        """One for each kind of name that is a finding."""
        remedy = "do not unpack it; ask the publisher for the model file itself"
        for names, rule, words in (
            (self.outside, "LD204", "names that leave the archive's folder"),
            (self.double, "LD204", "names that occur twice, of which each reader takes another"),
            (self.links, "LD234", "links in place of files"),
            (self.special, "LD223", "devices or pipes in place of files"),
        ):
            if names:
                shown = ", ".join(repr(name[:100]) for name in names[:3]) + " …" * (len(names) > 3)
                yield LoadRefused(rule, f"the archive has {words}: {shown}", remedy)


def check_tiles(stream: BinaryIO, archive: zipfile.ZipFile, size: int) -> None:
    """LD213 where bytes lie before, between or behind the members: a reader that streams sees them."""
    at = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        behind = info.header_offset - at
        if behind < 0:
            raise LoadRefused("LD204", f"the archive has {info.filename[:100]!r}, which overlaps", UNPACK)
        if behind > 24 or (behind and not at):  # a descriptor has 12 to 24 bytes
            raise LoadRefused("LD213", f"{behind} bytes of the archive belong to no member", UNPACK)
        header = read_at(stream, info.header_offset, 30)
        if len(header) < 30:
            raise zipfile.BadZipFile("a member is cut off")
        at = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30])) + info.compress_size
    end = size - 22 - len(archive.comment)
    whole = read_at(stream, end, 4) == b"PK\x05\x06" and is_text(archive.comment)
    if archive.start_dir - at not in range(25) or not whole:
        raise LoadRefused("LD213", "bytes of the archive belong to no member", UNPACK)


def check_end(stream: BinaryIO, end: int, size: int) -> None:
    """Whether a tar archive ends as one, with zeros: what follows them is read by some and not by others."""
    stream.seek(end)
    if end >= size:
        raise unread("the tar archive has no end: it is truncated")
    while chunk := stream.read(2**20):
        if chunk.strip(b"\0"):
            raise LoadRefused("LD213", "bytes follow the end of the tar archive", UNPACK)
