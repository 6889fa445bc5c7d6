"""How networks learn to judge signatures: stratified validation, weights of the best validation loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Labels, Scores
from unhorse.scanners.optimisation import Precision
from unhorse.scanners.signature_networks import Findings, Maps
from unhorse.scanners.signature_set import Evidence, SetNetwork, drop_classes, gather

Items = Sequence[Tensor] | Sequence[Evidence]
NO_TARGET = -1
TARGET_WEIGHT = 0.5
Progress = Callable[[int, int, float], None]
"""Called after each epoch with the epochs done, the epochs in all and the validation loss."""


@dataclass
class Examples:
    """Labelled signatures in the form that networks read: uint8 maps (m, c, h, w), or Evidence with n = 1."""

    items: Items
    trojaned: Bool[Tensor, " n"]
    targets: Labels
    droppable: bool = False

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: Int[Tensor, " b"]) -> Examples:
        items = [self.items[row] for row in index.tolist()]
        return Examples(items, self.trojaned[index], self.targets[index], self.droppable)


class Recipe(NamedTuple):
    epochs: int
    batch_size: int
    learning_rate: float
    precision: Precision
    seed: int
    members: int


def batch_of(items: Items, device: torch.device) -> Maps | Evidence:
    """Items side by side on `device`; maps stay uint8 until the network scales them."""
    if isinstance(items[0], Evidence):
        return gather(items).to(device)  # type: ignore[arg-type]
    return torch.stack(items).to(device)  # type: ignore[arg-type]


def stratified_split(trojaned: Bool[Tensor, " n"], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to fit on and to validate on: `fraction` of the benign and of the trojaned, one at least."""
    rng = torch.Generator().manual_seed(seed)
    fitting, validation = [], []
    for kind, name in ((False, "benign"), (True, "trojaned")):
        index = (trojaned == kind).nonzero().squeeze(1)
        if len(index) < 2:
            raise ValueError(
                f"{len(index)} {name} signatures: give at least 2, one of them is for validation"
            )
        index = index[torch.randperm(len(index), generator=rng)]
        held_back = min(max(1, round(fraction * len(index))), len(index) - 1)
        validation.append(index[:held_back])
        fitting.append(index[held_back:])
    return torch.cat(fitting).sort().values, torch.cat(validation).sort().values


def trains_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to train with bfloat16 autocast; "auto" asks whether the processor multiplies in it."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}: take one of {', '.join(get_args(Precision))}")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout and initial weights draw from `seed`; the caller's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def train_ensemble(
    build: Callable[[], nn.Module],
    fitting: Examples,
    validation: Examples,
    recipe: Recipe,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[nn.ModuleList, tuple[tuple[float, ...], ...]]:
    """Networks that differ in their seed, and each one's validation loss per epoch."""
    networks, losses = nn.ModuleList(), []
    for member in range(recipe.members):
        own = recipe._replace(seed=recipe.seed + 1000 * member)
        report = None
        if progress is not None:
            report = partial(_report, progress, member * recipe.epochs, recipe.members * recipe.epochs)
        with seeded(own.seed, device):
            network = build().to(device)
            if isinstance(network, SetNetwork):
                network.standardise(gather(fitting.items).to(device))  # type: ignore[arg-type]
            losses.append(tuple(train(network, fitting, validation, own, report)))
        networks.append(network)
    return networks.eval(), tuple(losses)


def _report(progress: Progress, before: int, total: int, epoch: int, epochs: int, loss: float) -> None:
    progress(before + epoch, total, loss)


def train(
    network: nn.Module,
    fitting: Examples,
    validation: Examples,
    recipe: Recipe,
    progress: Progress | None = None,
) -> list[float]:
    """Fit `network` in place, keep its weights of the lowest validation loss, return that loss per epoch."""
    device = next(network.parameters()).device
    rng = torch.Generator().manual_seed(recipe.seed)
    bfloat16 = trains_in_bf16(recipe.precision, device)
    optimizer = _optimizer(network, recipe)
    losses: list[float] = []
    lowest = float("inf")
    best = copy.deepcopy(network.state_dict())
    for epoch in range(recipe.epochs):
        network.train()
        for index in torch.randperm(len(fitting), generator=rng).split(recipe.batch_size):
            if len(index) == 1 < len(fitting):
                continue  # batch normalisation cannot train on one value
            loss = _loss(network, fitting.take(index), bfloat16, rng, device)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(validation_loss(network, validation, device))
        if losses[-1] < lowest:
            lowest, best = losses[-1], copy.deepcopy(network.state_dict())
        if progress is not None:
            progress(epoch + 1, recipe.epochs, losses[-1])
    network.load_state_dict(best)
    network.eval()
    return losses


@torch.no_grad()
def logits_of(network: nn.Module, items: Items, device: torch.device, size: int = 32) -> Findings:
    """Findings of all items in eval mode and full precision, on the CPU; class logits of one batch only."""
    network.eval()
    parts = [network(batch_of(items[start : start + size], device)) for start in range(0, len(items), size)]
    logits = torch.cat([part.logits for part in parts]).cpu()
    if len(parts) > 1 or parts[0].classes is None:
        return Findings(logits)
    return Findings(logits, parts[0].classes.cpu())


def validation_loss(network: nn.Module, validation: Examples, device: torch.device) -> float:
    logits = logits_of(network, validation.items, device).logits
    return float(functional.cross_entropy(logits, validation.trojaned.long()))


def ensemble_findings(networks: nn.ModuleList, items: Items, device: torch.device) -> Findings:
    """The mean log odds of all networks as two-way logits, and their mean class logits."""
    findings = [logits_of(network.to(device), items, device) for network in networks]
    odds = torch.stack([margins(finding.logits) for finding in findings]).mean(0)
    classes = [finding.classes for finding in findings if finding.classes is not None]
    logits = torch.stack([torch.zeros_like(odds), odds], 1)
    return Findings(logits, torch.stack(classes).mean(0) if classes else None)


def best_threshold(scores: Scores, trojaned: Bool[Tensor, " n"]) -> float:
    """The threshold of highest balanced accuracy, and of those the one nearest to 0.5."""
    ordered = scores.unique()
    candidates = torch.cat([(ordered[1:] + ordered[:-1]) / 2, scores.new_tensor([0.5])])
    flagged = scores >= candidates[:, None]  # (candidates, n)
    accuracy = (flagged[:, trojaned].double().mean(1) + (~flagged[:, ~trojaned]).double().mean(1)) / 2
    best = candidates[accuracy >= accuracy.max() - 1e-9]
    return float(best[(best - 0.5).abs().argmin()])


def margins(logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """Log odds of "trojaned", in float64: probabilities near 1 must not tie."""
    return logits[:, 1].double() - logits[:, 0].double()


def _loss(
    network: nn.Module, examples: Examples, bfloat16: bool, rng: torch.Generator, device: torch.device
) -> Tensor:
    batch = batch_of(examples.items, device)
    targets = examples.targets.to(device)
    if isinstance(batch, Evidence) and examples.droppable:
        batch = drop_classes(batch, targets, rng)
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
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
    # the linear model on activations leads: it learns faster than what corrects it
    groups: list[dict[str, Any]] = [{"params": linear, "lr": 3 * recipe.learning_rate}, {"params": others}]
    return torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=0.05)
