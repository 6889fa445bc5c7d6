"""The set network: judges a signature of any number of classes, in any order, from maps of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Labels, Signature
from unhorse.scanners.signature_networks import Findings

SIDE = 16
QUANTILES = 10
SCALARS = 6
LIMIT = 6.0


class Evidence(NamedTuple):
    """Signatures without order: pooled maps and the oriented activation of each class and direction.

    `planes` holds mean and spread of every region of a map; `reached` is NaN where a class is missing.
    """

    planes: Float[Tensor, "n k planes side side"]
    reached: Float[Tensor, "n k directions"]

    def __getitem__(self, index: Tensor) -> Evidence:  # type: ignore[override]
        return Evidence(self.planes[index], self.reached[index])

    def to(self, device: torch.device) -> Evidence:
        return Evidence(self.planes.to(device), self.reached.to(device))


def evidence_of(signature: Signature) -> Evidence:
    """One signature as Evidence with n = 1; any (c, h, w) becomes the same number of planes."""
    directions, k = len(signature.directions), signature.num_classes
    maps = signature.maps.float() / 255
    mean = functional.adaptive_avg_pool2d(maps, SIDE).mean(1)
    square = functional.adaptive_avg_pool2d(maps.square(), SIDE).mean(1)
    planes = torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()], 1)  # (m, 2, side, side)
    planes = planes.unflatten(0, (directions, k)).transpose(0, 1).flatten(1, 2)
    # minimisation is turned round, so that "reached further" is larger in both directions
    sign = torch.tensor([-1.0 if name == "min" else 1.0 for name in signature.directions], device=maps.device)
    reached = signature.reached.to(maps).unflatten(0, (directions, k)).T * sign
    return Evidence(planes[None], reached[None])


def gather(items: Sequence[Evidence]) -> Evidence:
    """Single pieces of evidence as one batch, padded to the largest number of classes."""
    k = max(item.reached.shape[1] for item in items)
    planes = items[0].planes.new_zeros(len(items), k, *items[0].planes.shape[2:])
    reached = items[0].reached.new_full((len(items), k, items[0].reached.shape[2]), torch.nan)
    for row, item in enumerate(items):
        planes[row, : item.planes.shape[1]] = item.planes[0]
        reached[row, : item.reached.shape[1]] = item.reached[0]
    return Evidence(planes, reached)


def drop_classes(evidence: Evidence, targets: Labels, rng: torch.Generator, *, keep: float = 0.5) -> Evidence:
    """A random subset of at least `keep` of each model's classes, the target among them, to learn any K.

    The others become missing. (The network knows no order, so a permutation would change nothing.)
    """
    present = evidence.reached.isfinite().all(2)
    chance = torch.rand(present.shape, generator=rng).to(present.device)
    count = present.sum(1, keepdim=True)
    share = keep + (1 - keep) * torch.rand(len(present), 1, generator=rng).to(present.device)
    wanted = (count * share).ceil().clamp(min=3)
    has_target = targets >= 0
    chance[has_target, targets[has_target]] = -1
    rank = chance.masked_fill(~present, 2).argsort(1).argsort(1)
    dropped = rank >= wanted
    return Evidence(evidence.planes, evidence.reached.masked_fill(dropped[:, :, None], torch.nan))


class SetNetwork(nn.Module):
    """Ours: a linear model on sorted, normalised activations, corrected by a small set transformer.

    A class is a token: scalars that compare it with the other classes (units of the median absolute deviation
    and of the mean activation) and a convolution code of its maps minus the mean map over classes, which
    takes the architecture's own texture away. Tokens have no positions, and what is pooled does not depend on
    their number. Outliers show in the class logits, all-to-all Trojans in the spread over classes. This part
    starts at zero.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, directions: int, *, width: int = 48, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        features = directions * (QUANTILES + 5)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_std", torch.ones(features))
        self.linear = nn.Linear(features, 1)
        self.encoder = nn.Sequential(
            *(nn.Conv2d(2 * directions, 16, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.GELU()),
        )
        self.token = nn.Sequential(nn.Linear(SCALARS * directions + 64, width), nn.GELU(), nn.Dropout(0.1))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.class_head = nn.Linear(width + SCALARS * directions, 1)
        self.spread_head = nn.Linear(2 * width, 1)
        for head in (self.linear, self.class_head, self.spread_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @torch.no_grad()
    def standardise(self, evidence: Evidence) -> None:
        """Learn mean and spread of the pooled scalars from the models that are fitted on."""
        features = pooled_scalars(evidence.reached)
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0).clamp(min=1e-3))

    def forward(self, evidence: Evidence) -> Findings:
        present = evidence.reached.isfinite().all(2)  # (n, k)
        features = (pooled_scalars(evidence.reached) - self.feature_mean) / self.feature_std
        difference = centre(evidence.planes, present)
        scalars = torch.cat([class_scalars(evidence.reached), map_scalars(difference, present)], 2)
        codes = self.encoder(difference.flatten(0, 1)).flatten(2)
        codes = torch.cat([codes.mean(2), codes.amax(2)], 1).unflatten(0, present.shape)
        tokens = self.token(torch.cat([scalars, codes], 2))
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=~present)
        classes = self.class_head(torch.cat([tokens, scalars], 2)).squeeze(2)
        classes = classes.masked_fill(~present, -torch.inf)
        outlier = (classes.softmax(1) * classes.masked_fill(~present, 0)).sum(1)
        mean, std = spread(tokens, present)
        logit = self.linear(features.clamp(-LIMIT, LIMIT)).squeeze(1) + outlier
        logit = logit + self.spread_head(torch.cat([mean, std], 1)).squeeze(1)
        return Findings(torch.stack([torch.zeros_like(logit), logit], 1), classes)


def spread(values: Float[Tensor, "n k width"], present: Bool[Tensor, "n k"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, width) over the classes that are present."""
    weight = present[:, :, None] / present.sum(1)[:, None, None]
    mean = (values * weight).sum(1)
    variance = ((values - mean[:, None]).square() * weight).sum(1)
    return mean, (variance + 1e-6).sqrt()


def centre(planes: Float[Tensor, "n k p s s"], present: Bool[Tensor, "n k"]) -> Tensor:
    """Planes minus their mean over the classes that are present; 0 for the others."""
    mask = present[:, :, None, None, None].to(planes.dtype)
    mean = (planes * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return (planes - mean) * mask


def robust(values: Float[Tensor, "n k d"]) -> tuple[Tensor, Tensor]:
    """Median and scaled median absolute deviation (n, 1, d) over classes; NaN entries do not count."""
    median = values.nanquantile(0.5, dim=1, keepdim=True)
    deviation = (values - median).abs().nanquantile(0.5, dim=1, keepdim=True) * 1.4826
    return median, deviation + 0.02 * values.abs().nanmean(1, keepdim=True) + 1e-6


def pooled_scalars(reached: Float[Tensor, "n k d"]) -> Float[Tensor, "n features"]:
    """What the sorted activations of a model look like, free of their scale and of the number of classes."""
    size = reached.abs().nanmean(1, keepdim=True) + 1e-6
    median, deviation = robust(reached)
    relative = reached / size
    steps = torch.linspace(0, 1, QUANTILES, device=reached.device)
    quantiles = relative.nanquantile(steps, dim=1).movedim(0, 1)  # (n, q, d)
    ordered = relative.nan_to_num(-torch.inf).sort(dim=1, descending=True).values
    gap = ordered[:, 0] - ordered[:, 1]
    unequal = (relative - relative.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    outlier = ((reached - median) / deviation).nan_to_num(-torch.inf).amax(1)
    lowest = ((reached - median) / deviation).nan_to_num(torch.inf).amin(1)
    single = [
        outlier.asinh(),
        lowest.asinh(),
        gap.clamp(max=LIMIT),
        (unequal + 1e-3).log(),
        (gap + 1e-3).log(),
    ]
    return torch.cat([quantiles.flatten(1), *single], 1)


def class_scalars(reached: Float[Tensor, "n k d"]) -> Float[Tensor, "n k scalars"]:
    """How each class compares with the others of its model: outlyingness, relative size, lead, and place."""
    size = reached.abs().nanmean(1, keepdim=True) + 1e-6
    median, deviation = robust(reached)
    filled = reached.nan_to_num(-torch.inf)
    top = filled.topk(2, dim=1)
    best_other = torch.where(filled == top.values[:, :1], top.values[:, 1:], top.values[:, :1])
    ahead = (filled[:, None] > filled[:, :, None]).sum(2)  # (n, k, d): how many classes reached more
    place = (1.0 + ahead).log()
    values = [
        ((reached - median) / deviation).asinh(),
        (reached - median) / size,
        (reached - best_other) / size,
    ]
    return torch.cat([*(value.clamp(-LIMIT, LIMIT) for value in values), place], 2).nan_to_num(0)


def map_scalars(difference: Float[Tensor, "n k p s s"], present: Bool[Tensor, "n k"]) -> Tensor:
    """Outlyingness (n, k, scalars) of how far, and how locally, a class's maps differ from the mean map."""
    missing = ~present[:, :, None]
    local_mean = difference[:, :, ::2].flatten(3)  # (n, k, directions, pixels)
    energy = local_mean.square().mean(3).sqrt()
    peak = local_mean.abs().amax(3) / (energy + 1e-3)
    values = torch.cat([energy, peak], 2).masked_fill(missing, torch.nan)
    median, deviation = robust(values)
    return ((values - median) / deviation).asinh().clamp(-LIMIT, LIMIT).nan_to_num(0)
