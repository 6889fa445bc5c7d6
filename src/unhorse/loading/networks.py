"""Which network of a file is meant: each is tried, and one is chosen by its key or because it is alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from unhorse.checks.expectations import Facts
from unhorse.core import Classifier
from unhorse.loading.assembly import Said, contradiction, identified
from unhorse.loading.containers import is_layer
from unhorse.loading.prefixes import Part, distinct, parts, readings
from unhorse.models.classifier import weights_hash
from unhorse.rulebook import RULES
from unhorse.rules import LoadFailed, LoadRefused, Severity

# what is trained beside a classifier and judges no image, unless it turns out to be a classifier that opens
_NO_CLASSIFIER = re.compile(
    r"(.*[/_.])?(net[GDM]|[GD]|gen(erator)?|disc(riminator)?|decoder|autoencoder|mask|trigger|atkmodel|unet)([/_.].*)?"
)


class Found(NamedTuple):
    """One network of a file by its key ("" where it is the only one): the classifier, or why it is none."""

    key: str
    model: Classifier | None = None
    error: LoadRefused | LoadFailed | None = None


def in_file(networks: Mapping[str, Mapping[str, Tensor]]) -> list[Part]:
    """The networks in the state dicts of a file: their keys name the state dict, and the part of it."""
    return [
        replace(part, key="/".join(filter(None, (key, part.key))))
        for key, tensors in networks.items()
        for part in parts(tensors)
    ]


def selected(found: Sequence[Part], key: str | None) -> list[Part]:
    """Those that a key names: all without one, the one of that key, or those below it; otherwise LD211."""
    if key is None:
        return list(found)
    for chosen in (
        [part for part in found if part.key == key],
        [part for part in found if part.key.startswith(f"{key}/")],
    ):
        if chosen:
            return chosen
    known = ", ".join(part.key or "(no key: leave --key out)" for part in found)
    raise contradiction(f"the file has no network under the key {key!r}", f"it has {known}")


def classifier(part: Part, said: Said, facts: Facts, notes: Sequence[str] = ()) -> Classifier:
    """The classifier that a state dict is of: by the first reading of its names that fits, or LD210."""
    if part.mean and part.std and facts.mean is None:
        facts = replace(facts, mean=part.mean, std=part.std)
    first: LoadRefused | None = None
    for reading in readings(part):
        try:
            assumed = [f"MD306 {note}" for note in reading.notes]
            return identified(reading.tensors, said, facts, [*notes, *assumed])
        except LoadRefused as error:
            if error.rule != "LD210":
                raise
            first = first or error
    assert first is not None
    raise first


def each(
    networks: Mapping[str, Mapping[str, Tensor]], said: Said, facts: Facts, notes: Sequence[str] = ()
) -> list[Found]:
    """Every network of a file, opened or with the reason why not.

    Parts of one network that are kept under several keys come back as the one they make up.
    """
    chosen = distinct(selected(in_file(networks), said.key))
    found = [_tried(part, said, facts, notes) for part in chosen]
    layers = any(is_layer(part.tensors) for part in chosen)
    if len(found) > 1 and (layers or all(one.model is None for one in found)):
        together = Part(
            "", {f"{part.key}.{name}": part.tensors[name] for part in chosen for name in part.tensors}
        )
        whole = _tried(together, said, facts, notes)
        if whole.model is not None:
            return [whole]
    found = _without_helpers(found)
    if len(found) == 1 and said.key is None:
        return [found[0]._replace(key="")]
    return found


def distinct_models(found: Sequence[Found]) -> list[Found]:
    """Without networks whose weights agree bit for bit with those of another; a note names them."""
    kept: list[Found] = []
    for one in found:
        for first in kept:
            if one.model and first.model and weights_hash(one.model) == weights_hash(first.model):
                note = f"MD306 the network is there twice, bit for bit: {first.key} and {one.key}"
                first.model.assumptions = (*first.model.assumptions, note)
                break
        else:
            kept.append(one)
    return [kept[0]._replace(key="")] if len(kept) == 1 else kept


def single(found: Sequence[Found]) -> Found:
    """The one network that is meant; LD228 where that is not clear, naming the keys."""
    first = found[0]
    for one in found:  # a file that is hostile is no matter of choosing
        if one.error is not None and RULES[one.error.rule].severity is Severity.HIGH:
            raise one.error
    if len(found) > 1 and any(one.model is not None for one in found):
        keys = ", ".join(one.key or "(none)" for one in found)
        what = f"the file holds {len(found)} different networks, under the keys {keys}"
        raise LoadRefused("LD228", what, f"say which one with --key, for instance --key {first.key}")
    if first.error is not None:
        raise first.error
    return first


def _without_helpers(found: list[Found]) -> list[Found]:
    """Without generators and the like beside a classifier, if they did not open; a note names them."""
    helpers = [one.key for one in found if one.model is None and _NO_CLASSIFIER.fullmatch(one.key)]
    kept = [one for one in found if one.key not in helpers]
    for one in kept:
        if helpers and one.model is not None:
            note = f"MD306 left out: {', '.join(helpers)}, by the name and the weights no classifier"
            one.model.assumptions = (*one.model.assumptions, note)
    return kept or found


def _tried(part: Part, said: Said, facts: Facts, notes: Sequence[str]) -> Found:
    try:
        return Found(part.key, classifier(part, said, facts, notes))
    except (LoadRefused, LoadFailed) as error:
        return Found(part.key, None, error)
