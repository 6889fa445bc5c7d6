"""Scanners that a user asks for by name: they need no folder, and no population of the user's own."""

from __future__ import annotations

from dataclasses import replace

from unhorse.scanners.activation_outlier import EFFORTS, ActivationOutlier
from unhorse.scanners.generalist import Generalist
from unhorse.scanners.neural_cleanse import NeuralCleanse

GENERALIST, OUTLIER, NEURAL_CLEANSE = "generalist", "activation-outlier", "neural-cleanse"
NAMED = (GENERALIST, OUTLIER, NEURAL_CLEANSE)
DATA_FREE = (Generalist, ActivationOutlier)
"""Those that need no clean images: they take a reference, and say how long they need."""
QUICK_SECONDS = 840.0
"""What a quick scan takes at most: with opening and reporting a quarter of an hour."""
CLEANSE_EFFORTS = {
    "quick": NeuralCleanse(samples_per_step=256),
    "standard": NeuralCleanse(),
    "deep": NeuralCleanse(repeats=3),
}


def named_scanner(
    name: str | None, effort: str = "standard", *, seed: int = 0, budget: float | None = None
) -> Generalist | ActivationOutlier | NeuralCleanse:
    """One of NAMED at an effort, the generalist unless one is named. `budget` is in seconds; the generalist
    at effort "quick" has QUICK_SECONDS unless it is given.
    """
    name = name or GENERALIST
    if name not in NAMED or effort not in EFFORTS:
        allowed = f"{', '.join(NAMED)}, at {', '.join(EFFORTS)}"
        raise ValueError(f"no scanner {name!r} at effort {effort!r}: take one of {allowed}")
    if name == NEURAL_CLEANSE:
        return replace(CLEANSE_EFFORTS[effort], seed=seed)
    if name == OUTLIER:
        return replace(EFFORTS[effort], seed=seed, budget=budget)
    if budget is None and effort == "quick":
        budget = QUICK_SECONDS
    return Generalist.shipped(effort, seed=seed, budget=budget)
