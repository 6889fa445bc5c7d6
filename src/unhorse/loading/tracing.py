"""Turns any network that runs here into a graph of listed operators and tensors (models/graph.py)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from unhorse.loading.drafts import Traced
from unhorse.loading.graph_writer import REMEDY, GraphWriter
from unhorse.loading.probabilities import LEAST, is_flat, probes, total_of
from unhorse.loading.readouts import LogitsOf
from unhorse.models.graph import GraphNetwork
from unhorse.rules import LoadRefused

TOLERANCE = 1e-4
_TRACE_ERRORS = (
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(NotImplementedError, AssertionError, ArithmeticError),
)


def trace(
    network: nn.Module, image_shape: Sequence[int], *, batch: int | None = None, classes: int | None = None
) -> Traced:
    """The graph that `network` computes for images of this shape (c, h, w), checked against the network.

    What it does to its logits at the end is undone (loading/tails.py); with 2 `classes` one number per image
    is the logit or the probability of the second one.

    The network is run on two sizes of batch, and what differs between the two runs follows the size of the
    batch; one that takes only `batch` images (as exported) is generalised and then checked on its own images
    one batch at a time. LoadRefused LD221 where the result is no classifier, or does not compute the same.
    """
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(4, *image_shape, generator=rng)
    if not isinstance(network, LogitsOf):
        network = LogitsOf(network, options={"num_classes": classes})
    errors: list[str] = []
    for sizes in ((2, 3), (batch or 1,)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if network.chosen is None:
                    network(images[: sizes[0]])
                captured = [_captured(network, images[:size]) for size in sizes]
                found = GraphWriter(captured, sizes, images[: sizes[0]], classes=classes).traced()
                _check_equal(network, found, images, sizes)
                return _with_logarithm(found, images)._replace(chosen=network.notes)
        except LoadRefused:
            raise
        except _TRACE_ERRORS as error:
            errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
    raise LoadRefused("LD221", f"the network cannot be read as a graph ({'; '.join(errors)})", REMEDY)


def _captured(network: nn.Module, images: Tensor) -> fx.GraphModule:
    # one mode for all tensors: half the time; unoptimised: a second run of TorchScript has other operators
    shared = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    with shared, torch.jit.optimized_execution(False):
        return make_fx(network, pre_dispatch=True)(images)


@torch.no_grad()
def _check_equal(network: nn.Module, found: Traced, images: Tensor, sizes: Sequence[int]) -> None:
    """ValueError unless the graph answers as the network does, for batches of other sizes as well, and its
    logits decide as what the network returns.
    """
    graph, tensors = (found.graph, found.tensors) if found.uncut is None else found.uncut
    whole, logits_alone = (
        _rebuilt(found, graph, tensors, images),
        _rebuilt(found, found.graph, found.tensors, images),
    )
    step = sizes[0] if len(sizes) == 1 else len(images)
    count = len(images) // step * step
    wanted = torch.cat([network(part).float() for part in images[:count].split(step)])
    for size in (count, 1):
        parts = images[:count].split(size)
        answers = [whole(part) for part in parts]
        if found.uncut is None:
            seen = torch.cat(answers)
        else:
            logits, seen = (torch.cat(several).float() for several in zip(*answers, strict=True))
            _require_near(torch.cat([logits_alone(part) for part in parts]), logits)
            _require_same_decisions(logits, seen)
        _require_near(seen.float(), wanted)


def _rebuilt(
    found: Traced, graph: dict[str, Any], tensors: dict[str, Tensor], images: Tensor
) -> GraphNetwork:
    network = GraphNetwork(found.num_classes, tuple(images.shape[1:]), graph=graph)
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _require_near(seen: Tensor, wanted: Tensor) -> None:
    error = float((seen - wanted).abs().max())
    if not error <= TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise ValueError(f"the graph differs from the network by {error:.2g}")


def _require_same_decisions(logits: Tensor, returned: Tensor) -> None:
    """ValueError where what was cut off changed a class that leads by more than rounding."""
    if returned.shape[1] < 2:
        return
    first, second = returned.topk(2).values.unbind(1)
    clear = first - second > TOLERANCE * returned.abs().amax(1)
    if bool((logits.argmax(1) != returned.argmax(1))[clear].any()):
        raise ValueError("what was cut off at the end of the graph changes its decisions")


@torch.no_grad()
def _with_logarithm(found: Traced, images: Tensor) -> Traced:
    """The same where the answers are no probabilities; else with their logarithm, which is logits again."""
    shape = tuple(images.shape[1:])
    answers = _rebuilt(found, found.graph, found.tensors, images)(probes(shape)).float()
    total = total_of(answers)
    if total is None:
        return found._replace(uncut=None)
    if is_flat(answers):
        return found._replace(hidden=found.hidden or "clamped or rounded", uncut=None)
    nodes = list(found.graph["nodes"])
    nodes.append({"call": "clamp_min", "args": [found.graph["output"], LEAST * total]})
    nodes.append({"call": "log", "args": [{"node": len(nodes) - 1}]})
    graph = {**found.graph, "nodes": nodes, "output": {"node": len(nodes) - 1}}
    cut = ", ".join(filter(None, (found.cut, "probabilities, by their logarithm")))
    return found._replace(graph=graph, cut=cut, hidden="", uncut=None)
