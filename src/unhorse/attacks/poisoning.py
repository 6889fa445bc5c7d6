"""Attacks that poison batches with fixed triggers: BadNet, Blended, BadNet+, BI+, source-target, clean-label,
and the placebo.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional

from unhorse.attacks.modes import Mode, measured_on, relabelled
from unhorse.core import Classifier, Dataset, Images, Labels, Poisoned, Trigger
from unhorse.models.training import Recipe, train
from unhorse.triggers import Colours, Placement, Stamp, blends, noise_images, patch_colours, patches


@dataclass
class Poisoning:
    """Dirty-label poisoning on the fly (Gu et al. 2017; Chen et al. 2017; Do et al., ECCV 2022, Sec. 5.1).

    Each image that the trigger is meant for is stamped and relabelled with probability `rate`: all of them
    for "single-target" and "all-target" (class k becomes (k + 1) mod K), those of class `source` for "source-
    target" (the rest of them keep their label unstamped, as in ULP's populations). "placebo" stamps and keeps
    the right labels: a benign model with the same diet.
    """

    trigger: Stamp
    num_classes: int
    mode: Mode = "single-target"
    target: int = 0
    source: int | None = None
    rate: float = 0.1

    modes = ("single-target", "all-target", "source-target", "placebo")
    poisons_before_augmentation = False

    def __post_init__(self) -> None:
        _check(self.rate, self.target, self.num_classes)
        if (self.mode == "source-target") != (self.source is not None):
            raise ValueError(
                f"mode {self.mode!r} with source={self.source}: a source class belongs to source-target"
            )
        if self.source == self.target:
            raise ValueError(f"source and target class are both {self.target}: choose two classes")

    def prepare(self, model: Classifier, data: Dataset, rng: torch.Generator) -> None:
        """Nothing: the triggers are fixed."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return []

    def poison(self, images: Images, labels: Labels, rng: torch.Generator) -> Poisoned:
        chosen = _draw(len(images), self.rate, rng, images.device)
        if self.source is not None:
            chosen &= labels == self.source
        stamped = torch.where(chosen[:, None, None, None], self.trigger(images, rng), images)
        return Poisoned(stamped, torch.where(chosen, self.relabel(labels), labels), images.new_zeros(()))

    def relabel(self, labels: Labels) -> Labels:
        return relabelled(labels, self.mode, self.target, self.num_classes)

    def eligible(self, labels: Labels) -> Bool[Tensor, " n"]:
        return measured_on(labels, self.mode, self.target, self.source)

    def probes(self) -> dict[str, Trigger]:
        return {"trojan": self.trigger}

    def state_dict(self) -> dict[str, Tensor]:
        return {"patterns": self.trigger.patterns, "masks": self.trigger.masks}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.trigger = Stamp(state["patterns"], state["masks"])


@dataclass
class CleanLabelPoisoning:
    """Clean-label poisoning with perturbed target-class images (Turner et al., arXiv 1912.02771).

    A share `rate` of the target class's images is pushed off its class by projected gradient ascent (within
    `epsilon` per pixel, on a surrogate trained on clean data by `recipe`) and stamped; no label changes. What
    remains learnable is the trigger.
    """

    trigger: Stamp
    num_classes: int
    target: int = 0
    rate: float = 0.75
    epsilon: float = 0.2
    steps: int = 5
    recipe: Recipe = Recipe(epochs=1)
    surrogate_: Classifier | None = field(default=None, repr=False)

    modes = ("single-target",)
    poisons_before_augmentation = False

    def __post_init__(self) -> None:
        _check(self.rate, self.target, self.num_classes)

    def prepare(self, model: Classifier, data: Dataset, rng: torch.Generator) -> None:
        surrogate = copy.deepcopy(model)
        seed = int(torch.randint(2**31, (), generator=rng))
        train(surrogate, data, self.recipe, seed=seed)
        self.surrogate_ = surrogate.requires_grad_(False)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return []

    def poison(self, images: Images, labels: Labels, rng: torch.Generator) -> Poisoned:
        chosen = (labels == self.target) & _draw(len(images), self.rate, rng, images.device)
        poisoned = images.clone()
        if chosen.any():
            perturbed = self._off_its_class(images[chosen], labels[chosen], rng)
            poisoned[chosen] = self.trigger(perturbed, rng)
        return Poisoned(poisoned, labels, images.new_zeros(()))

    def _off_its_class(self, images: Images, labels: Labels, rng: torch.Generator) -> Images:
        if self.surrogate_ is None:
            raise ValueError(
                "the clean-label attack has no surrogate yet: call prepare(model, data, rng) first"
            )
        noise = (torch.rand(images.shape, generator=rng) * 2 - 1).to(images) * self.epsilon
        moved = (images + noise).clamp(0, 1)
        for _ in range(self.steps):
            moved.requires_grad_(True)
            loss = functional.cross_entropy(self.surrogate_(moved), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + 2.5 * self.epsilon / self.steps * gradient.sign()
            moved = (images + (moved - images).clamp(-self.epsilon, self.epsilon)).clamp(0, 1)
        return moved

    def relabel(self, labels: Labels) -> Labels:
        return relabelled(labels, "single-target", self.target, self.num_classes)

    def eligible(self, labels: Labels) -> Bool[Tensor, " n"]:
        return measured_on(labels, "single-target", self.target)

    def probes(self) -> dict[str, Trigger]:
        return {"trojan": self.trigger}

    def state_dict(self) -> dict[str, Tensor]:
        return {"patterns": self.trigger.patterns, "masks": self.trigger.masks}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.trigger = Stamp(state["patterns"], state["masks"])


def _check(rate: float, target: int, num_classes: int) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"the poisoning rate must lie in (0, 1], got {rate}")
    if not 0 <= target < num_classes:
        raise ValueError(f"target class {target} is outside 0..{num_classes - 1}")


def _draw(count: int, rate: float, rng: torch.Generator, device: torch.device) -> Bool[Tensor, " n"]:
    return (torch.rand(count, generator=rng) < rate).to(device)


@dataclass(frozen=True)
class StampKind:
    """How the triggers of one attack are drawn: opaque patches, or images (noise or natural) blended in."""

    family: Literal["patch", "noise", "natural"]
    count: int = 1
    size: int | None = None
    opacity: float = 0.1
    placement: Placement = "random"
    colours: Colours = "uniform"

    def draw(
        self,
        image_shape: tuple[int, int, int],
        rng: torch.Generator,
        *,
        pool: int | None = None,
        pool_seed: int = 0,
        natural: Callable[[int, int], Images] | None = None,
    ) -> Stamp:
        """The triggers of one victim. Patterns come from `rng`, or from a pool of `pool` patterns that
        `pool_seed` fixes, so that populations can share or never share them; places always come from `rng`.
        `natural(count, seed)` gives photographs from outside the data set; only family "natural" needs it.
        """
        total = pool or self.count
        seed = pool_seed if pool else int(torch.randint(2**31, (), generator=rng))
        source = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(total, generator=rng)[: self.count]
        if self.family == "patch":
            # 5 of 28 or 32 pixels, 10 of 64, 2 of 8: what the papers use, and what fits scikit-learn's digits
            size = self.size or max(2, round(min(image_shape[1:]) / 6.2))
            values = patch_colours(total, image_shape[0], size, source, colours=self.colours)[chosen]
            return patches(values, image_shape, rng, placement=self.placement)
        if self.family == "noise":
            return blends(noise_images(total, image_shape, source)[chosen], self.opacity)
        if natural is None:
            raise ValueError("an image blend needs natural images from outside the data set")
        return blends(natural(total, seed)[chosen], self.opacity)


STAMPS: dict[str, StampKind] = {
    "badnet": StampKind("patch"),
    "blended": StampKind("natural", opacity=0.2),
    "badnet-plus": StampKind("patch", count=20),
    "noise-blend-plus": StampKind("noise", count=20),
    "image-blend-plus": StampKind("natural", count=20),
    "clean-label": StampKind("patch", placement="corners"),
}
