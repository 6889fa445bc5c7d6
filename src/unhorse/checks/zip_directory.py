"""The directory of a zip archive, read by hand: one archive, from the first byte of the file to the last."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, NamedTuple

from unhorse.rules import LoadFailed, LoadRefused

MAX_MEMBERS = 20_000
ARCHIVE_REMEDY = "export it again with the library that made it, without repacking the archive"

_CENTRAL, _END, _END64, _LOCATOR64 = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_PADDING, _ZIP64 = 0x4246, 1  # torch.save aligns tensors with a field called "FB", filled with "Z"
_HARMLESS_FIELDS = {_ZIP64, 0x5455, 0x7875}  # sizes, times, user ids


class Member(NamedTuple):
    """One entry of the directory; `offset` is where its local header stands."""

    name: str
    offset: int
    packed: int
    size: int
    method: int
    flags: int
    checksum: int
    mode: int

    def local(self) -> str:
        """The name without the root folder that torch puts around everything."""
        return self.name.partition("/")[2]


class Directory(NamedTuple):
    """The members in the order of the directory, and where that directory begins."""

    members: tuple[Member, ...]
    start: int


def read_directory(stream: BinaryIO) -> Directory:
    """The directory of a zip archive that fills the file: LD213 if it does not, LoadFailed if it is cut."""
    size = stream.seek(0, io.SEEK_END)
    count, length, start, end = _end_of_directory(stream, size)
    if count > MAX_MEMBERS:
        raise hostile(f"has {count} members, too many of them")
    if start < 0 or start + length != end:
        raise stray("bytes that are no part of the archive stand before it or inside it")
    stream.seek(start)
    return Directory(tuple(_entries(stream.read(length), count)), start)


def _end_of_directory(stream: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """(number of members, bytes of the directory, its start, its end)."""
    tail = read_at(stream, max(size - 22, 0), 22)
    if len(tail) < 22 or tail[:4] != _END or tail[20:] != b"\0\0":
        if _ends_early(read_at(stream, max(size - 65_557, 0), 65_557), size):
            raise stray("bytes follow the archive, or hide in its comment")
        raise LoadFailed("the zip archive has no directory at its end: it is truncated or damaged")
    disks, count_here, count, length, start = struct.unpack("<4x4sHHII2x", tail)
    end = size - 22
    locator = read_at(stream, max(end - 20, 0), 20)
    if end >= 76 and locator[:4] == _LOCATOR64:
        record = read_at(stream, end - 76, 56)
        if record[:4] != _END64 or struct.unpack("<Q", locator[8:16])[0] != end - 76:
            raise stray("the zip64 record is not where its locator says")
        large = struct.unpack("<QQQQ", record[24:56])
        if not all(
            small in (real, limit)
            for small, real, limit in zip(
                (count_here, count, length, start), large, (0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1), strict=True
            )
        ):
            raise hostile("has two directories that contradict each other")
        count_here, count, length, start = large
        end -= 76
    if disks != bytes(4) or count_here != count:
        raise hostile("is split over several disks")
    return count, length, start, end


def _ends_early(tail: bytes, size: int) -> bool:
    """Whether the end of an archive that begins with the file stands in its tail, before other bytes."""
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        return False
    length, start = struct.unpack("<12xII2x", tail[at : at + 22])
    return start + length in (size - len(tail) + at, size - len(tail) + at - 76)


def _entries(directory: bytes, count: int) -> list[Member]:
    members, at = [], 0
    for _ in range(count):
        if directory[at : at + 4] != _CENTRAL or len(directory) < at + 46:
            raise LoadFailed("the directory of the zip archive is damaged")
        (flags, method, checksum, packed, size, name_length, extra_length, comment, disk, mode, offset) = (
            struct.unpack("<8xHH4xIIIHHHH2xII", directory[at : at + 46])
        )
        name = directory[at + 46 : at + 46 + name_length]
        extra = directory[at + 46 + name_length : at + 46 + name_length + extra_length]
        at += 46 + name_length + extra_length + comment
        size, packed, offset = large_sizes(extra_fields(extra), size, packed, offset)
        if disk or comment:
            raise hostile("has a comment on a member, or one on another disk")
        members.append(Member(member_name(name), offset, packed, size, method, flags, checksum, mode >> 16))
    if at != len(directory):
        raise stray("bytes of the directory belong to no member")
    return members


def large_sizes(fields: dict[int, bytes], *values: int) -> tuple[int, ...]:
    """Sizes beyond 4 GiB stand in the zip64 field, in order, for each value that is saturated."""
    field, at, found = fields.get(_ZIP64, b""), 0, []
    for value in values:
        if value == 2**32 - 1:
            if len(field) < at + 8:
                raise LoadFailed("the zip archive lacks the zip64 sizes it announces")
            value = struct.unpack("<Q", field[at : at + 8])[0]
            at += 8
        found.append(value)
    return tuple(found)


def extra_fields(extra: bytes) -> dict[int, bytes]:
    """The extra fields of a member by type; LD213 for a field that means nothing to a model."""
    fields, at = {}, 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        body = extra[at + 4 : at + 4 + length]
        known = kind in _HARMLESS_FIELDS or (kind == _PADDING and not body.strip(b"Z\0"))
        if not known or len(body) != length or kind in fields:
            raise stray(f"an extra field of type {kind:#06x} holds bytes that mean nothing to a model")
        fields[kind] = body
        at += 4 + length
    if extra[at:].strip(b"\0"):
        raise stray("an extra field is cut off")
    return fields


def member_name(raw: bytes) -> str:
    """A name that stays inside the archive; otherwise LD204."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise hostile("has a member whose name is not UTF-8") from error
    parts = name.removesuffix("/").split("/")
    if not name or len(name) > 1024 or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise hostile("has a member without a usable name")
    if name.startswith("/") or "\\" in name or ":" in name[1:2] or {"", ".", ".."} & set(parts):
        raise hostile(f"has {name!r}, a path that leaves the archive")
    return name


def archive_at_end(stream: BinaryIO) -> bool:
    """Whether a zip reader, which starts at the end, would find an archive in the file."""
    size = stream.seek(0, io.SEEK_END)
    tail = read_at(stream, max(size - 65_557, 0), 65_557)
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        return False
    length, comment = struct.unpack("<12xI4xH", tail[at : at + 22])
    before = size - len(tail) + at - length
    starts = [read_at(stream, place, 4) for place in (before, before - 76) if place >= 0]
    return comment == len(tail) - at - 22 and (_CENTRAL in starts or length == 0)


def read_at(stream: BinaryIO, place: int, length: int) -> bytes:
    """Up to `length` bytes from a place in a stream."""
    stream.seek(place)
    return stream.read(length)


def hostile(what: str) -> LoadRefused:
    """The refusal of an archive: LD204."""
    return LoadRefused("LD204", f"the archive {what}", ARCHIVE_REMEDY)


def stray(what: str) -> LoadRefused:
    """The refusal of bytes that one reader sees and another does not: LD213."""
    return LoadRefused("LD213", what, ARCHIVE_REMEDY)
