"""What words leave open of a chain: image size, strides and paddings, solved from the shapes of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from unhorse.loading.parts import Part
from unhorse.models.chains import Word, side_after
from unhorse.models.registry import ImageShape

USUAL_SIDES: dict[int, tuple[tuple[int, ...], ...]] = {1: ((28, 32),), 3: ((32,), (64,), (224,))}
"""Sides of the images that everybody uses, by their channels: the first that fit are taken; of several beside
each other one is asked for."""
OTHER_SIDES: dict[int, tuple[int, ...]] = {
    1: (8, 64, 48, 224, 128, 96),
    3: (28, 48, 96, 128, 150, 256, 227, 299, 100, 50, 16),
}
"""Sides that are only proposed."""
_USUAL_FLAT = {64: (1, 8, 8), 784: (1, 28, 28), 1024: (1, 32, 32), 2352: (3, 28, 28), 3072: (3, 32, 32)}
_USUAL_FLAT |= {12288: (3, 64, 64), 150528: (3, 224, 224)}
_LENET = 5  # LeNet-5 pads its first 5x5 convolution only; nobody does so with 3x3
_MAX_FREE = 8
"""Layers whose padding is tried one by one; more have the same."""

Pairs = Sequence[tuple[Word, Part | None]]
Words = tuple[Word, ...]


@dataclass(frozen=True)
class Reading:
    """One way to read a chain: words without anything open, and the image.

    `sized` says whether the weights leave only this size of those that were tried, `usual` whether the size
    was given or is that of a data set that everybody uses.
    """

    words: Words
    image_shape: ImageShape
    sized: bool
    usual: bool = True

    def __str__(self) -> str:
        return " ".join(map(str, self.words))


def readings(pairs: Pairs, image_shape: ImageShape | None = None) -> list[Reading]:
    """All the ways that fit with strides of 1 where no other is said: of those without padding, with padding
    that keeps the size, or with the first convolution padded; if there is none, of any mixture of these.
    """
    return _readings(pairs, image_shape, (_plain, _mixed))


def plain_readings(pairs: Pairs, image_shape: ImageShape | None = None) -> list[Reading]:
    """As `readings`, without mixtures of paddings and without uncommon sizes."""
    return [one for one in _readings(pairs, image_shape, (_plain,), uncommon=False) if one.usual]


def strided_readings(pairs: Pairs, image_shape: ImageShape | None = None) -> list[Reading]:
    """The ways that fit with strides of 1 and 2 where none is said: too many to take one without asking."""
    return _readings(pairs, image_shape, (_strided,))


def _readings(
    pairs: Pairs,
    image_shape: ImageShape | None,
    sorts: Sequence[Callable[[Pairs], Iterator[Words]]],
    *,
    uncommon: bool = True,
) -> list[Reading]:
    first = next((part for _, part in pairs if part is not None and part.kind != "bn"), None)
    if first is None:
        return []
    if first.kind == "linear":
        shape = image_shape or _flat_shape(first.wide)
        words = tuple(word for word, _ in pairs)
        fits = shape and math.prod(shape) == first.wide
        return [Reading(words, shape, first.wide in _USUAL_FLAT)] if shape and fits else []
    channels = first.wide * (next(word for word, part in pairs if part is first).groups or 1)
    if image_shape is not None and image_shape[0] != channels:
        return []
    usual = [list(each) for each in _usual(channels)] if image_shape is None else [[image_shape[1:]]]
    found = [_found(pairs, channels, sides, sorts) for sides in usual]
    if fitting := [each for each in found if each]:
        return [replace(one, sized=one.sized and len(fitting) == 1) for one in fitting[0]]
    if image_shape is not None or not uncommon:
        return []
    others = [(side, side) for side in OTHER_SIDES[1 if channels == 1 else 3]]
    return [replace(one, usual=False) for one in _found(pairs, channels, others, sorts)]


def _found(
    pairs: Pairs,
    channels: int,
    sides: Sequence[tuple[int, int]],
    sorts: Sequence[Callable[[Pairs], Iterator[Words]]],
) -> list[Reading]:
    """The readings at these sides of the first sort that has any."""
    for sort in sorts:
        fitting = (_fitting(pairs, words, channels, sides) for words in sort(pairs))
        if found := _distinct([reading for each in fitting for reading in each]):
            return found
    return []


def flatten_size(pairs: Pairs, words: Sequence[Word], image_shape: ImageShape) -> int | None:
    """How many numbers the first linear layer gets from images of that shape; None where a map vanishes."""
    channels, *sides = image_shape
    for word, (_, part) in zip(words, pairs, strict=True):
        if word.kind in ("conv", "maxpool", "avgpool"):
            sides = [side_after(word, side) for side in sides]
            channels = part.width if part is not None else channels
            if min(sides) < 1:
                return None
        elif word.kind == "gap":
            sides = [word.kernel or 1] * 2
        elif word.kind == "linear":
            return channels * sides[0] * sides[1]
    return channels * sides[0] * sides[1]


def closed(word: Word, part: Part | None, *, stride: int = 1, padded: bool = False) -> Word:
    """A convolution with the size of its weights and what is open filled in; other words as they are."""
    if word.kind != "conv" or part is None:
        return word
    dilation = word.dilation or 1
    same = dilation * (part.kernel - 1) // 2 if padded else 0
    return replace(
        word,
        kernel=part.kernel,
        stride=word.stride or stride,
        padding=same if word.padding is None else word.padding,
    )


def _plain(pairs: Pairs) -> Iterator[Words]:
    for padded in (False, True):
        yield tuple(closed(word, part, padded=padded) for word, part in pairs)
    first = next(at for at, (word, _) in enumerate(pairs) if word.kind == "conv")
    if (part := pairs[first][1]) is not None and part.kernel >= _LENET:
        yield tuple(closed(word, part, padded=at == first) for at, (word, part) in enumerate(pairs))


def _mixed(pairs: Pairs) -> Iterator[Words]:
    free = [place for place, (word, _) in enumerate(pairs) if word.kind == "conv" and word.padding is None]
    if len(free) <= _MAX_FREE:
        for chosen in product((False, True), repeat=len(free)):
            padded = dict(zip(free, chosen, strict=True))
            yield tuple(
                closed(word, part, padded=padded.get(place, False))
                for place, (word, part) in enumerate(pairs)
            )


def _strided(pairs: Pairs) -> Iterator[Words]:
    free = [place for place, (word, _) in enumerate(pairs) if word.kind == "conv" and word.stride is None]
    if len(free) <= _MAX_FREE - 1:
        for padded, *strides in product((False, True), *[(1, 2)] * len(free)):
            chosen = dict(zip(free, strides, strict=True))
            yield tuple(
                closed(word, part, stride=int(chosen.get(place, 1)), padded=bool(padded))
                for place, (word, part) in enumerate(pairs)
            )


def _fitting(
    pairs: Pairs, words: Words, channels: int, sides: Sequence[tuple[int, int]]
) -> Iterator[Reading]:
    """The readings at these sides; where the last maps are averaged every side fits, and the first is it."""
    linear = next((part for _, part in pairs if part is not None and part.kind == "linear"), None)
    averaged = any(word.kind == "gap" for word, _ in pairs)
    for height, width in sides:
        size = flatten_size(pairs, words, (channels, height, width))
        if size is not None and (linear is None or size == linear.wide):
            yield Reading(words, (channels, height, width), not averaged)
            if averaged:
                return


def _distinct(found: Sequence[Reading]) -> list[Reading]:
    """Each once: without anything open the choices are the same."""
    return list({(str(reading), reading.image_shape): reading for reading in found}.values())


def _usual(channels: int) -> list[list[tuple[int, int]]]:
    return [[(side, side) for side in sides] for sides in USUAL_SIDES[1 if channels == 1 else 3]]


def _flat_shape(size: int) -> ImageShape | None:
    """The image whose pixels a first linear layer takes."""
    if size in _USUAL_FLAT:
        return _USUAL_FLAT[size]
    for channels in (1, 3):
        side = round((size / channels) ** 0.5)
        if channels * side * side == size:
            return channels, side, side
    return None
