"""From a model file to a classifier: read it where it can do no harm, then find out what it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from unhorse.checks.expectations import Facts
from unhorse.checks.metadata import remarks
from unhorse.checks.sniff import Format
from unhorse.checks.weight_files import check_safetensors
from unhorse.core import Classifier
from unhorse.loading.assembly import Said, contradiction, graph_classifier, overridden
from unhorse.loading.cards import Weights, described
from unhorse.loading.network_code import NetworkCode, read_network
from unhorse.loading.networks import Found, distinct_models, each, in_file, single
from unhorse.loading.own_networks import own_networks
from unhorse.loading.sources import Source, opened
from unhorse.loading.tensors import check_tensors
from unhorse.models.classifier import WEIGHTS_FILE
from unhorse.models.registry import ImageShape
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import server
from unhorse.sandbox.confinement import Limits

HERE = "here"


class Opened(NamedTuple):
    """A classifier and how it was come by: `opened` says where, and how confined."""

    model: Classifier
    format: str
    sha256: str
    size: int
    opened: str
    seconds: float


class Networks(NamedTuple):
    """The networks of a file, and how they were come by."""

    networks: tuple[Found, ...]
    format: str
    sha256: str
    size: int
    opened: str
    seconds: float


def load_model(  # noqa: PLR0913 - one argument for each thing that a user may say
    path: Path | str,
    *,
    architecture: str = "auto",
    layers: str | None = None,
    image_shape: ImageShape | None = None,
    num_classes: int | None = None,
    output: str | int | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_range: tuple[float, float] | None = None,
    key: str | None = None,
    network: Path | str | NetworkCode | None = None,
    network_args: Mapping[str, Any] | Sequence[Any] | str | None = None,
    trust_network: bool = False,
) -> Classifier:
    """The classifier in a file or folder, on the CPU, in eval mode; arguments win over what the file says.

    `layers` says a plain network in words: "conv5 relu maxpool2 flatten linear" (docs/formats.md).
    `output` names the output that holds the logits where a network has several, or is its place among them.
    `mean` and `std` are in the units of `value_range`, the pixel values the network was trained on (0 to 1
    unless given). `key` chooses one of several networks in the file: without it they are refused (LD228).
    Raises LoadRefused or LoadFailed, each with its remedy, and never runs code from the file.

    `network` is "FILE.py:NAME": your own class or factory for the weights, called with `network_args`. It is
    run in the sandbox, and refused (LD225) where that is weak, unless you `trust_network`.
    """
    if network is not None and not isinstance(network, NetworkCode):
        network = read_network(network, network_args, trusted=trust_network)
    said = Said(
        architecture=architecture,
        layers=layers,
        image_shape=image_shape,
        num_classes=num_classes,
        output=None if output is None else str(output),
        class_names=class_names,
        mean=mean,
        std=std,
        value_range=value_range,
        key=key,
        network=network,
    )
    return open_model(Path(path), said).model


def open_model(
    path: Path,
    said: Said = Said(),  # noqa: B008 - frozen
    *,
    progress: Callable[[str], None] | None = None,
) -> Opened:
    """As load_model, with where the file was opened, its format, hash and size."""
    seen = open_networks(path, said, progress=progress)
    chosen = single(seen.networks)
    assert chosen.model is not None
    return Opened(chosen.model, seen.format, seen.sha256, seen.size, seen.opened, seen.seconds)


def open_networks(
    path: Path,
    said: Said = Said(),  # noqa: B008 - frozen
    *,
    progress: Callable[[str], None] | None = None,
) -> Networks:
    """Every different network of a file (one, as a rule), each opened or with the reason why it is not.

    safetensors are parsed here; every other format in a restricted child, of which tensors come back, and for
    a network that is none of ours a graph of listed operators (models/graph.py). Both run here. Raises
    LoadRefused and LoadFailed for what is wrong with the file as a whole.
    """
    with opened(path) as source:
        return read(source, said, progress=progress)


def read(
    source: Source,
    said: Said = Said(),  # noqa: B008 - frozen
    *,
    progress: Callable[[str], None] | None = None,
) -> Networks:
    """As open_networks, of a file that is open: what is read is what its hash is of."""
    started = time.monotonic()
    source.check()
    if said.network is not None:
        found, tier = own_networks(source, said, progress, limits=_limits(source.size))
        where = f"in the sandbox ({tier}), with {said.network.file}:{said.network.name}"
    elif source.kind is Format.SAFETENSORS:
        found, where = _from_safetensors(source, said), HERE
    elif len(source.sets) > 1:
        found, where = _from_sets(source, said, progress)
    else:
        found, where = _in_sandbox(source, said, source.files, source.options(), progress)
    source.verify()
    networks = tuple(_overridden(one, said) for one in found)
    return Networks(networks, source.format, source.sha256, source.size, where, time.monotonic() - started)


def _in_sandbox(
    source: Source,
    said: Said,
    files: Sequence[BinaryIO],
    options: Mapping[str, object],
    progress: Callable[[str], None] | None,
) -> tuple[list[Found], str]:
    """What a restricted child makes of files, and where that was."""
    parcel = server.run(
        "read",
        files,
        {**options, **said.for_readers()},
        heavy=True,
        limits=_limits(source.size),
        progress=progress,
    )
    found = _from_parcel(source, parcel, said)
    for one in found:
        if source.left_out and one.model is not None:
            note = (
                f"MD306 left out of the folder: {', '.join(source.left_out)}, which the index does not name"
            )
            one.model.assumptions = (*one.model.assumptions, note)
    return found, f"in the sandbox ({parcel.tier})"


def _from_sets(source: Source, said: Said, progress: Callable[[str], None] | None) -> tuple[list[Found], str]:
    """The network of each set of weights in a folder, under the name of its first file; equal ones once."""
    found: list[Found] = []
    where = ""
    for names in source.sets:
        if said.key not in (None, names[0]):
            continue
        files, listed = source.parts(names)
        options = source.options() | {"names": listed}
        try:
            each_found, where = _in_sandbox(source, replace(said, key=None), files, options, progress)
            found += [one._replace(key=names[0]) for one in each_found]
        except (LoadRefused, LoadFailed) as error:
            found.append(Found(names[0], None, error))
    if not found:
        keys = ", ".join(names[0] for names in source.sets)
        raise contradiction(f"the folder has no weights called {said.key!r}", f"it has {keys}")
    return distinct_models(found), where


def _overridden(found: Found, said: Said) -> Found:
    """With what the user said of the network, where it was opened."""
    if found.model is None:
        return found
    try:
        model = overridden(found.model, said.num_classes, said.class_names, said.normalisation)
    except LoadRefused as error:
        return Found(found.key, None, error)
    return found._replace(model=model)


def _limits(size: int) -> Limits:
    """Of time and memory for a file of so many bytes."""
    seconds = 120 + size // 2**20
    return Limits(memory=4 * 2**30 + 8 * size, cpu_seconds=seconds, wall_seconds=3.0 * seconds)


def _from_safetensors(source: Source, said: Said) -> list[Found]:
    weights = _safetensors(source.files[0].read(), source.path.name)
    found = in_file({"": weights.tensors})
    file = source.path / WEIGHTS_FILE if source.path.is_dir() else source.path
    model = described(file, weights._replace(tensors=found[0].tensors) if len(found) == 1 else weights)
    if model is None:
        return each({"": weights.tensors}, said, Facts(), remarks(weights.metadata))
    if said.layers is not None:
        raise contradiction("the file's card says the network", "leave --layers out")
    if said.architecture not in ("auto", model.architecture["name"]):
        known = model.architecture["name"]
        raise contradiction(f"the card says {known}, not {said.architecture}", "leave --arch out")
    if said.image_shape not in (None, model.image_shape):
        raise contradiction(
            f"the card says images of {model.image_shape}, not {said.image_shape}", "leave the shape out"
        )
    model.assumptions = (*model.assumptions, *remarks(weights.metadata))
    return [Found("", model)]


def _safetensors(data: bytes, name: str) -> Weights:
    """The checked tensors of safetensors bytes, whoever wrote them."""
    try:
        metadata = check_safetensors(data)
        ordered = dict(sorted(parse_safetensors(data).items()))  # they come in any order
        return Weights(check_tensors(ordered, len(data)), metadata)
    except (safetensors.SafetensorError, RuntimeError, TypeError, KeyError, OverflowError) as error:
        raise LoadFailed(f"{name} is damaged ({type(error).__name__}: {_first_line(error)})") from error


def _from_parcel(source: Source, parcel: server.Parcel, said: Said) -> list[Found]:
    """The networks that a child sent home as data: whatever it sent is checked as a file would be."""
    document = parcel.document
    try:
        facts = Facts.from_json(document["facts"])
        tensors = _safetensors(parcel.blob, source.path.name).tensors
        notes = [*facts.notes, *([] if "landlock" in parcel.tier else [_weak_tier(parcel.tier)])]
        if document["kind"] == "tensors":
            if left_out := "; ".join(map(str, document["left_out"])):
                notes.append(f"MD306 left out of the file: {left_out}")
            return each(_by_key(document["keys"], tensors), said, facts, notes)
        if said.layers is not None:
            raise contradiction("the file has a network of its own, not only tensors", "leave --layers out")
        if said.key is not None:
            raise contradiction(f"{source.path.name} holds one network, without keys", "leave --key out")
        return [Found("", graph_classifier(document, tensors, facts, [*notes, *map(str, document["notes"])]))]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, LoadRefused | LoadFailed):
            raise
        raise LoadFailed(f"the sandbox sent back no usable network ({_first_line(error)})") from error


def _by_key(keys: Sequence[object], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each network, whose number stands before their names, and then their place in it."""
    networks: list[dict[str, Tensor]] = [{} for _ in keys]
    for whole in sorted(tensors, key=lambda name: int(name.split("/")[1])):
        number, _, name = whole.split("/", 2)
        networks[int(number)][name] = tensors[whole]
    return dict(zip(map(str, keys), networks, strict=True))


def _weak_tier(tier: str) -> str:
    return (
        f"MD304 this system has no Landlock: the file was opened under {tier} only; use Linux 5.13 or later"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
