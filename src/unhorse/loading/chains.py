"""Reads a state dict as the chain of layers that words name: which tensor is whose, and what is open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from unhorse.loading.chain_sizes import Pairs, Reading, closed, flatten_size, readings, strided_readings
from unhorse.loading.identification import Identified
from unhorse.loading.parts import Part, interchangeable, listed, order_lost, parts_of
from unhorse.models.architectures import outline
from unhorse.models.chains import CHAIN, Word, read_words
from unhorse.models.registry import ImageShape
from unhorse.rules import LoadRefused

_MAX_STEPS = 20_000
_SQUASHING = ("softmax", "logsoftmax", "sigmoid")
_NAMED = {"conv": "convolution", "linear": "linear layer", "bn": "batch normalisation"}


def said_chain(
    state: Mapping[str, Tensor], words: str, *, image_shape: ImageShape | None = None
) -> Identified:
    """The chain that `--layers` says, with the file's tensors.

    LoadRefused LD211 says what does not fit, LD210 asks where more than one size or padding does.
    """
    try:
        layers = read_words(words)
    except ValueError as error:
        raise LoadRefused("LD211", f"--layers: {error}", "correct the words") from error
    parts = parts_of(state)
    if order_lost(state) and (two := interchangeable(parts)):
        reason = f"the file has sorted its tensors, and {two[0].said} or {two[1].said} may come first"
        raise LoadRefused("LD210", reason, "pass --network FILE.py:NAME, or a file of torch.save")
    pairs = assigned(whole(layers), parts)
    found = readings(pairs, image_shape)
    if not found:
        raise _misfit(pairs, image_shape)
    if len(found) > 1 or not found[0].usual:
        raise _open(found)
    return as_identified(found[0], pairs, "read as --layers says")


def whole(layers: Sequence[Word]) -> tuple[Word, ...]:
    """The words up to the logits: no softmax or sigmoid at the end, a flatten where it was left out."""
    words = list(layers)
    while words and words[-1].kind in (*_SQUASHING, "dropout"):
        words.pop()
    if not any(word.kind == "flatten" for word in words):
        first = next((at for at, word in enumerate(words) if word.kind == "linear"), len(words))
        words.insert(first, Word("flatten"))
    return tuple(words)


def assigned(words: Sequence[Word], parts: Sequence[Part]) -> Pairs:
    """Each word with the layer of the file that it is; LoadRefused LD211 says which has none.

    Each kind is taken in the file's order, and by shapes where that order does not fit.
    """
    search = _Search(words, parts)
    if search.found is None:
        remedy = "correct the words, or pass --network FILE.py:NAME"
        raise LoadRefused("LD211", f"--layers: {search.reason}", remedy)
    of_place = dict(zip(search.places, search.found, strict=True))
    pairs, wide = [], 0
    for at, word in enumerate(words):
        part = parts[of_place[at]] if at in of_place else None
        if part is not None and word.kind == "conv":
            word = replace(word, groups=max(wide // part.wide, 1))
            wide = part.width
        pairs.append((word, part))
    return pairs


def as_identified(reading: Reading, pairs: Pairs, why: str) -> Identified:
    """The chain with the file's tensors under its own names; `why` says how the reading was come by."""
    weighted = [part for word, part in pairs if part is not None and word.weighted]
    classes = weighted[-1].width if weighted else 0
    options: dict[str, object] = {
        "words": str(reading),
        "widths": [part.width for part in weighted],
        "biased": [part.biased for part in weighted],
    }
    try:
        network = outline(CHAIN, num_classes=classes, image_shape=reading.image_shape, **options)
    except ValueError as error:
        raise LoadRefused("LD211", f"--layers: {error}", "correct the words") from error
    names = [name for name, module in network.named_modules() if any(True for _ in module.parameters(False))]
    used = [part for _, part in pairs if part is not None]
    state = {
        f"{name}.{key}": tensor
        for name, part in zip(names, used, strict=True)
        for key, tensor in part.tensors.items()
    }
    notes = [f"MD305 network {why}: {reading}; its weights are, in order, {listed(used)}"]
    if not reading.sized:
        side = "x".join(map(str, reading.image_shape[1:]))
        notes.append(f"MD301 input size assumed {side}: the weights fit others too; pass --size")
    return Identified(CHAIN, options, classes, reading.image_shape, state, (0.0,), (1.0,), tuple(notes))


class _Search:
    """Depth first through the words with weights; the file's order is tried first."""

    def __init__(self, words: Sequence[Word], parts: Sequence[Part]) -> None:
        self.parts = parts
        flat = next((at for at, word in enumerate(words) if word.kind == "flatten"), len(words))
        self.places = [at for at, word in enumerate(words) if word.kind in ("conv", "linear", "bn")]
        self.words = [words[at] for at in self.places]
        self.first_flat = next((i for i, at in enumerate(self.places) if at > flat), len(self.places))
        self.deepest, self.reason, self.steps = -1, "", 0
        self.found = self._from(0, (), None)

    def _from(self, index: int, used: tuple[int, ...], wide: int | None) -> tuple[int, ...] | None:
        """The parts of all words, if those from `index` on find theirs for `wide` channels or features."""
        self.steps += 1
        left = [at for at in range(len(self.parts)) if at not in used]
        if index == len(self.words):
            if left:
                self._note(index, f"no word takes {self.parts[left[0]].said}, {len(left)} in all are left")
            return None if left else used
        word = self.words[index]
        of_kind = [at for at in left if self.parts[at].kind == word.kind]
        for at in of_kind:
            part = self.parts[at]
            if self.steps < _MAX_STEPS and self._follows(index, part, wide):
                width = wide if word.kind == "bn" and index != self.first_flat else part.width
                found = self._from(index + 1, (*used, at), width)
                if found is not None:
                    return found
        self._note(index, self._wanted(index, wide, of_kind))
        return None

    def _follows(self, index: int, part: Part, wide: int | None) -> bool:
        word = self.words[index]
        if word.kind == "conv" and word.kernel not in (None, part.kernel):
            return False
        if wide is None:
            return word.kind != "bn"
        if index == self.first_flat:
            return part.wide % wide == 0
        if word.kind == "conv":
            groups = word.groups or wide // part.wide
            return part.wide * groups == wide and part.width % groups == 0
        return part.wide == wide

    def _wanted(self, index: int, wide: int | None, of_kind: Sequence[int]) -> str:
        """What a word without a layer wants, beside what the file has."""
        word, place = self.words[index], self.places[index] + 1
        if not of_kind:
            return f"layer {place} {str(word)!r} finds no {_NAMED[word.kind]} left in the file"
        wanted = _NAMED[word.kind]
        if word.kernel is not None:
            wanted += f" of {word.kernel}x{word.kernel}"
        if wide is not None:
            multiple = "a multiple of " if index == self.first_flat else ""
            wanted += f" for {multiple}{wide} {'inputs' if word.kind == 'linear' else 'channels'}"
        return (
            f"layer {place} {str(word)!r} wants a {wanted}, and the next in the file is "
            f"{self.parts[of_kind[0]].said}"
        )

    def _note(self, index: int, reason: str) -> None:
        if index > self.deepest:
            self.deepest, self.reason = index, reason


def _misfit(pairs: Pairs, image_shape: ImageShape | None) -> LoadRefused:
    """What the first linear layer would get, and what it has."""
    first = next(part for _, part in pairs if part is not None)
    linear = next(((at, part) for at, (_, part) in enumerate(pairs) if part and part.kind == "linear"), None)
    shape = image_shape or (first.wide, *(28 if first.wide == 1 else 32,) * 2)
    sides = f"{shape[1]}x{shape[2]}"
    if linear is None or first.kind == "linear":
        reason = f"--layers: images of {shape[0]}x{sides} do not fit {first.said}"
    else:
        sizes = []
        for padded in (False, True):
            words = [closed(word, part, padded=padded) for word, part in pairs]
            size = flatten_size(pairs, words, shape)
            sizes.append(f"{'with' if padded else 'without'} padding {size or 'no pixel'}")
        reason = (
            f"--layers: layer {linear[0] + 1} 'linear' would get {' or '.join(sizes)} inputs for images of "
            f"{sides}, and {linear[1].said} takes {linear[1].wide}"
        )
    remedy = "say more of it: conv5p2 pads by 2, conv3s2 steps by 2, maxpool3s2; and --size, --channels"
    if strided := strided_readings(pairs, image_shape):
        remedy += f"; strides of 2 would fit: {command_line(strided[0])}"
    return LoadRefused("LD211", reason, remedy)


def _open(found: Sequence[Reading]) -> LoadRefused:
    """Asks which of the readings it is, or whether the size of the only one is meant."""
    lines = [command_line(reading) for reading in found[:3]]
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    reason = f"--layers leaves open what the weights do not tell: {len(found)} readings fit"
    if len(found) == 1:
        reason = "--layers fits no usual size of images, only an uncommon one"
    return LoadRefused("LD210", reason, f"say which: {' or '.join(lines)}{more}")


def command_line(reading: Reading) -> str:
    """The flags that say this reading."""
    channels, height, width = reading.image_shape
    return f'--layers "{reading}" --size {height} {width} --channels {channels}'
