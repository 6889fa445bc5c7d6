"""Which reading of a state dict is right, by the statistics that it keeps or by images with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from unhorse.core import Classifier, Dataset, Images
from unhorse.loading.chain_sizes import Pairs, Reading
from unhorse.loading.chain_statistics import cost, mismatch, network_of
from unhorse.loading.drawn_images import drawn_images
from unhorse.loading.proposals import Proposal
from unhorse.models.chains import Word
from unhorse.models.registry import IMAGENET_MEAN, IMAGENET_STD, ImageShape

ACTIVATIONS = ("relu", "elu", "leakyrelu", "gelu", "silu", "tanh", "sigmoid")
"""What is tried in place of ReLU; relu6 and leakyrelu0.01 are not told from it."""
_FIRST = ("relu", "tanh")
_KEPT = 6
_IMAGES, _FEWEST = 128, 16
_WORK, _ALL_WORK = 2**32, 2**38
"""Multiplications of one try and of all, at most: about a second and a minute of one core."""
_LABELLED, _FEWEST_LABELLED = 256, 40

FITS, FITS_OWN = 0.25, 0.2
"""The largest mismatch of a right reading on drawn images, and on the user's own. Sixteen networks trained on
digits and photographs have 0.09 to 0.25 on drawn images and 0.03 to 0.13 on images of their own."""
APART, APART_OWN = 1.45, 1.25
"""By how much all others must be worse. On drawn images a wrong one came out best by up to 1.3 times."""
_NEAR = 1.06  # an activation other than ReLU must be better by so much
_ABOVE_CHANCE = 0.3
_ALIKE = 0.02
_NORMALS: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
    *(((0.0,), (1.0,)), ((0.5,), (0.5,)), ((0.0,), (1 / 255,))),
    *(((0.1307,), (0.3081,)), (IMAGENET_MEAN, IMAGENET_STD)),
)

Own = Callable[[Classifier], Dataset | None]
"""The user's clean images in the shape of a classifier; ValueError where they have another."""
_Read = Callable[[ImageShape, int], Dataset | None]


class Confirmed(NamedTuple):
    """The reading to use, what confirms it, and the normalisation it was tried with."""

    pairs: Pairs
    reading: Reading
    why: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class _Try(NamedTuple):
    """A reading with its mismatch; `frame` is what it is but for its activation."""

    mismatch: float
    pairs: Pairs
    reading: Reading
    frame: str
    activation: str


def confirmed(proposed: Sequence[Proposal], own: Own | None = None) -> Confirmed | None:
    """The one reading that batch statistics or labelled images speak for; None where they do not decide."""
    if not proposed:
        return None
    most = max(cost(proposal.pairs, proposal.reading) for proposal in proposed)
    if most * _FEWEST > _WORK:  # a hostile file must not keep us busy
        return None
    read = None if own is None else _remembered(own)
    norms = sum(part is not None and part.kind == "bn" for _, part in proposed[0].pairs)
    if norms >= 2:
        return _by_statistics(proposed, read, min(_IMAGES, _WORK // most))
    tries = len(proposed) * len(ACTIVATIONS) * len(_NORMALS) * 2
    count = min(_LABELLED, _ALL_WORK // (tries * most))
    return None if read is None or count < _FEWEST_LABELLED else _by_labels(proposed, read, count)


def _by_statistics(proposed: Sequence[Proposal], read: _Read | None, count: int) -> Confirmed | None:
    frames = [frame for proposal in proposed for frame in _frames(proposal)]
    images = {
        shape: _images(shape, read, count) for shape in {reading.image_shape for _, reading, _ in frames}
    }

    def tried(pairs: Pairs, reading: Reading, frame: str, activation: str, used: int) -> _Try | None:
        changed = varied(reading, activation)
        found = mismatch(network_of(pairs, changed), images[reading.image_shape][0][:used])
        return None if found is None else _Try(found, pairs, changed, frame, activation)

    few = [tried(*frame, activation, max(count // 4, _FEWEST)) for frame in frames for activation in _FIRST]
    best = sorted((one for one in few if one is not None), key=lambda one: one.mismatch)
    kept = list(dict.fromkeys(one.frame for one in best))[:_KEPT]
    left = [frame for frame in frames if frame[2] in kept]
    many = [tried(*frame, activation, count) for frame in left for activation in ACTIVATIONS]
    found = sorted((one for one in many if one is not None), key=lambda one: one.mismatch)
    if not found:
        return None
    owned = images[found[0].reading.image_shape][1]
    return _decided(found, fits=FITS_OWN if owned else FITS, apart=APART_OWN if owned else APART, owned=owned)


def _decided(found: Sequence[_Try], *, fits: float, apart: float, owned: bool) -> Confirmed | None:
    """The best reading, if it fits and all that fit nearly as well differ in nothing but their activation."""
    first = found[0]
    near = [one for one in found if one.mismatch <= apart * first.mismatch]
    if first.mismatch > fits or any(one.frame != first.frame for one in near):
        return None
    if not owned and len(near) > 1:
        return None
    relu = [one for one in near if one.activation == "relu" and one.mismatch <= _NEAR * first.mismatch]
    taken = relu[0] if relu else first
    others = [one.activation for one in near if one is not taken]
    also = f"; {', '.join(others)} fit nearly as well" if others else ""
    source = "your clean images" if owned else "drawn images"
    why = (
        f"proposed from shapes and confirmed by its batch-norm statistics on {source} (mismatch "
        f"{taken.mismatch:.2f}, the next other reading {_next(found, taken)}{also})"
    )
    return Confirmed(taken.pairs, taken.reading, why)


def _next(found: Sequence[_Try], taken: _Try) -> str:
    others = [one.mismatch for one in found if one.frame != taken.frame]
    return f"{min(others):.2f}" if others else "none"


def _frames(proposal: Proposal) -> Iterator[tuple[Pairs, Reading, str]]:
    """A proposal with maxima and averages, with normalisation before and behind the activation."""
    orders = [proposal.reading]
    if not proposal.ordered and any(word.kind == "bn" for word in proposal.reading.words):
        orders.append(swapped(proposal.reading))
    for order in orders:
        for pool in ("maxpool", "avgpool"):
            words = tuple(replace(word, kind=pool) if word.pools else word for word in order.words)
            reading = replace(order, words=words)
            yield _reordered(proposal.pairs, reading), reading, f"{reading} {reading.image_shape}"
            if words == order.words and pool == "avgpool":
                break


def _images(shape: ImageShape, read: _Read | None, count: int) -> tuple[Images, bool]:
    """Images to run, and whether they are the user's own."""
    data = None if read is None else read(shape, 1)
    if data is not None and len(data) >= _FEWEST:
        pixels = data[:count].pixels()
        return (pixels - pixels.mean()) / pixels.std().clamp(min=1e-6), True
    return drawn_images(shape, count), False


def _remembered(own: Own) -> _Read:
    """The user's images of a shape, for so many classes, read once; None where they are of another shape."""

    @cache
    def read(shape: ImageShape, classes: int) -> Dataset | None:
        names = [str(index) for index in range(classes)]
        try:
            return own(Classifier(nn.Identity(), image_shape=shape, class_names=names))
        except ValueError:
            return None

    return read


def _by_labels(proposed: Sequence[Proposal], read: _Read, count: int) -> Confirmed | None:
    """The reading with which the user's labelled images are classified best, and far above chance."""
    found: list[tuple[float, Confirmed]] = []
    for proposal in proposed:
        shape = proposal.reading.image_shape
        classes = [part.width for word, part in proposal.pairs if part is not None and word.weighted][-1]
        data = read(shape, classes)
        if data is None or data.labels is None or len(data) < _FEWEST_LABELLED:
            continue
        data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]]
        assert data.labels is not None
        chance = float(data.labels.bincount().max()) / len(data)
        for pairs, frame, _ in _frames(proposal):
            for activation in ACTIVATIONS:
                reading = varied(frame, activation)
                right, normal = _accuracy(network_of(pairs, reading), data, shape)
                if right >= chance + _ABOVE_CHANCE:
                    found.append((right, Confirmed(pairs, reading, "", *normal)))
    if not found:
        return None
    best = max(right for right, _ in found)
    near = [one for right, one in found if right >= best - _ALIKE]
    if len({_frame_of(one.reading) for one in near}) > 1:
        return None
    taken = next(one for right, one in found if right >= best - _ALIKE / 4)
    also = f"; {len(near) - 1} other activations do nearly as well" if len(near) > 1 else ""
    why = f"proposed from shapes and confirmed by your clean images ({best:.0%} right{also})"
    return taken._replace(why=why)


def _frame_of(reading: Reading) -> str:
    words = ["act" if word.kind in ACTIVATIONS else str(word) for word in reading.words]
    return f"{' '.join(words)} {reading.image_shape}"


def _accuracy(
    network: nn.Module, data: Dataset, shape: ImageShape
) -> tuple[float, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The share that is classified rightly under the best of the usual normalisations, and that one."""
    assert data.labels is not None
    best: tuple[float, tuple[tuple[float, ...], tuple[float, ...]]] = (0.0, ((0.0,), (1.0,)))
    for mean, std in _NORMALS:
        if len(mean) not in (1, shape[0]):
            continue
        model = Classifier(network, image_shape=shape, class_names=["0"], mean=mean, std=std).eval()
        with torch.no_grad():
            right = float((model(data.pixels()).argmax(1) == data.labels).float().mean())
        best = max(best, (right, (mean, std)), key=lambda pair: pair[0])
    return best


def _reordered(pairs: Pairs, reading: Reading) -> Pairs:
    """The layers of the file beside the words of a reading in which activations moved."""
    parts = iter(part for _, part in pairs if part is not None)
    return [(word, next(parts) if word.weighted or word.kind == "bn" else None) for word in reading.words]


def varied(reading: Reading, activation: str) -> Reading:
    """The reading with another activation in place of ReLU."""
    other = Word(activation, slope=0.1 if activation == "leakyrelu" else None)
    return replace(reading, words=tuple(other if word.kind == "relu" else word for word in reading.words))


def swapped(reading: Reading) -> Reading:
    """The reading with each activation before the normalisation that it stood behind, and the other way."""
    words = list(reading.words)
    for at in range(len(words) - 1):
        if {words[at].kind, words[at + 1].kind} == {"bn", "relu"} and words[at - 1].weighted:
            words[at], words[at + 1] = words[at + 1], words[at]
    return replace(reading, words=tuple(words))
