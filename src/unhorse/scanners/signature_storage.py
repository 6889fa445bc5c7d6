"""A learned scanner on disk: scanner.json and the safetensors file that it names; never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

FORMAT = "unhorse-signature-scanner-1"
SCANNER_FILE = "scanner.json"


def write_scanner(folder: Path, card: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Write both files; the JSON is replaced last and in one step, so the folder always holds a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: value.cpu().contiguous() for name, value in weights.items()})
    digest = hashlib.sha256(content).hexdigest()
    kept = _weights_file(folder, digest)
    _replace(kept, content)
    text = json.dumps({"format": FORMAT, "weights": digest, **card}, indent=1)
    _replace(folder / SCANNER_FILE, text.encode())
    for path in folder.glob("network-*.safetensors"):
        if path != kept:
            path.unlink()
    return folder


def read_scanner(folder: Path, *, required: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON fields (lists as tuples) and the weights; ValueError for missing, foreign or damaged files."""
    path = folder / SCANNER_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {SCANNER_FILE}: give a folder written by SignatureScanner.save()")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fit and save the scanner again") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"{path} is not a scanner of format {FORMAT}: fit and save the scanner again")
    if missing := sorted({"weights", *required} - card.keys()):
        raise ValueError(f"{path} lacks {missing}: fit and save the scanner again")
    weights = _weights_file(folder, str(card["weights"]))
    content = weights.read_bytes() if weights.is_file() else b""
    if hashlib.sha256(content).hexdigest() != card["weights"]:
        raise ValueError(f"{weights} is missing or damaged: fit and save the scanner again")
    return {name: _frozen(value) for name, value in card.items()}, load(content)


def _weights_file(folder: Path, digest: str) -> Path:
    # digits and letters only: a name from a foreign JSON must not leave the folder
    return folder / f"network-{''.join(sign for sign in digest[:16] if sign.isalnum())}.safetensors"


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _frozen(entry) for name, entry in value.items()}
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value
