"""HDF5 files walked link by link: nothing leads out of the file, and no data set claims more than it has."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from unhorse.checks.zip_directory import read_at
from unhorse.extras import install_line
from unhorse.rules import LoadFailed, LoadRefused

MAX_OBJECTS = 50_000
MAX_NESTING = 32
MAX_TOTAL_BYTES = 4 * 2**30
MAX_RATIO = 200
MAX_ATTRIBUTE_BYTES = 32 * 2**20

_REMEDY = "load it where you trust it and save it again with model.save('model.keras')"
_FOREIGN_REMEDY = "unhorse opens HDF5 files that Keras wrote; export the network as ONNX or safetensors"
_GZIP, _SHUFFLE, _CHECKSUM = 1, 2, 3  # the numbers that HDF5 gives to its filters
_MARKS = {
    *("model_config", "keras_version", "backend", "layer_names", "training_config", "weight_names"),
    *("model_weights", "layers", "vars", "optimizer_weights", "top_level_model_weights"),
}
"""What Keras puts into the root, one of them at least."""
_WANTED = {"model_config", "keras_version"}  # libhdf5 may crash on a damaged text: no more than needed
_HEAP, _CHUNK = b"GCOL\x01\0\0\0", 2**20
_CONTAINER_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, AttributeError)


def check_hdf5(stream: BinaryIO) -> dict[str, str]:
    """What Keras says in the root of an HDF5 file; LD219 for what leads out of it or claims too much.

    LD235 for a file that is not Keras's, unless it leads to other files.
    """
    try:
        import h5py
    except ImportError as error:
        reason = "reading Keras and HDF5 files needs h5py"
        raise LoadRefused("LD224", reason, install_line("keras")) from error
    size = stream.seek(0, io.SEEK_END)
    _check_heaps(stream, size)
    try:
        with h5py.File(stream, "r") as file:
            if file.userblock_size:
                raise LoadRefused("LD213", "bytes stand before the HDF5 file", _REMEDY)
            foreign = not _MARKS & {*file.attrs, *file}
            _Walk(h5py, size, foreign).group(file)
            if foreign:
                raise _not_keras("it has neither a configuration nor layers")
            return _texts(file)
    except LoadRefused:
        raise
    except _CONTAINER_ERRORS as error:
        raise LoadFailed(f"the HDF5 file is damaged ({_first_line(error)})") from error


def _check_heaps(stream: BinaryIO, size: int) -> None:
    """Raises unless the objects of every heap of texts tile it: over some that do not, HDF5 never ends."""
    for start in _places(stream, size):
        length = int.from_bytes(read_at(stream, start + 8, 8), "little")
        at, end = start + 16, start + length
        if length < 16 or end > size:
            raise LoadFailed("the HDF5 file has a heap that ends outside of it: it is truncated or damaged")
        while at + 16 <= end:
            header = read_at(stream, at, 16)
            index, taken = int.from_bytes(header[:2], "little"), int.from_bytes(header[8:], "little")
            # object 0 is what is left free, with its header; others are rounded up to 8 bytes behind theirs
            at += taken if index == 0 else 16 + (taken + 7) // 8 * 8
            if index == 0 and at == end:
                break
            if index == 0 or taken == 0 or at > end:
                raise LoadFailed("the HDF5 file has a heap whose objects do not fit: it is damaged")


def _places(stream: BinaryIO, size: int) -> Iterator[int]:
    """Where the heaps begin, found by their signature and version."""
    for base in range(0, size, _CHUNK):
        chunk = read_at(stream, base, _CHUNK + len(_HEAP) - 1)
        at = chunk.find(_HEAP)
        while at >= 0:
            yield base + at
            at = chunk.find(_HEAP, at + 1)


class _Walk:
    """What adds up over the groups of a file; one that is not Keras's (`foreign`) may be odd, not hostile."""

    def __init__(self, h5py: Any, size: int, foreign: bool) -> None:
        self.h5py, self.size, self.foreign = h5py, size, foreign
        self.seen: set[Any] = set()
        self.total = 0

    def odd(self, what: str) -> LoadRefused:
        """The refusal of what Keras does not write."""
        return _not_keras(what) if self.foreign else _refused(what)

    def group(self, root: Any) -> None:
        """Every link below a group is a hard one, to a group or a data set that no other link leads to."""
        open_groups = [(root, 0)]
        while open_groups:
            group, depth = open_groups.pop()
            self.enter(group, depth)
            for name in group:
                link = group.get(name, getlink=True)
                if type(link) is not self.h5py.HardLink:
                    what = f"{_shown(name)} is a link to another place or file ({type(link).__name__})"
                    raise self.odd(what) if type(link) is self.h5py.SoftLink else _refused(what)
                found = group[name]
                if isinstance(found, self.h5py.Group):
                    open_groups.append((found, depth + 1))
                elif isinstance(found, self.h5py.Dataset):
                    self.enter(found, depth + 1)
                    self.dataset(name, found)
                else:
                    raise self.odd(f"{_shown(name)} is neither a group nor a data set")

    def enter(self, found: Any, depth: int) -> None:
        address = self.h5py.h5o.get_info(found.id).addr
        if address in self.seen:
            raise self.odd(
                f"two links lead to {_shown(found.name)}: the file has a cycle or counts data twice"
            )
        self.seen.add(address)
        if depth > MAX_NESTING or len(self.seen) > MAX_OBJECTS:
            raise self.odd(f"it nests deeper than {MAX_NESTING} or has more than {MAX_OBJECTS} objects")

    def dataset(self, name: str, data: Any) -> None:
        settings = data.id.get_create_plist()
        filters = [settings.get_filter(index)[0] for index in range(settings.get_nfilters())]
        if data.is_virtual or data.external:
            raise _refused(f"data set {_shown(name)} lies in other files")
        if not set(filters) <= {_GZIP, _SHUFFLE, _CHECKSUM}:
            raise self.odd(
                f"data set {_shown(name)} needs filters {filters}, which may be code outside the file"
            )
        if data.dtype.kind not in "fiubS" or data.dtype.hasobject:
            raise self.odd(f"data set {_shown(name)} holds {data.dtype}, not numbers")
        stored = data.id.get_storage_size()
        if data.nbytes > stored * (MAX_RATIO if filters else 1) + 4096 * bool(stored) or stored > self.size:
            raise self.odd(
                f"data set {_shown(name)} claims {data.nbytes} bytes and the file has {stored} for it"
            )
        self.total += data.nbytes
        if self.total > MAX_TOTAL_BYTES:
            raise self.odd("its data sets claim more than 4 GiB")


def _texts(file: Any) -> dict[str, str]:
    texts = {}
    for name in _WANTED & set(file.attrs):
        if file.attrs.get_id(name).get_storage_size() > MAX_ATTRIBUTE_BYTES:
            raise _refused(f"attribute {_shown(name)} is larger than any configuration")
        value = file.attrs[name]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, str):
            texts[name] = value
    return texts


def _shown(name: str) -> str:
    return repr(name[:100])


def _not_keras(what: str) -> LoadRefused:
    return LoadRefused("LD235", f"it is an HDF5 file, and not one of Keras ({what})", _FOREIGN_REMEDY)


def _refused(what: str) -> LoadRefused:
    return LoadRefused("LD219", f"the HDF5 file is not what Keras writes: {what}", _REMEDY)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
