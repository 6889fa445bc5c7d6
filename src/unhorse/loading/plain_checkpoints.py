"""A file of torch.save that any protocol wrote, as one that torch.load(weights_only=True) reads."""

from __future__ import annotations

import io
import zipfile
from typing import BinaryIO

from unhorse.checks import archives, old_torch_files, zip_directory
from unhorse.checks.pickle_globals import contents
from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_names import Danger
from unhorse.checks.pickle_values import Reading
from unhorse.checks.pickle_writer import write_plain
from unhorse.checks.sniff import Format, sniff


def plain_checkpoint(stream: BinaryIO) -> BinaryIO:
    """The file itself where it is of protocol 2 and names tensors only; else a copy in memory that is.

    The file has passed its check. Its tensors are the same; values beside them are left out.
    """
    kind = sniff(stream)
    copied = _old(stream) if kind is Format.TORCH_OLD else _zip(stream) if kind is Format.TORCH_ZIP else None
    stream.seek(0)
    return copied or stream


def _is_plain(reading: Reading) -> bool:
    return reading.protocol == 2 and contents(reading, texts=False).worst is Danger.PLAIN


def _zip(stream: BinaryIO) -> BinaryIO | None:
    members = zip_directory.read_directory(stream).members
    (pickled,) = (member for member in members if member.local() == "data.pkl")
    reading = follow(archives.read_member(stream, pickled))
    if _is_plain(reading):
        return None
    copied = io.BytesIO()
    with zipfile.ZipFile(copied, "w", zipfile.ZIP_STORED) as archive:
        for member in members:
            plain = write_plain(reading.root) if member is pickled else None
            content = archives.open_member(stream, member).read() if plain is None else plain
            archive.writestr(zipfile.ZipInfo(member.name), content)
    copied.seek(0)
    return copied


def _old(stream: BinaryIO) -> BinaryIO | None:
    readings = old_torch_files.pickles_of(stream)
    if all(_is_plain(reading) for reading in readings):
        return None
    copied = io.BytesIO(b"".join(write_plain(reading.root) for reading in readings))
    copied.seek(0, io.SEEK_END)
    stream.seek(readings[-1].end)
    copied.write(stream.read())
    copied.seek(0)
    return copied
