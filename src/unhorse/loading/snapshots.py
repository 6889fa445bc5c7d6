"""Files taken down as they are: hashed and copied in one reading, so that nobody writes to what is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

MAX_COPIED = 256 * 2**20
"""Bytes of one model that are copied into memory; a larger one is hashed once more after it was read."""
_CHUNK = 2**20
_SEALED = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")


class Taken(NamedTuple):
    """The files with their hashes; `kept` says whether they are copies, `size` is of all, in bytes."""

    files: list[BinaryIO]
    digests: list[str]
    size: int
    kept: bool


def taken(files: Sequence[BinaryIO], size: int) -> Taken:
    """Copies of open files of `size` bytes together; the files themselves where they are large.

    A copy has no name: whoever is handed it learns nothing of where the file lies.
    """
    if size > MAX_COPIED or not hasattr(os, "memfd_create"):
        return Taken(list(files), [digest(file) for file in files], size, kept=False)
    copies = [_copied(file) for file in files]
    return Taken(
        [copy for copy, _, _ in copies],
        [hexdigest for _, hexdigest, _ in copies],
        sum(length for _, _, length in copies),
        kept=True,
    )


def digest(file: BinaryIO) -> str:
    """The SHA-256 of an open file, which is left at its start."""
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return found


def _copied(file: BinaryIO) -> tuple[BinaryIO, str, int]:
    import fcntl

    copy = os.fdopen(os.memfd_create("model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    hashing = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        hashing.update(chunk)
        copy.write(chunk)
    length = copy.tell()
    copy.flush()
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, sum(getattr(fcntl, name) for name in _SEALED))
    copy.seek(0)
    return copy, hashing.hexdigest(), length
