"""Demonstration: a footprint that turns other classes' images into the suspected class, tested on images it
never saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Exhibit, ImageGrid, Images, Labels, ReconstructedTrigger
from unhorse.models.training import autocast
from unhorse.scanners.optimisation import Adam, Precision, uses_bf16

Family = Literal["patch", "blend"]


class Footprints(NamedTuple):
    """One footprint per target class: masks (t, 1, h, w), patterns (t, c, h, w), flip rates (t,)."""

    family: Family
    masks: Float[Tensor, "t 1 h w"]
    patterns: Float[Tensor, "t c h w"]
    flip_rates: Float[Tensor, " t"]

    def trigger(self, index: int) -> ReconstructedTrigger:
        rate = float(self.flip_rates[index])
        return ReconstructedTrigger(self.masks[index].cpu(), self.patterns[index].cpu(), rate)


class Inputs(NamedTuple):
    """Images (n, c, h, w) and the class that the model gives each."""

    images: Images
    labels: Labels


@dataclass(frozen=True)
class FootprintSearch:
    """Searches, per target class, one mask and pattern that send images of all other classes there.

    A "patch" covers at most `area` of the pixels (four at least), opaquely; a "blend" covers all of them with
    `opacity`. A patch is searched as in Neural Cleanse (Wang et al., S&P 2019): for `steps` steps a soft mask
    with an L1 `price` and its pattern; then the highest pixels become the mask and the pattern alone goes on
    for `refine` steps. It counts as demonstrated when it flips at least `flip_rate` of unseen images and
    `lead` more than those of `rivals` other classes and ten random footprints. At most `inputs` images are
    used, half of them to search: with 1000 classes there is a map of each.
    """

    area: float = 0.05
    opacity: float = 0.2
    steps: int = 14
    refine: int = 6
    learning_rate: float = 0.5
    price: float = 1.0
    rivals: int = 3
    random: int = 10
    inputs: int = 128
    flip_rate: float = 0.7
    lead: float = 0.25

    @property
    def passes(self) -> int:
        """Forward and backward passes per image and class, for estimates of time: two families, then the
        rivals.
        """
        return (self.steps + self.refine) * (2 + self.rivals) // 10

    def search(
        self,
        model: Classifier,
        inputs: Inputs,
        targets: Int[Tensor, " t"],
        family: Family,
        precision: Precision,
    ) -> Footprints:
        """Footprints for `targets`, found on `inputs`; `tested` measures their flip rates."""
        images = inputs.images
        shape = (len(targets), *images.shape[1:])
        colours = torch.zeros(shape, device=images.device)
        descent = _Descent(model, inputs, targets, self.learning_rate, precision)
        if family == "blend":
            masks = torch.full_like(colours[:, :1], self.opacity)
            colours = descent.colours(colours, masks, self.steps + self.refine)
        else:
            weights, colours = descent.masks_and_colours(colours, self.steps, self.price)
            most = max(4, int(self.area * shape[2] * shape[3]))
            masks = _densest(weights, most)
            colours = descent.colours(colours, masks, self.refine)
        return Footprints(family, masks, torch.sigmoid(colours), torch.zeros(len(targets)))


class _Descent(NamedTuple):
    """Adam on masks and patterns under the mean cross-entropy to each target over other classes' images."""

    model: Classifier
    inputs: Inputs
    targets: Int[Tensor, " t"]
    learning_rate: float
    precision: Precision

    def masks_and_colours(self, colours: Tensor, steps: int, price: float) -> tuple[Tensor, Tensor]:
        """Soft masks (t, 1, h, w) in (0, 1) and unbounded colours, moved together."""
        weights = torch.full_like(colours[:, :1], -1.0).requires_grad_(True)
        colours = colours.clone().requires_grad_(True)
        optimizer = Adam([weights, colours], self.learning_rate, betas=(0.5, 0.9))
        for _ in range(steps):
            masks = torch.sigmoid(weights)
            loss = self._loss(masks, torch.sigmoid(colours)) + price * masks.mean((1, 2, 3)).sum()
            optimizer.step(torch.autograd.grad(loss, (weights, colours)))
        return torch.sigmoid(weights.detach()), colours.detach()

    def colours(self, colours: Tensor, masks: Tensor, steps: int) -> Tensor:
        """Unbounded colours under fixed masks."""
        colours = colours.clone().requires_grad_(True)
        optimizer = Adam([colours], self.learning_rate, betas=(0.5, 0.9))
        for _ in range(steps):
            optimizer.step(torch.autograd.grad(self._loss(masks, torch.sigmoid(colours)), [colours]))
        return colours.detach()

    def _loss(self, masks: Tensor, patterns: Tensor) -> Tensor:
        images, labels = self.inputs
        with autocast(images.device, uses_bf16(self.model, self.precision)):
            logits = self.model(_stamped(images, masks, patterns))
        wanted = self.targets.repeat_interleave(len(images))
        losses = functional.cross_entropy(logits.float(), wanted, reduction="none").view(
            len(self.targets), -1
        )
        others = _others(labels, self.targets).float()
        return (losses * others / others.sum(1, keepdim=True).clamp(min=1)).sum()


def _stamped(images: Images, masks: Tensor, patterns: Tensor) -> Images:
    """Every image under every footprint."""
    return (images + masks[:, None] * (patterns[:, None] - images)).flatten(0, 1)  # (t*n, c, h, w)


def _others(labels: Labels, targets: Int[Tensor, " t"]) -> Bool[Tensor, "t n"]:
    return labels != targets[:, None]  # a class is no victim of its own trigger


def _densest(weights: Tensor, count: int) -> Tensor:
    """0/1 masks of the `count` highest pixels of each."""
    flat = weights.flatten(1)
    return torch.zeros_like(flat).scatter_(1, flat.topk(count, 1).indices, 1.0).view_as(weights)


@torch.no_grad()
def tested(
    model: Classifier,
    found: Footprints,
    inputs: Inputs,
    targets: Int[Tensor, " t"],
    precision: Precision = "auto",
) -> Footprints:
    """The footprints with their flip rates on `inputs`: which share of other classes' images they convert."""
    with autocast(inputs.images.device, uses_bf16(model, precision)):
        answers = model(_stamped(inputs.images, found.masks, found.patterns)).argmax(1).view(len(targets), -1)
    others = _others(inputs.labels, targets)
    rates = ((answers == targets[:, None]) & others).sum(1) / others.sum(1).clamp(min=1)
    return found._replace(flip_rates=rates.cpu())


# --- the suspect beside its rivals --------------------------------------------------------------------------


@dataclass(frozen=True)
class Demonstration:
    """The suspect's best footprint and what it was compared with; flip rates are on inputs that no search
    saw.
    """

    target: int
    family: Family
    trigger: ReconstructedTrigger
    rivals: tuple[tuple[int, float], ...]
    random: tuple[float, ...]
    demonstrated: bool
    examples: tuple[Images, Images]

    def facts(self) -> dict[str, object]:
        """For tables and JSON."""
        return {
            "footprint": self.family,
            "footprint share of pixels": float((self.trigger.mask > 0).float().mean()),
            "flip rate": self.trigger.flip_rate,
            "flip rate of other classes' footprints": max((rate for _, rate in self.rivals), default=None),
            "flip rate of random footprints": max(self.random, default=None),
        }

    def rows(self, names: Sequence[str]) -> tuple[tuple[object, ...], ...]:
        """One row per footprint that was tried."""
        first = (f"class {names[self.target]} (suspect)", f"{self.trigger.flip_rate:.0%}")
        others = [(f"class {names[index]}", f"{rate:.0%}") for index, rate in self.rivals]
        last = [(f"{len(self.random)} random ones, best", f"{max(self.random):.0%}")] if self.random else []
        return (first, *others, *last)

    def exhibits(self) -> Iterator[Exhibit]:
        """Inputs before and after the stamp."""
        n = len(self.examples[0])
        if not self.demonstrated or n == 0:
            return
        note = f"Inputs that the search did not see; the stamp turns {self.trigger.flip_rate:.0%} of them."
        captions, marked = ("before",) * n + ("stamped",) * n, tuple(range(n, 2 * n))
        yield ImageGrid(
            "The demonstrated trigger at work", torch.cat(self.examples), captions, marked, n, note
        )


def demonstrate(
    model: Classifier,
    inputs: Inputs,
    reached: Float[Tensor, " k"],
    search: FootprintSearch,
    rng: torch.Generator,
    precision: Precision = "auto",
) -> Demonstration:
    """Searches a footprint for the class with the largest margin on half of `inputs`, tests it on the other
    half, and compares.

    Rivals are the classes with the next largest margins. They and the random footprints are only searched
    when the suspect's own footprint flips enough. Call it inside `frozen(model)`.
    """
    order = torch.randperm(len(inputs.images), generator=rng)[: search.inputs].to(inputs.images.device)
    seen, unseen = (Inputs(inputs.images[half], inputs.labels[half]) for half in order.chunk(2))
    ranking = reached.argsort(descending=True).to(inputs.labels.device)
    suspect = ranking[:1]
    families: tuple[Family, ...] = ("patch", "blend")
    tries = [
        tested(model, search.search(model, seen, suspect, family, precision), unseen, suspect, precision)
        for family in families
    ]
    best = max(tries, key=lambda found: float(found.flip_rates[0]))
    if best.family == "patch":
        best = tested(model, _smallest(model, best, seen, suspect, precision), unseen, suspect, precision)
    rate = float(best.flip_rates[0])
    rivals: tuple[tuple[int, float], ...] = ()
    random: tuple[float, ...] = ()
    if rate >= search.flip_rate:
        others = ranking[1 : 1 + search.rivals]
        found = tested(
            model, search.search(model, seen, others, best.family, precision), unseen, others, precision
        )
        rivals = tuple(zip(others.tolist(), found.flip_rates.tolist(), strict=True))
        drawn = _random_footprints(best, search.random, rng)
        random = tuple(
            tested(model, drawn, unseen, suspect.expand(search.random), precision).flip_rates.tolist()
        )
    average = sum(random) / max(1, len(random))
    compared = max([average, *(rate for _, rate in rivals)])
    shown = unseen.images[unseen.labels != suspect][:8]
    stamped = _stamped(shown, best.masks, best.patterns)
    return Demonstration(
        int(suspect),
        best.family,
        best.trigger(0),
        rivals,
        random,
        rate >= search.flip_rate and rate - compared >= search.lead,
        (shown.cpu(), stamped.cpu()),
    )


def _smallest(
    model: Classifier, found: Footprints, inputs: Inputs, target: Tensor, precision: Precision
) -> Footprints:
    """The same patch with the fewest pixels that keep 95 % of its flips on `inputs`; those that differ most
    from them stay.
    """
    change = found.masks * (found.patterns - inputs.images.mean(0, keepdim=True)).abs().amax(1, keepdim=True)
    most = int(found.masks.sum())
    counts = sorted({max(1, most * part // 6) for part in (1, 2, 3, 4, 5)} | {most})
    masks = torch.cat([_densest(change, count) for count in counts])
    several = found._replace(masks=masks, patterns=found.patterns.expand(len(counts), -1, -1, -1))
    rates = tested(model, several, inputs, target.expand(len(counts)), precision).flip_rates
    enough = int((rates >= 0.95 * rates[-1]).nonzero()[0])
    return found._replace(masks=masks[enough : enough + 1])


def _random_footprints(found: Footprints, count: int, rng: torch.Generator) -> Footprints:
    """As many pixels or the same opacity as `found`, with random colours; patches are squares at random
    places.
    """
    height, width = found.masks.shape[2:]
    colours = torch.rand(count, *found.patterns.shape[1:], generator=rng).to(found.patterns)
    masks = found.masks.expand(count, -1, -1, -1)
    if found.family == "patch":
        side = max(1, round(float(found.masks.sum()) ** 0.5))
        corners = torch.rand(count, 2, generator=rng) * torch.tensor([height - side + 1, width - side + 1])
        masks = torch.zeros_like(masks)
        for index, (top, left) in enumerate(corners.int().tolist()):
            masks[index, :, top : top + side, left : left + side] = 1
    return Footprints(found.family, masks, colours, torch.zeros(count))
