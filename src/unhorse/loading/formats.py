"""From a model file to a classifier: read the weights safely, then find out what they are."""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from unhorse.core import Classifier
from unhorse.loading import checks
from unhorse.loading.checks import EXPORT_REMEDY
from unhorse.loading.identification import ImageShape, identify
from unhorse.loading.sniff import Format, sniff
from unhorse.models.classifier import CARD_FILE, WEIGHTS_FILE, classifier_from_card, weights_hash
from unhorse.rules import LoadFailed, LoadRefused

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "netC")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
_PARSER_ERRORS = (
    *(RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError),
    *(ArithmeticError, AssertionError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile),
    safetensors.SafetensorError,
)


class Weights(NamedTuple):
    """The checked tensors of a file and the text beside them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Normalisation(NamedTuple):
    """What a network subtracts and divides by, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_model(
    path: Path | str,
    *,
    architecture: str = "auto",
    image_shape: ImageShape | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Classifier:
    """The classifier in a folder or file, on the CPU, in eval mode; arguments win over what the file says.

    `mean` and `std` are in the units of `value_range`, the pixel values the network was trained on (0 to 1
    unless given). Raises LoadRefused or LoadFailed, each with its remedy, and never runs code from the file.
    """
    file = _weights_file(Path(path))
    weights = read_weights(file)
    model = _described(file, weights)
    if model is None:
        model = _identified(weights.tensors, architecture, image_shape)
    elif architecture not in ("auto", model.architecture["name"]):
        raise _contradiction(
            f"the card says {model.architecture['name']}, not {architecture}", "leave --arch out"
        )
    elif image_shape not in (None, model.image_shape):
        raise _contradiction(
            f"the card says images of {model.image_shape}, not {image_shape}", "leave the shape out"
        )
    given = None
    if not (mean is std is value_range is None):
        given = _normalisation(mean or (0.0,), std or (1.0,), value_range or (0.0, 1.0))
    return _overridden(model, num_classes, class_names, given)


def read_weights(path: Path) -> Weights:
    """The checked tensors of a safetensors file or a PyTorch state dict, told apart by content, not name."""
    kind, data = _contents(path)
    try:
        found, metadata = _parse(kind, data)
        tensors = checks.check_tensors(_unwrapped(found), len(data))
    except (LoadRefused, LoadFailed):
        raise
    except _PARSER_ERRORS as error:
        raise LoadFailed(f"{path.name} is damaged ({type(error).__name__}: {_first_line(error)})") from error
    return Weights(_without_prefixes(tensors), metadata)


def _contents(path: Path) -> tuple[Format, bytes]:
    """The bytes of a file in a format that unhorse opens, read once: what is checked is what is parsed."""
    try:
        with path.open("rb") as stream:
            kind = sniff(stream)
            opened = kind in (Format.SAFETENSORS, Format.TORCH_ZIP)
            data = stream.read(checks.MAX_FILE_BYTES + 1) if opened else b""
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read ({error.strerror})", "check the path") from error
    if kind is Format.BROKEN_ZIP:
        raise LoadFailed(f"{path.name} is a {kind}: it is truncated or damaged")
    if kind is Format.UNKNOWN:
        raise LoadRefused("LD202", f"{path.name} is not a model file", EXPORT_REMEDY)
    if not opened:
        raise LoadRefused("LD201", f"{path.name} is {kind}, which unhorse does not open", EXPORT_REMEDY)
    if len(data) > checks.MAX_FILE_BYTES:
        raise LoadRefused("LD208", f"{path.name} has more than 4 GiB", EXPORT_REMEDY)
    return kind, data


def _parse(kind: Format, data: bytes) -> tuple[object, dict[str, str]]:
    if kind is Format.SAFETENSORS:
        metadata = checks.check_safetensors(data)
        return parse_safetensors(data), metadata
    checks.check_torch_zip(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {}


def _unwrapped(found: object) -> dict[str, object]:
    """The state dict inside the dictionaries that training scripts save around it."""
    for _ in range(3):
        inside = [found[key] for key in _WRAPPERS if key in found] if isinstance(found, Mapping) else []
        if not inside or not isinstance(inside[0], Mapping):
            break
        found = inside[0]
    if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found):
        raise LoadRefused(
            "LD209", f"the file holds a {type(found).__name__}, not a state dict", EXPORT_REMEDY
        )
    if len(found) > checks.MAX_TENSORS:
        raise LoadRefused("LD209", f"{len(found)} tensors are more than {checks.MAX_TENSORS}", EXPORT_REMEDY)
    return dict(found)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops what DataParallel, torch.compile and wrapper modules put before every name."""
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if not (path / WEIGHTS_FILE).is_file():
        raise LoadRefused("LD202", f"folder {path.name} has no {WEIGHTS_FILE}", "give the model file itself")
    return path / WEIGHTS_FILE


def _described(file: Path, weights: Weights) -> Classifier | None:
    """The classifier of the card beside the file or in its metadata; None where there is neither."""
    beside = file.with_name(CARD_FILE)
    try:
        if beside.is_file():
            model = _from_card(
                json.loads(beside.read_text(encoding="utf-8")), weights, required=file.name == WEIGHTS_FILE
            )
            if model is not None:
                return model
        if "unhorse" in weights.metadata:
            return _from_card(json.loads(weights.metadata["unhorse"]), weights, required=True)
    except (OSError, ValueError, RecursionError) as error:
        remedy = "remove the card and name the architecture with --arch"
        raise LoadRefused(
            "LD212", f"the card of {file.name} is not usable ({_first_line(error)})", remedy
        ) from error
    return None


def _from_card(card: object, weights: Weights, *, required: bool) -> Classifier | None:
    """A card beside a file of another name counts only if it describes exactly these weights."""
    if not isinstance(card, dict) or "architecture" not in card:
        return None
    if required:
        return classifier_from_card(card, weights.tensors)
    try:
        model = classifier_from_card(card, weights.tensors)
    except ValueError:
        return None
    return model if weights_hash(model) == card.get("weights_hash") else None


def _identified(tensors: dict[str, Tensor], architecture: str, image_shape: ImageShape | None) -> Classifier:
    found = identify(tensors, architecture=architecture, image_shape=image_shape)
    card: dict[str, object] = {
        "architecture": {"name": found.name, "options": found.options},
        "image_shape": list(found.image_shape),
        "class_names": [str(index) for index in range(found.num_classes)],
        "mean": list(found.mean),
        "std": list(found.std),
        "assumptions": [*found.assumptions, _normalisation_assumed(found.mean, found.std)],
    }
    try:
        return classifier_from_card(card, found.state)
    except ValueError as error:
        raise LoadRefused("LD210", str(error), "give the image shape with --size") from error


def _normalisation_assumed(mean: Sequence[float], std: Sequence[float]) -> str:
    listed = ", ".join(
        f"{word} {'/'.join(f'{value:.4g}' for value in values)}"
        for word, values in (("mean", mean), ("std", std))
    )
    return f"MD301 input normalisation assumed {listed} for pixels in 0..1: pass --mean/--std/--range"


def _normalisation(
    mean: Sequence[float], std: Sequence[float], value_range: tuple[float, float]
) -> Normalisation:
    """From the units of the network's own pixel range to those of pixels in [0, 1]."""
    low, high = value_range
    numbers = (*mean, *std, low, high)
    if not all(math.isfinite(number) for number in numbers) or high <= low or min(std) <= 0:
        raise _contradiction(
            f"mean {tuple(mean)}, std {tuple(std)}, range {low}..{high} are no normalisation",
            "give finite numbers, std above 0 and a range from low to high",
        )
    span = high - low
    return Normalisation(tuple((value - low) / span for value in mean), tuple(value / span for value in std))


def _overridden(
    model: Classifier, num_classes: int | None, class_names: Sequence[str] | None, given: Normalisation | None
) -> Classifier:
    """The model with what the user said; LoadRefused LD211 where that contradicts the weights."""
    for asked in (num_classes, None if class_names is None else len(class_names)):
        if asked not in (None, model.num_classes):
            raise _contradiction(
                f"the weights have {model.num_classes} classes, not {asked}", "leave --classes out"
            )
    channels = model.image_shape[0]
    if given and not {len(given.mean), len(given.std)} <= {1, channels}:
        counts = f"{len(given.mean)} means and {len(given.std)} deviations for {channels} channels"
        raise _contradiction(counts, f"give 1 or {channels} of each to --mean and --std")
    kept = model.assumptions
    if given:
        kept = tuple(line for line in kept if not line.startswith("MD301 input normalisation"))
    return Classifier(
        model.network,
        image_shape=model.image_shape,
        class_names=class_names if class_names is not None else model.class_names,
        mean=given.mean if given else model.mean.flatten().tolist(),
        std=given.std if given else model.std.flatten().tolist(),
        architecture=model.architecture,
        assumptions=kept,
    ).eval()


def _contradiction(reason: str, remedy: str) -> LoadRefused:
    return LoadRefused("LD211", reason, remedy)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
