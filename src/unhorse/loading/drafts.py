"""A graph while it is written, and what comes of it: the nodes that the logits need, numbered anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from unhorse.loading.origins import Origin, Origins
from unhorse.loading.traced_values import own, renumbered

UNDONE = "what came after the logits was undone, the last first: {}"
HIDDEN = (
    "the outputs are computed from probabilities ({}) in a way that cannot be undone: export the network up "
    "to its logits, or name them with --output-name"
)


class Traced(NamedTuple):
    """A graph and its tensors, as GraphNetwork loads them; `cut` names what came after the logits, the last
    first, `hidden` the probabilities that the outputs are computed from all the same. `uncut` are the graph
    and tensors that give [logits, what the network returned], where something was cut off. `origins` says of
    tensors that were computed from others how; `chosen` which of several outputs was taken.
    """

    graph: dict[str, Any]
    tensors: dict[str, Tensor]
    num_classes: int
    cut: str = ""
    hidden: str = ""
    uncut: tuple[dict[str, Any], dict[str, Tensor]] | None = None
    origins: Mapping[str, Origin] = {}
    chosen: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report says of it."""
        if self.hidden:
            return (*self.chosen, f"MD308 {HIDDEN.format(self.hidden)}")
        if self.cut in ("softmax", "log_softmax", "sigmoid"):
            return (*self.chosen, f"MD303 the last {self.cut} was cut off, to have logits")
        return (*self.chosen, f"MD307 {UNDONE.format(self.cut)}") if self.cut else self.chosen


@dataclass
class Draft:
    """What is written so far; `examples` are what each node gave for the traced images."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    examples: list[Any] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    owned: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None
    returned: Any = None
    num_classes: int = 0
    cut: str = ""
    hidden: str = ""


def assembled(written: Draft, known: Origins) -> Traced:
    """What comes of a draft: the graph of its logits, and one of what came after them, too."""
    graph, tensors, origins = _needed_for(written.output, written, known)
    uncut = None
    if written.returned != written.output:
        uncut = _needed_for([written.output, written.returned], written, known)[:2]
    return Traced(graph, tensors, written.num_classes, written.cut, written.hidden, uncut, origins)


def _needed_for(
    output: Any, written: Draft, known: Origins
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Origin]]:
    """Numbers the nodes that the output needs, and leaves the others out."""
    needed: set[int] = set()
    waiting = [output]
    while waiting:
        for index in _references(waiting.pop(), "node") - needed:
            needed.add(index)
            waiting.append({name: written.nodes[index].get(name) for name in ("args", "kwargs")})
            if "use" in written.nodes[index]:
                waiting.append({"node": written.nodes[index]["use"]})
    numbers = {old: new for new, old in enumerate(sorted(needed))}
    nodes = [renumbered(written.nodes[old], numbers) for old in sorted(needed)]
    tensors, listed, origins = {}, {}, {}
    named = _references(nodes, "tensor")
    for name, tensor in written.tensors.items():
        kind, index, weight = name.split(".")
        if kind == "layers" and int(index) in numbers:
            place = f"layers.{numbers[int(index)]}.{weight}"
        elif kind == "constants" and weight in named:
            place = f"constants.value_{weight}"
        else:
            continue
        tensors[place] = kept = _owned(written, name)
        if kind == "constants":
            listed[weight] = [str(kept.dtype).removeprefix("torch."), list(kept.shape)]
        if (origin := known.of(tensor)) is not None:
            origins[place] = origin
    return {"nodes": nodes, "output": renumbered(output, numbers), "tensors": listed}, tensors, origins


def _owned(written: Draft, name: str) -> Tensor:
    """A tensor of memory of its own, in float32 or whole numbers, copied once."""
    if name not in written.owned:
        written.owned[name] = own(written.tensors[name])
    return written.owned[name]


def _references(value: Any, kind: str) -> set[Any]:
    """The nodes or tensors that a value, or a node, names."""
    if isinstance(value, dict):
        if value.keys() == {kind}:
            return {value[kind]}
        value = list(value.values())
    return set().union(*(_references(item, kind) for item in value)) if isinstance(value, list) else set()
