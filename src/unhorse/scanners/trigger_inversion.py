"""Trigger inversion (Wang et al., IEEE S&P 2019): for each class the smallest mask and a pattern that turn
images into that class, all classes in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unhorse.core import Classifier, Images, Labels
from unhorse.models.training import autocast
from unhorse.scanners.optimisation import Adam, Precision, chunk_size, frozen, uses_bf16

EPSILON = 1e-7
CACHED = 1 << 24
"""Bytes of activations that a backward pass on a CPU may save: with more, every tensor is mapped anew."""

OnStep = Callable[[int, int], None]
"""Is told after each step how many are done and how many classes are still searched."""


class Settings(Protocol):
    """The fields of the search."""

    @property
    def norm(self) -> Literal["l1", "l2"]: ...
    @property
    def steps(self) -> int: ...
    @property
    def samples_per_step(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def success(self) -> float: ...
    @property
    def cost(self) -> float: ...
    @property
    def cost_from_start(self) -> bool: ...
    @property
    def start(self) -> Literal["uniform", "ones"]: ...
    @property
    def patience(self) -> int: ...
    @property
    def multiplier(self) -> float: ...
    @property
    def early_stop(self) -> bool: ...
    @property
    def early_stop_patience(self) -> int: ...
    @property
    def precision(self) -> Precision: ...


class Inversion(NamedTuple):
    """The best trigger of each of t classes: masks and patterns in [0, 1], the L1 norm of each mask, the
    success of its search (the share of images sent to the class; 0 where no step reached the wanted success,
    and then the trigger is the last one), and the steps that it took.
    """

    masks: Float[Tensor, "t 1 h w"]
    patterns: Float[Tensor, "t c h w"]
    norms: Float[Tensor, " t"]
    reached: Float[Tensor, " t"]
    steps: Int[Tensor, " t"]


def invert(
    model: Classifier,
    images: Images,
    settings: Settings,
    seed: int,
    *,
    targets: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Inversion:
    """Searches a trigger for each of `targets` (every class) on `images`, of which no labels are needed.

    Every class has its own cost, counters and early stop, and leaves the batch when it stops. What is drawn
    for a class does not depend on which others are searched. The model is left as found.
    """
    chosen = torch.arange(model.num_classes) if targets is None else torch.as_tensor(targets)
    with frozen(model, settings.precision):
        search = _Search(model, images, settings, chosen, seed)
        for step in range(settings.steps):
            search.step()
            if on_step is not None:
                on_step(step + 1, len(search.active))
            if not len(search.active):
                break
        return search.result()


class CostSchedule:
    """The price of the mask, one per class: 0 at first; `settings.cost` after `patience` steps of success in
    a row; then times `multiplier` after as many successes, divided by its 1.5th power after as many failures.

    A class stops once its price moved both ways and its best norm stood still for `early_stop_patience`
    steps.
    """

    def __init__(self, classes: int, settings: Settings) -> None:
        self.settings = settings
        first = settings.cost if settings.cost_from_start else 0.0
        self.cost = torch.full((classes,), first, dtype=torch.float64)
        self.best = torch.full((classes,), math.inf, dtype=torch.float64)
        counts = torch.zeros(classes, dtype=torch.int64)
        self.free_successes, self.successes, self.failures, self.still = (counts.clone() for _ in range(4))
        self.rose, self.fell = (torch.zeros(classes, dtype=torch.bool) for _ in range(2))

    def update(self, success: Tensor, norm: Tensor) -> tuple[Bool[Tensor, " t"], Bool[Tensor, " t"]]:
        """Takes the mean success and norm of a step, says which classes improved and which are done."""
        settings, reached = self.settings, success >= self.settings.success
        improved = reached & (norm < self.best)
        self.best = torch.where(improved, norm, self.best)
        self.still = torch.where(improved, 0, self.still + self.best.isfinite())
        done = self.rose & self.fell & (self.still >= settings.early_stop_patience) & settings.early_stop

        self.free_successes = torch.where(reached & (self.cost == 0), self.free_successes + 1, 0)
        begins = self.free_successes >= settings.patience
        self.cost = torch.where(begins, settings.cost, self.cost)
        self.rose, self.fell = self.rose & ~begins, self.fell & ~begins
        self.successes = torch.where(reached, torch.where(begins, 0, self.successes) + 1, 0)
        self.failures = torch.where(reached, 0, self.failures + 1)

        rises, falls = self.successes >= settings.patience, self.failures >= settings.patience
        self.cost = torch.where(rises, self.cost * settings.multiplier, self.cost)
        self.cost = torch.where(falls, self.cost / settings.multiplier**1.5, self.cost)
        self.rose, self.fell = self.rose | rises, self.fell | falls
        self.successes = torch.where(rises, 0, self.successes)
        self.failures = torch.where(falls, 0, self.failures)
        return improved, done

    def keep(self, rows: Tensor) -> None:
        """Forgets all classes but `rows`."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


class _Search:
    """The state of an inversion; `active` are the rows of the result that are still searched."""

    def __init__(
        self, model: Classifier, images: Images, settings: Settings, targets: Labels, seed: int
    ) -> None:
        device = model.mean.device
        self.model, self.settings = model, settings
        self.low_precision = uses_bf16(model, settings.precision)
        self.layout = torch.channels_last if self.low_precision else torch.contiguous_format
        self.images = ((images.to(device) - model.mean) / model.std).contiguous(memory_format=self.layout)
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.rand(
            model.num_classes, 1 + len(images[0]), *images.shape[2:], generator=rng, dtype=torch.float64
        )
        start = torch.atanh((drawn - 0.5) * (2 - EPSILON)) if settings.start == "uniform" else drawn * 0 + 1
        self.variables = start[targets].float().to(device)  # (t, 1 + c, h, w): mask and pattern in tanh space
        self.optimizer = Adam([self.variables], settings.learning_rate, betas=(0.5, 0.9))
        self.schedule = CostSchedule(len(targets), settings)
        self.targets, self.active = targets.to(device), torch.arange(len(targets))
        self.batches = _endless(len(images), settings.batch_size, rng)
        self.count = _batches_per_step(len(images), settings)
        self.best = self.variables.clone()
        self.reached = torch.zeros(len(targets), dtype=torch.float64)
        self.taken = torch.zeros(len(targets), dtype=torch.int64)
        self.chunk = max(1, chunk_size(model, self._budget()) // settings.batch_size)  # classes a pass

    def _budget(self) -> int:
        if self.variables.device.type == "cuda":
            return torch.cuda.mem_get_info(self.variables.device)[0] // 4
        return 2 * CACHED if self.low_precision else CACHED

    def step(self) -> None:
        """A pass over `samples_per_step` images, then one look at how each class did."""
        device = self.variables.device
        cost = self.schedule.cost.float().to(device)[:, None, None, None]
        hits, norms = torch.zeros(2, len(self.active), device=device)
        for _ in range(self.count):
            batch = self.images[next(self.batches).to(device)]
            soft = squashed(self.variables)
            mask = soft[:, :1]
            gradient = torch.empty_like(soft)
            for part in torch.arange(len(soft)).split(self.chunk):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                gradient[rows], found = self._gradient(batch, soft[rows], self.targets[rows])
                hits[rows] += found
            norm, slope = self._norm(mask)
            norms += norm
            gradient[:, :1] += cost * slope
            gradient *= 1 - (2 * soft - 1).square()
            self.optimizer.step([gradient])
        seen = self.count * self.settings.batch_size
        self._look(hits.cpu().double() / seen, norms.cpu().double() / self.count)

    def _gradient(self, batch: Images, soft: Tensor, targets: Labels) -> tuple[Tensor, Tensor]:
        """The gradient of the mean cross-entropy by mask and pattern (t, 1 + c, h, w), and the hits (t,).

        The stamp is linear in each, so its part of the chain rule is two sums over the images.
        """
        std, mean = self.model.std[0], self.model.mean[0]
        mask, pattern = soft[:, :1], (soft[:, 1:] - mean) / std
        stamped = torch.lerp(batch, pattern[:, None], mask[:, None])  # (t, n, c, h, w), normalised
        stamped = stamped.flatten(0, 1).contiguous(memory_format=self.layout).requires_grad_(True)
        with autocast(stamped.device, self.low_precision):
            logits = self.model.network(stamped)
        wanted = targets.repeat_interleave(len(batch))
        with torch.no_grad():
            slope = logits.float().softmax(1)
            hits = slope.argmax(1) == wanted
            slope[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            slope /= len(batch)
        (gradient,) = torch.autograd.grad(logits, stamped, slope.to(logits.dtype))
        gradient = gradient.unflatten(0, (len(soft), len(batch))).float()
        total, product = gradient.sum(1), (gradient * batch).sum(1)
        by_mask = (pattern * total - product).sum(1, keepdim=True)
        return torch.cat([by_mask, mask * total / std], 1), hits.unflatten(0, (len(soft), -1)).sum(1)

    def _norm(self, mask: Tensor) -> tuple[Tensor, Tensor | float]:
        """The norm of each mask (t,) and its gradient."""
        if self.settings.norm == "l1":
            return mask.sum((1, 2, 3)), 1.0
        norm = mask.square().sum((1, 2, 3)).sqrt()
        return norm, mask / norm[:, None, None, None]

    def _look(self, success: Tensor, norms: Tensor) -> None:
        """Keeps what improved, prices the masks anew and lets classes that are done leave."""
        self.taken[self.active] += 1
        improved, done = self.schedule.update(success, norms)
        kept = self.active[improved]
        self.reached[kept] = success[improved]
        never = self.reached[self.active] == 0
        stored = improved | never  # the last trigger stands in until one is good enough
        device = self.variables.device
        self.best[self.active[stored].to(device)] = self.variables[stored.to(device)]
        if done.any():
            self._leave(~done)

    def _leave(self, staying: Tensor) -> None:
        self.active = self.active[staying]
        self.schedule.keep(staying)
        rows = staying.to(self.variables.device)
        self.targets, self.variables = self.targets[rows], self.variables[rows]
        optimizer = self.optimizer
        optimizer.leaves = [self.variables]
        optimizer.first, optimizer.second = [optimizer.first[0][rows]], [optimizer.second[0][rows]]

    def result(self) -> Inversion:
        soft = squashed(self.best).clamp(0, 1)
        masks, patterns = soft[:, :1], soft[:, 1:]
        return Inversion(masks, patterns, masks.sum((1, 2, 3)).cpu(), self.reached.float(), self.taken)


def squashed(variables: Tensor) -> Tensor:
    """From tanh space to [0, 1]."""
    return torch.tanh(variables) / (2 - EPSILON) + 0.5


def _batches_per_step(count: int, settings: Settings) -> int:
    if settings.samples_per_step is None:
        return math.ceil(count / settings.batch_size)
    return max(1, settings.samples_per_step // settings.batch_size)


def _endless(count: int, size: int, rng: torch.Generator) -> Iterator[Labels]:
    """Full batches of indices from one reshuffled pass after another."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=rng)])
        yield left[:size]
        left = left[size:]
