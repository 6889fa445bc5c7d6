"""What network a state dict is of: as the user says, as names and shapes show, or as words propose."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from unhorse.loading.chains import said_chain
from unhorse.loading.copied_chains import known_chain
from unhorse.loading.identification import Identified, identify
from unhorse.models.registry import ImageShape
from unhorse.rules import LoadRefused


def recognised(
    tensors: Mapping[str, Tensor], architecture: str, layers: str | None, image_shape: ImageShape | None
) -> Identified:
    """The network of a state dict; LoadRefused LD210 or LD211 where it cannot be told."""
    if layers is not None and architecture != "auto":
        reason = f"--arch {architecture} and --layers name two networks"
        raise LoadRefused("LD211", reason, "leave one out")
    if layers is not None:
        return said_chain(tensors, layers, image_shape=image_shape)
    try:
        return identify(tensors, architecture=architecture, image_shape=image_shape)
    except LoadRefused:
        if architecture != "auto" or (found := known_chain(tensors, image_shape=image_shape)) is None:
            raise
        return found
