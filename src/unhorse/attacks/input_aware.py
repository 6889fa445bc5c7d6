"""Input-Aware: every image gets a trigger of its own, made by networks that are trained with the victim."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from unhorse.attacks.modes import Mode, measured_on, relabelled
from unhorse.core import Classifier, Dataset, Images, Labels, Poisoned, Trigger

BETAS = (0.5, 0.9)


@dataclass
class InputAware:
    """Input-Aware Dynamic Backdoor Attack (Nguyen and Tran, NeurIPS 2020, arXiv 2010.08138).

    A generator draws a pattern and a mask network says where it goes: x -> x + mask(x) * (pattern(x) - x).
    `prepare` trains the mask network alone, on at most `mask_images` images: its masks differ from image to
    image as the images do, and pixels above `density` cost. Then it is frozen, and the generator learns with
    the victim: of each batch, the first share `rate` carries its own trigger and its new label, the next
    share `cross_rate` the trigger of another image and its true label, and patterns that differ less than
    their images are penalised. Batches must come shuffled; of fewer than 3 images none is poisoned.
    "placebo" keeps the right labels and all losses: a benign model with the same diet, whose generator
    learns patterns that leave the class as it is.

    `mask_milestones` are the shares of the mask phase after which its learning rate is divided by 10.
    `widths` are the channels of the networks per level (each level halves the image); by default 16, 32, or
    32, 64, 128 from 32 pixels on, as far as the sides can be halved. `accumulate_gradients` repeats a flaw of
    the published code, where the generator's gradients are never set to zero.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mode: Mode = "single-target"
    target: int = 0
    rate: float = 0.1
    cross_rate: float = 0.1
    diversity_weight: float = 1.0
    density: float = 0.032
    norm_weight: float = 100.0
    learning_rate: float = 1e-2
    mask_epochs: int = 25
    mask_milestones: tuple[float, ...] = (0.4, 0.8)
    mask_images: int | None = None
    batch_size: int = 128
    widths: tuple[int, ...] | None = None
    accumulate_gradients: bool = False
    generator_: nn.Sequential | None = field(default=None, init=False, repr=False)
    mask_network_: nn.Sequential | None = field(default=None, init=False, repr=False)
    optimizer_: torch.optim.Optimizer | None = field(default=None, init=False, repr=False)

    modes = ("single-target", "all-target", "placebo")
    poisons_before_augmentation = False

    def __post_init__(self) -> None:
        channels, height, width = self.image_shape
        self.image_shape = (channels, height, width)  # a list, when it comes from a card
        self.widths = _widths(self.image_shape) if self.widths is None else tuple(self.widths)
        levels = max(1, len(self.widths))
        if not self.widths or height % 2**levels or width % 2**levels:
            raise ValueError(
                f"{height}x{width} images cannot be halved {levels} times: resize them or give fewer widths"
            )
        if self.mode not in self.modes:
            raise ValueError(f"mode {self.mode!r}: Input-Aware knows {', '.join(self.modes)}")
        if not 0 <= self.target < self.num_classes:
            raise ValueError(f"target class {self.target} is outside 0..{self.num_classes - 1}")
        if not (self.rate > 0 and self.cross_rate > 0 and self.rate + self.cross_rate < 1):
            raise ValueError(
                f"rate {self.rate} and cross_rate {self.cross_rate} must be positive and sum to less than 1"
            )
        if self.batch_size < 2 or (self.mask_images is not None and self.mask_images < 2):
            raise ValueError(
                f"batch_size {self.batch_size}, mask_images {self.mask_images}: masks need pairs, at least 2"
            )

    def prepare(self, model: Classifier, data: Dataset, rng: torch.Generator) -> None:
        """New networks, on the model's device, and the mask phase; `rng` alone decides both."""
        if data.image_shape != self.image_shape or len(data) < 2:
            raise ValueError(
                f"{len(data)} images of {data.image_shape}: give the attack at least 2 of {self.image_shape}"
            )
        device = model.mean.device
        self._build(int(torch.randint(2**31, (), generator=rng)), device)
        chosen = torch.randperm(len(data), generator=rng)[: self.mask_images]
        self._train_masks(data.images[chosen].to(device), rng)

    def _build(self, seed: int, device: torch.device) -> None:
        assert self.widths is not None
        channels = self.image_shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.generator_ = _network(channels, channels, self.widths)
            self.mask_network_ = _network(channels, 1, self.widths).append(_Squash(20, -10))
        for network in (self.generator_, self.mask_network_):
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast
        self.mask_network_.eval().requires_grad_(False)
        self.optimizer_ = None

    def _train_masks(self, images: UInt8[Tensor, "n c h w"], rng: torch.Generator) -> None:
        _, mask_network = self._networks()
        mask_network.train().requires_grad_(True)
        optimizer = torch.optim.Adam(mask_network.parameters(), self.learning_rate, betas=BETAS)
        # a single image left over has no partner
        per_epoch = len(images) // self.batch_size + (len(images) % self.batch_size > 1)
        edges = [round(share * self.mask_epochs * per_epoch) for share in self.mask_milestones]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, edges)
        for _ in range(self.mask_epochs):
            order = torch.randperm(len(images), generator=rng).to(images.device)
            for batch in order.split(self.batch_size)[:per_epoch]:
                pixels = images[batch].float() / 255
                masks = mask_network(pixels)
                excess = (masks - self.density).relu().mean()
                sameness = _sameness(pixels, pixels.roll(1, 0), masks, masks.roll(1, 0))
                optimizer.zero_grad()
                (self.norm_weight * excess + self.diversity_weight * sameness).backward()
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        mask_network.eval().requires_grad_(False)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        if self.optimizer_ is None:
            kind = _Accumulating if self.accumulate_gradients else torch.optim.Adam
            generator, _ = self._networks()
            self.optimizer_ = kind(generator.parameters(), self.learning_rate, betas=BETAS)
        return [self.optimizer_]

    def poison(self, images: Images, labels: Labels, rng: torch.Generator) -> Poisoned:
        generator, mask_network = self._networks()
        own, crossed = self._counts(len(images))
        if not own:
            return Poisoned(images, labels, images.new_zeros(()))
        donors = (torch.arange(crossed, device=images.device) + own + crossed) % len(images)
        sources = torch.cat([images[:own], images[donors]])
        patterns = generator.train()(sources)
        with torch.no_grad():
            masks = mask_network(sources)
        stamped = _blend(images[: own + crossed], masks, patterns)
        pairs = min(own, crossed)
        other = slice(own, own + pairs)
        sameness = _sameness(sources[:pairs], sources[other], patterns[:pairs], patterns[other])
        return Poisoned(
            torch.cat([stamped, images[own + crossed :]]),
            torch.cat([self.relabel(labels[:own]), labels[own:]]),
            self.diversity_weight * sameness,
        )

    def _counts(self, count: int) -> tuple[int, int]:
        """How many images get their own trigger, and how many another's: at least 1; 1 stays clean."""
        if count < 3:
            return 0, 0
        own = min(max(1, int(self.rate * count)), count - 2)
        return own, min(max(1, int(self.cross_rate * count)), count - 1 - own)

    def relabel(self, labels: Labels) -> Labels:
        return relabelled(labels, self.mode, self.target, self.num_classes)

    def eligible(self, labels: Labels) -> Bool[Tensor, " n"]:
        return measured_on(labels, self.mode, self.target)

    def probes(self) -> dict[str, Trigger]:
        """The triggers as they are now: later training does not change them."""
        generator, mask_network = copy.deepcopy(self._networks())
        generator.eval().requires_grad_(False)
        return {
            "trojan": GeneratedTrigger(self.image_shape, generator, mask_network),
            "cross": GeneratedTrigger(self.image_shape, generator, mask_network, cross=True),
        }

    def state_dict(self) -> dict[str, Tensor]:
        generator, mask_network = self._networks()
        found = dict(nn.ModuleDict({"generator": generator, "mask": mask_network}).state_dict())
        if self.accumulate_gradients:
            gradients = {name: value.grad for name, value in generator.named_parameters()}
            found |= {f"gradient.{name}": value for name, value in gradients.items() if value is not None}
        return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the networks, where they are or, in a new attack, on the CPU."""
        if self.generator_ is None:
            self._build(0, torch.device("cpu"))
        generator, mask_network = self._networks()
        weights = {name: value for name, value in state.items() if not name.startswith("gradient.")}
        try:
            nn.ModuleDict({"generator": generator, "mask": mask_network}).load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"not the weights of this attack on {self.image_shape} images with widths {self.widths}: "
                f"give the options it was trained with ({error})"
            ) from error
        for name, parameter in generator.named_parameters():
            gradient = state.get(f"gradient.{name}")
            parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)

    def _networks(self) -> tuple[nn.Sequential, nn.Sequential]:
        if self.generator_ is None or self.mask_network_ is None:
            raise ValueError("the attack has no networks: call prepare(model, data, rng) or load its state")
        return self.generator_, self.mask_network_


@dataclass(frozen=True)
class GeneratedTrigger:
    """Stamps each image with the trigger that the networks make of it or, with `cross`, of another image of
    the batch, drawn by `rng`. No gradients.
    """

    image_shape: tuple[int, int, int]
    generator: nn.Module
    mask_network: nn.Module
    cross: bool = False

    @torch.no_grad()
    def __call__(self, images: Images, rng: torch.Generator) -> Images:
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"the trigger is for {self.image_shape} images, not {tuple(images.shape[1:])}: resize them"
            )
        sources = images.float()
        if self.cross:
            if len(images) == 1:
                raise ValueError("the trigger of another image needs another image: give at least 2 at once")
            order = torch.randperm(len(images), generator=rng)
            donors = torch.empty_like(order)
            donors[order] = order.roll(1)  # one cycle, so no image is its own donor
            sources = sources[donors.to(images.device)]
        masks = self.mask_network.to(images.device)(sources)
        return _blend(images, masks, self.generator.to(images.device)(sources)).to(images)


# --- arithmetic and networks --------------------------------------------------------------------------------


def _blend(images: Images, masks: Float[Tensor, "n 1 h w"], patterns: Images) -> Images:
    return (images + masks * (patterns - images)).clamp(0, 1)  # rounding alone can leave [0, 1]


def _sameness(first: Images, second: Images, made_of_first: Tensor, made_of_second: Tensor) -> Tensor:
    """Mean over the pairs of rms(x1 - x2) / (rms(f(x1) - f(x2)) + 1e-7)."""
    return (_rms(first - second) / (_rms(made_of_first - made_of_second) + 1e-7)).mean()


def _rms(values: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    # not the root of a mean of squares: its gradient is NaN where a batch holds an image twice
    return torch.linalg.vector_norm(values.flatten(1), dim=1) / math.sqrt(values[0].numel())


class _Accumulating(torch.optim.Adam):
    """Adam whose gradients are never set to zero."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


class _Squash(nn.Module):
    """tanh(scale * x + shift) / 2 + 0.5, in [0, 1]."""

    def __init__(self, scale: float = 1, shift: float = 0) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, values: Tensor) -> Tensor:
        return torch.tanh(self.scale * values + self.shift) / 2 + 0.5


def _widths(image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    height, width = image_shape[1:]
    wanted = (16, 32) if min(height, width) < 32 else (32, 64, 128)
    side = math.gcd(height, width)
    return wanted[: (side & -side).bit_length() - 1]  # as often as 2 divides both sides


def _network(channels: int, outputs: int, widths: Sequence[int]) -> nn.Sequential:
    """(n, channels, h, w) -> (n, outputs, h, w) in [0, 1]: down and up again, without skip connections."""
    layers: list[nn.Module] = []
    wide = channels
    for width in widths:
        layers += [*_block(wide, width), *_block(width, width), nn.MaxPool2d(2)]
        wide = width
    layers += _block(wide, wide)
    for width in (*reversed(widths[:-1]), outputs):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(wide, wide), *_block(wide, width)]
        wide = width
    layers[-1] = _Squash()
    return nn.Sequential(*layers)


def _block(wide_in: int, wide_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(wide_in, wide_out, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(wide_out, momentum=0.05), nn.ReLU(inplace=True)]
