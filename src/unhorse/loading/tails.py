"""What a network does to its logits at the end, undone: softmax, sigmoid, scales, clamps, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import log
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from unhorse.loading.tail_steps import BLUNT, ONE_MINUS, SIGMOIDS, STEPS, SUM, Steps, Stop
from unhorse.loading.written_graph import Written

SPREAD, FAR = 10.0, 5.0
"""By how much the logits of an image differ in most networks, and what multiple is unusual: there a scale
of the logits themselves is undone, too."""
PAIRING = ("cat", "concat", "stack")
_DEEPEST = 64


class Undone(NamedTuple):
    """The value of the logits, how many classes they have (1: a number that tells no classes), and what was
    undone after them, the last first.
    """

    value: Any
    classes: int
    words: tuple[str, ...] = ()


@dataclass
class Tail:
    """The end of a written graph, walked backwards from its output of `width` numbers per image."""

    written: Written
    width: int
    stops: list[Stop] = field(default_factory=list)

    def undone(self, value: Any, *, two: bool = False) -> Undone:
        """The logits behind `value`; what they need is written behind the graph.

        No step changes the order of the classes in an image, or it turns it round and is turned back: the
        decision stays. One number per image becomes two logits (0, x) where it is a sigmoid or one of two
        probabilities, or where `two` says that it tells two classes apart.
        """
        single, classes = self.width == 1, self.width
        steps = Steps(self.written, self.width)
        here: Stop | None = Stop(value)
        while here is not None and len(self.stops) < _DEEPEST:
            self.stops.append(here)
            here = self._before_pairing(here, steps) or steps.before(here)
        self.width = steps.width
        if single and not (two or self._is_probability()):
            return Undone(value, 1)
        stop = self._best()
        found = self._shaped_again(stop)
        if single:
            found = self._of_two(stop, found)
        return Undone(found, 2 if single else classes, stop.undone)

    def _before_pairing(self, here: Stop, steps: Steps) -> Stop | None:
        """Before a probability p was put beside 1 - p."""
        node = self.written.node(here.value)
        if node is None or steps.width != 2 or self.written.called(here.value) not in PAIRING:
            return None
        parts = [self.written.unshaped(each) for each in node["args"][0]]
        if len(parts) != 2:
            return None
        for place, part in enumerate(parts):
            if not self.written.same(self._one_minus(parts[1 - place]), part):
                continue
            found = Tail(self.written, 1).undone(part)
            if found.classes == 2:
                value, words = found.value, (*here.undone, *found.words)
                if place == 0:
                    example = self.written.example(value)
                    assert example is not None
                    value = self.written.append("flip", [value, [1]], example.flip(1))
                return replace(here, value=value, undone=words, squash=True)
        return None

    def _one_minus(self, value: Any) -> Any:
        """x where a value is 1 - x."""
        name, node = self.written.called(value), self.written.node(value)
        if node is None or name not in ("rsub", "sub") or len(node["args"]) < 2 or node.get("kwargs"):
            return None
        one, own = (0, 1) if name == "sub" else (1, 0)
        return (
            self.written.unshaped(node["args"][own]) if self.written.level(node["args"][one]) == 1 else None
        )

    # --- where to cut ---------------------------------------------------------------------------------------

    def _best(self) -> Stop:
        """The deepest place before all that squashes; a scale there is undone only where it is unusual."""
        last = max((place for place, stop in enumerate(self.stops) if stop.squash), default=0)
        best = self.stops[last]
        for stop in self.stops[last + 1 :]:
            if self.width == 1 and stop.undone[-1:] == (SUM,):
                break  # it moves the point between the two classes
            far, nearer = self._far(best), self._far(stop)
            if far > log(FAR) and nearer < far:
                best = stop
        return best

    def _far(self, stop: Stop) -> float:
        """How unusual it is by how much the numbers of an image differ there."""
        example = self.written.example(stop.value)
        if example is None or not example.numel():
            return 0.0
        rows = example.reshape(len(example), -1)
        spread = (rows.amax(1) - rows.amin(1)).max() if rows.shape[1] > 1 else rows.abs().max()
        return abs(log(max(float(spread), 1e-12) / SPREAD))

    def _is_probability(self) -> bool:
        """Whether one number per image is the probability of a class: a sigmoid, or one of a softmax of two,
        that nothing scales; a hundred times a sigmoid may be an age.
        """
        for stop in self.stops:
            words = set(stop.undone) - BLUNT - STEPS - {"clamp", ONE_MINUS, "log"}
            if words & SIGMOIDS or (stop.single is not None and not words):
                return words <= SIGMOIDS
        return False

    # --- writing --------------------------------------------------------------------------------------------

    def _shaped_again(self, stop: Stop) -> Any:
        """The value at a place, in the shape that the output has, and turned back if need be."""
        if not stop.undone:
            return self.stops[0].value
        value, example = stop.value, self.written.example(stop.value)
        assert example is not None
        for place in reversed(stop.shaping):
            node = self.written.nodes[place]
            if self.written.shapes_only({"node": place}):
                example = example.reshape(len(example), *self.written.examples[place].shape[1:])
            else:
                others = [self.written.constants_in(each) for each in node["args"][1:]]
                example = getattr(torch.ops.aten, node["call"])(example, *others)
            value = self.written.append(node["call"], [value, *node["args"][1:]], example)
        return value if stop.rising else self.written.append("neg", [value], -example)

    def _of_two(self, stop: Stop, value: Any) -> Any:
        """Logits (0, x) of a number x per image, or those of the pair that it was one of."""
        example = self.written.example(value)
        assert example is not None
        if example.ndim == 1:
            example = example[:, None]
            value = self.written.append("unsqueeze", [value, 1], example)
        if stop.single is None:
            return self.written.append("constant_pad_nd", [value, [1, 0]], functional.pad(example, (1, 0)))
        return value if stop.single else self.written.append("flip", [value, [1]], example.flip(1))
