"""What network a state dict is of: as the user says, as names and shapes show, or as shapes propose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from unhorse.loading.chains import as_identified, command_line, said_chain
from unhorse.loading.confirmation import Own, confirmed
from unhorse.loading.copied_chains import known_chain
from unhorse.loading.identification import Identified, identify
from unhorse.loading.proposals import Proposal, proposals
from unhorse.models.registry import ImageShape
from unhorse.rules import LoadRefused

_SHOWN = 2


def recognised(
    tensors: Mapping[str, Tensor],
    *,
    architecture: str = "auto",
    layers: str | None = None,
    image_shape: ImageShape | None = None,
    own: Own | None = None,
) -> Identified:
    """The network of a state dict; LoadRefused LD210 or LD211 where it cannot be told.

    A chain that is only proposed from shapes is taken where statistics of the file, or the user's `own` clean
    images, speak for one reading alone.
    """
    if layers is not None and architecture != "auto":
        reason = f"--arch {architecture} and --layers name two networks"
        raise LoadRefused("LD211", reason, "leave one out")
    if layers is not None:
        return said_chain(tensors, layers, image_shape=image_shape)
    try:
        return identify(tensors, architecture=architecture, image_shape=image_shape)
    except LoadRefused as problem:
        if architecture != "auto":
            raise
        if found := known_chain(tensors, image_shape=image_shape):
            return found
        proposed = proposals(tensors, image_shape)
        if taken := confirmed(proposed, own):
            chain = as_identified(taken.reading, taken.pairs, taken.why)
            return replace(chain, mean=taken.mean, std=taken.std)
        if problem.rule != "LD210":
            raise
        raise _way_out(problem, proposed) from problem


def _way_out(problem: LoadRefused, proposed: Sequence[Proposal]) -> LoadRefused:
    """The refusal with what helps first, and the list of names last."""
    ways = ["pass --network FILE.py:NAME, the class that was trained"]
    if proposed:
        lines = " or ".join(command_line(proposal.reading) for proposal in proposed[:_SHOWN])
        more = f", or one of {len(proposed) - _SHOWN} more" if len(proposed) > _SHOWN else ""
        ways.append(f"or its layers, of which only the sizes are sure: {lines}{more}")
    shape = ", ".join(map(str, proposed[0].reading.image_shape)) if proposed else "3, 32, 32"
    ways.append(f"or export it: torch.onnx.export(model.eval(), torch.rand(1, {shape}), 'model.onnx')")
    ways.append(problem.remedy)
    return LoadRefused(problem.rule, problem.reason, "; ".join(ways))
