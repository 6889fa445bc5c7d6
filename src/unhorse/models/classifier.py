"""A classifier on disk: a folder with model.safetensors and card.json, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unhorse.core import Classifier
from unhorse.models.architectures import build, outline
from unhorse.models.graph import GRAPH, check_sizes, graph_digest

CARD_FORMAT = "unhorse-classifier-1"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "card.json"


def new_classifier(
    architecture: str,
    *,
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    options: Mapping[str, object] | None = None,
    seed: int,
) -> Classifier:
    """An untrained classifier on the CPU; `seed` alone decides its weights; global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build(
            architecture, num_classes=len(class_names), image_shape=image_shape, **(options or {})
        )
    return Classifier(
        network,
        image_shape=image_shape,
        class_names=class_names,
        mean=mean,
        std=std,
        architecture={"name": architecture, "options": dict(options or {})},
    )


def weights_hash(model: Classifier) -> str:
    """SHA-256 over the weights (names, types, shapes, bytes), the normalisation and, if it is one, the
    graph; equal on every device.
    """
    digest = hashlib.sha256()
    if model.architecture.get("name") == GRAPH:
        digest.update(graph_digest(model.architecture["options"]["graph"]).encode())  # type: ignore[index]
    tensors = {f"network.{name}": tensor for name, tensor in model.network.state_dict().items()}
    for name, tensor in sorted((tensors | {"mean": model.mean, "std": model.std}).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_classifier(
    model: Classifier,
    folder: Path,
    *,
    extra_tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    **card_fields: object,
) -> Path:
    """Write `folder` atomically; a classifier already there is replaced.

    `extra_tensors` maps further file names (trigger.safetensors) to tensors; `card_fields` go to the card,
    where load_classifier never looks at them.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CARD_FILE).is_file():
        raise ValueError(f"{folder} exists and is not a classifier folder: choose another name")
    card = _describe(model)
    if taken := sorted(card.keys() & card_fields.keys()):
        raise ValueError(f"card fields {taken} are written from the model: choose other names")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        _save_tensors(model.network.state_dict(), draft / WEIGHTS_FILE, {"unhorse": json.dumps(card)})
        for name, tensors in (extra_tensors or {}).items():
            _save_tensors(tensors, draft / name)
        (draft / CARD_FILE).write_text(json.dumps(card | card_fields, indent=1) + "\n", encoding="utf-8")
        _replace(folder, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def save_weights(model: Classifier, path: Path) -> Path:
    """Write one safetensors file with the card in its metadata; it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        _save_tensors(model.network.state_dict(), draft, {"unhorse": json.dumps(_describe(model))})
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def read_card(folder: Path) -> dict[str, object]:
    """The whole card, attack and metrics included: for populations and tables, never for a defence."""
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {CARD_FILE}: give a folder written by unhorse")
    card = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(card, dict) or card.get("format") != CARD_FORMAT:
        raise ValueError(f"{path} is not a card of format {CARD_FORMAT}")
    return card


def load_classifier(folder: Path) -> Classifier:
    """The classifier of a folder, on the CPU, in eval mode; attack and metrics on the card are not read."""
    return classifier_from_card(read_card(folder), load_file(Path(folder) / WEIGHTS_FILE))


def classifier_from_card(card: Mapping[str, object], weights: Mapping[str, Tensor]) -> Classifier:
    """The network that a card describes, with these weights; ValueError where card and weights do not fit."""
    try:
        architecture, names = _architecture_of(card), _class_names_of(card)
        channels, height, width = (_whole(size) for size in _list_of(card, "image_shape"))
        shape = (channels, height, width)
        network = outline(
            architecture["name"], num_classes=len(names), image_shape=shape, **architecture["options"]
        )
        if architecture["name"] == GRAPH:
            check_sizes(network, shape, len(names))
        network.load_state_dict(dict(weights), strict=True, assign=True)
        return Classifier(
            network,
            image_shape=shape,
            class_names=names,
            mean=[_finite(value) for value in _list_of(card, "mean")],
            std=[_finite(value) for value in _list_of(card, "std")],
            architecture=architecture,
            assumptions=[str(line) for line in card.get("assumptions", ())],  # type: ignore[attr-defined]
        ).eval()
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the card does not describe these weights: {error}") from error


def _architecture_of(card: Mapping[str, object]) -> dict[str, Any]:
    architecture = card["architecture"]
    if not isinstance(architecture, dict) or not isinstance(architecture.get("options", {}), dict):
        raise TypeError(f"architecture is {architecture!r}, not a name with options")
    return {"name": architecture["name"], "options": architecture.get("options", {})}


def _class_names_of(card: Mapping[str, object]) -> list[str]:
    return [str(name) for name in _list_of(card, "class_names")]


def _list_of(card: Mapping[str, object], key: str) -> list[Any]:
    values = card[key]
    if not isinstance(values, list):
        raise TypeError(f"{key} is {values!r}, not a list")
    return values


def _whole(size: object) -> int:
    if type(size) is not int or not 0 < size < 2**16:
        raise TypeError(f"image_shape has {size!r}, not a number of pixels")
    return size


def _finite(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"mean or std has {value!r}, not a finite number")
    return float(value)


def _describe(model: Classifier) -> dict[str, object]:
    if not model.architecture:
        raise ValueError(
            "the classifier names no architecture, so it could not be loaded again: set its architecture"
        )
    return {
        "format": CARD_FORMAT,
        "architecture": model.architecture,
        "image_shape": list(model.image_shape),
        "class_names": list(model.class_names),
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "assumptions": list(model.assumptions),
        "weights_hash": weights_hash(model),
    }


def _save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    # A clone each: safetensors refuses tensors that share storage, as expanded triggers do.
    own = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(own, path, metadata)


def _replace(folder: Path, draft: Path) -> None:
    """Put `draft` at `folder`: the old one steps aside, since a folder cannot be renamed over a full one."""
    if not folder.exists():
        draft.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old)
