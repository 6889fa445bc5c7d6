"""Which of a network's outputs are its logits: by name, by width, or by what is computed from what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from unhorse.rules import LoadRefused

CLASSIFIER_REMEDY = (
    "export a network that maps float images (n, c, h, w) to logits (n, k) with k of 2 or more"
)
REMEDY = "say which one with --output-name NAME, or how many classes there are with --classes"
ONE_NUMBER = (
    "say --classes 2 if it is the logit or the probability of the second of two classes; a number that is no "
    "class, such as an age, cannot be scanned"
)
_RESHAPING = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "squeeze",
        "unsqueeze",
        "alias",
        "detach",
        "clone",
        "contiguous",
        "_unsafe_view",
        "_reshape_alias",
        "to",
        "_to_copy",
        "dropout",
        "permute",
        "transpose",
        "t",
    ]
)


class Output(NamedTuple):
    """One output: its place among all tensors that a network returns, its name, and its values (n, k)."""

    place: int
    name: str
    rows: Tensor

    @property
    def width(self) -> int:
        return int(self.rows.shape[1])


@dataclass(frozen=True)
class Wanted:
    """What the user says of the outputs: the name or the place of one, and the number of classes."""

    output: str | None = None
    classes: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Wanted:
        """From the options of a reader."""
        output, classes = options.get("output"), options.get("num_classes")
        return cls(None if output is None else str(output), classes if type(classes) is int else None)


class Chosen(NamedTuple):
    """The place of the output that holds the logits, and a note where others were passed over."""

    place: int
    note: str = ""


def tensors_in(output: object, names: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all tensors in what a network returned: keys and places joined by points; `names` are
    those of a file that names its outputs in their order.
    """
    for place, (name, tensor) in enumerate(_named(output, "")):
        yield (names[place] if place < len(names) and names[place] else name), tensor


def _named(output: object, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield path or "0", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _named(value, f"{path}.{key}" if path else str(key))
    elif isinstance(output, list | tuple):
        fields = getattr(output, "_fields", None) or range(len(output))
        for key, value in zip(fields, output, strict=True):
            yield from _named(value, f"{path}.{key}" if path else str(key))


def rows_of(tensor: Tensor, count: int) -> Tensor | None:
    """(count, k) of a tensor with one number per class and image, whatever sides of 1 it has; or None."""
    if not tensor.is_floating_point() or tensor.ndim == 0:
        return None
    if tensor.ndim == 1:
        if tensor.shape[0] == count:
            return tensor[:, None]
        return tensor[None] if count == 1 else None
    if tensor.shape[0] != count or sum(size != 1 for size in tensor.shape[1:]) > 1:
        return None
    return tensor if tensor.ndim == 2 else tensor.flatten(1)


def choose(
    network: Callable[[Tensor], Any], images: Tensor, answer: object, names: Sequence[str], wanted: Wanted
) -> Chosen:
    """Which tensor of `answer`, what `network` returned for `images`, holds the logits.

    What the user says decides; then the name "logits"; then the one output that is left when those are put
    aside from which another one is computed; of several of one width the first. LoadRefused LD239 where two
    of different width are left, LD221 where there is none.
    """
    listed = list(tensors_in(answer, names))
    found = [
        Output(place, name, rows)
        for place, (name, tensor) in enumerate(listed)
        if (rows := rows_of(tensor, len(images))) is not None
    ]
    if not found:
        raise _no_classifier(listed, len(images))
    if wanted.output is not None:
        return _noted(_said(wanted.output, found, listed), found, "as --output-name says")
    several = [output for output in found if output.width >= 2]
    if wanted.classes is not None and (fits := _as_wide(found, wanted.classes)):
        return _noted(
            fits[0], found, f"the first of {wanted.classes} classes" if len(fits) > 1 else "by its width"
        )
    if named := [output for output in several if output.name.rpartition(".")[2].lower() == "logits"]:
        return _noted(named[0], found, "by its name")
    if wanted.classes is not None and len(several) > 1:
        raise LoadRefused("LD239", f"no output is {wanted.classes} wide: there are {_widths(found)}", REMEDY)
    left = several or found
    if len({output.width for output in left}) > 1:
        left = _last_computed(network, images, left)
    if len({output.width for output in left}) > 1 or (not several and len(left) > 1):
        raise LoadRefused("LD239", f"several outputs could be the logits: {_widths(found)}", REMEDY)
    return _noted(left[0], found, "the first" if len(left) > 1 else "the last that is computed")


def _said(name: str, found: Sequence[Output], listed: Sequence[tuple[str, Tensor]]) -> Output:
    """The output of that name, or of that place."""
    for output in found:
        if output.name == name:
            return output
    for output in found:
        if output.name.lower() == name.lower() or str(output.place) == name:
            return output
    there = ", ".join(each for each, _ in listed)
    raise LoadRefused("LD239", f"there is no output {name!r} with numbers per image", f"take one of {there}")


def _as_wide(found: Sequence[Output], classes: int) -> list[Output]:
    """Those of that many classes; of two classes those with one number per image, too."""
    fits = [output for output in found if output.width == classes]
    return fits or [output for output in found if classes == 2 and output.width == 1]


def _noted(chosen: Output, found: Sequence[Output], why: str) -> Chosen:
    if len(found) == 1:
        return Chosen(chosen.place)
    taken = f"{chosen.name!r} was taken as the logits ({why})"
    note = f"MD307 of the outputs {_widths(found)}, {taken}: --output-name takes another"
    return Chosen(chosen.place, note)


def _widths(found: Sequence[Output]) -> str:
    return ", ".join(f"{output.name[:60]!r} ({output.width} wide)" for output in found[:8])


def _no_classifier(listed: Sequence[tuple[str, Tensor]], count: int) -> LoadRefused:
    shapes = ", ".join("x".join(map(str, tensor.shape)) or "a number" for _, tensor in listed) or "no tensor"
    kinds = {tensor.dtype for _, tensor in listed if not tensor.is_floating_point()}
    whole = f" of {', '.join(sorted(map(str, kinds)))}" if kinds else ""
    return LoadRefused("LD221", f"for {count} images the network answers {shapes}{whole}", CLASSIFIER_REMEDY)


def _last_computed(
    network: Callable[[Tensor], Any], images: Tensor, outputs: Sequence[Output]
) -> list[Output]:
    """The outputs from which no other one is computed; all of them where the network cannot be traced."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def answered(some: Tensor) -> list[Tensor]:
        tensors = [tensor for _, tensor in tensors_in(network(some))]
        return [tensors[output.place] for output in outputs]

    try:
        with torch.jit.optimized_execution(False), torch.no_grad():
            graph = make_fx(answered, pre_dispatch=True)(images).graph
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError):
        return list(outputs)
    returned: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    bases = [_base(node) for node in returned]
    behind = [_ancestors(node) for node in returned]
    return [
        output
        for place, output in enumerate(outputs)
        if not any(
            bases[place] in ancestors and bases[place] is not bases[other]
            for other, ancestors in enumerate(behind)
            if other != place
        )
    ]


def _base(node: fx.Node) -> fx.Node:
    """The node whose values another one only arranges otherwise."""
    while (
        node.op == "call_function"
        and str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_") in _RESHAPING
        and node.all_input_nodes
    ):
        node = node.all_input_nodes[0]
    return node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for before in waiting.pop().all_input_nodes:
            if before not in found:
                found.add(before)
                waiting.append(before)
    return found
