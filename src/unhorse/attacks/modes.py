"""Modes of attacks: which label an image under the trigger gets, and which images that is measured on."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from unhorse.core import Labels

Mode = Literal["single-target", "all-target", "source-target", "placebo"]


def relabelled(labels: Labels, mode: Mode, target: int, num_classes: int) -> Labels:
    """The labels under the trigger: `target`, class k's successor (k + 1) mod K for "all-target", and what
    they were for "placebo".
    """
    if mode == "placebo":
        return labels
    if mode == "all-target":
        return (labels + 1) % num_classes
    return torch.full_like(labels, target)


def measured_on(labels: Labels, mode: Mode, target: int, source: int | None = None) -> Bool[Tensor, " n"]:
    """The images whose class the trigger is meant to change: those of `source` if there is one, those
    outside `target` for "single-target", else all.
    """
    if source is not None:
        return labels == source
    return labels != target if mode == "single-target" else torch.ones_like(labels, dtype=torch.bool)
