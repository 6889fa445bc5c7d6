"""What is to be done with a file, by its bytes alone: open it, look into it, count it, or report it."""

from __future__ import annotations

import zlib
from typing import BinaryIO, NamedTuple

from unhorse.checks.harmless import harmless, is_text, runs_nothing
from unhorse.checks.sniff import Format, sniff
from unhorse.checks.zip_directory import read_at
from unhorse.rules import LoadRefused

ZIP, TAR = "zip archive", "tar archive"
STREAMS = {
    **{b"\x1f\x8b": "gzip file", b"BZh": "bzip2 file", b"\xfd7zXZ\0": "xz file", b"\x5d\0\0": "LZMA file"},
    **dict.fromkeys((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), "zlib file"),
}
"""Compressed files that Python's own library reads."""
CLOSED = {
    **{b"7z\xbc\xaf\x27\x1c": "7z archive", b"Rar!": "RAR archive", b"\x28\xb5\x2f\xfd": "zstd file"},
    **{b"\x04\x22\x4d\x18": "LZ4 file", b"MSCF\0\0\0\0": "cabinet archive", b"xar!": "xar archive"},
    **{b"!<arch>\n": "ar archive", b"\xed\xab\xee\xdb": "RPM package"},
}
_CHANCE = 2**16
_PERHAPS_TEXT = (
    *(Format.UNKNOWN, Format.COMPRESSED, Format.TORCH_LEGACY_PICKLE),
    *(Format.WEB_PAGE, Format.ERROR_TEXT),
)


class Sorted(NamedTuple):
    """One of: a model of a `kind`; an `archive` to look into, or `closed` to us; `harmless`; else unknown.

    `kind` is a format also where it is one that unhorse does not open. `problem` is why the bytes are two
    things at once; with an `archive` it counts only if that archive turns out to be a model.
    """

    kind: Format = Format.UNKNOWN
    archive: str = ""
    closed: str = ""
    harmless: str = ""
    problem: LoadRefused | None = None

    @property
    def is_model(self) -> bool:
        """Whether the file is to be opened, if only to say why it is not."""
        return not self.archive and (self.kind is not Format.UNKNOWN or self.problem is not None)


def sort(stream: BinaryIO) -> Sorted:
    """What an open file is; its first bytes, its end and the directory of a zip archive are read."""
    try:
        kind, problem = sniff(stream), None
    except LoadRefused as refused:
        kind, problem = Format.UNKNOWN, refused
    head = read_at(stream, 0, 512)
    found = _sorted(stream, head, kind, problem)
    stream.seek(0)
    return found


def _sorted(stream: BinaryIO, head: bytes, kind: Format, problem: LoadRefused | None) -> Sorted:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")) and kind is Format.UNKNOWN:
        return Sorted(kind, archive=ZIP, problem=problem)
    if problem is not None:
        return Sorted(problem=problem)
    if closed := next((name for magic, name in CLOSED.items() if head.startswith(magic)), ""):
        return Sorted(closed=closed)
    if kind is Format.TAR or (kind is Format.UNKNOWN and is_tar(head)):
        return Sorted(Format.TAR, archive=TAR)
    if kind in _PERHAPS_TEXT and _is_known(stream, kind):
        return Sorted(harmless=harmless(stream))
    if kind is Format.COMPRESSED:
        return Sorted(kind, archive=next(name for magic, name in STREAMS.items() if head.startswith(magic)))
    return Sorted(kind)


def _is_known(stream: BinaryIO, kind: Format) -> bool:
    if kind is Format.TORCH_LEGACY_PICKLE:
        content = read_at(stream, 0, _CHANCE)
        if not is_text(content, cut=True) or not runs_nothing(content):
            return False
    return bool(harmless(stream))


def is_tar(head: bytes) -> bool:
    """Whether a block of 512 bytes is the header of a tar member: its sum is that which it states."""
    if len(head) < 512 or not head[0]:
        return False
    field = head[148:156].strip(b" \0")
    if not field or field.strip(b"01234567"):
        return False
    return int(field, 8) == sum(head) - sum(head[148:156]) + 8 * 32


def is_by_chance(stream: BinaryIO, found: Sorted) -> bool:
    """Whether numbers only look like what they were sorted as: bytes of weights can begin with any magic.

    Asked of a file that a model names as its own data, for the formats whose magic is three bytes or fewer.
    """
    content = read_at(stream, 0, _CHANCE)
    if found.kind is Format.TORCH_LEGACY_PICKLE:
        return runs_nothing(content)
    if found.archive == "zlib file":
        return _fails(zlib.decompressobj(), content)
    if found.archive == "LZMA file":
        import lzma

        return _fails(lzma.LZMADecompressor(), content)
    return not found.archive and not found.closed and found.kind is Format.UNKNOWN and not found.problem


def _fails(reader: object, content: bytes) -> bool:
    import lzma

    try:
        reader.decompress(content, 4096)  # type: ignore[attr-defined]
    except (zlib.error, lzma.LZMAError, EOFError):
        return True
    return False
