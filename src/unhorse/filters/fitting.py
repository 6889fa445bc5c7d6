"""How filters are fitted: the classifier frozen, clean images only, stopped on clean images, resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unhorse.core import Classifier, Dataset, Images, Labels
from unhorse.filters.networks import FilterNetwork, build_filter
from unhorse.models.training import Augmentation, bf16_pays
from unhorse.rates import predictions

MINIMUM_IMAGES = 20
FINAL_LEARNING_RATE = 1e-5
BATCH = 512
Precision = Literal["auto", "fp32", "bf16"]
Terms = dict[str, Tensor]
"""The loss and its unweighted terms, each a mean over the batch."""


class FilterEpoch(NamedTuple):
    """Mean terms over one epoch of `epochs`; `held_out` is the clean objective on images not fitted on."""

    epoch: int
    epochs: int
    loss: float
    terms: Mapping[str, float]
    held_out: float | None = None
    stage: str = ""


OnEpoch = Callable[[FilterEpoch], None]


class Settings(Protocol):
    """The fields that every filter has."""

    network: str
    epochs: int
    batch_size: int
    learning_rate: float
    crop: int
    flip: bool
    rotation: float
    precision: Precision
    held_out: float
    patience: int
    warm_up: float
    seed: int


class Game(Protocol):
    """What the loop plays: networks that step together. `objective` is the loss on clean images alone.

    `label_share` is 0 while the loop warms up and 1 from then on: what a new network draws is so far from an
    image that the classifier's gradient there would lead it away from images for good.
    """

    label_share: float
    device: torch.device
    networks: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]

    def step(self, images: Images, labels: Labels, rng: torch.Generator) -> Terms: ...

    def objective(self, images: Images, labels: Labels) -> Tensor: ...


def usable(model: Classifier, clean: Dataset, settings: Settings) -> Dataset:
    """`clean`, labelled by the model where it has no labels; ValueError for what cannot be fitted on."""
    if clean.images.dtype != torch.uint8:
        raise ValueError(f"the clean images are {clean.images.dtype}: give uint8 pixels from 0 to 255")
    if clean.image_shape != tuple(model.image_shape):
        raise ValueError(
            f"the clean images are {clean.image_shape}, the model takes {tuple(model.image_shape)} "
            "(channels, height, width): resize or convert them"
        )
    if len(clean) < MINIMUM_IMAGES:
        raise ValueError(f"{len(clean)} clean images: give at least {MINIMUM_IMAGES}, better some hundreds")
    if settings.epochs < 1 or settings.batch_size < 2 or not 0 <= settings.held_out < 1:
        raise ValueError("give at least 1 epoch, a batch_size of 2 or more and a held_out below 1")
    if not 0 <= settings.warm_up <= 0.5:
        raise ValueError(f"warm_up is {settings.warm_up}: give a share of the fit from 0 to 0.5")
    if settings.precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {settings.precision!r}: take auto, fp32 or bf16")
    if clean.labels is None:
        return replace(clean, labels=predictions(model, clean.images))
    if len(clean.class_names) not in (0, model.num_classes):
        raise ValueError(
            f"the clean images have {len(clean.class_names)} classes, the model {model.num_classes}: "
            "give images of the model's classes, or none of the labels"
        )
    if not 0 <= int(clean.labels.min()) <= int(clean.labels.max()) < model.num_classes:
        raise ValueError(
            f"labels must be from 0 to {model.num_classes - 1}, the model's classes: correct them"
        )
    return clean


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, no parameter asking for a gradient; both as found afterwards."""
    training = {module: module.training for module in model.modules()}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights draw from `seed`; the caller's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def new_network(size: str, model: Classifier, seed: int) -> FilterNetwork:
    """A filter network for the model's images, on its device; `seed` alone decides its weights."""
    with seeded(seed):
        return build_filter(size, model.image_shape).to(model.mean.device)


def new_optimizer(
    network: nn.Module, settings: Settings, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), settings.learning_rate, betas=betas, fused=True)


def trains_in_bf16(network: nn.Module, model: Classifier, precision: Precision) -> bool:
    if precision == "auto":
        return bf16_pays(nn.ModuleList([network, model]), model.mean.device)
    return precision == "bf16"


def settled(network: FilterNetwork) -> FilterNetwork:
    """The fitted network as it is kept: eval mode, no gradients for its weights, laid out as when loaded."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def purify(network: FilterNetwork, images: Images) -> Images:
    """The filtered images, in eval mode and full precision, on the device of `images`."""
    network.to(images.device).eval()
    return torch.cat([network(part) for part in images.split(BATCH)])


def play(
    game: Game,
    clean: Dataset,
    settings: Settings,
    *,
    stage: str = "",
    checkpoint: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[FilterEpoch]:
    """Steps the game for `epochs`, or until the clean objective of the held-out part has stalled.

    The last epoch's weights are kept: nothing is chosen. With a `checkpoint` path a fit that was killed goes
    on after its last whole epoch; the file stays until the caller deletes it.
    """
    assert clean.labels is not None
    device = game.device
    held = round(settings.held_out * len(clean))
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(settings.seed))
    fitting, aside = clean[order[held:]], clean[order[:held]]
    images, labels = fitting.images.to(device), clean.labels[order[held:]].to(device)
    augmentation = Augmentation(settings.crop, settings.rotation, settings.flip)
    # of even sizes, and of two images at least: batch normalisation cannot train on one
    batches = max(1, min(math.ceil(len(fitting) / settings.batch_size), len(fitting) // 2))
    written_for = f"{settings} on {len(clean)} images"
    log = _restore(game, written_for, checkpoint)
    warm = math.ceil(2 * settings.warm_up * settings.epochs)
    while len(log) < settings.epochs and not stalled(log[warm:], settings.patience):
        epoch = len(log)
        # by epoch: a resumed fit draws what an undisturbed one draws
        rng = torch.Generator().manual_seed(settings.seed * 1009 + epoch)
        noise = torch.Generator(device).manual_seed(settings.seed * 1009 + epoch)
        sums: Terms = {}
        shuffled = torch.randperm(len(fitting), generator=rng).to(device)
        for index, batch in enumerate(shuffled.tensor_split(batches)):
            done = (epoch + index / batches) / settings.epochs
            _set_learning_rate(game.optimizers, settings, done)
            game.label_share = label_share(done, settings.warm_up)
            augmented = augmentation(images[batch].float() / 255, rng)
            for name, value in game.step(augmented, labels[batch], noise).items():
                sums[name] = sums.get(name, 0) + value * (len(batch) / len(fitting))
        means = {name: float(value) for name, value in sums.items()}
        objective = _objective(game, aside) if held else None
        log.append(FilterEpoch(epoch, settings.epochs, means.pop("loss"), means, objective, stage))
        if on_epoch is not None:
            on_epoch(log[-1])
        if checkpoint is not None:
            _store(game, written_for, checkpoint, log)
    return log


def label_share(done: float, warm_up: float) -> float:
    """0 for the first `warm_up` of a fit, then rising to 1 as long again."""
    return 1.0 if not warm_up else min(1.0, max(0.0, done / warm_up - 1))


def stalled(log: list[FilterEpoch], patience: int) -> bool:
    """Whether the held-out objective has not been lower for `patience` epochs."""
    objectives = [entry.held_out for entry in log if entry.held_out is not None]
    return bool(objectives) and len(objectives) - 1 - objectives.index(min(objectives)) >= patience


def _objective(game: Game, aside: Dataset) -> float:
    modes = {name: network.training for name, network in game.networks.items()}
    for network in game.networks.values():
        network.eval()
    with torch.no_grad():
        parts = [
            game.objective(images, labels) * len(labels)
            for images, labels in aside.batches(BATCH, game.device)
        ]
    for name, network in game.networks.items():
        network.train(modes[name])
    return float(torch.stack(parts).sum()) / len(aside)


def _set_learning_rate(optimizers: list[torch.optim.Optimizer], settings: Settings, done: float) -> None:
    floor = min(FINAL_LEARNING_RATE, settings.learning_rate)
    rate = floor + (settings.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * done))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _store(game: Game, written_for: str, path: Path, log: list[FilterEpoch]) -> None:
    state = {
        "written_for": written_for,
        "networks": {name: network.state_dict() for name, network in game.networks.items()},
        "optimizers": [optimizer.state_dict() for optimizer in game.optimizers],
        "log": [tuple(entry) for entry in log],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    temporary.replace(path)


def _restore(game: Game, written_for: str, path: Path | None) -> list[FilterEpoch]:
    if path is None or not path.exists():
        return []
    state = torch.load(path, weights_only=True, map_location=game.device)
    if state["written_for"] != written_for:
        raise ValueError(f"{path} was written for {state['written_for']}: delete it, or fit as before")
    for name, network in game.networks.items():
        network.load_state_dict(state["networks"][name])
    for optimizer, saved in zip(game.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return [FilterEpoch(*entry) for entry in state["log"]]
