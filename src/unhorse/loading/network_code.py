"""The user's own Python for a network, read as bytes; it is run elsewhere (loading/network_reading.py)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import server
from unhorse.sandbox.confinement import Limits, Tier

MAX_FILES, MAX_BYTES, MAX_DEPTH = 200, 5 * 2**20, 8
CONTAINER_REMEDY = (
    "use Linux 5.13 or later on x86-64 or ARM64, or a container there "
    '(docker run --rm --network none --read-only --tmpfs /tmp -v "$PWD:/work:ro" -w /work unhorse ...), '
    "or pass --trust-network if you would run the file yourself"
)
_DEFINED = re.compile(rb"^(?:class|def)\s+([A-Za-z]\w*)", re.MULTILINE)
_WITHIN = re.compile(rb"^\s*from\s+\.", re.MULTILINE)
_PROBE = Limits(memory=2**28, cpu_seconds=60, wall_seconds=90)


@dataclass(frozen=True)
class NetworkCode:
    """A class or factory in a Python file, its arguments, and every source that it may import.

    `sources` maps paths below the file's folder, with / between, to bytes; `folder` is that folder's name, ""
    unless the file belongs to a package. `arguments` are JSON: by name (a mapping) or by place (a list). With
    `trusted` the user said that the code may run where it is not wholly confined.
    """

    file: str
    name: str
    sources: Mapping[str, bytes]
    folder: str = ""
    arguments: Mapping[str, Any] | list[Any] = field(default_factory=dict)
    trusted: bool = False
    links: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the file alone."""
        return hashlib.sha256(self.sources[self.file]).hexdigest()

    @property
    def description(self) -> str:
        """What is run, with hashes, for a report."""
        beside = sorted(name for name in self.sources if name != self.file)
        text = f"network {self.file}:{self.name}, SHA-256 {self.sha256}"
        if beside:
            listed = "".join(f"{hashlib.sha256(self.sources[name]).hexdigest()}  {name}\n" for name in beside)
            text += f"; {len(beside)} files beside it, SHA-256 of their list "
            text += hashlib.sha256(listed.encode()).hexdigest()
        return text + (f"; arguments {json.dumps(self.arguments, sort_keys=True)}" if self.arguments else "")

    def to_json(self) -> dict[str, Any]:
        """As a restricted process is told it."""
        return {
            "file": self.file,
            "name": self.name,
            "folder": self.folder,
            "arguments": self.arguments,
            "trusted": self.trusted,
            "links": list(self.links),
            "sources": {name: base64.b64encode(text).decode() for name, text in self.sources.items()},
        }


def read_network(
    place: str | Path,
    arguments: str | Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    trusted: bool = False,
) -> NetworkCode:
    """The code that FILE.py:NAME names, with the .py files beside it and in packages below its folder.

    `arguments` may be JSON text. Nothing is run or imported. LoadRefused LD223 for links and what is no
    regular file, LD226 for more than 200 files or 5 MB; LoadFailed where it cannot be read; ValueError for
    what is no FILE.py:NAME or no JSON.
    """
    path, name = _parted(str(place))
    text = _regular(path)
    if not name:
        found = [item.decode() for item in _DEFINED.findall(text)][:12]
        raise ValueError(
            f"{path.name} is given without a name: say --network {path.name}:NAME; it defines "
            f"{', '.join(found) or 'nothing'}"
        )
    folder = path.absolute().parent
    belongs = (folder / "__init__.py").is_file() or _WITHIN.search(text) is not None
    sources, links = _beside(folder, {path.name: text})
    return NetworkCode(
        path.name, name, sources, folder.name if belongs else "", _as_json(arguments), trusted, tuple(links)
    )


def require_confinement(code: NetworkCode | None) -> None:
    """LoadRefused LD225 unless code would run where files and calls are confined, or is trusted.

    It asks a restricted process that is given nothing of the code.
    """
    if code is None or code.trusted:
        return
    try:
        tier = server.run("tier", [], {}, heavy=True, limits=_PROBE).tier
    except LoadRefused as error:  # no restricted process at all, as on Windows
        raise unconfined("none") from error
    if tier != Tier.FULL:
        raise unconfined(tier)


def unconfined(tier: str) -> LoadRefused:
    reason = f"a network file is run only where files and calls are confined, and here is only {tier}"
    return LoadRefused("LD225", reason, CONTAINER_REMEDY)


def _parted(place: str) -> tuple[Path, str]:
    head, colon, tail = place.rpartition(":")
    if colon and all(part.isidentifier() for part in tail.split(".")):
        path, name = Path(head), tail
    else:
        path, name = Path(place), ""
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ValueError(f"{place!r} is not FILE.py:NAME: give a Python file and a class or function in it")
    return path, name


def _as_json(arguments: str | Mapping[str, Any] | Sequence[Any] | None) -> Mapping[str, Any] | list[Any]:
    try:
        found = json.loads(arguments if isinstance(arguments, str) else json.dumps(arguments or {}))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"the network's arguments are not JSON ({error}): write '{{\"num_classes\": 10}}'"
        ) from error
    if not isinstance(found, dict | list):
        raise ValueError("the network's arguments are no JSON object: write '{\"num_classes\": 10}'")
    return found


def _regular(path: Path) -> bytes:
    """A file's bytes; not through a link, and not more than may be sent."""
    if path.is_symlink():
        raise LoadRefused(
            "LD223", f"{path.name} is a symbolic link", f"give the file it leads to: {path.resolve()}"
        )
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read ({error.strerror})", "check the path") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LoadRefused("LD223", f"{path.name} is not a regular file", "give the Python file itself")
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise _too_much()
    return text


def _beside(folder: Path, sources: dict[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """The sources with all that lie beside them, and the links among those, which are left out."""
    links: list[str] = []
    total = sum(map(len, sources.values()))
    for path in _python_files(folder, 0):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file():
            links.append(name)
            continue
        if name not in sources:
            sources[name] = _regular(path)
            total += len(sources[name])
        if len(sources) > MAX_FILES or total > MAX_BYTES:
            raise _too_much()
    return sources, links


def _python_files(folder: Path, depth: int) -> Iterator[Path]:
    """Python files of a folder and of the packages below it; no folder is entered through a link."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.endswith(".py") and entry.name[:-3].isidentifier():
            yield path
        elif entry.is_dir(follow_symlinks=False) and depth < MAX_DEPTH and (path / "__init__.py").is_file():
            yield from _python_files(path, depth + 1)


def _too_much() -> LoadRefused:
    return LoadRefused(
        "LD226",
        f"beside the network file lie more than {MAX_FILES} Python files or {MAX_BYTES // 2**20} MB",
        "copy the file, and what it imports, into a folder of their own",
    )
