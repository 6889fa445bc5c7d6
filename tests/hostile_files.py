"""Files made to harm whoever opens them, in nine formats; none of them may do more than be refused.

A payload touches a marker file or connects to a listener on the loopback; both places are parameters.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

FORMATS = ("safetensors", "torch", "pickle", "torchscript", "pt2", "onnx", "keras", "hdf5", "huggingface")


@dataclass(frozen=True)
class Harm:
    """Where a payload leaves its mark: a file that it creates, a port on 127.0.0.1 that it connects to."""

    marker: Path
    port: int = 9

    @property
    def command(self) -> str:
        return f"touch {self.marker}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{self.marker.name}"


class Link(NamedTuple):
    """A symbolic link in place of a file."""

    target: str


class Fifo(NamedTuple):
    """A named pipe in place of a file, on which opening waits for ever."""


Content = bytes | Link | Fifo


class Folder(NamedTuple):
    """Files by name; `main` is the one that is opened."""

    main: str
    files: Mapping[str, Content]


@dataclass(frozen=True)
class Hostile:
    """A hostile file: by which rule it is refused, and where: on opening, by a check, on loading, or nowhere
    ("report": it opens, and what it says must be escaped).
    """

    name: str
    format: str
    rule: str
    make: Callable[[Harm], Content | Folder]
    caught: str = "check"
    needs: str = ""


@dataclass
class Corpus:
    """The registry that the generators of each format fill."""

    files: dict[str, Hostile] = field(default_factory=dict)

    def add(
        self,
        name: str,
        rule: str,
        make: Callable[[Harm], Content | Folder] | Content | Folder,
        *,
        caught: str = "check",
        needs: str = "",
    ) -> None:
        """Adds a file called "format/what"; `make` may be its content, where that does not depend on harm."""
        assert name not in self.files and name.partition("/")[0] in FORMATS, name
        maker = make if callable(make) else (lambda harm, made=make: made)
        self.files[name] = Hostile(name, name.partition("/")[0], rule, maker, caught, needs)


def write(hostile: Hostile, folder: Path, harm: Harm) -> Path:
    """Writes one hostile file into a folder of its own, and gives the path that a victim would open."""
    place = folder / hostile.name.replace("/", "-")
    place.mkdir(parents=True)
    made = hostile.make(harm)
    files = made.files if isinstance(made, Folder) else {"model": made}
    for name, content in files.items():
        if isinstance(content, Link):
            (place / name).symlink_to(content.target)
        elif isinstance(content, Fifo):
            os.mkfifo(place / name)
        else:
            (place / name).write_bytes(content)
    return place / (made.main if isinstance(made, Folder) else "model")


class Piece(NamedTuple):
    """A member of an archive, and how it lies about itself."""

    name: str
    content: bytes
    method: int = 0
    local_name: str | None = None
    flags: int = 0
    mode: int = 0
    extra: bytes = b""
    behind: bytes = b""
    size: int | None = None
    local_size: int | None = None
    offset: int | None = None
    comment: bytes = b""


def zipped(*pieces: Piece, before: bytes = b"", after: bytes = b"", comment: bytes = b"") -> bytes:
    """A zip archive of these members, wherever they lie."""
    body, directory = bytearray(before), bytearray()
    for piece in pieces:
        packed = piece.content
        if piece.method == 8:
            press = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = press.compress(piece.content) + press.flush()
        offset = len(body) if piece.offset is None else piece.offset
        size = len(piece.content) if piece.size is None else piece.size
        length = size if piece.method == 0 and piece.size is not None else len(packed)
        checksum = zlib.crc32(piece.content)
        local = (piece.local_name if piece.local_name is not None else piece.name).encode()
        name, local_size = piece.name.encode(), size if piece.local_size is None else piece.local_size
        head = (20, piece.flags, piece.method, 0, 33, checksum)
        if piece.offset is None:
            body += struct.pack("<4sHHHHHI", b"PK\3\4", *head)
            body += struct.pack("<IIHH", length, local_size, len(local), len(piece.extra))
            body += local + piece.extra + packed + piece.behind
        directory += struct.pack("<4sHHHHHHI", b"PK\1\2", 0x031E, *head)
        directory += struct.pack("<IIHHHHH", length, size, len(name), 0, len(piece.comment), 0, 0)
        directory += struct.pack("<II", piece.mode << 16, offset) + name + piece.comment
    count = len(pieces)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), len(comment))
    return bytes(body) + bytes(directory) + end + comment + after


def corpus() -> dict[str, Hostile]:
    """Every hostile file by name."""
    import hostile_archives
    import hostile_graphs
    import hostile_keras
    import hostile_pickles

    found = Corpus()
    for part in (hostile_pickles, hostile_archives, hostile_graphs, hostile_keras):
        part.fill(found)
    return found.files
