"""Scanners that learn from the signatures of benign and trojaned models."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from unhorse.core import Bars, Classifier, Dataset, Reference, ScanResult, Scores, Signature, Verdict
from unhorse.scanners.signature_networks import RESNEXT50, ConvolutionNetwork, TransformerNetwork
from unhorse.scanners.signature_set import Evidence, SetNetwork
from unhorse.scanners.signature_training import (
    NO_TARGET,
    Examples,
    Progress,
    Recipe,
    logits_of,
    margins,
    readable,
    seeded,
    stratified_split,
    train,
)
from unhorse.scanners.signatures import compute_signature

FORMAT = "unhorse-signature-scanner-1"
ALPHA = 0.05
DIRECTIONS = {"min": ("min",), "max": ("max",), "both": ("min", "max")}
LEARNED = ("shape_", "directions_", "threshold_", "localises_", "history_", "split_")


class Kind(NamedTuple):
    """The usual training of a kind of network; the score is the mean log odds of `members` networks."""

    epochs: int
    learning_rate: float
    batch_size: int
    members: int


KINDS = {
    "convolution": Kind(epochs=100, learning_rate=1e-4, batch_size=8, members=1),
    "transformer": Kind(epochs=20, learning_rate=1e-4, batch_size=8, members=1),
    "set": Kind(epochs=60, learning_rate=2e-3, batch_size=32, members=3),
}


@dataclass
class SignatureScanner:
    """Trojan model detection from activation-optimised maps (Hussein et al., arXiv 2306.04877).

    Kinds "convolution" and "transformer" are the paper's; "set" is ours: any order and number of classes, maps of
    any size, and it names the target class where it was fitted with targets. None takes the kind's usual value.
    The score is the probability of "trojaned"; `layers` are the depths of the ResNeXt stages. Deviations from the
    paper: a 2-way head (the public code has 1000), batch normalisation over all maps of a batch, no ImageNet
    normalisation of the maps.
    """

    kind: str = "set"
    maps: str = "both"
    preset: str = "fast"
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    validation_fraction: float = 0.1
    seed: int = 0
    device: str | None = None
    precision: str = "auto"
    layers: tuple[int, ...] = RESNEXT50
    cache: Path | None = None

    network_: nn.ModuleList | None = field(default=None, init=False, repr=False)
    shape_: tuple[int, ...] = field(default=(), init=False)
    """(m, c, h, w) of the signatures fitted on; kind "set" accepts others."""
    directions_: tuple[str, ...] = field(default=(), init=False)
    threshold_: float = field(default=0.5, init=False)
    localises_: bool = field(default=False, init=False)
    history_: tuple[tuple[float, ...], ...] = field(default=(), init=False, repr=False)
    """Validation loss per member and epoch."""
    split_: tuple[int, int] = field(default=(0, 0), init=False)
    """How many signatures were fitted on, and how many chose the epoch and the threshold."""
    reference_: Reference | None = field(default=None, init=False, repr=False)

    def describe(self, model: Classifier) -> Signature:
        """The signature that this scanner reads; one start image for all models, whatever `seed` is."""
        return compute_signature(model, self.preset, directions=self._directions(), cache=self.cache)

    def fit(
        self,
        signatures: Sequence[Signature],
        trojaned: Sequence[bool],
        targets: Sequence[int | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from labelled signatures; a stratified part of them chooses the epoch and the threshold.

        A target of None says "no single target class" (benign, all-to-all); `targets` None says "not known".
        """
        selected = [self._select(signature) for signature in signatures]
        examples = self._examples(selected, trojaned, targets)
        fitting, validation = stratified_split(examples.trojaned, self.validation_fraction, self.seed)
        device = torch.device(self.device or selected[0].maps.device)
        self.shape_, self.directions_ = tuple(selected[0].maps.shape), selected[0].directions
        usual = self._kind()
        epochs, members, histories = self.epochs or usual.epochs, [], []
        for member in range(usual.members):
            report = _after_each_epoch(progress, member * epochs, usual.members * epochs)
            recipe = Recipe(
                epochs,
                self.batch_size or usual.batch_size,
                self.learning_rate or usual.learning_rate,
                self._low_precision(device),
                self.seed + 1000 * member,
            )
            with seeded(recipe.seed, device):
                network = self._build(examples.take(fitting)).to(device)
                histories.append(
                    tuple(train(network, examples.take(fitting), examples.take(validation), recipe, report))
                )
            members.append(network)
        self.network_, self.history_ = nn.ModuleList(members).eval(), tuple(histories)
        self.localises_ = self.kind == "set" and bool((examples.targets != NO_TARGET).any())
        self.split_, self.reference_ = (len(fitting), len(validation)), None
        held_back = self._judge(examples.take(validation).items)[0]
        self.threshold_ = best_threshold(held_back, examples.trojaned[validation])
        return self

    def calibrate(self, benign: Sequence[Signature], name: str = "benign models") -> Reference:
        """Take benign models that fit() has not seen as the reference group of p-values."""
        self.reference_ = Reference(name, tuple(self.scores(benign).tolist()))
        return self.reference_

    def scores(self, signatures: Sequence[Signature]) -> Scores:
        """Probability of "trojaned" per signature, in float64 on the CPU."""
        items = [self._item(self._finite(self._select(signature))) for signature in signatures]
        self._check_shapes(signatures=[self._select(signature) for signature in signatures])
        return self._judge(items)[0]

    def judge(self, signature: Signature) -> ScanResult:
        """SUSPICIOUS or NO SIGN FOUND: a learned score alone demonstrates no trigger."""
        return self._result(signature, [str(index) for index in range(signature.num_classes)])

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judge the signature of `model`; clean images are not needed."""
        return self._result(self.describe(model), model.class_names)
