"""Files that are no model and hide none, told by their bytes: pictures, text, tables, git's own store."""

from __future__ import annotations

import io
import pickletools
import re
from typing import BinaryIO

from unhorse.checks.zip_directory import read_at

_HEAD, _TAIL = 2**16, 2**12
_PICTURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"),
    *(b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  "),
)
_PNM = re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s")
# control characters that text has: tab, line feed, form feed, carriage return, backspace, escape
_CONTROL = bytes(set(range(32)) - {8, 9, 10, 12, 13, 27}) + b"\x7f"

_GIT_FILES = (
    (re.compile(r"objects/[0-9a-f]{2}/[0-9a-f]{38,62}"), (b"x\x01", b"x^", b"x\x9c", b"x\xda")),
    (
        re.compile(r"objects/(pack|info)/[\w./-]+"),
        (b"PACK", b"\xfftOc", b"RIDX", b"BITM", b"MIDX", b"CGPH", b"MTME"),
    ),
    (re.compile(r"index"), (b"DIRC",)),
)
_IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
_CALLS = {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"}


def harmless(stream: BinaryIO) -> str:
    """What a file is that is known as harmless, in one word; empty where it is not known.

    Only for a file in which `sniff` sees no model: the bytes of a model come before anything said here.
    """
    size = stream.seek(0, io.SEEK_END)
    if not size:
        return "empty"
    head = read_at(stream, 0, _HEAD)
    if is_picture(head, size):
        return "image"
    if head.startswith(b"PAR1") and read_at(stream, size - 4, 4) == b"PAR1":
        return "table"
    tail = b"" if size <= _HEAD else read_at(stream, max(size - _TAIL, _HEAD), _TAIL)
    return "text" if is_text(head, cut=size > _HEAD) and is_text(tail, cut=True) else ""


def is_picture(head: bytes, size: int) -> bool:
    """Whether a file of that many bytes begins as PNG, JPEG, GIF, BMP, TIFF, WebP, PNM, JPEG XL or 2000."""
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") == size and head[6:10] == bytes(4)
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    return head.startswith(_PICTURES) or _PNM.match(head) is not None


def is_text(content: bytes, *, cut: bool = False) -> bool:
    """Whether bytes are UTF-8, UTF-16 with its mark, or old 8-bit text; `cut`: an end may split a letter."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        if len(content) % 2 and not cut:
            return False
        try:
            text = content[: len(content) // 2 * 2].decode("utf-16")
        except UnicodeDecodeError:
            return False
        return all(letter.isprintable() or letter in "\t\n\f\r" for letter in text)
    if content.translate(None, _CONTROL) != content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        split = cut and (error.start >= len(content) - 3 or error.end <= 3)
        return split or sum(byte > 127 for byte in content) <= len(content) // 8
    return True


def is_of_git(place: str, head: bytes) -> bool:
    """Whether a file at `place` below a .git folder is git's own: an object, a pack or an index."""
    return any(pattern.fullmatch(place) and head.startswith(magic) for pattern, magic in _GIT_FILES)


def runs_nothing(content: bytes) -> bool:
    """Whether bytes that begin like a pickle break off before they could call anything.

    "cat", "dog" on two lines begin as the import of `at.dog`; what an unpickler would meet next is an error.
    """
    depths, imported = [0], False  # one for each open list of arguments
    try:
        for opcode, _, _ in pickletools.genops(content):
            before = opcode.stack_before
            if opcode.name == "MARK":
                depths.append(0)
            elif pickletools.markobject in before:
                depths.pop()
                depths[-1] += len(opcode.stack_after) - before.index(pickletools.markobject)
            else:
                depths[-1] += len(opcode.stack_after) - len(before)
            if depths[-1] < 0 or (before and depths[-1] < len(opcode.stack_after)):
                return True
            if opcode.name == "STOP" or opcode.name in _CALLS and (imported or opcode.name == "INST"):
                return False
            imported = imported or opcode.name in _IMPORTS
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError):
        return True
    return False
