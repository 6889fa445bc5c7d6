"""Finds out which images a network takes, by running it on grey ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unhorse.checks.expectations import Facts
from unhorse.loading.layouts import square
from unhorse.loading.outputs import CLASSIFIER_REMEDY
from unhorse.loading.readouts import Readout
from unhorse.rules import LoadFailed, LoadRefused

ImageShape = tuple[int, int, int]

USUAL_SHAPES: tuple[ImageShape, ...] = (
    *((3, 224, 224), (3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 32, 32), (3, 96, 96), (3, 299, 299)),
)
ONE_AT_A_TIME = "MD301 input batch assumed 1: the file says any number of images, and a part of it takes one"
_RUN_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def readout(
    network: nn.Module,
    facts: Facts,
    options: Mapping[str, object],
    *,
    batch: int | None = None,
    notes: Sequence[str] = (),
) -> Readout:
    """The network with the facts of `probed`; one that takes any number of images, and then only one, is
    read with a batch of one, and the notes say so.
    """
    try:
        return Readout(network, probed(network, facts, options, batch=batch), batch=batch, notes=tuple(notes))
    except LoadRefused as refusal:
        if batch is not None or refusal.rule != "LD221":
            raise
        try:
            found = probed(network, facts, options, batch=1)
        except LoadRefused:
            raise refusal from None
    return Readout(network, found, batch=1, notes=(*notes, ONE_AT_A_TIME))


def probed(
    network: nn.Module, facts: Facts, options: Mapping[str, object], *, batch: int | None = None
) -> Facts:
    """The facts with image shape and number of classes, found by running the network on grey images.

    What `options["image_shape"]` or the facts say is tried alone; otherwise the usual shapes, and then
    `extra["assumed_size"]` says so (MD301). Raises LD221 where the network runs on none of them.
    """
    said = options.get("image_shape")
    shapes = [tuple(said)] if isinstance(said, list | tuple) else list(_candidates(network, facts))
    reasons: list[str] = []
    for shape in shapes:
        try:
            with torch.no_grad():
                logits = network(torch.full((batch or 2, *shape), 0.5))
        except _RUN_ERRORS as error:
            if isinstance(error, LoadRefused | LoadFailed):
                raise
            reasons.append(f"it does not run on images of {'x'.join(map(str, shape))} ({_last_line(error)})")
            continue
        assumed = not said and (facts.image_shape is None or None in facts.image_shape)
        size = {"assumed_size": f"{shape[1]}x{shape[2]}"} if assumed and len(shapes) > 1 else {}
        return replace(facts, image_shape=shape, num_classes=logits.shape[1], extra={**facts.extra, **size})
    more = f", nor on {len(reasons) - 1} other usual sizes" if len(reasons) > 1 else ""
    reason = reasons[0] + more if reasons else "no image shape fits what the file says of itself"
    raise LoadRefused("LD221", reason, "say the image shape with --size, or " + CLASSIFIER_REMEDY)


def rows_taken(network: nn.Module) -> int | None:
    """How many numbers the first linear layer of a network without convolutions takes; None for others."""
    weights = [*network.parameters(), *network.buffers()] or _constants(network)
    if any(tensor.ndim == 4 for tensor in weights):
        return None
    return next((tensor.shape[1] for tensor in weights if tensor.ndim == 2), None)


def _candidates(network: nn.Module, facts: Facts) -> list[ImageShape]:
    """The usual shapes that contradict neither the facts nor the first layer, the likely first."""
    weights = [*network.parameters(), *network.buffers()]
    kernel = next((tensor for tensor in weights if tensor.ndim == 4), None)
    if facts.image_shape is None:
        channels, height, width = (None if kernel is None else kernel.shape[1]), None, None
    else:
        channels, height, width = facts.image_shape
    if channels is not None and height is not None and width is not None:
        return [(channels, height, width)]
    shapes = [
        (c if channels is None else channels, h if height is None else height, w if width is None else width)
        for c, h, w in USUAL_SHAPES
    ]
    if _is_for_small_images(weights or _constants(network)):
        shapes.sort(key=lambda shape: shape[1] > 64)
    rows = square(rows_taken(network)) if facts.image_shape is None else None
    return list(dict.fromkeys([*([rows] if rows else []), *shapes]))


def _is_for_small_images(weights: Sequence[Tensor]) -> bool:
    """Whether the stem looks at 5x5 pixels or fewer, and no layer tells more than 200 classes apart."""
    stems = [tensor.shape[-1] for tensor in weights if tensor.ndim == 4 and tensor.shape[1] in (1, 3)]
    classes = [tensor.shape[0] for tensor in weights if tensor.ndim == 2]
    return bool(stems) and max(stems) <= 5 and bool(classes) and min(classes) <= 200


def _constants(network: nn.Module) -> list[Tensor]:
    """The tensors of a frozen TorchScript module, which has no parameters, in no order."""
    inner: Any = network
    while not isinstance(inner, torch.jit.ScriptModule) and hasattr(inner, "network"):
        inner = inner.network
    if not isinstance(inner, torch.jit.ScriptModule):
        return []
    graph: Any = inner.graph
    nodes = [node for node in graph.findAllNodes("prim::Constant") if node.hasAttribute("value")]
    return [node.t("value") for node in nodes if node.kindOf("value") == "t"]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:200]
