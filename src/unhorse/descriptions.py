"""A model's line in the report: what is known of its file and of its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unhorse.core import Classifier
from unhorse.loading.formats import Networks, Opened
from unhorse.loading.sources import opened
from unhorse.models.classifier import weights_hash
from unhorse.models.graph import GRAPH
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.scanned_model import ScannedModel


def describe(path: Path, model: Classifier, file: Opened | None = None) -> ScannedModel:
    """A model's line in the report; `file` says what it was opened from."""
    if file is None:
        return ScannedModel(str(path), sha256=_hash_of(path, model), **of_network(model))
    return ScannedModel(str(path), **known(file), **of_network(model))


def known(file: Opened | Networks) -> dict[str, Any]:
    """What a report says of the file."""
    return {"sha256": file.sha256, "size": file.size, "format": file.format, "opened": file.opened}


def of_network(model: Classifier) -> dict[str, Any]:
    """What a report says of the network itself."""
    return {
        "architecture": called(model),
        "image_shape": model.image_shape,
        "class_names": model.class_names,
        "assumptions": model.assumptions,
    }


def _hash_of(path: Path, model: Classifier) -> str:
    """Of the file, where there is one."""
    try:
        with opened(path) as source:
            return source.sha256
    except (LoadRefused, LoadFailed):
        return weights_hash(model)


def called(model: Classifier) -> str:
    """The name of the architecture; a graph is said to be one, and how large."""
    name = str(model.architecture.get("name", ""))
    return f"graph of {len(model.network.layers)} operators" if name == GRAPH else name  # type: ignore[arg-type]
