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

    The generator draws a mask m and a pattern for a class k; x~ is the image x of class y under them. It minimises
    -log p(k | x~) + hinge_weight * max(||m|| - mask_norm, 0) - attack_weight * log p(k | F(x~)), the filter F
    label_weight * -log p(y | F(x)) + reconstruction_weight * ||F(x) - x||
    - robust_label_weight * log p(y | F(x~)) + robust_reconstruction_weight * ||F(x~) - x||,
    in turn, batch by batch. `mask_norm` is Euclidean, by default 0.2 sqrt(h w); with `normalise_mask` no mask
    is larger. `robust_reconstruction_weight` is that of the clean images unless given.
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
        self.network_ = network.eval().requires_grad_(False)
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
        import os

        self.fmt = (
            torch.channels_last if self.low_precision or os.environ.get("CL") else torch.contiguous_format
        )
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: dict[str, nn.Module] = {"network": network, "generator": generator}
        self.optimizers = [
            new_optimizer(network, settings),
            new_optimizer(generator, settings, betas=(0.5, 0.999)),
        ]

    def step(self, images: Images, labels: Labels, rng: torch.Generator) -> Terms:
        stamped, terms = self._step_generator(images, rng)
        return terms | self._step_filter(images, stamped, labels)

    def _logits(self, images: Images) -> Tensor:
        return self.model(images.contiguous(memory_format=torch.channels_last))

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
            shown = torch.cat([stamped, self.network(stamped)]) if settings.attack_weight else stamped
            losses = functional.cross_entropy(
                self._logits(shown), targets.repeat(len(shown) // count), reduction="none"
            )
        weights = torch.ones_like(losses)
        weights[count:] = settings.attack_weight
        loss = (weights * losses).sum() / count
        if not settings.normalise_mask:
            loss = loss + settings.hinge_weight * (norms(masks) - self.generator.mask_norm).relu().mean()
        self._update(1, loss)
        terms = {"generator": loss, "attack": losses[:count].mean(), "mask_norm": norms(masks).mean()}
        return stamped.detach(), {name: value.detach() for name, value in terms.items()}

    def _step_filter(self, images: Images, stamped: Images, labels: Labels) -> Terms:
        settings, count = self.settings, len(images)
        with autocast(self.device, self.low_precision):
            filtered = self.network(torch.cat([images, stamped]))
            logits = self._logits(filtered)
        label, robust_label = functional.cross_entropy(logits, labels.repeat(2), reduction="none").split(
            count
        )
        reconstruction, robust_reconstruction = distance(filtered, images.repeat(2, 1, 1, 1)).split(count)
        terms = {
            "label": label.mean(),
            "reconstruction": reconstruction.mean(),
            "robust_label": robust_label.mean(),
            "robust_reconstruction": robust_reconstruction.mean(),
        }
        robust_weight = settings.robust_reconstruction_weight
        weights = {
            "label": self.label_share * settings.label_weight,
            "reconstruction": settings.reconstruction_weight,
            "robust_label": self.label_share * settings.robust_label_weight,
            "robust_reconstruction": settings.reconstruction_weight
            if robust_weight is None
            else robust_weight,
        }
        loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        self._update(0, loss)
        return {name: value.detach() for name, value in terms.items()} | {"loss": loss.detach()}

    def _update(self, player: int, loss: Tensor) -> None:
        self.optimizers[player].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[player].step()
