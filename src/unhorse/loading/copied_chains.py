"""The plain networks that everybody copies, known by the names and kinds of their layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from unhorse.loading.chain_sizes import Pairs, Reading, readings
from unhorse.loading.chains import as_identified, assigned, whole
from unhorse.loading.identification import Identified
from unhorse.loading.parts import Part, parts_of
from unhorse.models.chains import read_words
from unhorse.models.registry import ImageShape
from unhorse.rules import LoadRefused


@dataclass(frozen=True)
class Copied:
    """A network that is known: its `layers` as name and word each, and ways to read it, in words."""

    title: str
    layers: str
    words: tuple[str, ...]


_TWO = "conv{0} relu maxpool2 conv{1} relu maxpool2 flatten linear relu linear"
_LENET = _TWO + " relu linear"
_AVERAGED = "conv5p0 relu avgpool2 conv5p0 relu avgpool2 flatten linear relu linear"
_NORMED = "conv5p2 bn relu maxpool2 conv5p2 bn relu maxpool2 flatten linear"
_LINEARS = "flatten linear relu linear"

COPIED = (
    Copied(
        "PyTorch's CIFAR tutorial or LeNet-5",
        "conv1:conv5 conv2:conv5 fc1:linear fc2:linear fc3:linear",
        (_LENET.format("5p0", "5p0"), _LENET.format("5p2", "5p0")),
    ),
    Copied(
        "PyTorch's MNIST example",
        "conv1:conv3 conv2:conv3 fc1:linear fc2:linear",
        ("conv3p0 relu conv3p0 relu maxpool2 flatten linear relu linear",),
    ),
    Copied(
        "two convolutions, each pooled, and two linear layers",
        "conv1:conv3 conv2:conv3 fc1:linear fc2:linear",
        (_TWO.format("3p1", "3p1"), _TWO.format("3p0", "3p0")),
    ),
    Copied(
        "PyTorch's older MNIST example or CNN 20-50",
        "conv1:conv5 conv2:conv5 fc1:linear fc2:linear",
        (_TWO.format("5p0", "5p0"), _TWO.format("5p2", "5p2"), _TWO.format("5p2", "5p0")),
    ),
    Copied(
        "LeNet-5 whose third convolution is its first full layer",
        "conv1:conv5 conv2:conv5 conv3:conv5 fc1:linear fc2:linear",
        tuple(
            f"conv5{first} relu maxpool2 conv5p0 relu maxpool2 conv5p0 relu flatten linear relu linear"
            for first in ("p0", "p2")
        ),
    ),
    Copied("the BadNet CNN", "conv1.0:conv5 conv2.0:conv5 fc1.0:linear fc2.0:linear", (_AVERAGED,)),
    Copied(
        "the MNIST tutorial of two Sequentials and an output",
        "conv1.0:conv5 conv2.0:conv5 out:linear",
        (_TWO.format("5p2", "5p2").removesuffix(" relu linear"),),
    ),
    Copied(
        "the MNIST tutorial of two layers with normalisation",
        "layer1.0:conv5 layer1.1:bn layer2.0:conv5 layer2.1:bn fc:linear",
        (_NORMED,),
    ),
    Copied(
        "the MNIST tutorial of two layers",
        "layer1.0:conv5 layer2.0:conv5 fc1:linear fc2:linear",
        # no activation between the linear layers
        (_TWO.format("5p2", "5p2").replace("linear relu linear", "dropout linear linear"),),
    ),
    Copied(
        "PyTorch's quickstart",
        "linear_relu_stack.0:linear linear_relu_stack.2:linear linear_relu_stack.4:linear",
        (_LINEARS + " relu linear",),
    ),
    *(
        Copied(
            f"a perceptron of {count} layers",
            " ".join(f"fc{index}:linear" for index in range(1, count + 1)),
            (_LINEARS + " relu linear" * (count - 2),),
        )
        for count in (2, 3, 4)
    ),
)
_OPEN = "activations and poolings are those of published code with these names; --layers says others"


def known_chain(state: Mapping[str, Tensor], *, image_shape: ImageShape | None = None) -> Identified | None:
    """The copied network that the names and shapes are of; None where they are of none."""
    try:
        parts = parts_of(state)
    except LoadRefused:
        return None
    for title, named, words in _candidates(parts):
        found = [reading for text in words for reading in _readings(named, text, image_shape)]
        if found:
            pairs, reading = min(found, key=lambda pair: pair[1].image_shape[1])
            sizes = {other.image_shape for _, other in found}
            reading = replace(reading, sized=reading.sized and len(sizes) == 1)
            return as_identified(reading, pairs, f"known by its names as {title} ({_OPEN})")
    return None


def _readings(
    parts: Sequence[Part], words: str, image_shape: ImageShape | None
) -> Iterator[tuple[Pairs, Reading]]:
    try:
        pairs = assigned(whole(read_words(words)), parts)
    except LoadRefused:
        return
    yield from ((pairs, reading) for reading in readings(pairs, image_shape) if reading.usual)


def _candidates(parts: Sequence[Part]) -> Iterator[tuple[str, list[Part], tuple[str, ...]]]:
    """The titles of networks with these names, their layers in order, and the words to read them by."""
    by_name = {part.name: part for part in parts}
    for copied in COPIED:
        names, words = zip(*(layer.split(":") for layer in copied.layers.split()), strict=True)
        if by_name.keys() == set(names) and all(
            _is(by_name[name], word) for name, word in zip(names, words, strict=True)
        ):
            yield copied.title, [by_name[name] for name in names], copied.words
    for decode in (_vgg, _mobilenet):
        if found := decode(by_name):
            yield found


def _is(part: Part, word: str) -> bool:
    return word in (part.kind, f"{part.kind}{part.kernel}")


Decoded = tuple[str, list[Part], tuple[str, ...]]


def _vgg(by_name: Mapping[str, Part]) -> Decoded | None:
    """VGG for small images: the numbers of `features` show where activations and poolings are.

    After a convolution (and its normalisation) one number is missing for the activation, a second one for a
    pooling; a third, for dropout, is of the small VGG of backdoor research, whose activation is ELU.
    """
    numbers = sorted(int(name[9:]) for name in by_name if re.fullmatch(r"features\.\d+", name))
    heads = [name for name in by_name if not name.startswith("features.")]
    if not numbers or numbers[0] != 0 or any(not _fits_vgg(by_name[f"features.{n}"]) for n in numbers):
        return None
    words, dropped = [], False
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        part = by_name[f"features.{number}"]
        words.append("conv3p1" if part.kind == "conv" else "bn")
        missing = 2 if following is None else following - number - 1
        if not 0 <= missing <= 3 or (missing == 0 and by_name[f"features.{following}"].kind != "bn"):
            return None
        dropped = dropped or missing == 3
        words += ["ACT", "maxpool2", "dropout"][:missing]
    head = _vgg_head(by_name, heads)
    if head is None:
        return None
    activation = "elu" if dropped else "relu"
    features = " ".join(words).replace("ACT", activation)
    named = [by_name[f"features.{number}"] for number in numbers]
    title = "the small VGG with ELU and dropout" if dropped else "VGG for small images"
    return title, [*named, *head[0]], (f"{features} flatten {head[1]}",)


def _fits_vgg(part: Part) -> bool:
    return part.kind == "bn" or (part.kind == "conv" and part.kernel == 3)


def _vgg_head(by_name: Mapping[str, Part], heads: Sequence[str]) -> tuple[list[Part], str] | None:
    """One linear layer, or three in a Sequential."""
    for names in (["classifier"], ["fc"], ["linear"], *(_head_names(at) for at in _HEADS)):
        if sorted(heads) == sorted(names) and all(by_name[name].kind == "linear" for name in names):
            return [by_name[name] for name in names], " relu ".join(["linear"] * len(names))
    return None


_HEADS = ((0, 3, 6), (1, 4, 6), (0, 2, 4))


def _head_names(numbers: Sequence[int]) -> list[str]:
    return [f"classifier.{number}" for number in numbers]


def _mobilenet(by_name: Mapping[str, Part]) -> Decoded | None:
    """MobileNet (Howard et al., 2017) for small images: a block that widens halves, but for the first."""
    count = len({name.split(".")[1] for name in by_name if name.startswith("layers.")})
    blocks = [[f"layers.{at}.{name}" for name in ("conv1", "bn1", "conv2", "bn2")] for at in range(count)]
    names = ["conv1", "bn1", *(name for block in blocks for name in block), "linear"]
    if count < 3 or by_name.keys() != set(names) or by_name["conv1"].kind != "conv":
        return None
    words, wide = ["conv3s1p1 bn relu"], by_name["conv1"].width
    for at, block in enumerate(blocks):
        width = by_name[block[2]].width
        words.append(f"conv3s{2 if at and width > wide else 1}p1 bn relu conv1s1p0 bn relu")
        wide = width
    text = " ".join(words)
    return (
        "MobileNet for small images",
        [by_name[name] for name in names],
        (f"{text} avgpool2 flatten linear",),
    )
