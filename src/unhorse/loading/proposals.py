"""Proposes how the layers of a state dict follow each other, from the shapes of their weights alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from unhorse.loading.chain_sizes import Pairs, Reading, plain_readings
from unhorse.loading.chains import assigned, whole
from unhorse.loading.parts import Part, interchangeable, order_lost, parts_of
from unhorse.models.chains import read_words
from unhorse.models.registry import ImageShape
from unhorse.rules import LoadRefused

MOST = 24
_MAX_CONVOLUTIONS = 20


class Proposal(NamedTuple):
    """One way to read a state dict, with ReLU and maxima.

    `ordered` says whether the numbers in the names show what stands before a normalisation.
    """

    pairs: Pairs
    reading: Reading
    ordered: bool


def proposals(state: Mapping[str, Tensor], image_shape: ImageShape | None = None) -> list[Proposal]:
    """All readings as a chain of convolutions, poolings and linear layers that fit, the plainest first.

    There are none where a layer is of another kind, the widths make no chain, or where the file has sorted
    layers that could stand in each other's place.
    """
    try:
        parts = parts_of(state)
        if order_lost(state) and interchangeable(parts):
            return []
        return list(_proposed(parts, image_shape))[:MOST]
    except LoadRefused:
        return []


def _proposed(parts: Sequence[Part], image_shape: ImageShape | None) -> Iterator[Proposal]:
    blocks = _blocks(parts)
    convolutions = [block for block in blocks if block[0].kind == "conv"]
    linears = [block for block in blocks if block[0].kind == "linear"]
    if not linears or len(convolutions) > _MAX_CONVOLUTIONS or len(blocks[-1]) > 1:
        return
    numbered = any(len(block) > 1 and _number(block[0]) is not None for block in convolutions)
    averaged = convolutions and convolutions[-1][0].width == linears[0][0].wide
    seen: set[tuple[str, ImageShape]] = set()
    for pooled in _poolings(convolutions):
        words = [*_features(convolutions, pooled), "gap flatten" if averaged else "flatten", *_head(linears)]
        ordered = [part for block in (*convolutions, *linears) for part in block]
        try:
            pairs = assigned(whole(read_words(" ".join(words))), ordered)
        except LoadRefused:
            return
        for reading in plain_readings(pairs, image_shape):
            if (str(reading), reading.image_shape) not in seen:
                seen.add((str(reading), reading.image_shape))
                yield Proposal(pairs, reading, numbered)


def _blocks(parts: Sequence[Part]) -> list[list[Part]]:
    """Each convolution and linear layer with its normalisation: the one behind it, or the next as wide.

    LoadRefused where a normalisation is left over.
    """
    weighted = [part for part in parts if part.kind != "bn"]
    norms = [part for part in parts if part.kind == "bn"]
    behind = {id(part): after for part, after in pairwise(parts) if part.kind != "bn" and after.kind == "bn"}
    interleaved = len(behind) == len(norms)
    blocks = []
    for part in sorted(weighted, key=lambda part: part.kind != "conv"):
        norm = behind.get(id(part)) if interleaved else next(iter(norms), None)
        block = [part]
        if norm is not None and norm.width == part.width:
            block.append(norm)
            norms = [other for other in norms if other is not norm]
        blocks.append(block)
    if norms:
        raise LoadRefused("LD210", "a normalisation follows no layer", "pass --network FILE.py:NAME")
    return blocks


def _features(convolutions: Sequence[Sequence[Part]], pooled: Sequence[bool]) -> list[str]:
    words = []
    for block, pool in zip(convolutions, pooled, strict=True):
        late = len(block) > 1 and (_gap(block[0], block[1]) or 0) > 0
        layer = "conv relu bn" if late else "conv bn relu" if len(block) > 1 else "conv relu"
        words.append(f"{layer} maxpool2" if pool else layer)
    return words


def _head(linears: Sequence[Sequence[Part]]) -> list[str]:
    layers = ["linear bn" if len(block) > 1 else "linear" for block in linears]
    return [" relu ".join(layers)]


def _poolings(convolutions: Sequence[Sequence[Part]]) -> Iterator[tuple[bool, ...]]:
    """Behind which convolutions a pooling may stand: where numbers in the names tell, only there."""
    count = len(convolutions)
    told = [_pooled(block, after) for block, after in pairwise(convolutions)] + [None]
    widths = [block[0].width for block in convolutions]
    wider = [at + 1 == count or widths[at + 1] != widths[at] for at in range(count)]
    patterns: list[Sequence[bool]] = [
        [True] * count,
        [at % 2 == 1 for at in range(count)],
        wider,
        *([at >= start for at in range(count)] for start in range(1, count + 1)),
        *([at < end for at in range(count)] for end in range(1, count)),
    ]
    seen = set()
    for pattern in patterns[: max(count, 1) * 3]:
        known = tuple(
            usual if sure is None else sure for usual, sure in zip(pattern, told[:count], strict=True)
        )
        if known not in seen:
            seen.add(known)
            yield known


def _pooled(block: Sequence[Part], after: Sequence[Part]) -> bool | None:
    """Whether numbers are missing for a pooling beside the activation; None where names do not tell."""
    late = len(block) > 1 and (_gap(block[0], block[1]) or 0) > 0
    gap = _gap(block[-1], after[0])
    return None if gap is None else gap + late >= 2


def _gap(one: Part, other: Part) -> int | None:
    """How many layers without weights stand between two of one Sequential; None if they are not."""
    first, second = _number(one), _number(other)
    if first is None or second is None or first[0] != second[0] or second[1] <= first[1]:
        return None
    return second[1] - first[1] - 1


def _number(part: Part) -> tuple[str, int] | None:
    found = re.fullmatch(r"(.*?)(\d+)", part.name)
    return (found[1], int(found[2])) if found and (not found[1] or found[1].endswith(".")) else None
