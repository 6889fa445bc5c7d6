"""Hostile files under names that promise no model, and archives of all kinds, each made by a few bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from hostile_files import Harm, Piece, zipped
from hostile_graphs import network, script
from hostile_keras import keras, layer, sequential
from hostile_pickles import called, state, text, torch_zip, two

Files = Mapping[str, bytes]


def system(harm: Harm) -> bytes:
    """A pickle that calls os.system."""
    return two(called("posix", "system", text(harm.command)))


def array(harm: Harm) -> bytes:
    """A NumPy file whose array of objects is that pickle."""
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head += b" " * (117 - len(head)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + system(harm)


def seven_zip(harm: Harm) -> bytes:
    """The header of a 7z archive with one packed stream, and that stream."""
    packed = lzma.compress(system(harm), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    start = struct.pack("<QQI", len(packed), 0, 0)
    return b"7z\xbc\xaf\x27\x1c\0\x04" + struct.pack("<I", zlib.crc32(start)) + start + packed


HIDDEN: dict[str, Callable[[Harm], bytes]] = {
    "scores.npy": array,
    "backup.zip": lambda harm: zip_of({"notes.txt": b"notes", "data/weights": system(harm)}),
    "backup.7z": seven_zip,
    "session.dill": lambda harm: (
        b"\x80\x04\x95" + struct.pack("<Q", len(system(harm)) - 2) + system(harm)[2:]
    ),
    "mobile.ptl": lambda harm: torch_zip(system(harm), Piece("m/constants.pkl", two(b")"))),
    "net.jit": lambda harm: script(network(f"torch.from_file('{harm.marker}', True, 4)")),
    "net.torchscript": lambda harm: script(network(f"torch.load('{harm.marker}')")),
    "forest.model": lambda harm: f"cposix\nsystem\n(S'{harm.command}'\ntR.".encode(),
    "table.dat": lambda harm: torch_zip(state(called("posix", "system", text(harm.command)))),
    "net.pt.gz": lambda harm: gzip.compress(torch_zip(system(harm))),
    "net.keras.zip": lambda harm: keras(sequential(layer("Lambda", "l", function=["4wEAAA==", None, None])))(
        harm
    ),
    "weights": system,
}
"""The twelve kinds of name under which a folder used to hide a file, each with something that runs code."""


def zip_of(files: Files, *, method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"") -> bytes:
    """An archive as `zip` writes it, with an entry for each folder."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as archive:
        for folder in sorted({name.rpartition("/")[0] for name in files} - {""}):
            archive.writestr(zipfile.ZipInfo(f"{folder}/"), b"")
        for name, content in files.items():
            archive.writestr(name, content)
        archive.comment = comment
    return raw.getvalue()


def tar_of(files: Files, *members: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in members:
            archive.addfile(entry)
    return raw.getvalue()


def old_tar(files: Files) -> bytes:
    """As tar wrote it before POSIX: a header without a mark of its kind, only its sum."""
    raw = b""
    for name, content in files.items():
        head = name.encode().ljust(100, b"\0") + b"0000644\x000000000\x000000000\0"
        head += b"%011o\0" % len(content) + b"00000000000\0" + b" " * 8 + b"0"
        head = head.ljust(512, b"\0")
        head = head[:148] + b"%06o\0 " % sum(head) + head[156:]
        raw += head + content + bytes(-len(content) % 512)
    return raw + bytes(1024)


def tar_link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


PACKERS: dict[str, Callable[[Files], bytes]] = {
    "zip": zip_of,
    "stored.zip": lambda files: zip_of(files, method=zipfile.ZIP_STORED),
    "xz.zip": lambda files: zip_of(files, method=zipfile.ZIP_LZMA),
    "commented.zip": lambda files: zip_of(files, comment=b"6d6ac3ec7f0e3eb4"),
    "tar": tar_of,
    "old.tar": lambda files: old_tar(files),
    "tar.gz": lambda files: gzip.compress(tar_of(files)),
    "tar.bz2": lambda files: bz2.compress(tar_of(files)),
    "tar.xz": lambda files: lzma.compress(tar_of(files)),
    "tar.lzma": lambda files: lzma.compress(tar_of(files), lzma.FORMAT_ALONE),
    "tar.z": lambda files: zlib.compress(tar_of(files)),
    "zip-in.zip": lambda files: zip_of({"inner.zip": zip_of(files)}),
    "zip-in.tar.gz": lambda files: gzip.compress(tar_of({"inner.zip": zip_of(files)})),
}
"""Every kind of archive that is looked into, by the end of its name."""


def encrypted(name: str, content: bytes) -> bytes:
    """A zip archive that says of its member that it is encrypted."""
    return zipped(Piece(name, content, flags=1))


def bomb(megabytes: int = 40) -> bytes:
    return zip_of({"zeros.bin": bytes(megabytes * 2**20)})


def write_all(folder: Path, files: Files) -> Path:
    """Writes files by their paths below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def joblib_like(harm: Harm) -> bytes:
    """What joblib.dump(compress=3) writes: a pickle in zlib."""
    return zlib.compress(pickle.PROTO + b"\x04" + system(harm)[2:], 3)
