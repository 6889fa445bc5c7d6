"""Plain chains of layers, said in words: `conv5p2 relu maxpool2 flatten linear relu linear`."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from unhorse.models.registry import ImageShape

CHAIN = "chain"
MAX_WORDS = 400
_MAX_NUMBER = 4096
_MAX_ELEMENTS = 2**26  # of one feature map: a quarter of a gigabyte per image

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "leakyrelu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
OTHERS = ("conv", "linear", "bn", "maxpool", "avgpool", "gap", "flatten", "dropout", "softmax", "logsoftmax")
LISTED = ", ".join([*OTHERS, *ACTIVATIONS])
"""All words, for messages."""
_ALIASES = {
    **{"batchnorm": "bn", "batchnorm2d": "bn", "batchnorm1d": "bn", "conv2d": "conv", "fc": "linear"},
    **{"dense": "linear", "maxpool2d": "maxpool", "avgpool2d": "avgpool", "swish": "silu"},
    **{"log_softmax": "logsoftmax", "leaky_relu": "leakyrelu", "lrelu": "leakyrelu", "dropout2d": "dropout"},
    **{"globalavgpool": "gap", "adaptiveavgpool": "gap"},
}
_GRAMMAR = re.compile(r"([a-z_]+(?:[12]d(?![a-z0-9])|2d(?=[0-9]))?)((?:[0-9.]+)?)((?:[spdg][0-9]+)*)")
_MARKS = {"conv": "spdg", "maxpool": "sp", "avgpool": "sp"}


@dataclass(frozen=True)
class Word:
    """One layer; what is None is still open. `kernel` is the side of a convolution, a pooling, or of the map
    that `gap` leaves; `slope` is leakyrelu's.
    """

    kind: str
    kernel: int | None = None
    stride: int | None = None
    padding: int | None = None
    dilation: int | None = None
    groups: int | None = None
    slope: float | None = None

    @property
    def weighted(self) -> bool:
        """Whether the layer has a weight that says how wide its output is."""
        return self.kind in ("conv", "linear")

    @property
    def pools(self) -> bool:
        return self.kind in ("maxpool", "avgpool")

    def __str__(self) -> str:
        size = "" if self.kernel is None or (self.kind == "gap" and self.kernel == 1) else str(self.kernel)
        if self.slope is not None:
            size = f"{self.slope:g}"
        marks = (("s", self.stride), ("p", self.padding), ("d", self.dilation), ("g", self.groups))
        usual = {"p": 0} if self.pools else {"d": 1, "g": 1}
        if self.pools:
            usual["s"] = self.kernel or 0
        said = "".join(f"{mark}{value}" for mark, value in marks if value not in (None, usual.get(mark)))
        return f"{self.kind}{size}{said}"


def read_words(text: str) -> tuple[Word, ...]:
    """The layers that `text` names; ValueError for a word that is none."""
    words = [_word(place, word) for place, word in enumerate(re.split(r"[\s,]+", text.strip()), start=1)]
    if len(words) > MAX_WORDS:
        raise ValueError(f"{len(words)} layers are more than {MAX_WORDS}")
    return tuple(words)


def _word(place: int, text: str) -> Word:
    found = _GRAMMAR.fullmatch(text.lower())
    name, size, marks = found.groups() if found else ("", "", "")
    if name + size in ACTIVATIONS:  # relu6 is a name, not a relu of size 6
        name, size = name + size, ""
    kind = _ALIASES.get(name, name)
    options = {mark: int(number) for mark, number in re.findall(r"([spdg])([0-9]+)", marks)}
    if kind not in (*OTHERS, *ACTIVATIONS) or options.keys() - set(_MARKS.get(kind, "")):
        raise ValueError(f"layer {place} {text[:40]!r} is no word for a layer: take {LISTED}")
    if kind == "leakyrelu":
        return Word(kind, slope=_slope(place, size or "0.01"))
    if kind == "dropout":  # its rate plays no part at test time
        return Word(kind)
    numbers = [size] if size else []
    if any(not number.isdecimal() for number in numbers) or (size and kind not in (*_MARKS, "gap")):
        raise ValueError(f"layer {place} {text[:40]!r} takes no {size!r}: say {kind}")
    kernel = int(size) if size else {"maxpool": 2, "avgpool": 2, "gap": 1}.get(kind)
    stride, padding = options.get("s"), options.get("p")
    if kind in ("maxpool", "avgpool"):
        stride, padding = stride or kernel, padding or 0
    word = Word(kind, kernel, stride, padding, options.get("d"), options.get("g"))
    _check_numbers(place, text, word)
    return word


def _slope(place: int, text: str) -> float:
    try:
        slope = float(text)
    except ValueError as error:
        raise ValueError(f"layer {place}: {text!r} is no slope of a leakyrelu: say leakyrelu0.1") from error
    if not 0 <= slope <= 1:
        raise ValueError(f"layer {place}: a leakyrelu's slope is between 0 and 1, not {text}")
    return slope


def _check_numbers(place: int, text: str, word: Word) -> None:
    least_1 = (word.kernel, word.stride, word.dilation, word.groups)
    if any(number is not None and not 0 < number <= _MAX_NUMBER for number in least_1):
        raise ValueError(f"layer {place} {text[:40]!r}: sizes and strides are between 1 and {_MAX_NUMBER}")
    if word.padding is not None and word.padding > (word.kernel or _MAX_NUMBER):
        raise ValueError(f"layer {place} {text[:40]!r} pads by more than its size")
    if word.pools and 2 * (word.padding or 0) > (word.kernel or 0):
        raise ValueError(f"layer {place} {text[:40]!r}: a pooling pads by half its size at most")


def side_after(word: Word, side: int) -> int:
    """The height or width of a map behind a convolution or pooling; below 1 where it is too small."""
    assert word.kernel is not None and word.stride is not None and word.padding is not None
    reach = (word.dilation or 1) * (word.kernel - 1) + 1
    return (side + 2 * word.padding - reach) // word.stride + 1


def chain(
    num_classes: int,
    image_shape: ImageShape,
    *,
    words: str,
    widths: Sequence[int],
    biased: Sequence[bool],
) -> nn.Module:
    """The chain of layers: `words` with every size, stride and padding, `widths` the outputs of each
    convolution and linear layer and `biased` whether it adds a bias. ValueError where that is no classifier.
    """
    layers = read_words(words) if isinstance(words, str) else ()
    weighted = [place for place, word in enumerate(layers) if word.weighted]
    _check_lists(widths, biased, len(weighted))
    outputs = dict(zip(weighted, zip(widths, biased, strict=True), strict=True))
    features: list[nn.Module] = []
    head: list[nn.Module] = []
    shape: tuple[int, ...] = image_shape
    for place, word in enumerate(layers):
        module, shape = _layer(place + 1, word, shape, outputs.get(place, (0, False)))
        (features if len(shape) == 3 else head).append(module)
    if shape != (num_classes,):
        raise ValueError(f"the chain ends in {shape}, not in {num_classes} logits")
    parts = {"features": nn.Sequential(*features), "head": nn.Sequential(*head)}
    return nn.Sequential(OrderedDict[str, nn.Module](parts))


def _check_lists(widths: Sequence[int], biased: Sequence[bool], count: int) -> None:
    for name, values, kind in (("widths", widths, int), ("biased", biased, bool)):
        if not isinstance(values, Sequence) or len(values) != count:
            raise ValueError(f"{name} needs a value for each of {count} convolutions and linear layers")
        if any(type(value) is not kind for value in values) or (kind is int and min(values, default=0) < 0):
            raise ValueError(f"{name} has {values!r:.80}")


def _layer(
    place: int, word: Word, shape: tuple[int, ...], output: tuple[int, bool]
) -> tuple[nn.Module, tuple[int, ...]]:
    """The module of a word and the shape (c, h, w) or (f,) behind it."""
    if len(shape) == 1:
        return _flat_layer(place, word, shape, output)
    channels, height, width = shape
    if word.kind == "flatten":
        return nn.Flatten(), (math.prod(shape),)
    if word.kind == "linear":
        raise ValueError(f"layer {place} 'linear' stands before flatten")
    if word.kind == "bn":
        return nn.BatchNorm2d(channels), shape
    if word.kind == "gap":
        side = word.kernel or 1
        return nn.AdaptiveAvgPool2d(side), (channels, side, side)
    if word.kind not in ("conv", "maxpool", "avgpool"):
        return _shapeless(place, word), shape
    if word.kernel is None or word.stride is None or word.padding is None:
        raise ValueError(f"layer {place} {str(word)!r} leaves its size, stride or padding open")
    sides = side_after(word, height), side_after(word, width)
    wide = output[0] if word.kind == "conv" else channels
    if min(sides) < 1 or wide * math.prod(sides) > _MAX_ELEMENTS:
        raise ValueError(f"layer {place} {str(word)!r} makes maps of {sides[0]}x{sides[1]}")
    if word.kind == "conv":
        return _convolution(place, word, channels, output), (wide, *sides)
    pool = nn.MaxPool2d if word.kind == "maxpool" else nn.AvgPool2d
    return pool(word.kernel, word.stride, word.padding), (wide, *sides)


def _flat_layer(
    place: int, word: Word, shape: tuple[int, ...], output: tuple[int, bool]
) -> tuple[nn.Module, tuple[int, ...]]:
    if word.kind == "linear":
        return nn.Linear(shape[0], output[0], bias=output[1]), (output[0],)
    if word.kind == "bn":
        return nn.BatchNorm1d(shape[0]), shape
    if word.kind == "flatten":
        return nn.Flatten(), shape
    return _shapeless(place, word), shape


def _convolution(place: int, word: Word, channels: int, output: tuple[int, bool]) -> nn.Module:
    groups, (width, bias) = word.groups or 1, output
    if channels % groups or width % groups:
        raise ValueError(f"layer {place} {str(word)!r}: {channels} to {width} channels in {groups} groups")
    assert word.kernel is not None and word.stride is not None and word.padding is not None
    spread = word.dilation or 1
    return nn.Conv2d(
        channels, width, word.kernel, word.stride, word.padding, dilation=spread, groups=groups, bias=bias
    )


def _shapeless(place: int, word: Word) -> nn.Module:
    """What keeps the shape."""
    if word.kind == "dropout":
        return nn.Dropout()
    if word.kind not in ACTIVATIONS:
        raise ValueError(f"layer {place} {str(word)!r} cannot stand here")
    if word.kind == "leakyrelu":
        return nn.LeakyReLU(0.01 if word.slope is None else word.slope)
    return ACTIVATIONS[word.kind]()
