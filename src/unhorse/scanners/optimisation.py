"""Activation optimisation: images that drive a classifier's logits, a batch of them in one backward pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.optim.adam import adam

from unhorse.core import Classifier, Images, Logits
from unhorse.models.training import autocast, bf16_pays

Precision = Literal["auto", "fp32", "bf16"]
START_SEED = 928462
MEMORY_BUDGET = (
    1 << 30
)  # bytes of saved activations per chunk: a 1000-class 224x224 model then stays under 4 GiB


@dataclass(frozen=True)
class Preset:
    """How maps are optimised. `space` is where learning rate, clamp and weight decay act: the network's input
    (the published presets: ULP's networks take 0..255) or pixels in [0, 1] (ours). `gradient_normalization`
    divides by the L2 norm per image and channel; `standardise` brings each finished map to mean 0.5 and
    standard deviation 0.25.
    """

    name: str
    optimizer: Literal["adam", "sgd"]
    learning_rate: float
    steps: int
    space: Literal["network", "pixels"] = "network"
    weight_decay: float = 1e-5
    gradient_normalization: bool = False
    total_variation: float = 0.0
    blur_every: int = 0
    blur_sigma: float = 1.0
    clamp: bool = False
    standardise: bool = False

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("paper-cifar10", "adam", 10, 30, gradient_normalization=True, standardise=True),
        Preset("paper-tiny-imagenet", "sgd", 10, 150, blur_every=4, clamp=True),
        Preset("icpr2024", "adam", 0.1, 200, total_variation=1e-3),
        Preset("pixels", "adam", 0.1, 60, space="pixels", clamp=True),
    )
}


class Optimised(NamedTuple):
    """Maps (m, c, h, w) in the optimisation space, best so far, and the objective that each reached (m,), in
    fp32.
    """

    maps: Tensor
    objective: Tensor


Objective = Callable[[Logits, slice], Float[Tensor, " m"]]
"""What is minimised, one number per map; the slice says which maps of the whole job the logits belong to."""


def start_image(model: Classifier) -> Images:
    """The one image (1, c, h, w) that every map of every model starts from: U{0..255}, fixed seed."""
    rng = torch.Generator().manual_seed(START_SEED)
    levels = torch.randint(256, (1, *model.image_shape), generator=rng)
    return (levels.float() / 255).to(model.mean.device)


def optimise(
    model: Classifier,
    objective: Objective,
    start: Images,
    preset: Preset,
    *,
    precision: Precision = "auto",
    watch: Callable[[Tensor, Logits], None] | None = None,
) -> Optimised:
    """Minimises `objective` from `start` (n, c, h, w) in one batch; call it inside `frozen(model)`.

    The best map so far is kept per map, the one after the last step included. bf16 autocast and channels_last
    where they pay; the objective that is returned is computed once more in fp32.
    """
    low_precision = uses_bf16(model, precision)
    maps = start.clone() if preset.space == "pixels" else (start - model.mean) / model.std
    forward = model if preset.space == "pixels" else model.network
    if low_precision:
        maps = maps.contiguous(memory_format=torch.channels_last)
    low, high = _bounds(model, preset)
    maps.requires_grad_(True)
    method = Adam if preset.optimizer == "adam" else Descent
    optimizer = method([maps], preset.learning_rate, weight_decay=preset.weight_decay)
    best, lowest = maps.detach().clone(), torch.full((len(maps),), torch.inf, device=maps.device)
    everything = slice(None)
    for step in range(preset.steps + 1):
        with torch.no_grad():
            if preset.blur_every and step % preset.blur_every == 0:
                maps.copy_(_blurred(maps, preset.blur_sigma))
        with autocast(maps.device, low_precision):
            logits = forward(maps)
        logits = logits.float()
        if watch is not None:
            watch(maps.detach(), logits.detach())
        loss = objective(logits, everything) + _variation(maps, preset.total_variation)
        with torch.no_grad():
            better = loss.detach() < lowest
            lowest = torch.where(better, loss.detach(), lowest)
            torch.where(better[:, None, None, None], maps, best, out=best)
        if step == preset.steps:
            break
        (gradient,) = torch.autograd.grad(loss.sum(), maps)
        optimizer.step([_normalised(gradient) if preset.gradient_normalization else gradient])
        if preset.clamp:
            with torch.no_grad():
                maps.clamp_(low, high)
    with torch.no_grad():
        reached = objective(forward(best).float(), everything)
    return Optimised(best, reached)


class Adam:
    """Adam (Kingma and Ba, 2015) on plain tensors, in place, by torch's own functional form.

    torch.optim.Adam computes the same, but its constructor imports the compiler: a second in every process.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        learning_rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.leaves, self.learning_rate = list(leaves), learning_rate
        self.betas, self.weight_decay = betas, weight_decay
        self.first = [torch.zeros_like(leaf) for leaf in leaves]
        self.second = [torch.zeros_like(leaf) for leaf in leaves]
        self.steps = [torch.zeros(()) for _ in leaves]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step down `gradients`, one per leaf."""
        adam(
            self.leaves,
            list(gradients),
            self.first,
            self.second,
            [],
            self.steps,
            foreach=False,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )


class Descent:
    """Plain gradient descent, with Adam's interface."""

    def __init__(self, leaves: Sequence[Tensor], learning_rate: float, *, weight_decay: float = 0.0) -> None:
        self.leaves, self.learning_rate, self.weight_decay = list(leaves), learning_rate, weight_decay

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step down `gradients`, one per leaf."""
        for leaf, gradient in zip(self.leaves, gradients, strict=True):
            leaf.sub_(self.learning_rate * (gradient + self.weight_decay * leaf))


def _bounds(model: Classifier, preset: Preset) -> tuple[Tensor, Tensor]:
    black, white = torch.zeros_like(model.mean), torch.ones_like(model.mean)
    if preset.space == "pixels":
        return black, white
    return (black - model.mean) / model.std, (white - model.mean) / model.std


def to_pixels(model: Classifier, maps: Tensor, preset: Preset) -> Images:
    """Maps of the preset's space as pixels, not yet clipped to [0, 1]."""
    return maps if preset.space == "pixels" else maps * model.std + model.mean


def _normalised(gradient: Tensor) -> Tensor:
    return gradient / (gradient.flatten(2).norm(dim=2)[:, :, None, None] + 1e-8)


def _variation(maps: Tensor, weight: float) -> Tensor | float:
    if not weight:
        return 0.0
    down = (maps[:, :, 1:] - maps[:, :, :-1]).abs().flatten(1).sum(1)
    across = (maps[:, :, :, 1:] - maps[:, :, :, :-1]).abs().flatten(1).sum(1)
    return weight * (down + across)


def _blurred(maps: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-2, 3, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    channels = maps.shape[1]
    across, down = (
        kernel.view(1, 1, 1, 5).expand(channels, 1, 1, 5),
        kernel.view(1, 1, 5, 1).expand(channels, 1, 5, 1),
    )
    padded = functional.pad(maps, (2, 2, 2, 2), mode="reflect")
    return functional.conv2d(functional.conv2d(padded, across, groups=channels), down, groups=channels)


# --- running a model for its input gradients ----------------------------------------------------------------


@contextmanager
def frozen(model: Classifier, precision: Precision = "auto") -> Iterator[None]:
    """The model in eval mode with frozen weights (a third less work); both are as found afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layout = uses_bf16(model, precision)
    try:
        model.eval().requires_grad_(False)
        if layout:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.enable_grad():
            yield
    finally:
        if layout:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for module, mode in training.items():
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


def uses_bf16(model: Classifier, precision: Precision = "auto") -> bool:
    """Whether bf16 autocast and channels_last are used; "auto": where they pay."""
    if precision == "auto":
        return bf16_pays(model, model.mean.device)
    return precision == "bf16"


def chunk_size(model: Classifier, budget: int = MEMORY_BUDGET) -> int:
    """How many images one backward pass may hold, from the bytes that one image's forward pass saves."""
    seen: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        """Detached: a graph that holds its own output is never freed."""
        return seen.setdefault(tensor.data_ptr(), tensor.detach())

    weights = {parameter.data_ptr() for parameter in model.parameters()}
    probe = start_image(model).requires_grad_(True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(probe)
    saved = [tensor for pointer, tensor in seen.items() if pointer not in weights]
    per_image = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    return max(1, budget // max(1, per_image))
