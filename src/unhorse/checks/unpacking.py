"""What lies in an ordinary archive: each member read in memory, never written, within limits.

Runs in the restricted child. Zip and tar archives and compressed files are followed to a depth of two; what
cannot be followed is said, not skipped.
"""

from __future__ import annotations

import bz2
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from unhorse.checks.archive_names import UNPACK, Names, check_end, check_tiles, tidy, unread
from unhorse.checks.archives import window
from unhorse.checks.sniff import model_signs
from unhorse.checks.sorting import TAR, ZIP, Sorted, sort
from unhorse.rules import LoadFailed, LoadRefused

MAX_DEPTH = 2
MAX_MEMBERS = 10_000
MAX_BYTES = 2 * 2**30
MAX_RATIO = 100
BETWEEN = "!"
"""Stands between the path of an archive and that of its member: models.zip!vit/model.safetensors."""

_CHUNK, _SLACK = 2**20, 2**20
_OLD_TORCH_TAR = {"pickle", "storages", "tensors"}
_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError),
    *(struct.error, NotImplementedError, RuntimeError, KeyError, IndexError, OverflowError),
)


class Inner(NamedTuple):
    """A member by its path within the outermost archive, with its bytes; or a problem of an archive there.

    The path of the outermost archive itself is empty.
    """

    name: str
    stream: BinaryIO | None = None
    problem: LoadRefused | LoadFailed | None = None
    sorted: Sorted = Sorted()


class _Over(Exception):
    """A limit on the whole is used up: nothing more is read."""


class Unpacker:
    """Goes through an archive and those in it; what it unpacks counts against the same limits."""

    def __init__(self) -> None:
        self.members = self.unpacked = self.archives = 0

    def walk(self, stream: BinaryIO, found: Sorted, name: str = "", depth: int = 1) -> Iterator[Inner]:
        """The members of an archive that was sorted as one, and of those in it."""
        self.archives += 1
        reader = {ZIP: self._zip, TAR: self._tar}.get(found.archive, self._compressed)
        try:
            for inner in reader(stream, found):
                yield from self._entered(inner, name, depth, found)
        except _Over as over:
            if depth > 1:
                raise
            yield Inner(name, problem=unread(f"the archive was not read to its end: {over}"))
        except LoadRefused as problem:
            yield Inner(name, problem=problem)
        except _BROKEN as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            yield Inner(name, problem=unread(f"the {found.archive} cannot be read to its end ({reason})"))

    def _entered(self, inner: Inner, outer: str, depth: int, around: Sorted) -> Iterator[Inner]:
        """A member, or what is in it if it is an archive."""
        path = f"{outer}{BETWEEN}{inner.name}" if outer and inner.name else inner.name or outer
        if inner.stream is None:
            yield inner._replace(name=path)
            return
        found = sort(inner.stream)
        if not found.archive:
            yield inner._replace(name=path, sorted=found)
            return
        # a compressed tar is one archive, not two
        deeper = depth + (around.archive in (ZIP, TAR) or found.archive != TAR)
        if deeper > MAX_DEPTH:
            yield Inner(
                path, problem=unread(f"the {found.archive} lies within {MAX_DEPTH} others"), sorted=found
            )
            return
        if deeper == depth:
            path = outer
            self.archives -= 1
        yield from self.walk(inner.stream, found, path, deeper)

    def _count(self, members: int = 0, unpacked: int = 0) -> None:
        self.members += members
        self.unpacked += unpacked
        if self.members > MAX_MEMBERS:
            raise _Over(f"it has more than {MAX_MEMBERS} members")
        if self.unpacked > MAX_BYTES:
            raise _Over(f"it unpacks to more than {MAX_BYTES // 2**30} GiB")

    # --- zip --------------------------------------------------------------------------------------------

    def _zip(self, stream: BinaryIO, found: Sorted) -> Iterator[Inner]:
        size = stream.seek(0, io.SEEK_END)
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            if model_signs([info.filename for info in infos]):
                raise found.problem or LoadRefused("LD213", "two readers see different members", UNPACK)
            names = Names()
            for info in infos:
                self._count(members=1)
                mode = info.external_attr >> 16
                link = info.create_system == 3 and stat.S_ISLNK(mode)
                names.add(info.orig_filename, link=link, folder=info.is_dir())
            yield from (Inner("", problem=problem) for problem in names.problems())
            check_tiles(stream, archive, size)
            for info in infos:
                if not info.is_dir() and not names.is_link(info.orig_filename):
                    yield self._zipped(archive, info)

    def _zipped(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Inner:
        name = tidy(info.orig_filename)
        if info.flag_bits & 1:
            return Inner(name, problem=unread("the member is encrypted"))
        if info.file_size > _SLACK + MAX_RATIO * info.compress_size:
            return Inner(name, problem=unread(f"the member unpacks to more than {MAX_RATIO} times its size"))
        try:
            self._count(unpacked=info.file_size)
            with archive.open(info) as member:
                content = member.read(info.file_size + 1)
        except _BROKEN as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            if "in directory" in reason:  # and another one in the member's own header
                return Inner(
                    name, problem=LoadRefused("LD204", f"two names for one member ({reason})", UNPACK)
                )
            return Inner(name, problem=unread(f"the member cannot be unpacked ({reason})"))
        return Inner(name, io.BytesIO(content))

    # --- tar --------------------------------------------------------------------------------------------

    def _tar(self, stream: BinaryIO, found: Sorted) -> Iterator[Inner]:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        names, files = Names(), []
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                self._count(members=1)
                special = not (member.isfile() or member.isdir() or member.islnk() or member.issym())
                link = member.islnk() or member.issym()
                names.add(member.name, link=link, special=special, folder=member.isdir())
                if member.isfile():
                    files.append(member)
            end = archive.offset
            yield from (Inner("", problem=problem) for problem in names.problems())
            if {member.name for member in files} >= _OLD_TORCH_TAR:
                reason = "the tar is what torch.save wrote before 0.2, which runs code by design"
                yield Inner("", problem=LoadRefused("LD201", reason, "ask the publisher for safetensors"))
            for member in files:
                yield self._tarred(archive, member, size)
        check_end(stream, end, size)

    def _tarred(self, archive: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> Inner:
        name = tidy(member.name)
        if member.sparse is None:
            if member.offset_data + member.size > size:
                return Inner(name, problem=unread("the member is cut off: the archive is truncated"))
            return Inner(name, window(archive.fileobj, member.offset_data, member.size))  # type: ignore[arg-type]
        if member.size > _SLACK + MAX_RATIO * size:
            return Inner(name, problem=unread(f"the member unpacks to more than {MAX_RATIO} times its size"))
        self._count(unpacked=member.size)
        content = archive.extractfile(member)
        return Inner(name, io.BytesIO(content.read() if content else b""))

    # --- one compressed stream -----------------------------------------------------------------------------

    def _compressed(self, stream: BinaryIO, found: Sorted) -> Iterator[Inner]:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        content, problem = io.BytesIO(), None
        try:
            for chunk in _unpacked(stream, found.archive):
                self._count(unpacked=len(chunk))
                content.write(chunk)
                if content.tell() > _SLACK + MAX_RATIO * size:
                    raise unread(f"the {found.archive} unpacks to more than {MAX_RATIO} times its size")
        except _BROKEN as error:
            problem = (
                error
                if isinstance(error, LoadRefused)
                else unread(f"the {found.archive} is damaged: {error}")
            )
        self._count(members=1)
        if problem is None or content.tell():
            yield Inner("content", content)
        if problem is not None:
            raise problem


def _unpacked(stream: BinaryIO, kind: str) -> Iterator[bytes]:
    """The bytes of a compressed file, whose parts may follow one another; EOFError where it is cut off."""
    makers: Mapping[str, Callable[[], Any]] = {
        "gzip file": lambda: zlib.decompressobj(31),
        "zlib file": lambda: zlib.decompressobj(15),
        "bzip2 file": bz2.BZ2Decompressor,
    }
    make = makers.get(kind, lzma.LZMADecompressor)
    reader, waiting = make(), b""
    while True:
        if not waiting and getattr(reader, "needs_input", True):
            waiting = stream.read(_CHUNK)
        ended = not waiting
        chunk = reader.decompress(waiting, _CHUNK)
        waiting = getattr(reader, "unconsumed_tail", b"")
        if chunk:
            yield chunk
        if reader.eof:
            waiting = (reader.unused_data or stream.read(_CHUNK)).lstrip(b"\0")
            if not waiting:
                return
            reader = make()
        elif ended and not chunk:
            raise EOFError("it is cut off")
