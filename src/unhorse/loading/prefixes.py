"""Takes off what wrappers put before the names of tensors, and what they keep beside the network itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from unhorse.loading.containers import is_layer, is_matrix, size_in_words
from unhorse.loading.normalisers import normalisation, normalisers

# attributes that hold a whole network: DataParallel, torch.compile, Lightning, EMA, wrappers of all kinds
WRAPPERS = {
    *(
        "module",
        "_orig_mod",
        "_forward_module",
        "_fsdp_wrapped_module",
        "model",
        "_model",
        "network",
        "_network",
    ),
    *(
        "net",
        "_net",
        "nn",
        "cnn",
        "backbone",
        "encoder",
        "classifier",
        "clf",
        "base",
        "base_model",
        "body",
        "trunk",
    ),
    *("netC", "core", "inner", "wrapped", "wrapped_model", "student", "teacher", "target_model", "victim"),
    *(
        "resnet",
        "vgg",
        "vit",
        "densenet",
        "mobilenet",
        "efficientnet",
        "ema",
        "ema_model",
        "model_ema",
        "online",
    ),
    *(
        "averaged_model",
        "swa_model",
        "shadow",
        "learner",
        "image_encoder",
        "feature_extractor",
        "arch",
        "m",
        "f",
    ),
}
_SECOND = re.compile(
    r"(.*_)?(ema|teacher|student|target|online|averaged|swa|shadow|momentum|average|old|best)(_.*)?"
)
_BESIDE = re.compile(
    r"(.*_)?(criterion|criteria|loss(es)?|metrics?|acc(uracy)?|auroc|auc|confmat|confusion)(_.*)?"
)
_COUNTERS = re.compile(
    r"n_averaged|initted|steps?|epochs?|num_updates|decay|global_step|iteration|it|_dummy|dummy.*"
)


@dataclass(frozen=True)
class Part:
    """One network of a state dict: `tensors` under the network's own names, without `prefix`.

    `key` says which part of the state dict it is, "" for all of it; `beside` are tensors, under their whole
    names, that belong to a wrapper, a loss or a metric; `mean` and `std` are those of a wrapper that
    normalises, for pixels in 0..1. `notes` are assumptions in words.
    """

    key: str
    tensors: dict[str, Tensor]
    prefix: str = ""
    beside: dict[str, Tensor] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


def parts(tensors: Mapping[str, Tensor]) -> list[Part]:
    """The networks in a state dict, mostly one; several where it has a student and a teacher, or an average.

    Copies that agree bit for bit count once. Every tensor is in one of the parts, in the `beside` of one, or
    in a copy that a note names.
    """
    return distinct(_split(Part("", dict(tensors), beside={})))


def readings(part: Part) -> Iterator[Part]:
    """Ways to read the names: as they are, with a common prefix off, with body and head side by side."""
    yield part
    groups = _groups(part.tensors)
    if len(groups) == 1 and None not in groups:
        yield _peeled(part, str(next(iter(groups))))
        return
    heads = [name for name in groups if name is not None and is_layer(groups[name])]
    bodies = [name for name in groups if name in WRAPPERS and name not in heads]
    if len(groups) == 2 and len(heads) == len(bodies) == 1:
        yield from _with_head(part, str(bodies[0]), str(heads[0]))


def distinct(found: list[Part]) -> list[Part]:
    """Without the copies that agree bit for bit; a note says which they were."""
    kept: list[Part] = []
    for part in found:
        place = next((place for place, other in enumerate(kept) if same(part.tensors, other.tensors)), None)
        if place is None:
            kept.append(part)
            continue
        note = f"the network is in the file twice, bit for bit: {kept[place].key or 'itself'} and {part.key}"
        kept[place] = replace(kept[place], notes=(*kept[place].notes, note))
    return kept


def same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names, types, shapes and bits; counters of batches may differ."""
    first, second = (
        {name: tensor for name, tensor in each.items() if not name.endswith("num_batches_tracked")}
        for each in (tensors, others)
    )
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


def _split(part: Part) -> list[Part]:
    """Takes wrappers off until none is left, and apart what holds two networks."""
    while True:
        part, normalised = _without_beside(part)
        groups = _groups(part.tensors)
        if len(groups) == 1:
            (word,) = groups
            if word is None or not (_wraps(word) or (word.isdecimal() and normalised)):
                return [part]
            part = _peeled(part, word)
            continue
        apart = _apart(groups)
        if not apart:
            return [part]
        rest = {name: tensor for name, tensor in part.tensors.items() if name.partition(".")[0] not in apart}
        found = [
            _peeled(_only(part, {name: part.tensors[name] for name in names}, word), word)
            for word, names in apart.items()
        ]
        if any(map(is_matrix, rest.values())):
            found.insert(0, _only(part, rest, "+".join(sorted({name.partition(".")[0] for name in rest}))))
        elif rest:
            found[0] = _beside(found[0], {part.prefix + name: tensor for name, tensor in rest.items()})
        return [each for one in found for each in _split(one)]


def _wraps(word: str) -> bool:
    return word in WRAPPERS or bool(_SECOND.fullmatch(word))


def _groups(tensors: Mapping[str, Tensor]) -> dict[str | None, dict[str, Tensor]]:
    """Tensors by the first component of their names, and under None those without a dot."""
    groups: dict[str | None, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        word, dot, rest = name.partition(".")
        groups.setdefault(word if dot else None, {})[rest if dot else name] = tensor
    return groups


def _apart(groups: Mapping[str | None, dict[str, Tensor]]) -> dict[str, list[str]]:
    """Which groups are networks of their own: those so called, and two that have all the same shapes."""
    matrices = {word: sum(map(is_matrix, tensors.values())) for word, tensors in groups.items()}
    whole = {word: groups[word] for word, count in matrices.items() if word is not None and count}
    # a single layer called "online_classifier" beside a backbone is a part of one network
    chosen = {
        word for word in whole if _SECOND.fullmatch(word) and 2 * matrices[word] >= max(matrices.values())
    }
    shapes = {word: _shapes(tensors) for word, tensors in whole.items()}
    for first, second in combinations(whole, 2):
        # parts of one network may have the same shapes too: blocks of a ResNet, but never all that there is
        if len(whole) == 2 and shapes[first] == shapes[second] and len(shapes[first]) >= 4:
            chosen |= {first, second}
    return {word: [f"{word}.{name}" for name in whole[word]] for word in whole if word in chosen}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a group, wrappers off."""
    while len(groups := _groups({name: tensor for name, tensor in tensors.items() if "." in name})) == 1:
        (word,) = groups
        if word is None or not _wraps(word):
            break
        tensors = groups[word]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.dim()}


def _only(part: Part, tensors: dict[str, Tensor], word: str) -> Part:
    """A part of a part; what lay beside it is named with each."""
    return replace(part, key="/".join(filter(None, (part.key, f"{part.prefix}{word}"))), tensors=tensors)


def _peeled(part: Part, word: str) -> Part:
    tensors = {name.removeprefix(f"{word}."): tensor for name, tensor in part.tensors.items()}
    return replace(part, tensors=tensors, prefix=f"{part.prefix}{word}.")


def _beside(part: Part, tensors: Mapping[str, Tensor]) -> Part:
    """The part with tensors beside it, and a note that names them with their size."""
    if not tensors:
        return part
    listed: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        listed.setdefault(name.rpartition(".")[0] or name, []).append(tensor)
    words = [f"{word} ({size_in_words(found)})" for word, found in listed.items()]
    more = f" and {len(words) - 12} more" if len(words) > 12 else ""
    note = f"left out of the network: {', '.join(words[:12])}{more}"
    return replace(part, beside={**(part.beside or {}), **tensors}, notes=(*part.notes, note))


def _without_beside(part: Part) -> tuple[Part, bool]:
    """Sets aside what no network computes with, where a wrapped network is left; whether it normalises."""
    own = dict(part.tensors)
    pair = normalisers(own)
    for name in pair:
        del own[name]
    aside = [name for name in own if _COUNTERS.fullmatch(name) and own[name].numel() <= 1]
    aside += [name for name in own if "." in name and _BESIDE.fullmatch(name.partition(".")[0])]
    aside += [name for name in own if "." not in name and _BESIDE.fullmatch(name)]
    rest = {name: tensor for name, tensor in own.items() if name not in aside}
    if not any(map(is_matrix, rest.values())):
        return part, False
    removed = {f"{part.prefix}{name}": own[name] for name in aside}
    part = _beside(replace(part, tensors=rest), removed)
    if not pair:
        return part, False
    mean, std = pair
    return _normalised(part, f"{part.prefix}{mean}", pair[mean], pair[std]), True


def _normalised(part: Part, name: str, mean: Tensor, std: Tensor) -> Part:
    """The part with the normalisation of a wrapper, and a note that says where it is from."""
    means, deviations, words = normalisation(mean, std)
    note = f"input normalisation taken from {name} in the file: {words}"
    return replace(part, mean=means, std=deviations, notes=(*part.notes, note))


def _with_head(part: Part, body: str, head: str) -> Iterator[Part]:
    """Body and head of a classifier side by side, the head under the names that published networks use."""
    for name in dict.fromkeys((head, "fc", "classifier", "head", "linear")):
        tensors = {key.removeprefix(f"{body}."): tensor for key, tensor in part.tensors.items()}
        renamed = {
            f"{name}{key.removeprefix(head)}" if key.startswith(f"{head}.") else key: tensor
            for key, tensor in tensors.items()
        }
        if len(renamed) == len(part.tensors):
            note = f"read as {body} followed by {head}"
            yield replace(part, tensors=renamed, notes=(*part.notes, note))
