"""Opens the files of a model and takes them down as they are, so that what is hashed is what is read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from unhorse.checks import weight_files
from unhorse.checks.onnx_outline import external_names, is_plain
from unhorse.checks.sniff import EXPORT_REMEDY, Format, refusal, sniff
from unhorse.loading import archived, hub_folders, snapshots
from unhorse.rules import LoadFailed, LoadRefused

FOLDER = "folder"
HUGGING_FACE = "Hugging Face folder"
NAMELESS = "the file"
FOLDER_MARKS = ("card.json", "config.json")
"""A folder without one of these is no model as a whole."""


@dataclass(frozen=True)
class Source:
    """The open files of one model: the model first, then those beside it; `sha256` is over all of them.

    They are copies in memory, which nobody else can write, unless `kept` is false. A Hugging Face folder may
    have its weights twice: `sets` are the files of each. `left_out` are weights that its index does not name.
    """

    path: Path
    kind: Format | None
    names: tuple[str, ...]
    files: tuple[BinaryIO, ...]
    sha256: str
    size: int
    problem: LoadRefused | LoadFailed | None = None
    sets: tuple[tuple[str, ...], ...] = ()
    left_out: tuple[str, ...] = ()
    kept: bool = True

    def check(self) -> None:
        """Raises what is already known to speak against the file."""
        if self.problem is not None:
            raise self.problem

    @property
    def format(self) -> str:
        """The format in words."""
        return HUGGING_FACE if self.kind is None else str(self.kind)

    def options(self) -> dict[str, object]:
        """What a task is told of the files: no name that it does not need to find them by."""
        if self.kind is None:
            return {"format": FOLDER, "names": list(self.names)}
        return {"format": str(self.kind), "names": [NAMELESS, *self.names[1:]]}

    def parts(self, weights: Sequence[str]) -> tuple[list[BinaryIO], list[str]]:
        """The files and names of one set of weights, and of the configuration."""
        others = {name for names in self.sets for name in names} - set(weights)
        chosen = [(f, name) for f, name in zip(self.files, self.names, strict=True) if name not in others]
        chosen.sort(key=lambda pair: pair[1] not in weights)
        return [file for file, _ in chosen], [name for _, name in chosen]

    def verify(self) -> None:
        """LoadFailed where a file that is too large to be copied was written since it was hashed."""
        if (
            not self.kept
            and _sha256(self.names, [snapshots.digest(file) for file in self.files]) != self.sha256
        ):
            reason = f"{self.path.name} was written while it was read"
            raise LoadFailed(reason, "let nothing write to it, and try again")


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The files of a model file, of a folder of unhorse (its weights) or of Hugging Face (`kind` is None).

    `check` raises LoadRefused LD202 for what is no model, LD201 for a format that is not opened, LD213 for
    two formats in one. Raised here: LD208 for more than 4 GiB, LD223 for links and for what is not a regular
    file, LD202 for a folder without a model, LoadFailed where it cannot be read.
    """
    with ExitStack() as stack:
        names, folder = _names(path)
        inside = folder if path.is_dir() else None
        files = [stack.enter_context(_open(folder / name, within=inside)) for name in names]
        kind, problem = None, None
        if "config.json" not in names:
            kind, problem = _sniffed(files[0], path.name)
        if kind is Format.ONNX and archived.divided(path) is None:
            for name in _data_beside(files[0], folder):
                names.append(name)
                files.append(stack.enter_context(_open(folder / name)))
        size = sum(os.fstat(file.fileno()).st_size for file in files)
        if size > weight_files.MAX_FILE_BYTES:
            raise LoadRefused("LD208", f"{path.name} has more than 4 GiB", EXPORT_REMEDY)
        taken = snapshots.taken(files, size)
        for file in taken.files:
            stack.enter_context(file)
        if kind is not None:  # what was sniffed above may have been written since
            kind, problem = _sniffed(taken.files[0], path.name)
        sets, left_out = hub_folders.weights(folder) if kind is None else ((), ())
        yield Source(
            path=path,
            kind=kind,
            names=tuple(names),
            files=tuple(taken.files),
            sha256=_sha256(names, taken.digests),
            size=taken.size,
            problem=problem,
            sets=sets,
            left_out=left_out,
            kept=taken.kept,
        )


def _sniffed(file: BinaryIO, name: str) -> tuple[Format, LoadRefused | LoadFailed | None]:
    try:
        kind = sniff(file)
    except LoadRefused as problem:
        return Format.UNKNOWN, problem
    return kind, refusal(kind, name)


def _names(path: Path) -> tuple[list[str], Path]:
    """Which files to open, and the folder they are in."""
    if not path.is_dir():
        return [path.name], path.parent
    present = {entry.name for entry in path.iterdir()}
    if "card.json" in present and "model.safetensors" in present:
        return ["model.safetensors"], path
    if "config.json" in present:
        weights = [name for names in hub_folders.weights(path)[0] for name in names]
        if weights:
            return [*weights, *(name for name in hub_folders.CONFIGURATION if name in present)], path
    raise LoadRefused(
        "LD202",
        f"folder {path.name} has no model.safetensors with a card or config.json",
        "give the model file",
    )


def parts_of(folder: Path) -> list[str]:
    """The files of the one model that a folder is, its weights first; none where it is not one model."""
    try:
        return _names(folder)[0]
    except (OSError, LoadRefused, LoadFailed):
        return []


def open_file(path: Path) -> BinaryIO:
    """A regular file for reading: LoadRefused LD223 for a link or a device, LoadFailed where it cannot be."""
    return _open(path)


def hub_blob(path: Path) -> Path | None:
    """Where a link of a hub's cache leads: from snapshots/COMMIT/... to blobs/ of the same repository."""
    target = Path(os.path.realpath(path))
    for folder in path.absolute().parents:
        if folder.name == "snapshots":
            return target if target.parent == Path(os.path.realpath(folder.parent / "blobs")) else None
    return None


def _open(path: Path, within: Path | None = None) -> BinaryIO:
    """A regular file, opened for reading, and not through a link, unless `within` a hub's snapshot folder."""
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        if (inside := archived.divided(path)) is not None:
            with _open(inside[0]) as archive:
                return archived.open_member(archive, inside[1])
        if path.is_symlink():
            path = _linked(path, within)
        descriptor = os.open(path, flags)
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read ({error.strerror})", "check the path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LoadRefused("LD223", f"{path.name} is not a regular file", "give the model file itself")
    return os.fdopen(descriptor, "rb")


def _linked(path: Path, within: Path | None) -> Path:
    """Where a link of a hub's cache leads: snapshots/<commit>/name to blobs/<hash>. Others are refused."""
    target = Path(os.path.realpath(path))
    if within is not None and target.parent == within.resolve().parent.parent / "blobs":
        return target
    if (blob := hub_blob(path)) is not None:
        return blob
    raise LoadRefused("LD223", f"{path.name} is a symbolic link", f"give the file it leads to: {target}")


def _data_beside(model: BinaryIO, folder: Path) -> list[str]:
    """The regular files of the folder that an ONNX file keeps its tensors in; the checks name absent ones.

    LD216 for a link or anything else in the place of such a file. No other file is opened.
    """
    found = []
    for name in filter(is_plain, external_names(model)):
        try:
            mode = (folder / name).lstat().st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            reason = f"the model keeps tensors in {name[:100]!r}, which is no regular file"
            raise LoadRefused("LD216", reason, "put the data file itself into the folder of the model")
        found.append(name)
    return found


def _sha256(names: Sequence[str], digests: Sequence[str]) -> str:
    """Of a single file its own; of several, that of a list of names and hashes."""
    if len(digests) == 1:
        return digests[0]
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(zip(names, digests, strict=True)))
    return hashlib.sha256(listed.encode()).hexdigest()
