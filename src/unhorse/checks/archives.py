"""Zip archives whose every byte belongs to one member, once, so that no two readers can differ."""

from __future__ import annotations

import io
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

from unhorse.checks.zip_directory import (
    Directory,
    Member,
    extra_fields,
    hostile,
    large_sizes,
    member_name,
    read_at,
    stray,
)
from unhorse.rules import LoadFailed

MAX_TEXT_BYTES = 64 * 2**20
MAX_UNPACKED_BYTES = 2**30
MAX_RATIO = 100
STORED, DEFLATED = 0, 8

_LOCAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x07\x08"
_ENCRYPTED, _DESCRIBED_BEHIND = 1, 8


def check_members(
    stream: BinaryIO, directory: Directory, *, deflated: Callable[[str], bool], nested: Sequence[str] = ()
) -> None:
    """Raises unless the members tile the file and every local header agrees with the directory.

    `deflated` tells which members may be compressed, `nested` names the members (without their root) that may
    be archives themselves.
    """
    names = [member.name.casefold() for member in directory.members]  # torch's reader ignores case
    if len(set(names)) != len(names):
        raise hostile("has duplicate members")
    ordered = sorted(directory.members, key=lambda member: member.offset)
    ends = [member.offset for member in ordered[1:]] + [directory.start]
    if ordered and ordered[0].offset:
        raise stray(f"{ordered[0].offset} bytes stand before the first member")
    for member, end in zip(ordered, ends, strict=True):
        _check_kind(member, deflated)
        begin = _check_local(stream, member)
        behind = end - begin - member.packed
        if behind < 0:
            raise hostile(f"has {member.name!r}, which overlaps another member")
        if behind and not _describes(read_at(stream, begin + member.packed, min(behind, 32)), behind, member):
            raise stray(f"{behind} bytes behind {member.name!r} belong to no member")
        if read_at(stream, begin, 4) == _LOCAL and member.local() not in nested and member.packed:
            raise hostile(f"has {member.name!r}, an archive in the archive")
    if sum(member.size for member in ordered if member.method == DEFLATED) > MAX_UNPACKED_BYTES:
        raise hostile("unpacks to more than 1 GiB")


def _check_kind(member: Member, deflated: Callable[[str], bool]) -> None:
    if stat.S_ISLNK(member.mode) or member.flags & _ENCRYPTED:
        raise hostile(f"has {member.name!r}, a link or an encrypted member")
    if member.method == STORED:
        if member.packed != member.size:
            raise hostile(f"has {member.name!r}, whose two sizes differ")
    elif member.method != DEFLATED or not deflated(member.name):
        raise hostile(f"compresses {member.name!r}, which no exporter does")
    elif member.size > 2**20 and member.size > MAX_RATIO * member.packed:
        raise hostile(f"unpacks {member.name!r} to more than {MAX_RATIO} times its size")


def _check_local(stream: BinaryIO, member: Member) -> int:
    """Where the bytes of the member begin; LD204 where its own header says something else."""
    header = read_at(stream, member.offset, 30)
    if len(header) < 30 or header[:4] != _LOCAL:
        raise LoadFailed(f"the zip archive has no header for {member.name!r}: it is truncated or damaged")
    flags, method, checksum, packed, size, name_length, extra_length = struct.unpack("<6xHH4xIIIHH", header)
    rest = stream.read(name_length + extra_length)
    name, extra = rest[:name_length], rest[name_length:]
    fields = extra_fields(extra)
    sized = flags & _DESCRIBED_BEHIND and (packed, size, checksum) == (0, 0, 0)
    if not sized:
        size, packed = large_sizes(fields, size, packed)
        sized = (checksum, size, packed) == (member.checksum, member.size, member.packed)
    if not sized or member_name(name) != member.name or (method, flags) != (member.method, member.flags):
        raise hostile(f"names or sizes {member.name!r} differently in its two directories")
    return member.offset + 30 + name_length + extra_length


def _describes(found: bytes, length: int, member: Member) -> bool:
    """Whether bytes behind a member are nothing but its checksum and sizes again."""
    bodies = [
        struct.pack(form, member.checksum, member.packed, member.size)
        for form in ("<III", "<IQQ")
        if form == "<IQQ" or max(member.packed, member.size) < 2**32
    ]
    allowed = bodies + [_DESCRIPTOR + body for body in bodies]
    return bool(member.flags & _DESCRIBED_BEHIND) and len(found) == length and found in allowed


def read_member(stream: BinaryIO, member: Member, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of one member, unpacked and compared with its checksum; LD204 beyond `limit`."""
    if member.size > limit:
        raise hostile(f"has {member.name!r} of {member.size} bytes, more than {limit}")
    content = read_at(stream, _check_local(stream, member), member.packed)
    if member.method == DEFLATED:
        try:
            content = zlib.decompressobj(-15).decompress(content, member.size + 1)
        except zlib.error as error:
            raise LoadFailed(f"member {member.name!r} of the archive cannot be unpacked ({error})") from error
    if len(content) != member.size or zlib.crc32(content) != member.checksum:
        raise LoadFailed(
            f"member {member.name!r} of the archive does not have its own checksum: it is damaged"
        )
    return content


def open_member(stream: BinaryIO, member: Member) -> BinaryIO:
    """A stream over one member: a window if it is stored, its unpacked bytes otherwise."""
    if member.method == DEFLATED:
        return io.BytesIO(read_member(stream, member, MAX_UNPACKED_BYTES))
    return window(stream, _check_local(stream, member), member.size)


def window(stream: BinaryIO, start: int, size: int) -> BinaryIO:
    """A stream over a part of another one."""
    return io.BufferedReader(_Window(stream, start, size))


class _Window(io.RawIOBase):
    """A part of another stream, read-only."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(min(len(buffer), self._size - self._at), 0)
        found = read_at(self._stream, self._start + self._at, wanted)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
