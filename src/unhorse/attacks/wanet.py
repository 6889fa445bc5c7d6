"""WaNet: an imperceptible warp as the trigger, and a noise mode so that no other warp is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unhorse.attacks.modes import Mode, measured_on, relabelled
from unhorse.core import Classifier, Dataset, Images, Labels, Poisoned, Trigger
from unhorse.triggers import Warp, draw_field


@dataclass
class WaNet:
    """WaNet (Nguyen and Tran, ICLR 2021): one smooth warp of all images; other small warps stay harmless.

    Of each batch the first int(rate * n) images are warped and relabelled, the next `noise_ratio` times as
    many are warped with further noise at every pixel and keep their label, the rest stays clean: batches must
    be shuffled, and one of fewer than 1 / rate images stays clean. "all-target" turns class k into (k + 1)
    mod K; "placebo" warps and keeps the right labels: a benign model with the same diet. `field` (2, h, w)
    comes from `unhorse.triggers.draw_field`; without one, `prepare` draws it from its generator, of `cells`
    x `cells` shifts.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mode: Mode = "single-target"
    target: int = 0
    field: Float[Tensor, "2 h w"] | None = None
    rate: float = 0.1
    noise_ratio: float = 2.0
    strength: float = 0.5
    grid_rescale: float = 1.0
    cells: int = 4

    modes = ("single-target", "all-target", "placebo")
    poisons_before_augmentation = True

    def __post_init__(self) -> None:
        self.image_shape = (self.image_shape[0], self.image_shape[1], self.image_shape[2])
        if self.mode not in self.modes:
            raise ValueError(f"WaNet has no mode {self.mode!r}: give one of {', '.join(self.modes)}")
        if not 0 <= self.target < self.num_classes:
            raise ValueError(f"target class {self.target} is outside 0..{self.num_classes - 1}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"the poisoning rate must lie in (0, 1], got {self.rate}")
        if self.noise_ratio < 0 or self.rate * (1 + self.noise_ratio) > 1:
            raise ValueError(
                f"noise_ratio {self.noise_ratio} does not go with a poisoning rate of {self.rate}: "
                f"give a noise_ratio of 0 to {1 / self.rate - 1:g}"
            )
        if self.strength < 0:
            raise ValueError(f"the strength of a warp must not be negative, got {self.strength}")
        if not 0 < self.grid_rescale <= 1:
            raise ValueError(f"grid_rescale must lie in (0, 1], got {self.grid_rescale}")
        if self.field is not None:
            self._set(self.field)

    def prepare(self, model: Classifier, data: Dataset, rng: torch.Generator) -> None:
        """Draws the field if none was given."""
        if self.field is None:
            self._set(draw_field(self.image_shape, rng, self.cells))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return []

    def poison(self, images: Images, labels: Labels, rng: torch.Generator) -> Poisoned:
        poisoned = int(self.rate * len(images))
        touched = poisoned + int(self.noise_ratio * poisoned)
        warp = self.probes()
        parts = [
            warp["trojan"](images[:poisoned], rng),
            warp["noise"](images[poisoned:touched], rng),
            images[touched:],
        ]
        relabelled = torch.cat([self.relabel(labels[:poisoned]), labels[poisoned:]])
        return Poisoned(torch.cat(parts), relabelled, images.new_zeros(()))

    def relabel(self, labels: Labels) -> Labels:
        return relabelled(labels, self.mode, self.target, self.num_classes)

    def eligible(self, labels: Labels) -> Bool[Tensor, " n"]:
        return measured_on(labels, self.mode, self.target)

    def probes(self) -> dict[str, Trigger]:
        field = self._drawn()
        return {
            "trojan": Warp(field, self.strength, grid_rescale=self.grid_rescale),
            "noise": Warp(field, self.strength, jitter=1.0, grid_rescale=self.grid_rescale),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {"field": self._drawn()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._set(state["field"])

    def _set(self, field: Tensor) -> None:
        if field.shape != (2, *self.image_shape[1:]):
            height, width = self.image_shape[1:]
            raise ValueError(
                f"a warp field of shape {tuple(field.shape)} does not fit {height}x{width} images: "
                "draw one by draw_field(image_shape, rng)"
            )
        self.field = field.detach().cpu().contiguous()

    def _drawn(self) -> Tensor:
        if self.field is None:
            raise ValueError(
                "WaNet has no warp field yet: call prepare(model, data, rng), or give one by draw_field"
            )
        return self.field
