"""Finished scans kept by what was scanned: the same file, request and version are not scanned twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import safe_open, save_file
from torch import Tensor

from unhorse import core
from unhorse.report import ScannedModel
from unhorse.rules import Confidence, Finding, Severity

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(ScannedModel, Finding, Severity, Confidence, core.Verdict, core.ScanResult, core.Reference),
        *(core.ReconstructedTrigger, core.ImageGrid, core.Bars, core.Curve, core.Histogram, core.Table),
    )
}


class ScanCache:
    """A folder with one safetensors file per finished scan; a damaged one is as good as none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> tuple[ScannedModel, ...]:
        """The scans of that key, one for each network of the file; none if they were not kept."""
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return ()
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                found = unpacked(json.loads(file.metadata()["scan"]), tensors)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
            return ()
        whole = isinstance(found, tuple) and all(isinstance(one, ScannedModel) for one in found)
        return found if whole else ()

    def problem(self) -> str | None:
        """Why nothing can be kept here, and what to do; None where it can."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="."):
                return None
        except OSError as error:
            return (
                f"the cache {self.folder} cannot be written ({error.strerror or error}), so scans are not "
                "kept: name a folder in UNHORSE_CACHE, or pass --no-cache"
            )

    def write(self, key: str, scanned: tuple[ScannedModel, ...]) -> None:
        """Keeps the scans of one file, where that can be; another process may do the same meanwhile."""
        tensors: dict[str, Tensor] = {}
        document = packed(scanned, tensors)
        draft = self.folder / f".{uuid.uuid4().hex}"
        with suppress(OSError, safetensors.SafetensorError):  # problem() told of it before the scan
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, {"scan": json.dumps(document)})
            draft.replace(self.folder / f"{key}.safetensors")
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def scan_key(sha256: str, request: Mapping[str, object]) -> str:
    """The name of a scan: hash of the model's file, of all that was asked, and of the code that scans."""
    return hashlib.sha256(
        json.dumps([sha256, request, _code()], sort_keys=True, default=str).encode()
    ).hexdigest()


def stamp(path: Path | None) -> list[object]:
    """What tells whether a file, or any below a folder, was changed: names, sizes and times."""
    if path is None:
        return []
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [
        str(path.resolve()),
        *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files),
    ]


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, StrEnum):
        return {"kind": type(value).__name__, "value": str(value)}
    if is_dataclass(value) and not isinstance(value, type):
        content = {part.name: packed(getattr(value, part.name), tensors) for part in fields(value)}
        return {"kind": type(value).__name__, "fields": content}
    if isinstance(value, Mapping):
        return {"map": [[packed(key, tensors), packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [packed(item, tensors) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    if isinstance(value, Sequence):
        return {"list": [packed(item, tensors) for item in value]}
    raise TypeError(f"a {type(value).__name__} cannot be kept")


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `packed`; KeyError, TypeError or ValueError for what it did not write."""
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        kind = _KINDS[value["kind"]]
        if "value" in value:
            return kind(value["value"])
        return kind(**{name: unpacked(item, tensors) for name, item in value["fields"].items()})
    ((form, content),) = value.items()
    if form == "tensor":
        return tensors[content]
    if form == "number":
        return float(content)
    items = [unpacked(item, tensors) for item in (sum(content, []) if form == "map" else content)]
    if form == "map":
        return dict(zip(items[::2], items[1::2], strict=True))
    return tuple(items) if form == "tuple" else items
