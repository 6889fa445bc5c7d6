"""Makes the classifier of what came out of a file: tensors or a graph, facts, and what the user says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from unhorse.checks.expectations import Facts
from unhorse.core import Classifier
from unhorse.loading.confirmation import Own
from unhorse.loading.network_code import NetworkCode
from unhorse.loading.outputs import ONE_NUMBER
from unhorse.loading.recognition import recognised
from unhorse.models.architectures import ONE_LOGIT
from unhorse.models.classifier import classifier_from_card
from unhorse.models.graph import GRAPH
from unhorse.models.registry import ImageShape
from unhorse.rules import LoadRefused


class Normalisation(NamedTuple):
    """What a network subtracts and divides by, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the user says of a file, which wins over what the file says; None means: as the file says.

    `mean` and `std` are in the units of `value_range`, the pixel values the network was trained on. `key`
    says which of several networks in the file is meant, `output` which of a network's outputs holds the
    logits, by its name or its place; `layers` are the words of a plain chain (models/chains.py), `network` is
    the user's own code for it.
    """

    architecture: str = "auto"
    layers: str | None = None
    image_shape: ImageShape | None = None
    num_classes: int | None = None
    output: str | None = None
    class_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    value_range: tuple[float, float] | None = None
    key: str | None = None
    network: NetworkCode | None = None
    clean: Own | None = None

    def for_readers(self) -> dict[str, object]:
        """What a reader needs to know of it."""
        shape = self.image_shape and list(self.image_shape)
        return {"image_shape": shape, "num_classes": self.num_classes, "output": self.output}

    @property
    def normalisation(self) -> Normalisation | None:
        if self.mean is self.std is self.value_range is None:
            return None
        return _normalisation(self.mean or (0.0,), self.std or (1.0,), self.value_range or (0.0, 1.0))


def graph_classifier(
    document: Mapping[str, Any], tensors: dict[str, Tensor], facts: Facts, notes: Sequence[str]
) -> Classifier:
    """The classifier of a graph, with what the file says of images and classes."""
    count, shape = document["num_classes"], facts.image_shape
    names, named = _class_names(count, facts)
    mean, std, assumed = _expected(facts, shape[0] if shape else None, ((0.0,), (1.0,)))
    size = facts.extra.get("assumed_size")
    assumptions = [f"MD301 input size assumed {size}: the network runs on it; pass --size"] if size else []
    card: dict[str, object] = {
        "architecture": {"name": GRAPH, "options": {"graph": document["graph"]}},
        "image_shape": list(shape or ()),
        "class_names": names,
        "mean": list(mean),
        "std": list(std),
        "assumptions": [*assumptions, *assumed, *named, *notes],
    }
    return classifier_from_card(card, tensors)


def identified(tensors: dict[str, Tensor], said: Said, facts: Facts, notes: Sequence[str] = ()) -> Classifier:
    """The known architecture that a state dict is of, with what the file says of images and classes."""
    shape = said.image_shape
    if shape is None and facts.image_shape is not None and None not in facts.image_shape:
        channels, height, width = (int(size or 0) for size in facts.image_shape)
        shape = (channels, height, width)
    found = recognised(
        tensors, architecture=said.architecture, layers=said.layers, image_shape=shape, own=said.clean
    )
    count, options = found.num_classes, dict(found.options)
    if count == 1:
        if said.num_classes != 2:
            raise LoadRefused("LD221", "the network answers with a single number per image", ONE_NUMBER)
        count, options = 2, options | {ONE_LOGIT: True}
    names, named = _class_names(count, facts)
    mean, std, assumed = _expected(facts, found.image_shape[0], (found.mean, found.std))
    card: dict[str, object] = {
        "architecture": {"name": found.name, "options": options},
        "image_shape": list(found.image_shape),
        "class_names": names,
        "mean": list(mean),
        "std": list(std),
        "assumptions": [*found.assumptions, *assumed, *named, *notes],
    }
    try:
        return classifier_from_card(card, found.state)
    except ValueError as error:
        raise LoadRefused("LD210", str(error), "give the image shape with --size") from error


def overridden(
    model: Classifier, num_classes: int | None, class_names: Sequence[str] | None, given: Normalisation | None
) -> Classifier:
    """The model with what the user said; LoadRefused LD211 where that contradicts the weights."""
    if num_classes not in (None, model.num_classes):
        raise contradiction(
            f"the weights have {model.num_classes} classes, not {num_classes}", "leave --classes out"
        )
    if class_names is not None and len(class_names) != model.num_classes:
        what = f"{len(class_names)} class names were given, and the weights have {model.num_classes} classes"
        raise contradiction(what, f"name {model.num_classes} classes in --labels")
    channels = model.image_shape[0]
    if given and not {len(given.mean), len(given.std)} <= {1, channels}:
        counts = f"{len(given.mean)} means and {len(given.std)} deviations for {channels} channels"
        raise contradiction(counts, f"give 1 or {channels} of each to --mean and --std")
    kept = model.assumptions
    if class_names is not None:
        kept = tuple(line for line in kept if not line.startswith("MD302"))
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


def _class_names(count: int, facts: Facts) -> tuple[list[str], list[str]]:
    """The names of the classes, and a note where the file has none."""
    if facts.class_names is not None and len(facts.class_names) == count:
        return list(facts.class_names), []
    return [str(index) for index in range(count)], ["MD302 the file names no classes: pass --labels"]


def _expected(
    facts: Facts, channels: int | None, usual: tuple[Sequence[float], Sequence[float]]
) -> tuple[Sequence[float], Sequence[float], list[str]]:
    """Mean and deviation as the file says them, or the usual ones and a note that they are assumed."""
    said = (facts.mean, facts.std)
    if said[0] and said[1] and {len(said[0]), len(said[1])} <= {1, channels} and min(said[1]) > 0:
        return said[0], said[1], []
    return *usual, [_normalisation_assumed(*usual)]


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
        raise contradiction(
            f"mean {tuple(mean)}, std {tuple(std)}, range {low}..{high} are no normalisation",
            "give finite numbers, std above 0 and a range from low to high",
        )
    span = high - low
    return Normalisation(tuple((value - low) / span for value in mean), tuple(value / span for value in std))


def contradiction(reason: str, remedy: str) -> LoadRefused:
    return LoadRefused("LD211", reason, remedy)
