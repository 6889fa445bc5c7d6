"""Completion of images: a network fills holes from what is around them, taught on clean images alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Dataset, Images, Labels
from unhorse.filters.fitting import (
    FilterEpoch,
    OnEpoch,
    Precision,
    Terms,
    frozen,
    new_optimizer,
    play,
    seeded,
)
from unhorse.filters.networks import ImageShape
from unhorse.models.training import autocast, bf16_pays

FORMAT = "unhorse-completion-1"
STRIDE = 4
SMALLEST_HOLE, LARGEST_HOLE = 4 / 32, 12 / 32
"""Sides of the holes to learn from, as shares of the image's."""
Masks = Float[Tensor, "n 1 h w"]
"""1 where pixels are to be filled, else 0."""


@dataclass
class CompletionSettings:
    """How a completion network is trained: all that decides its weights, besides the images.

    The critic joins after the first `warm_up` of the epochs, and its weight comes in over as long again.
    """

    width: int = 16
    epochs: int = 16
    batch_size: int = 64
    learning_rate: float = 1e-3
    warm_up: float = 0.3
    adversarial_weight: float = 1e-3
    gradient_penalty: float = 10.0
    critic_steps: int = 1
    precision: Precision = "auto"
    seed: int = 0
    network: str = "completion"  # from here on: what the loop of all filters also asks for
    crop: int = 0
    flip: bool = False
    rotation: float = 0.0
    held_out: float = 0.0
    patience: int = 5


class CompletionNetwork(nn.Module):
    """The completion network of GLCIC (Iizuka et al., SIGGRAPH 2017) as Februus uses it; theirs has width 64.

    Sees the image with the mean pixel in its hole, and the mask. Images whose sides 4 does not divide are
    padded by their edge pixels and cropped back.
    """

    mean_pixel: Tensor

    def __init__(self, width: int, image_shape: ImageShape) -> None:
        super().__init__()
        channels, self.height, self.width = image_shape
        self.register_buffer("mean_pixel", torch.full((channels, 1, 1), 0.5))
        wide = (width, 2 * width, 4 * width)
        layers = [
            *_layer(nn.Conv2d(channels + 1, wide[0], 5, padding=2, bias=False)),
            *_layer(nn.Conv2d(wide[0], wide[1], 3, 2, 1, bias=False)),
            *_layer(nn.Conv2d(wide[1], wide[1], 3, padding=1, bias=False)),
            *_layer(nn.Conv2d(wide[1], wide[2], 3, 2, 1, bias=False)),
        ]
        for dilation in (1, 1, 2, 4, 8, 16, 1, 1):
            inner = nn.Conv2d(wide[2], wide[2], 3, padding=dilation, dilation=dilation, bias=False)
            layers += _layer(inner)
        layers += [
            *_layer(nn.ConvTranspose2d(wide[2], wide[1], 4, 2, 1, bias=False)),
            *_layer(nn.Conv2d(wide[1], wide[1], 3, padding=1, bias=False)),
            *_layer(nn.ConvTranspose2d(wide[1], wide[0], 4, 2, 1, bias=False)),
            *_layer(nn.Conv2d(wide[0], max(1, width // 2), 3, padding=1, bias=False)),
            nn.Conv2d(max(1, width // 2), channels, 3, padding=1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Images, masks: Masks) -> Images:
        """The images with their holes filled, and untouched outside them; what is in a hole is not seen."""
        seen = torch.cat([paste(images, self.mean_pixel.expand_as(images), masks), masks], 1)
        padding = (0, -self.width % STRIDE, 0, -self.height % STRIDE)
        filled = self.layers(functional.pad(seen, padding, mode="replicate"))
        return paste(images, filled.float().sigmoid()[:, :, : self.height, : self.width], masks)


def paste(images: Images, filling: Images, masks: Masks) -> Images:
    """`filling` inside the masks, `images` outside."""
    return torch.where(masks > 0, filling, images)


def random_holes(
    count: int, image_shape: ImageShape, rng: torch.Generator
) -> tuple[Masks, Float[Tensor, "n 2"]]:
    """A rectangle per image, of 4 to 12 pixels a side where images have 32, and the row and column of its
    centre; on the device of `rng`.
    """
    device = rng.device
    bands, centres = [], []
    for side in image_shape[1:]:
        smallest, largest = (max(1, round(share * side)) for share in (SMALLEST_HOLE, LARGEST_HOLE))
        length = torch.randint(smallest, largest + 1, (count, 1), generator=rng, device=device)
        start = (torch.rand(count, 1, generator=rng, device=device) * (side - length + 1)).floor()
        cells = torch.arange(side, device=device)
        bands.append(((cells >= start) & (cells < start + length)).float())
        centres.append(start + (length - 1) / 2)
    return (bands[0][:, :, None] * bands[1][:, None, :])[:, None], torch.cat(centres, 1)


def around(images: Images, centres: Float[Tensor, "n 2"]) -> Images:
    """The part of each image, as large as the largest hole, whose middle is nearest to its centre."""
    index = []
    for axis, side in enumerate(images.shape[2:]):
        length = max(1, round(LARGEST_HOLE * side))
        start = (centres[:, axis] - (length - 1) / 2).round().clamp(0, side - length).long()
        index.append(start[:, None] + torch.arange(length, device=images.device))
    each = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[each, channels, index[0][:, None, :, None], index[1][:, None, None, :]]


class Critic(nn.Module):
    """GLCIC's two views, the image and what is around its hole, to one score: higher for real images.

    It has no batch normalisation: the gradient penalty is per image (Gulrajani et al., NeurIPS 2017).
    """

    def __init__(self, width: int, image_shape: ImageShape) -> None:
        super().__init__()
        channels, *sides = image_shape
        holes = [max(1, round(LARGEST_HOLE * side)) for side in sides]
        self.whole, size = _halved(channels, width, sides, 3)
        self.near, near_size = _halved(channels, width, holes, 2)
        self.score = nn.Linear(size + near_size, 1)

    def forward(self, images: Images, centres: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        views = [self.whole(images), self.near(around(images, centres))]
        return self.score(torch.cat(views, 1)).squeeze(1)


def slopes(critic: Callable[[Images], Tensor], images: Images) -> Float[Tensor, " n"]:
    """The length of the critic's gradient at each image; it differentiates."""
    images = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    return (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()


class _Completing:
    """The network fills random holes; the critic, once it has joined, tells filled images from real ones."""

    label_share = 1.0

    def __init__(
        self, settings: CompletionSettings, network: CompletionNetwork, critic: Critic, device: torch.device
    ) -> None:
        self.settings, self.network, self.critic, self.device = settings, network, critic, device
        auto = settings.precision == "auto"
        self.low_precision = bf16_pays(network, device) if auto else settings.precision == "bf16"
        network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: dict[str, nn.Module] = {"network": network, "critic": critic}
        self.optimizers = [
            new_optimizer(network, settings),
            new_optimizer(critic, settings, betas=(0.5, 0.9)),
        ]

    def step(self, images: Images, labels: Labels, rng: torch.Generator) -> Terms:
        masks, centres = random_holes(len(images), images.shape[1:], rng)  # type: ignore[arg-type]
        with autocast(self.device, self.low_precision):
            filled = self.network(images, masks)
        error = (filled - images).square().sum() / (masks.sum() * images.shape[1])
        terms = {"reconstruction": error}
        loss = error
        if self.label_share:
            for _ in range(self.settings.critic_steps):
                terms |= self._step_critic(images, filled.detach(), centres, rng)
            with frozen(self.critic):
                score = self.critic(filled, centres).mean()
            loss = error - self.label_share * self.settings.adversarial_weight * score
        self._update(0, loss)
        return {name: value.detach() for name, value in (terms | {"loss": loss}).items()}

    def objective(self, images: Images, labels: Labels) -> Tensor:
        raise AssertionError("no image is held out: a game has no loss that must fall")

    def _step_critic(
        self, real: Images, filled: Images, centres: Float[Tensor, "n 2"], rng: torch.Generator
    ) -> Terms:
        share = torch.rand(len(real), 1, 1, 1, generator=rng, device=self.device)
        scores = self.critic(torch.cat([real, filled]), centres.repeat(2, 1))
        apart = scores[: len(real)].mean() - scores[len(real) :].mean()
        between = slopes(lambda images: self.critic(images, centres), filled + share * (real - filled))
        penalty = (between - 1).square().mean()
        self._update(1, self.settings.gradient_penalty * penalty - apart)
        return {"distance": apart.detach(), "penalty": penalty.detach()}

    def _update(self, player: int, loss: Tensor) -> None:
        self.optimizers[player].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[player].step()


def train_completion(
    settings: CompletionSettings,
    clean: Dataset,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[CompletionNetwork, list[FilterEpoch]]:
    """A network trained on clean images, their labels unseen; it depends on no classifier.

    With a `checkpoint` path a training that was killed goes on after its last whole epoch.
    """
    network = _new_network(settings, clean.image_shape).to(device)
    with seeded(settings.seed + 1):
        critic = Critic(settings.width, clean.image_shape).to(device)
    network.mean_pixel.copy_(clean.images.double().mean((0, 2, 3), keepdim=True)[0] / 255)
    game = _Completing(settings, network, critic, device)
    unlabelled = replace(clean, labels=torch.zeros(len(clean), dtype=torch.long))
    log = play(game, unlabelled, settings, checkpoint=checkpoint, on_epoch=on_epoch)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False), log


def completion_file(cache: Path, settings: CompletionSettings, clean: Dataset) -> Path:
    """Where the network of these settings and images is kept in a folder."""
    digest = hashlib.sha256(f"{FORMAT} {settings} {tuple(clean.images.shape)}".encode())
    digest.update(clean.images.cpu().contiguous().numpy().tobytes())
    return cache / f"completion-{digest.hexdigest()[:16]}.safetensors"


def save_completion(network: CompletionNetwork, path: Path) -> Path:
    """Writes the network whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(save({name: value.cpu().contiguous() for name, value in network.state_dict().items()}))
    draft.replace(path)
    return path


def load_completion(
    path: Path, settings: CompletionSettings, image_shape: ImageShape, device: torch.device
) -> CompletionNetwork:
    """The network of a file; ValueError for a file that is not one of these settings."""
    network = _new_network(settings, image_shape)
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is no completion network of these settings: delete it") from error
    return network.to(device).eval().requires_grad_(False)


def _new_network(settings: CompletionSettings, image_shape: ImageShape) -> CompletionNetwork:
    if settings.width < 1:
        raise ValueError(f"width is {settings.width}: give at least 1, better 16")
    with seeded(settings.seed):
        return CompletionNetwork(settings.width, image_shape)


def _layer(convolution: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [convolution, nn.ReLU(), nn.BatchNorm2d(convolution.out_channels)]


def _halved(channels: int, width: int, sides: list[int], stages: int) -> tuple[nn.Module, int]:
    """Strided convolutions that halve the sides and double the width, and how many numbers come out."""
    layers: list[nn.Module] = []
    for _ in range(stages):
        layers += [nn.Conv2d(channels, width, 5, 2, 2), nn.LeakyReLU(0.2)]
        channels, width, sides = width, 2 * width, [-(-side // 2) for side in sides]
    return nn.Sequential(*layers, nn.Flatten()), channels * sides[0] * sides[1]
