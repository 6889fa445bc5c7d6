"""Adversarial input filtering: the filter plays against a generator of triggers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Classifier, Dataset, Images, Labels
from unhorse.filters.fitting import (
    FilterEpoch,
    OnEpoch,
    Precision,
    Terms,
    frozen,
    new_network,
    new_optimizer,
    play,
    purify,
    seeded,
    settled,
    trains_in_bf16,
    usable,
)
from unhorse.filters.input_filter import distance
from unhorse.filters.networks import FilterNetwork, ImageShape
from unhorse.models.training import autocast

NOISE_SIZE = 64
LARGE_IMAGE = 64


@dataclass
class AdversarialFilter:
    """AIF (Do et al., ECCV 2022, arXiv 2202.12154, Eq. 2 and 6 to 10): purify what a generator stamps.

    A generator draws mask m and pattern for a class k; x~ is the image x of class y under them. It minimises
    -log p(k | x~) + hinge_weight * max(||m|| - mask_norm, 0) - attack_weight * log p(k | F(x~)), the filter F
    -label_weight * log p(y | F(x)) + reconstruction_weight * ||F(x) - x||
    - robust_label_weight * log p(y | F(x~)) + robust_reconstruction_weight * ||F(x~) - x||,
    in turn, batch by batch. Norms are Euclidean. With `normalise_mask` no mask's norm is above `mask_norm`,
    0.2 sqrt(h w) unless given. `robust_reconstruction_weight` is `reconstruction_weight` unless given;
    `stamped_share` of each batch is stamped, all of it in the paper. The terms of y are left out for the
    first `warm_up` of the fit and come in over as long again.
    """

    network: str = "auto"
    label_weight: float = 1.0
    reconstruction_weight: float = 1.0
    robust_label_weight: float = 1.0
    robust_reconstruction_weight: float | None = None
    attack_weight: float = 1.0
    hinge_weight: float = 1.0
    normalise_mask: bool = True
    mask_norm: float | None = None
    mask_channels: int = 1
    generator_width: int = 16
    stamped_share: float = 1.0
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    crop: int = 0
    flip: bool = False
    rotation: float = 0.0
    precision: Precision = "auto"
    held_out: float = 0.1
    patience: int = 5
    warm_up: float = 0.1
    seed: int = 0
    network_: FilterNetwork = field(init=False, repr=False, compare=False)
    log_: list[FilterEpoch] = field(init=False, repr=False, compare=False)
    generator_: TriggerGenerator = field(init=False, repr=False, compare=False)

    def fit(
        self,
        model: Classifier,
        clean: Dataset,
        *,
        checkpoint: Path | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Self:
        """Fits on clean images; labels that are missing are the model's own predictions.

        With a `checkpoint` path a fit that was killed goes on after its last whole epoch.
        """
        clean = usable(model, clean, self)
        network = new_network(self.network, model, self.seed)
        with seeded(self.seed + 1):
            generator = TriggerGenerator(self, model.image_shape, model.num_classes).to(model.mean.device)
        with frozen(model):
            game = _Game(self, network, generator, model)
            self.log_ = play(game, clean, self, checkpoint=checkpoint, on_epoch=on_epoch)
        self.network_ = settled(network)
        self.generator_ = generator.eval().requires_grad_(False)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return self

    def __call__(self, images: Images) -> Images:
        """The purified images; what becomes of one does not depend on the others."""
        return purify(self.network_, images)


class TriggerGenerator(nn.Module):
    """Noise and a class to the mask and the pattern of a trigger for that class; it sees no image."""

    def __init__(self, settings: AdversarialFilter, image_shape: ImageShape, classes: int) -> None:
        super().__init__()
        channels, self.height, self.width = image_shape
        self.mask_channels, self.classes = settings.mask_channels, classes
        if not 0 < settings.stamped_share <= 1:
            raise ValueError(f"stamped_share is {settings.stamped_share}: give a share above 0, at most 1")
        if self.mask_channels not in (1, channels):
            raise ValueError(f"mask_channels is {self.mask_channels}: give 1 or the images' {channels}")
        default = 0.2 * math.sqrt(self.height * self.width)
        self.mask_norm = default if settings.mask_norm is None else settings.mask_norm
        self.normalise_mask = settings.normalise_mask
        stages = 3 if max(self.height, self.width) >= LARGE_IMAGE else 2
        width, shrink = settings.generator_width * 2**stages, 2**stages
        self.start = (width, -(-self.height // shrink), -(-self.width // shrink))
        self.embedding = nn.Embedding(classes, NOISE_SIZE)
        self.linear = nn.Linear(2 * NOISE_SIZE, math.prod(self.start), bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(stages):
            layers.append(nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False))
            layers += [nn.BatchNorm2d(width // 2), nn.ReLU()]
            width //= 2
        layers.append(nn.Conv2d(width, self.mask_channels + channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor, targets: Labels) -> tuple[Tensor, Tensor]:
        """Masks (n, 1 or c, h, w), in norm at most `mask_norm` if so chosen, and patterns (n, c, h, w)."""
        start = self.linear(torch.cat([noise, self.embedding(targets)], 1))
        drawn = self.layers(start.unflatten(1, self.start))[:, :, : self.height, : self.width]
        masks, patterns = drawn.float().sigmoid().tensor_split([self.mask_channels], dim=1)
        return projected(masks, self.mask_norm) if self.normalise_mask else masks, patterns


def norms(masks: Tensor) -> Float[Tensor, " n"]:
    """Euclidean norm of each mask over its pixels; of several channels the root mean square counts."""
    return torch.linalg.vector_norm(masks.flatten(1), dim=1) / masks.shape[1] ** 0.5


def projected(masks: Tensor, largest: float) -> Tensor:
    """Each mask scaled down to the norm `largest`, where it is larger."""
    scale = (largest / norms(masks).clamp_min(1e-12)).clamp(max=1.0)
    return masks * scale[:, None, None, None]


class _Game:
    """Generator and filter, one step each on every batch."""

    label_share = 1.0

    def __init__(
        self,
        settings: AdversarialFilter,
        network: FilterNetwork,
        generator: TriggerGenerator,
        model: Classifier,
    ) -> None:
        self.settings, self.network, self.generator, self.model = settings, network, generator, model
        self.device = model.mean.device
        self.low_precision = trains_in_bf16(network, model, settings.precision)
        for player in (network, generator):
            player.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: dict[str, nn.Module] = {"network": network, "generator": generator}
        self.optimizers = [
            new_optimizer(network, settings),
            new_optimizer(generator, settings, betas=(0.5, 0.999)),
        ]

    def step(self, images: Images, labels: Labels, rng: torch.Generator) -> Terms:
        # batches are shuffled: the first images are random ones
        stamped, terms = self._step_generator(images[: self._stamped(len(images))], rng)
        return terms | self._step_filter(images, stamped, labels)

    def objective(self, images: Images, labels: Labels) -> Tensor:
        with autocast(self.device, self.low_precision):
            filtered = self.network(images)
            logits = self._logits(filtered)
        settings = self.settings
        return (
            settings.label_weight * functional.cross_entropy(logits, labels)
            + settings.reconstruction_weight * distance(filtered, images).mean()
        )

    def _step_generator(self, images: Images, rng: torch.Generator) -> tuple[Images, Terms]:
        settings, count = self.settings, len(images)
        noise = torch.randn(count, NOISE_SIZE, generator=rng, device=self.device)
        targets = torch.randint(self.generator.classes, (count,), generator=rng, device=self.device)
        # eval mode and no weight gradients: the generator's step leaves the filter as it is
        with frozen(self.network), autocast(self.device, self.low_precision):
            masks, patterns = self.generator(noise, targets)
            stamped = images + masks * (patterns - images)
            logits = self._logits(torch.cat([stamped, self.network(stamped)]))
        losses = functional.cross_entropy(logits, targets.repeat(2), reduction="none").split(count)
        terms = {
            "attack": losses[0].mean(),
            "filtered_attack": losses[1].mean(),
            "mask_norm": norms(masks).mean(),
        }
        loss = terms["attack"] + settings.attack_weight * terms["filtered_attack"]
        if not settings.normalise_mask:
            loss = loss + settings.hinge_weight * (norms(masks) - self.generator.mask_norm).relu().mean()
        self._update(1, loss)
        return stamped.detach(), {name: value.detach() for name, value in terms.items()}

    def _step_filter(self, images: Images, stamped: Images, labels: Labels) -> Terms:
        settings, counts = self.settings, [len(images), len(stamped)]
        with autocast(self.device, self.low_precision):
            filtered = self.network(torch.cat([images, stamped]))
            logits = self._logits(filtered)
        labels = torch.cat([labels, labels[: len(stamped)]])
        label_losses = functional.cross_entropy(logits, labels, reduction="none").split(counts)
        distances = distance(filtered, torch.cat([images, images[: len(stamped)]])).split(counts)
        terms = {
            "label": label_losses[0].mean(),
            "robust_label": label_losses[1].mean(),
            "reconstruction": distances[0].mean(),
            "robust_reconstruction": distances[1].mean(),
        }
        given = settings.robust_reconstruction_weight
        weights = {
            "label": self.label_share * settings.label_weight,
            "robust_label": self.label_share * settings.robust_label_weight,
            "reconstruction": settings.reconstruction_weight,
            "robust_reconstruction": settings.reconstruction_weight if given is None else given,
        }
        loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        self._update(0, loss)
        return {name: value.detach() for name, value in (terms | {"loss": loss}).items()}

    def _stamped(self, count: int) -> int:
        """How many of so many images are stamped: two at least, for the generator's batch normalisation."""
        return max(2, round(self.settings.stamped_share * count))

    def _logits(self, images: Images) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def _update(self, player: int, loss: Tensor) -> None:
        self.optimizers[player].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[player].step()
