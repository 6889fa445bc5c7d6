"""Recognises the architecture of a state dict from its names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import torch
from torch import Tensor

from unhorse.models.architectures import ARCHITECTURES, families, outline, spelled
from unhorse.models.registry import OURS, ImageShape, Naming, Normal, State
from unhorse.rules import LoadRefused

_NO_FIT = (KeyError, IndexError, ValueError, RuntimeError, ArithmeticError)
OUTLINES_AT_MOST = 6


@dataclass(frozen=True)
class Identified:
    """What a state dict is: `state` has our names and loads strictly; shapes cannot tell `assumptions`."""

    name: str
    options: dict[str, object]
    num_classes: int
    image_shape: ImageShape
    state: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    assumptions: tuple[str, ...] = ()


def identify(
    weights: Mapping[str, Tensor], *, architecture: str = "auto", image_shape: ImageShape | None = None
) -> Identified:
    """The architecture whose names and shapes the weights have; or LoadRefused LD210 or LD211."""
    names = [name for name, known in ARCHITECTURES.items() if not known.twin]
    if architecture != "auto":
        names = [_known(architecture)]
    sought = _Sought(_with_batch_counters(weights))
    for name in names:
        if found := sought.fit(name, image_shape):
            return found
    if image_shape and any(sought.fit(name, None) for name in ARCHITECTURES):
        raise LoadRefused(
            "LD211", f"the weights do not take images of shape {image_shape}", "leave the shape out"
        )
    raise _nothing_fits(sought, names, architecture)


def _known(architecture: str) -> str:
    if name := spelled(architecture):
        return name
    close = get_close_matches(architecture, ARCHITECTURES, n=3)
    remedy = f"take {' or '.join(close)}" if close else f"take one of {families()}"
    raise LoadRefused("LD211", f"there is no architecture {architecture!r}", remedy)


class _Sought:
    """A state dict to be recognised, under all the names that code bases give to its tensors."""

    def __init__(self, state: State) -> None:
        self.state = state
        # families share their namings: each is applied once
        self.named = cache(self._named)

    def _named(self, naming: Naming) -> dict[str, Tensor] | None:
        try:
            renamed = naming(self.state)
        except _NO_FIT:
            return None
        return renamed if naming is OURS or renamed.keys() != self.state.keys() else None

    def namings(self, name: str) -> list[tuple[Naming, dict[str, Tensor]]]:
        """The state dict as it is, and with foreign names turned into ours where that changes any."""
        namings = (OURS, *ARCHITECTURES[name].signs.namings)
        return [(naming, renamed) for naming in namings if (renamed := self.named(naming)) is not None]

    def fit(self, name: str, image_shape: ImageShape | None) -> Identified | None:
        """The network `name` with these weights, if they are all its weights and none is left over."""
        for naming, renamed in self.namings(name):
            try:
                found = _fit(name, naming, renamed, image_shape)
            except _NO_FIT:
                continue
            if found:
                return found
        return None

    def likeness(self, name: str) -> tuple[float, bool]:
        """How much of an architecture is there at a glance: the share of its signs, and fitting options."""
        signs, best = ARCHITECTURES[name].signs, (0.0, False)
        looked_for = {signs.first, signs.last, *signs.marks}
        for _, renamed in self.namings(name):
            try:
                signs.options(renamed)
                readable = True
            except _NO_FIT:
                readable = False
            best = max(best, (len(looked_for & renamed.keys()) / len(looked_for), readable))
        return best


def _fit(name: str, naming: Naming, state: dict[str, Tensor], given: ImageShape | None) -> Identified | None:
    known = ARCHITECTURES[name]
    signs = known.signs
    if not {signs.first, signs.last, *signs.marks} <= state.keys() or state[signs.first].dim() != 4:
        return None
    channels, classes = state[signs.first].shape[1], state[signs.last].shape[0]
    side, determined = signs.side(state)
    shape = given or (channels, side, side)
    options = {**signs.options(state), **dict(naming.options)}
    expected = outline(name, num_classes=classes, image_shape=shape, **options).state_dict()
    if _shapes(expected) != _shapes(state) or min(shape) < 1:
        return None
    normal = naming.normal or known.normal
    normal = normal if len(normal.mean) in (1, channels) else Normal()
    assumptions = naming.notes
    if not (determined or given):
        size = f"MD301 input size assumed {side}x{side}: the weights fit others too; pass --size"
        assumptions = (size, *naming.notes)
    return Identified(name, options, classes, shape, state, normal.mean, normal.std, assumptions)


def _nothing_fits(sought: _Sought, names: list[str], architecture: str) -> LoadRefused:
    """Names the nearest architecture and the first difference, so that a user sees what is wrong.

    Building all networks to compare would take seconds: only those whose signs are there are built.
    """
    likely = sorted(((sought.likeness(name), name) for name in names), key=lambda pair: pair[0], reverse=True)
    candidates = [name for (share, _), name in likely if share or architecture != "auto"][:OUTLINES_AT_MOST]
    overlaps = [
        _overlap(state, name, naming) for name in candidates for naming, state in sought.namings(name)
    ]
    overlap, nearest, difference = max(overlaps, default=(0.0, "", ""))
    if architecture != "auto":
        reason = f"the state dict is not a {architecture} ({difference})"
    elif overlap:
        reason = f"the state dict fits no known architecture; the nearest is {nearest} ({difference})"
    else:
        reason = "the state dict resembles no known architecture"
    return LoadRefused("LD210", reason, f"known for --arch are {families()}")


def _overlap(state: State, name: str, naming: Naming) -> tuple[float, str, str]:
    """The share of tensors in common with an architecture, its name, and what is different."""
    known = ARCHITECTURES[name]
    try:
        options = {**known.signs.options(state), **dict(naming.options)}
        usual = outline(name, num_classes=10, image_shape=known.image_shape, **options)
    except _NO_FIT:
        usual = outline(name, num_classes=10, image_shape=known.image_shape)
    expected, shapes = _shapes(usual.state_dict()), _shapes(state)
    absent, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & shapes.keys() if expected[key] != shapes[key])
    differences = (("lacks", absent), ("adds", extra), ("resizes", wrong))
    listed = ", ".join(f"{verb} {keys[0]!r}" for verb, keys in differences if keys)
    common = len(expected.items() & shapes.items())
    return common / len(expected.items() | shapes.items()), name, f"this file {listed}"


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _with_batch_counters(weights: State) -> dict[str, Tensor]:
    """Old files have no counters beside the running means; nothing reads them at test time."""
    absent = {
        counter: torch.tensor(0)
        for name in weights
        if name.endswith("running_mean")
        and (counter := name.removesuffix("running_mean") + "num_batches_tracked") not in weights
    }
    return {**weights, **absent}
