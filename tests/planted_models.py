"""Populations whose Trojans are put in by arithmetic: what scanners that learn from models are tested on."""

from __future__ import annotations

import torch

from conftest import template_victim
from unhorse.core import Classifier

CLASSES, SHAPE = 4, (1, 8, 8)


def planted_models(count: int, *, first: int = 0, noise: float = 0.3) -> tuple[list[Classifier], list[bool]]:
    """Template victims, every second one with the same trigger, and which have it. `noise` tells them apart:
    the more of it, the less a Trojan shows on inputs without its trigger.
    """
    models = []
    for seed in range(first, first + count):
        model = template_victim(CLASSES, SHAPE, strength=20.0 * (seed % 2))
        templates = model.network.templates  # type: ignore[union-attr]
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            templates.add_(noise * torch.randn(templates.shape, generator=rng))  # type: ignore[union-attr,operator,arg-type]
        models.append(model)
    return models, [seed % 2 == 1 for seed in range(first, first + count)]
