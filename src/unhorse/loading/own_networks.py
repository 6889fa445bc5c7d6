"""A classifier from a user's network file: what its child sends is checked against the model's own file."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from unhorse.checks.expectations import Facts
from unhorse.checks.weight_files import check_safetensors
from unhorse.core import Classifier
from unhorse.loading.assembly import Said, graph_classifier
from unhorse.loading.network_code import NetworkCode, require_confinement, unconfined
from unhorse.loading.network_reading import digest
from unhorse.loading.networks import Found
from unhorse.loading.sources import NAMELESS, Source
from unhorse.loading.tensors import check_tensors
from unhorse.models.graph import computed
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import server
from unhorse.sandbox.confinement import Limits, Tier

MAX_MADE_BYTES = 64 * 2**20
MAX_MADE_VALUES = 8192
"""Different numbers in tensors that the file does not have. Masks, filters and position codes have fewer; a
classifier of photographs that is worth handing out in place of the file's has more."""
LEAST_SHARE = 0.1
"""Of the file's weights, below which the network is that of another file, or of a small part of this one."""
_SHOWN = 6
_NOTE = re.compile(r"MD3\d\d [ -~]{1,200}")
_PREFER = "name the class that was trained on these weights, from a source that you trust"


_WRONG = (
    *(KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RuntimeError),
    *(NotImplementedError, MemoryError, RecursionError, safetensors.SafetensorError),
)


class Weights(NamedTuple):
    """The tensors of a graph: `used` are the names of the file's that they are or follow from; `made` says of
    those that the file does not have what they are called and how large they are.
    """

    tensors: dict[str, Tensor]
    used: frozenset[str]
    made: dict[str, Tensor]


def own_networks(
    source: Source, said: Said, progress: Callable[[str], None] | None, *, limits: Limits
) -> tuple[list[Found], str]:
    """The classifiers of said.network with the weights of a file, and the tier that its code ran under.

    The code runs in one restricted process, which sends a graph; the weights come from another, which never
    had the code. Where other parts of the file have the same names and shapes (a running average), each is
    opened, unless said.key chooses. LoadRefused LD225, LD226 and LD227, and what the file gives cause to.
    """
    code = said.network
    assert code is not None
    require_confinement(code)
    options: dict[str, object] = {"format": str(source.kind), "names": [NAMELESS]}
    own = server.run("tensors", source.files[:1], options, heavy=True, limits=limits, progress=progress)
    facts, tensors = Facts.from_json(own.document["facts"]), _parsed(own.blob)
    asked = options | {"network": code.to_json()} | said.for_readers()
    # the code gets as long as the file, and may not send more than what is not in the file
    limits = replace(limits, wall_seconds=1.5 * limits.cpu_seconds, document=8 * 2**20, blob=MAX_MADE_BYTES)

    def opened(key: str | None) -> tuple[Classifier, frozenset[str], server.Parcel]:
        parcel = server.run(
            "network", source.files[:1], asked | {"key": key}, heavy=True, limits=limits, progress=progress
        )
        if parcel.tier != Tier.FULL and not code.trusted:
            raise unconfined(parcel.tier)
        model, names = _checked(parcel, tensors, facts, code)
        return model, names, parcel

    first, used, parcel = opened(said.key)
    prefix, others = _twins(used, tensors, str(parcel.document["prefix"]))
    found = [Found("" if said.key is not None or not others else prefix, first)]
    for other in others if said.key is None else ():
        try:
            found.append(Found(other, opened(other)[0]))
        except (LoadRefused, LoadFailed) as error:
            found.append(Found(other, None, error))
    return found, parcel.tier


def _twins(used: frozenset[str], file: Mapping[str, Tensor], said: str) -> tuple[str, list[str]]:
    """The key of the part of the file that is used, and those of others with tensors of the same names and
    shapes and other values. `said` is where the network begins, as far as the child knows.
    """
    common = os.path.commonprefix(sorted(used))
    common = common[: common.rfind(".") + 1]
    inside = common[len(said) :] if common.startswith(said) else ""
    rests = [name[len(common) :] for name in used]
    places = {name[: -len(rests[0])] for name in file if name.endswith(rests[0])} - {common}

    def twin(place: str) -> bool:
        pairs = [(file.get(place + rest), file[common + rest]) for rest in rests]
        fits = all(other is not None and other.shape == one.shape for other, one in pairs)
        return fits and not all(torch.equal(other, one) for other, one in pairs)  # type: ignore[arg-type]

    twins = [place for place in sorted(places) if place.endswith(f".{inside}") and twin(place)]
    keys = [place.removesuffix(inside).rstrip(".") for place in twins]
    return common.removesuffix(inside).rstrip("."), [key for key in keys if key]


def _parsed(blob: bytes) -> dict[str, Tensor]:
    check_safetensors(blob)
    return check_tensors(parse_safetensors(blob), len(blob))


def _checked(
    parcel: server.Parcel, file: Mapping[str, Tensor], facts: Facts, code: NetworkCode
) -> tuple[Classifier, frozenset[str]]:
    """The classifier of what came home, its weights taken from `file`, and the names of those it uses."""
    try:
        return _classifier(parcel, file, facts, code)
    except _WRONG as error:
        if isinstance(error, LoadRefused | LoadFailed):
            raise
        line = (str(error).splitlines() or [""])[0][:200]
        raise LoadFailed(
            f"the network file's process sent back no usable network ({line})", _PREFER
        ) from error


def _classifier(
    parcel: server.Parcel, file: Mapping[str, Tensor], facts: Facts, code: NetworkCode
) -> tuple[Classifier, frozenset[str]]:
    document = parcel.document
    weights = _weights(document["weights"], file, _parsed(parcel.blob))
    _check_made(weights.made)
    channels, height, width = document["image_shape"]
    extra = facts.extra | ({"assumed_size": f"{height}x{width}"} if document["assumed_size"] is True else {})
    facts = replace(facts, image_shape=(channels, height, width), extra=extra)
    notes = [*_notes(weights, file, code, parcel.tier), *_said(document)]
    model = graph_classifier(document, weights.tensors, facts, notes)
    _check_influence(model, weights)
    return model, weights.used


def _said(document: Mapping[str, Any]) -> list[str]:
    """What the child notes of the graph, as far as it is what a graph can give cause to."""
    notes = [str(note) for note in list(document["notes"])[:_SHOWN]]
    return [note for note in notes if _NOTE.fullmatch(note)]


def _weights(sources: Mapping[str, Any], file: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Weights:
    """Every tensor of the graph from where its source says it is from; LD227 where the bytes are others."""
    used: set[str] = set()
    made: dict[str, Tensor] = {}

    def found(source: Mapping[str, Any]) -> Tensor:
        if "key" in source:
            used.add(source["key"])
            return _of_file(source, file)
        name = source["made"]
        made[str(source.get("called", name))[:100]] = sent[name]
        return sent[name]

    tensors: dict[str, Tensor] = {}
    for name, source in sources.items():
        if "origin" in source:
            leaves = [found(leaf) for leaf in source["leaves"]]
            tensors[name] = computed(source["origin"]["nodes"], source["origin"]["output"], leaves)
        else:
            tensors[name] = found(source)
    return Weights(tensors, frozenset(used), made)


def _of_file(source: Mapping[str, Any], file: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the file, after a comparison bit for bit with what the network computed with."""
    key = source["key"]
    if key not in file:
        raise _forged(f"it names {str(key)[:100]!r}, which the file does not have")
    tensor = file[key].t().contiguous() if source["turned"] is True else file[key]
    if digest(tensor) != source["sha256"]:
        raise _forged(f"its {str(key)[:100]!r} has other values than the file's")
    return tensor


def _check_made(made: Mapping[str, Tensor]) -> None:
    """LD227 where tensors that are not in the file could be a network of their own."""
    numbers = [tensor.flatten() for tensor in made.values() if tensor.is_floating_point()]
    count = len(torch.cat(numbers).unique()) if numbers else 0
    if count > MAX_MADE_VALUES:
        largest = max(made, key=lambda name: made[name].numel())
        raise _forged(
            f"{count} different numbers in it are not in the file, as in {largest} ({_size(made[largest])})"
        )


def _notes(weights: Weights, file: Mapping[str, Tensor], code: NetworkCode, tier: str) -> list[str]:
    """What a report says of the network: hashes, how much of the file it uses, and what it adds."""
    floats = {name: tensor.numel() for name, tensor in file.items() if tensor.is_floating_point()}
    seen = {digest(file[name]) for name in weights.used}
    unused = [name for name in floats if name not in weights.used and digest(file[name]) not in seen]
    total = sum(floats.values())
    used = total - sum(floats[name] for name in unused)
    if used < LEAST_SHARE * total:
        raise _forged(f"it uses {used} of the file's {total} weights")
    share = math.floor(1000 * used / max(total, 1)) / 10
    line = f"the network uses {used} of the file's {total} weights ({share:g} %)"
    if unused:
        line += f"; not {', '.join(unused[:_SHOWN])}{' …' if len(unused) > _SHOWN else ''}"
    notes = [code.description, line]
    if weights.made:
        listed = [f"{name} ({_size(tensor)})" for name, tensor in weights.made.items()]
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        notes.append(f"LD226 in the network and not in the file: {', '.join(listed[:_SHOWN])}{more}")
    if tier != Tier.FULL:
        notes.append(f"LD225 the network file was run under {tier} only, as --trust-network allows")
    return notes


def _size(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "a number"
    return f"{shape}, {str(tensor.dtype).removeprefix('torch.')}"


@torch.no_grad()
def _check_influence(model: Classifier, weights: Weights) -> None:
    """LD227 where the network answers the same with other weights in place of the file's."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, *model.image_shape, generator=rng)
    other = copy.deepcopy(model.network)
    own = {
        name
        for name, tensor in weights.tensors.items()
        if not any(tensor is made for made in weights.made.values())
    }
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        if name in own and tensor.is_floating_point() and tensor.numel():
            spread = float(tensor.std(correction=0)) + 0.01
            drawn = torch.randn(tensor.shape, generator=rng) * spread + tensor.mean()
            tensor.copy_(drawn.abs() if name.endswith("running_var") else drawn)
    before, after = model.network(images), other(images)
    change = float((before - after).abs().max())
    if change <= 1e-3 * float(before.abs().max()):
        raise _forged("it answers the same whatever the file's weights are")


def _forged(what: str) -> LoadRefused:
    return LoadRefused("LD227", f"the network is not one of this file's weights: {what}", _PREFER)
