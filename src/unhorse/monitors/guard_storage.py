"""A guard on disk: a folder with classifier, filter and guard.json, whole or not at all; never a pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from unhorse.core import Classifier
from unhorse.filters.registry import load_filter, save_filter
from unhorse.models.classifier import (
    CARD_FILE,
    WEIGHTS_FILE,
    load_classifier,
    save_classifier,
    weights_hash,
)
from unhorse.monitors.calibration import Calibration
from unhorse.monitors.contrast import NetworkFilter
from unhorse.monitors.guarded_classifier import Policy

GUARD_FILE = "guard.json"
FILTER_FILE = "filter.safetensors"
HASHED = (WEIGHTS_FILE, CARD_FILE, FILTER_FILE)


class GuardCard(BaseModel):
    """guard.json: `filter` has the filter's name and options, `files` the SHA-256 of the other files."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["unhorse-guard-1"] = "unhorse-guard-1"
    policy: Policy
    fpr: float | None
    threshold: float
    calibration: Calibration | None
    filter: dict[str, Any]
    model_hash: str
    files: dict[str, str]


def write_guard(
    folder: Path,
    model: Classifier,
    purifier: NetworkFilter,
    *,
    policy: Policy,
    fpr: float | None,
    threshold: float,
    calibration: Calibration | None,
) -> Path:
    """Writes `folder` atomically; a guard already there is replaced, anything else refused by ValueError."""
    folder = Path(folder)
    if folder.exists() and not (folder / GUARD_FILE).is_file():
        raise ValueError(f"{folder} exists and is not a guard: choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        save_classifier(model, draft)
        save_filter(purifier, draft / FILTER_FILE)
        with safe_open(draft / FILTER_FILE, framework="pt") as stored:
            described = json.loads(stored.metadata()["unhorse"])
        card = GuardCard(
            policy=policy,
            fpr=fpr,
            threshold=threshold,
            calibration=calibration,
            filter=described,
            model_hash=weights_hash(model),
            files={name: _digest(draft / name) for name in HASHED},
        )
        (draft / GUARD_FILE).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
        _replace(folder, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def read_guard(folder: Path) -> tuple[GuardCard, Classifier, NetworkFilter]:
    """guard.json, the classifier and the filter, on the CPU; ValueError where a file is not what it was."""
    path = Path(folder) / GUARD_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {GUARD_FILE}: give a folder written by `unhorse guard fit`")
    try:
        card = GuardCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise ValueError(f"{path}: {where}: {fault['msg']}; fit and save the guard again") from error
    for name in HASHED:
        file = Path(folder) / name
        if not file.is_file() or _digest(file) != card.files.get(name):
            raise ValueError(
                f"{file} is missing or not the file that was saved with this guard: "
                "fit and save the guard again, a threshold is good for one model and one filter only"
            )
    try:
        model = load_classifier(Path(folder))
        purifier = cast(NetworkFilter, load_filter(Path(folder) / FILTER_FILE))
    except SafetensorError as error:
        raise ValueError(f"{folder} is damaged ({error}): fit and save the guard again") from error
    if weights_hash(model) != card.model_hash:
        raise ValueError(f"{path} belongs to a classifier of other weights: fit and save the guard again")
    return card, model, purifier


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _replace(folder: Path, draft: Path) -> None:
    """Put `draft` at `folder`; a guard already there steps aside first, and is deleted last."""
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
