"""Outputs that are probabilities although nothing at the end of the graph says how to undo them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unhorse.loading.written_graph import Written

LEAST = 1e-37
"""The least number whose logarithm is taken; float32 has hardly any below it."""
_SQUASHES = frozenset(
    {"softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "hardsigmoid", "tanh"}
)
_MIXING = frozenset({"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "conv2d", "_convolution"})
_NEAR = 40


def squash_behind(written: Written, value: Any, width: int) -> str:
    """The function of as many numbers as there are classes that the outputs are still computed from, through
    operators that are no layers, or one linear layer right behind a softmax; empty where there is none.
    """
    waiting: list[Any] = [value]
    seen: set[int] = set()
    while waiting and len(seen) < _NEAR:
        here = waiting.pop()
        node = written.node(here)
        if node is None or here["node"] in seen:
            continue
        seen.add(here["node"])
        name, arguments = written.called(here), _values(node["args"])
        if node.get("layer") == "Linear":
            before = written.unshaped(node["args"][0])
            if "softmax" in written.called(before):
                return "softmax, Linear"
            continue
        if not name or name in _MIXING:
            continue
        example = written.example(here)
        if name in _SQUASHES and example is not None and example.numel() == width * len(example):
            return name.removeprefix("_")
        waiting += arguments
    return ""


def _values(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [each for item in value for each in _values(item)]
    return [value] if isinstance(value, dict) else []


def total_of(answers: Tensor) -> float | None:
    """What the (n, k) answers to images of very different ranges sum to, if they are probabilities times that
    number and tell classes apart; None otherwise.
    """
    sums = answers.sum(1)
    total = float(sums.mean())
    if answers.shape[1] < 2 or not bool(answers.isfinite().all()) or total <= 0:
        return None
    if float(answers.min()) < -1e-6 * total or float((sums - total).abs().max()) > 1e-3 * total:
        return None
    return total


def is_flat(answers: Tensor) -> bool:
    """Whether most numbers of the answers are the least one: what was clamped or rounded away is lost."""
    least = answers.amin()
    return bool((answers <= least + 1e-7 * answers.abs().max()).double().mean() > 0.5)


def probes(image_shape: tuple[int, ...]) -> Tensor:
    """Six images of the ranges that networks are trained on: standardised, 0..1 and 0..255."""
    images = torch.randn(6, *image_shape, generator=torch.Generator().manual_seed(0))
    spread = torch.tensor([1.0, 0.25, 64.0, 1.0, 0.25, 64.0]).reshape(-1, 1, 1, 1)
    middle = torch.tensor([0.0, 0.5, 128.0, 0.0, 0.5, 128.0]).reshape(-1, 1, 1, 1)
    return images * spread + middle
