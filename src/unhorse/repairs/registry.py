"""Repairs by the name of their table rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from unhorse.repairs.distill import AttentionDistillation
from unhorse.repairs.fine_tuning import FineTuning
from unhorse.repairs.prune import Pruning
from unhorse.repairs.unlearn import NeuronPruning, Unlearning

AnyRepair = Pruning | FineTuning | AttentionDistillation | NeuronPruning | Unlearning
REPAIRS: Mapping[str, Callable[..., AnyRepair]] = {
    "pruning": Pruning,
    "fine-pruning": partial(Pruning, fine_tune_epochs=20),
    "fine-tuning": FineTuning,
    "nad": AttentionDistillation,
    "neuron-pruning": NeuronPruning,
    "unlearning": Unlearning,
}
NEEDS_FINDING = frozenset({"neuron-pruning", "unlearning"})
"""Repairs that work with the reversed trigger of a Neural Cleanse scan."""
