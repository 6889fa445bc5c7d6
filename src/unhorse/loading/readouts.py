"""What a reader makes of a file: a network from images to logits, or tensors, and the facts it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unhorse.checks.expectations import Facts
from unhorse.rules import LoadFailed, LoadRefused

ImageShape = tuple[int, int, int]

CLASSIFIER_REMEDY = (
    "export a network that maps float images (n, c, h, w) to logits (n, k) with k of 2 or more"
)
USUAL_SHAPES: tuple[ImageShape, ...] = (
    *((3, 224, 224), (3, 32, 32), (1, 28, 28), (3, 64, 64), (1, 32, 32), (3, 96, 96), (3, 299, 299)),
)


class Readout(NamedTuple):
    """Either a `network` in eval mode (float32 NCHW images in its own units to (n, k)) or state dicts by key.

    `batch` is the one batch size that the network takes, None where it takes any; `left_out` says in words
    which tensors of the file are in none of the `networks`.
    """

    network: nn.Module | None
    facts: Facts
    networks: Mapping[str, Mapping[str, Tensor]] = {}
    batch: int | None = None
    left_out: Sequence[str] = ()


class LogitsOf(nn.Module):
    """The (n, k) output of a network that may return tuples, dictionaries or (n, k, 1, 1) maps.

    With `channels_last` the network is given (n, h, w, c). Raises LD221 where no output is (n, k).
    """

    def __init__(self, network: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.network = network
        self.channels_last = channels_last
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) to (n, k)."""
        output = self.network(images.permute(0, 2, 3, 1) if self.channels_last else images)
        return logits_in(output, len(images))

    def train(self, mode: bool = True) -> LogitsOf:
        """Stays as it is: exported programs refuse to change, and nothing here may train."""
        return self


def logits_in(output: object, count: int) -> Tensor:
    """The first tensor of (count, k >= 2) in what a network returned; otherwise LD221."""
    shapes = []
    for tensor in _tensors_in(output):
        if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        shapes.append("x".join(str(size) for size in tensor.shape))
        if tensor.ndim == 2 and tensor.shape[0] == count and tensor.shape[1] >= 2:
            return tensor
        if count == 1 and tensor.ndim == 1 and tensor.shape[0] >= 2:
            return tensor[None]
    if any(shape in (f"{count}x1", str(count)) for shape in shapes):
        remedy = "give it two outputs: logits of (0, x) decide exactly as one logit x does"
        raise LoadRefused("LD221", "the network answers with a single number per image", remedy)
    listed = ", ".join(shapes) or "no tensor"
    raise LoadRefused("LD221", f"for {count} images the network answers {listed}", CLASSIFIER_REMEDY)


def _tensors_in(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        named = [output["logits"]] if "logits" in output else list(output.values())
        for value in named:
            yield from _tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors_in(value)


def probed(
    network: nn.Module, facts: Facts, options: Mapping[str, object], *, batch: int | None = None
) -> Facts:
    """The facts with image shape and number of classes, found by running the network on grey images.

    What `options["image_shape"]` or the facts say is tried alone; otherwise the usual shapes, and then
    `extra["assumed_size"]` says so (MD301). Raises LD221 where the network runs on none of them.
    """
    said = options.get("image_shape")
    shapes = [tuple(said)] if isinstance(said, list | tuple) else list(_candidates(network, facts))
    reason = "no image shape fits what the file says of itself"
    for shape in shapes:
        try:
            with torch.no_grad():
                logits = network(torch.full((batch or 2, *shape), 0.5))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if isinstance(error, LoadRefused | LoadFailed):
                raise
            reason = f"it does not run on images of {'x'.join(map(str, shape))} ({_last_line(error)})"
            continue
        if not logits.is_floating_point():
            raise LoadRefused("LD221", f"the network answers with {logits.dtype}", CLASSIFIER_REMEDY)
        assumed = not said and (facts.image_shape is None or None in facts.image_shape)
        size = {"assumed_size": f"{shape[1]}x{shape[2]}"} if assumed and len(shapes) > 1 else {}
        return replace(facts, image_shape=shape, num_classes=logits.shape[1], extra={**facts.extra, **size})
    raise LoadRefused("LD221", reason, "say the image shape with --size, or " + CLASSIFIER_REMEDY)


def _candidates(network: nn.Module, facts: Facts) -> list[ImageShape]:
    """The usual shapes that contradict neither the facts nor the first convolution, the likely first."""
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
    return list(dict.fromkeys(shapes))


def _is_for_small_images(weights: Sequence[Tensor]) -> bool:
    """Whether the stem looks at 5x5 pixels or fewer, and no layer tells more than 200 classes apart."""
    stems = [tensor.shape[-1] for tensor in weights if tensor.ndim == 4 and tensor.shape[1] in (1, 3)]
    classes = [tensor.shape[0] for tensor in weights if tensor.ndim == 2]
    return bool(stems) and max(stems) <= 5 and bool(classes) and min(classes) <= 200


def _constants(network: nn.Module) -> list[Tensor]:
    """The tensors of a frozen TorchScript module, which has no parameters, in no order."""
    inner = getattr(network, "network", network)
    if not isinstance(inner, torch.jit.ScriptModule):
        return []
    graph: Any = inner.graph
    nodes = [node for node in graph.findAllNodes("prim::Constant") if node.hasAttribute("value")]
    return [node.t("value") for node in nodes if node.kindOf("value") == "t"]


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:200]
