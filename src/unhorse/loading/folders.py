"""Every file that a command's paths name or hold: what is opened, what is known, and what is neither.

A file is sorted by its bytes, whatever its name.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from unhorse.checks.archive_names import unread
from unhorse.checks.harmless import is_of_git
from unhorse.checks.kinds import Format, refused_kind
from unhorse.checks.onnx_outline import external_names
from unhorse.checks.sorting import Sorted, is_by_chance, sort
from unhorse.loading import addresses, archived, sources
from unhorse.loading.listing import Listing, Patterns, look_into
from unhorse.rules import LoadFailed, LoadRefused

SUFFIXES = (
    *(".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2", ".onnx", ".keras", ".h5", ".hdf5"),
    *(".pkl", ".pickle", ".pb", ".mar", ".tar", ".joblib", ".npz", ".gguf", ".tflite", ".mlmodel"),
)
"""Names that promise a model: text under one of them is reported, for it is not what it says."""
_KINDS = {
    **{stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"},
    **{stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"},
}
_CARD, _CARD_BYTES = sources.FOLDER_MARKS[0], 2**24
_READABLE = "let this user read it, or leave it out with --exclude"
_LEAVE_OUT = "leave it out with --exclude '{}' if you know what it is"
_SAVED_MODEL = ("saved_model.pb", "saved_model.pbtxt", "keras_metadata.pb", "fingerprint.pb")


def list_files(paths: Sequence[Path], patterns: Patterns = Patterns()) -> Listing:  # noqa: B008 - immutable
    """What is to be done with each file that `paths` name or hold; ValueError where there is none."""
    for path in paths:
        if (missing := addresses.missing(path)) is not None:
            raise missing
    listing = Listing()
    roots = [Path(os.path.realpath(path)) for path in paths if path.is_dir()]
    for path in paths:
        if path.is_dir():
            _Walk(path, roots, patterns, listing).go()
        else:
            _named(path, patterns, listing)
    return listing


def _named(path: Path, patterns: Patterns, listing: Listing) -> None:
    """A path that names a file: opened whatever it is, unless it is an archive."""
    if patterns.leave_out(path.as_posix()):
        listing.excluded += 1
        return
    if archived.divided(path) is None:
        try:
            with sources.open_file(path) as file:
                found = sort(file)
                if found.archive:
                    look_into(path, path, found, listing)
                    return
        except (OSError, LoadRefused, LoadFailed):
            pass  # said when it is its turn
    listing.models.append(path)


class _File(NamedTuple):
    """A regular file of a folder: how it is named, and where its bytes are if that is a hub's link."""

    path: Path
    place: Path
    inode: tuple[int, int]


class _Walk:
    """Goes through a folder and those in it."""

    def __init__(self, root: Path, roots: list[Path], patterns: Patterns, listing: Listing) -> None:
        self.root, self.roots, self.patterns, self.listing = root, roots, patterns, listing
        self.linked: set[tuple[int, int]] = set()
        self.waiting: list[_File] = []

    def go(self) -> None:
        folders = [self.root]
        while folders:
            folder = folders.pop()
            files, inside = self.entries(folder)
            folders += reversed(inside)
            self.waiting += self.without_models(folder, files)
        # last, for a hub's links may claim what lies in another folder
        by_folder: dict[Path, list[_File]] = {}
        for file in self.waiting:
            by_folder.setdefault(file.path.parent, []).append(file)
        for files in by_folder.values():
            self.each(files)
        self.listing.models.sort()

    def entries(self, folder: Path) -> tuple[list[_File], list[Path]]:
        """The regular files of a folder that are not left out, and its folders; all else is reported."""
        files, inside = [], []
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.listing.skip(folder, _unreadable(error, "the folder"))
            return [], []
        for entry in entries:
            path = folder / entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    inside.append(path)
                elif self.patterns.leave_out(path.relative_to(self.root).as_posix()):
                    self.listing.excluded += 1
                elif entry.is_symlink():
                    files += self.link(path)
                else:
                    files += self.file(path, path)
            except OSError as error:
                self.listing.skip(path, _unreadable(error, "the file"))
        return files, inside

    def file(self, path: Path, place: Path) -> list[_File]:
        found = place.stat(follow_symlinks=False)
        if stat.S_ISREG(found.st_mode):
            return [_File(path, place, (found.st_dev, found.st_ino))]
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        self.listing.skip(path, LoadRefused("LD223", f"it is {kind}", "give the model file itself"), kind)
        return []

    def link(self, path: Path) -> list[_File]:
        """What a link leads to, where it is the link of a hub's cache; others are reported, not followed."""
        target = Path(os.path.realpath(path))
        if (blob := sources.hub_blob(path)) is not None:
            files = [file for file in self.file(path, blob) if file.inode not in self.linked]
            self.linked |= {file.inode for file in files}
            if not files:  # two commits of a hub's cache have it in common
                self.listing.links.append((str(path), str(target)))
            return files
        if not any(target.is_relative_to(root) for root in self.roots):
            reason = f"the link leads out of the folder, to {target}"
            problem = LoadRefused("LD234", reason, "give the file it leads to, if you mean it")
            self.listing.skip(path, problem, "link")
        elif not target.exists():
            problem = LoadRefused("LD232", "the link leads to nothing", "remove it")
            self.listing.skip(path, problem, "link")
        else:
            self.listing.links.append((str(path), str(target)))
        return []

    # --- models of several files ------------------------------------------------------------------------

    def without_models(self, folder: Path, files: list[_File]) -> list[_File]:
        """The files that belong to no model which the folder as a whole is; that model is listed."""
        by_name = {file.path.name: file for file in files}
        if not by_name.keys().isdisjoint(sources.FOLDER_MARKS):
            parts = sources.parts_of(folder)
            if parts and parts[0] in by_name:
                names = by_name.keys() & {*parts, *_of_ours(folder)}
                self.listing.models.append(folder)
                self.listing.parts += len(names) - 1
                return [file for file in files if file.path.name not in names]
        return files

    def each(self, files: list[_File]) -> None:
        """The files of one folder that are no part of a model of the hub's or of ours."""
        found: list[tuple[_File, Sorted]] = []
        for file in files:
            if file.inode in self.linked and file.path == file.place:
                self.listing.parts += 1  # a blob of a hub's cache, looked at under its name
                continue
            try:
                with sources.open_file(file.place) as stream:
                    if (sorting := self.sorted(file, stream)) is not None:
                        found.append((file, sorting))
            except LoadRefused as problem:
                self.listing.skip(file.path, problem)
            except (LoadFailed, OSError) as error:
                reason = error.reason if isinstance(error, LoadFailed) else f"cannot be read ({error})"
                self.listing.skip(file.path, LoadRefused("LD232", reason, _READABLE))
        named = self.named_by(found) | self.of_saved_model(files)
        for file, sorting in found:
            self.place(file, sorting, file.path.name in named)

    def sorted(self, file: _File, stream: BinaryIO) -> Sorted | None:
        """What the file is; None where it is counted already."""
        found = sort(stream)
        place = file.path.relative_to(self.root)
        if ".git" in place.parts[:-1]:
            inside = place.as_posix().rpartition(".git/")[2]
            stream.seek(0)
            if is_of_git(inside, stream.read(8)):
                self.listing.harmless["git"] += 1
                return None
        if not found.harmless:
            return found
        if found.harmless in ("text", "empty") and file.path.name.lower().endswith(SUFFIXES):
            self.listing.models.append(file.path)  # it is none: why, is said as for any other
        else:
            self.listing.harmless[found.harmless] += 1
        return None

    def named_by(self, found: Sequence[tuple[_File, Sorted]]) -> set[str]:
        """The names of neighbours that ONNX models of the folder keep their tensors in."""
        onnx = [file for file, sorting in found if sorting.kind is Format.ONNX]
        named: set[str] = set()
        for file in onnx if len(found) > len(onnx) else ():
            with sources.open_file(file.place) as stream:
                named.update(external_names(stream))
        return named

    def of_saved_model(self, files: Sequence[_File]) -> set[str]:
        """The files that TensorFlow writes beside saved_model.pb and into its folder of variables."""
        names = {file.path.name for file in files}
        if not files:
            return set()
        folder = files[0].path.parent
        if not names.isdisjoint(_SAVED_MODEL[:2]):
            return names & set(_SAVED_MODEL[2:])
        saved = any((folder.parent / mark).is_file() for mark in _SAVED_MODEL[:2])
        if folder.name == "variables" and saved:
            return {name for name in names if name.startswith("variables.")}
        return set()

    def place(self, file: _File, found: Sorted, named: bool) -> None:
        """Puts a file where it belongs; `named` says that a model calls it its own data."""
        if named:
            with sources.open_file(file.place) as stream:
                if is_by_chance(stream, found):
                    self.listing.parts += 1
                    return
        if found.archive:
            look_into(file.path, file.place, found, self.listing)
        elif found.closed:
            reason = f"the file is a {found.closed}, which unhorse does not read"
            self.listing.skip(file.path, unread(reason), found.closed)
        elif found.is_model:
            self.listing.models.append(file.path)
        else:
            remedy = _LEAVE_OUT.format(f"*{file.path.suffix}" if file.path.suffix else file.path.name)
            reason = "the file is of no kind that unhorse opens or knows as harmless"
            unknown = LoadRefused("LD232", reason, remedy)
            named_like = refused_kind(Format.UNKNOWN, file.path.name)
            self.listing.skip(file.path, named_like if named_like.rule == "LD235" else unknown)


def _of_ours(folder: Path) -> tuple[str, ...]:
    """What lies beside the weights in a folder that unhorse wrote; a trigger only in a victim of its zoo."""
    try:
        with sources.open_file(folder / _CARD) as file:
            card = json.loads(file.read(_CARD_BYTES))
    except (OSError, ValueError, RecursionError):  # LoadRefused and LoadFailed are ValueErrors
        return ()
    if not isinstance(card, dict) or "architecture" not in card:
        return ()
    return (_CARD, "trigger.safetensors") if isinstance(card.get("attack"), dict) else (_CARD,)


def _unreadable(error: OSError, what: str) -> LoadRefused:
    return LoadRefused("LD232", f"{what} cannot be read ({error.strerror or error})", _READABLE)
