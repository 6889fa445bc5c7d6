"""How a network learns to judge signatures: stratified validation, and the weights of the best validation loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Labels, Signature
from unhorse.scanners.signature_networks import Findings, Maps
from unhorse.scanners.signature_set import Evidence, SetNetwork, drop_classes, evidence_of, gather

NO_TARGET = -1
TARGET_WEIGHT = 0.5
Progress = Callable[[int, int, float], None]
"""Called after each epoch with the epochs done, the epochs in all and the validation loss."""


@dataclass
class Examples:
    """Labelled signatures in the form that networks read: uint8 maps (m, c, h, w), or Evidence with n = 1."""

    items: Sequence[Tensor] | Sequence[Evidence]
    trojaned: Bool[Tensor, " n"]
    targets: Labels
    droppable: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: Int[Tensor, " b"]) -> Examples:
        items = [self.items[row] for row in index.tolist()]
        return Examples(items, self.trojaned[index], self.targets[index], self.droppable)  # type: ignore[arg-type]


class Recipe(NamedTuple):
    epochs: int
    batch_size: int
    learning_rate: float
    low_precision: bool
    seed: int


def readable(signature: Signature, *, as_set: bool) -> Tensor | Evidence:
    return evidence_of(signature) if as_set else signature.maps


def batch_of(items: Sequence[Tensor] | Sequence[Evidence], device: torch.device) -> Maps | Evidence:
    """Items side by side on `device`; maps stay uint8 until the network scales them."""
    if isinstance(items[0], Evidence):
        return gather(items).to(device)  # type: ignore[arg-type]
    return torch.stack(items).to(device)  # type: ignore[arg-type]


def stratified_split(trojaned: Bool[Tensor, " n"], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to fit on and to validate on: `fraction` of the benign and of the trojaned, at least one of each."""
    rng = torch.Generator().manual_seed(seed)
    fitting, validation = [], []
    for kind, name in ((False, "benign"), (True, "trojaned")):
        index = (trojaned == kind).nonzero().squeeze(1)
        if len(index) < 2:
            raise ValueError(f"{len(index)} {name} signatures: give at least 2, one of them is for validation")
        index = index[torch.randperm(len(index), generator=rng)]
        held_back = min(max(1, round(fraction * len(index))), len(index) - 1)
        validation.append(index[:held_back])
        fitting.append(index[held_back:])
    return torch.cat(fitting).sort().values, torch.cat(validation).sort().values


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout and initial weights draw from `seed`; the caller's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def train(
    network: nn.Module, fitting: Examples, validation: Examples, recipe: Recipe, progress: Callable[[int, float], None]
) -> list[float]:
    """Fit `network` in place, leave it with the weights of the lowest validation loss, return that loss per epoch."""
    device = next(network.parameters()).device
    rng = torch.Generator().manual_seed(recipe.seed)
    optimizer = _optimizer(network, recipe)
    losses: list[float] = []
    best = copy.deepcopy(network.state_dict())
    for epoch in range(recipe.epochs):
        network.train()
        for index in torch.randperm(len(fitting), generator=rng).split(recipe.batch_size):
            if len(index) == 1 < len(fitting):
                continue  # batch normalisation cannot train on one value
            loss = _loss(network, fitting.take(index), recipe.low_precision, rng, device)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(validation_loss(network, validation, device))
        if losses[-1] <= min(losses):
            best = copy.deepcopy(network.state_dict())
        progress(epoch + 1, losses[-1])
    network.load_state_dict(best)
    network.eval()
    return losses


@torch.no_grad()
def logits_of(
    network: nn.Module, items: Sequence[Tensor] | Sequence[Evidence], device: torch.device, size: int = 32
) -> Findings:
    """Findings of all items in eval mode and full precision, on the CPU; class logits only where K is the same."""
    network.eval()
    parts = [network(batch_of(items[start : start + size], device)) for start in range(0, len(items), size)]
    logits = torch.cat([part.logits for part in parts]).cpu()
    if len(parts) > 1 or parts[0].classes is None:
        return Findings(logits)
    return Findings(logits, parts[0].classes.cpu())


def validation_loss(network: nn.Module, validation: Examples, device: torch.device) -> float:
    logits = logits_of(network, validation.items, device).logits
    return float(functional.cross_entropy(logits, validation.trojaned.long()))


def margins(logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """Log odds of "trojaned", in float64: probabilities near 1 must not tie."""
    return logits[:, 1].double() - logits[:, 0].double()


def _loss(
    network: nn.Module, examples: Examples, low_precision: bool, rng: torch.Generator, device: torch.device
) -> Tensor:
    batch = batch_of(examples.items, device)
    targets = examples.targets.to(device)
    if isinstance(batch, Evidence) and examples.droppable:
        batch = drop_classes(batch, targets, rng)
    with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
        findings: Findings = network(batch)
    loss = functional.cross_entropy(findings.logits, examples.trojaned.long().to(device))
    if findings.classes is not None and bool((examples.targets != NO_TARGET).any()):
        which = functional.cross_entropy(findings.classes, targets, ignore_index=NO_TARGET)
        loss = loss + TARGET_WEIGHT * which
    return loss


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if not isinstance(network, SetNetwork):
        return torch.optim.Adam(network.parameters(), recipe.learning_rate, fused=True)
    linear = list(network.linear.parameters())
    others = [value for name, value in network.named_parameters() if not name.startswith("linear.")]
    # the linear model on activations leads: it learns ten times as fast as what corrects it
    groups = [{"params": linear, "lr": 10 * recipe.learning_rate}, {"params": others}]
    return torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=0.05)
