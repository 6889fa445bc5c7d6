"""The one training loop: victims, surrogates and co-trained attacks all pass through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Attack, Classifier, Dataset, Images


@dataclass(frozen=True)
class Augmentation:
    """Random crop after padding by `crop` pixels, rotation by up to `rotation` degrees, horizontal `flip`."""

    crop: int = 0
    rotation: float = 0.0
    flip: bool = False

    def __call__(self, images: Images, rng: torch.Generator) -> Images:
        """One draw per image, all images at once."""
        return self.apply(images, self.draw(len(images), rng))

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """What `apply` needs for `count` images: one entry per image in each tensor."""
        drawn = {}
        if self.crop:
            drawn["down"], drawn["across"] = torch.randint(2 * self.crop + 1, (2, count), generator=rng)
        if self.rotation:
            drawn["angles"] = (torch.rand(count, generator=rng) * 2 - 1) * math.radians(self.rotation)
        if self.flip:
            drawn["flipped"] = torch.rand(count, generator=rng) < 0.5
        return drawn

    def apply(self, images: Images, drawn: Mapping[str, Tensor]) -> Images:
        """The images, cropped, rotated and flipped as `drawn` says."""
        count, channels, height, width = images.shape
        device = images.device
        if self.crop:
            padded = functional.pad(images, (self.crop,) * 4)
            down, across = (drawn[name].to(device)[:, None] for name in ("down", "across"))
            rows = (down + torch.arange(height, device=device))[:, None, :, None]
            columns = (across + torch.arange(width, device=device))[:, None, None, :]
            each = torch.arange(count, device=device)[:, None, None, None]
            images = padded[each, torch.arange(channels, device=device)[None, :, None, None], rows, columns]
        if self.rotation:
            images = _rotated(images, drawn["angles"])
        if self.flip:
            images = torch.where(drawn["flipped"].to(device)[:, None, None, None], images.flip(3), images)
        return images


def _rotated(images: Images, angles: Tensor) -> Images:
    aspect = images.shape[3] / images.shape[2]  # the grid's units are half a width and half a height
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = [cosine, -sine / aspect, zero, sine * aspect, cosine, zero]
    matrix = torch.stack(rows, 1).view(-1, 2, 3).to(images)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the defaults suit small networks on small images.

    `schedule` is "one-cycle" (warm-up over the first fifth, cosine to zero), "steps" (x0.1 at each of
    `milestones`, given in epochs) or "constant"; "nesterov" is SGD with Nesterov's momentum. `precision`
    "auto" takes bf16 autocast and channels_last where they pay (bf16_pays).
    """

    epochs: int = 3
    batch_size: int = 128
    optimizer: Literal["adam", "sgd", "nesterov"] = "adam"
    learning_rate: float = 2e-3
    schedule: Literal["one-cycle", "steps", "constant"] = "one-cycle"
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 0.0
    augmentation: Augmentation = Augmentation()
    precision: Literal["auto", "fp32", "bf16"] = "auto"


Penalty = Callable[[Images], Tensor]


class EpochLog(NamedTuple):
    """Mean loss and accuracy over the batches of one epoch, as trained on (poisoned batches included)."""

    epoch: int
    loss: float
    accuracy: float


def train(
    model: Classifier,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    attack: Attack | None = None,
    penalty: Penalty | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> list[EpochLog]:
    """Trains `model` in place on its own device and leaves it in eval mode; same seed, same weights.

    An attack sees every batch through `poison`, before or after augmentation as it declares, and its own
    optimizers are zeroed and stepped with the model's, on the recipe's schedule too. What `penalty` makes of
    a batch, right after the model has seen it, is added to the loss. With a `checkpoint`
    path, a training that was killed goes on after its last whole epoch.
    """
    if data.labels is None or len(data) == 0:
        raise ValueError(f"data set {data.name!r} has no labelled images to train on")
    device = model.mean.device
    rng = torch.Generator().manual_seed(seed)
    if attack is not None:
        attack.prepare(model, data, rng)
    low_precision = bf16_pays(model, device) if recipe.precision == "auto" else recipe.precision == "bf16"
    model.to(memory_format=layout_of(model, device, low_precision))  # type: ignore[call-overload]
    steps = math.ceil(len(data) / recipe.batch_size)
    optimizer = optimizer_of(model.network, recipe)
    optimizers = [optimizer, *(attack.optimizers() if attack is not None else [])]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, learning_rate_factor(recipe, steps)) for each in optimizers
    ]
    state = _State(model, optimizer, schedules, attack, rng)
    log = state.restore(checkpoint) if checkpoint is not None else []
    images, labels = data.images.to(device), data.labels.to(device)
    model.train()
    with forked_randomness():
        for epoch in range(len(log), recipe.epochs):
            torch.manual_seed(
                seed * 1009 + epoch
            )  # by epoch: a resumed run draws the dropout of an undisturbed one
            order = torch.randperm(len(data), generator=rng).to(device)
            sums = torch.zeros(2, device=device)
            for batch in order.split(recipe.batch_size):
                sums += _step(
                    state, images[batch].float() / 255, labels[batch], recipe, low_precision, penalty
                )
            loss, correct = (sums / len(data)).tolist()
            log.append(EpochLog(epoch, loss, correct))
            if on_epoch is not None:
                on_epoch(log[-1])
            if checkpoint is not None:
                state.store(checkpoint, log)
    model.eval()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return log


def _step(  # noqa: PLR0913
    state: _State,
    images: Images,
    labels: Tensor,
    recipe: Recipe,
    low_precision: bool,
    penalty: Penalty | None,
) -> Tensor:
    """One optimizer step; returns (sum of losses, number correct)."""
    attack, extra = state.attack, torch.zeros((), device=images.device)
    if attack is None or not attack.poisons_before_augmentation:
        images = recipe.augmentation(images, state.rng)
    if attack is not None:
        images, labels, extra = attack.poison(images, labels, state.rng)
        if attack.poisons_before_augmentation:
            images = recipe.augmentation(images, state.rng)
    optimizers = [state.optimizer, *(attack.optimizers() if attack is not None else [])]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, low_precision):
        logits = state.model(images)
        if penalty is not None:
            extra = extra + penalty(images)
    loss = functional.cross_entropy(logits, labels)
    (loss + extra).backward()
    for optimizer in optimizers:
        optimizer.step()
    for schedule in state.schedules:
        schedule.step()
    with torch.no_grad():
        return torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum().float()])


@dataclass
class _State:
    """All that a resumed training needs."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    schedules: list[torch.optim.lr_scheduler.LambdaLR]
    attack: Attack | None
    rng: torch.Generator

    def store(self, path: Path, log: list[EpochLog]) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "attack": {} if self.attack is None else dict(self.attack.state_dict()),
            "attack_optimizers": []
            if self.attack is None
            else [o.state_dict() for o in self.attack.optimizers()],
            "rng": self.rng.get_state(),
            "log": [tuple(entry) for entry in log],
        }
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(path)

    def restore(self, path: Path) -> list[EpochLog]:
        if not path.exists():
            return []
        state = torch.load(path, weights_only=True, map_location=self.model.mean.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        if self.attack is not None:
            self.attack.load_state_dict(state["attack"])
            for optimizer, saved in zip(self.attack.optimizers(), state["attack_optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.rng.set_state(state["rng"].cpu())
        return [EpochLog(*entry) for entry in state["log"]]


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """bf16 autocast on `device`, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


def bf16_pays(model: nn.Module, device: torch.device) -> bool:
    """Whether bf16 autocast and channels_last are faster than fp32: where the device has bf16 products, and
    the network more than 50,000 weights (measured: MNIST's small CNN of 105,000 trains 1.8 times as fast, the
    digits' of 14,000 no faster).
    """
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return _is_large(model)


def layout_of(model: nn.Module, device: torch.device, low_precision: bool) -> torch.memory_format:
    """channels_last for bf16, and on a CPU for fp32 where the network is large (measured: WaNet's MNIST CNN
    trains 1.35 times as fast).
    """
    pays = low_precision or (device.type == "cpu" and _is_large(model))
    return torch.channels_last if pays else torch.contiguous_format


def _is_large(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) > 50_000


def optimizer_of(network: nn.Module, recipe: Recipe, *, fused: bool | None = None) -> torch.optim.Optimizer:
    """The recipe's optimizer of the weights that learn."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            parameters, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        parameters,
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.optimizer == "nesterov",
        fused=fused,
    )


def learning_rate_factor(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of step s as a factor of the recipe's."""
    total, warm = recipe.epochs * steps_per_epoch, max(1, recipe.epochs * steps_per_epoch // 5)
    if recipe.schedule == "constant":
        return lambda step: 1.0
    if recipe.schedule == "steps":
        return lambda step: 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)

    def one_cycle(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

    return one_cycle


@contextmanager
def forked_randomness() -> Iterator[None]:
    """Gives the caller's global random state back afterwards: dropout draws from that generator only."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
