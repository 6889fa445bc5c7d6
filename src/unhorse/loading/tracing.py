"""Turns any network that runs here into a graph of listed operators and tensors (models/graph.py)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from unhorse.loading.graph_writer import REMEDY, GraphWriter, Traced
from unhorse.loading.readouts import logits_in
from unhorse.models.graph import GraphNetwork
from unhorse.rules import LoadRefused

TOLERANCE = 1e-4
_SQUASHING: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(1),
    "log_softmax": lambda logits: logits.log_softmax(1),
}
_TRACE_ERRORS = (
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(NotImplementedError, AssertionError, ArithmeticError),
)


def trace(
    network: Callable[[Tensor], Any], image_shape: Sequence[int], *, batch: int | None = None
) -> Traced:
    """The graph that `network` computes for images of this shape (c, h, w), checked against the network.

    The network is run on two sizes of batch, and what differs between the two runs follows the size of the
    batch; one that takes only `batch` images (as exported) is generalised and then checked on its own images
    one batch at a time. LoadRefused LD221 where the result is no classifier, or does not compute the same.
    """
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(4, *image_shape, generator=rng)
    errors: list[str] = []
    for sizes in ((2, 3), (batch or 1,)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                captured = [_captured(network, images[:size]) for size in sizes]
                found = GraphWriter(captured, sizes, images[: sizes[0]]).traced()
                _check_equal(network, found, images, sizes)
            return found
        except LoadRefused:
            raise
        except _TRACE_ERRORS as error:
            errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
    raise LoadRefused("LD221", f"the network cannot be read as a graph ({'; '.join(errors)})", REMEDY)


def _captured(network: Callable[[Tensor], Any], images: Tensor) -> fx.GraphModule:
    # one mode for all tensors: half the time; unoptimised: a second run of TorchScript has other operators
    shared = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    with shared, torch.jit.optimized_execution(False):
        return make_fx(lambda x: logits_in(network(x), len(x)), pre_dispatch=True)(images)


@torch.no_grad()
def _check_equal(
    network: Callable[[Tensor], Any], found: Traced, images: Tensor, sizes: Sequence[int]
) -> None:
    """ValueError unless the graph answers as the network does, for batches of other sizes as well."""
    rebuilt = GraphNetwork(found.num_classes, tuple(images.shape[1:]), graph=found.graph)
    rebuilt.load_state_dict(found.tensors, strict=True)
    rebuilt.eval()
    step = sizes[0] if len(sizes) == 1 else len(images)
    count = len(images) // step * step
    wanted = torch.cat([logits_in(network(part), len(part)).float() for part in images[:count].split(step)])
    for parts in (images[:count].split(count), images[:count].split(1)):
        seen = torch.cat([rebuilt(part) for part in parts])
        seen = _SQUASHING[found.cut](seen)
        error = float((seen - wanted).abs().max())
        if not error <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise ValueError(f"the graph differs from the network by {error:.2g}")
