"""Februus: what the classifier looks at is cut out of the image and painted over."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Classifier, Dataset, Images
from unhorse.extras import install_line
from unhorse.filters.completion import (
    CompletionSettings,
    Masks,
    completion_file,
    load_completion,
    paste,
    save_completion,
    train_completion,
)
from unhorse.filters.fitting import FilterEpoch, OnEpoch, Precision, frozen, usable
from unhorse.inputs import check_images
from unhorse.models.stages import Stage, convolution_stages, watched

BATCH = 512
TELEA_RADIUS = 3.0
ROUNDING = 1e-5
"""A map whose values differ by less, as a share of the largest, is constant."""


@dataclass
class Februus:
    """Februus (Doan et al., ACSAC 2020, arXiv 1908.03369): Grad-CAM finds the trigger, inpainting removes it.

    Where the class activation map of the model's own decision at `layer` is at least `cam_threshold` of the
    way from its lowest to its highest value, the image is replaced by what `inpaint` makes of the rest: a
    "completion" network taught on clean images (see CompletionSettings for the fields from `width` on), or
    OpenCV's "telea", which learns nothing. `layer` is "last", the last convolutional stage, or the name of
    another.
    """

    layer: str = "last"
    cam_threshold: float = 0.7
    inpaint: Literal["completion", "telea"] = "completion"
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
    model_: Classifier = field(init=False, repr=False, compare=False)
    stage_: Stage = field(init=False, repr=False, compare=False)
    network_: nn.Module = field(init=False, repr=False, compare=False)
    log_: list[FilterEpoch] = field(init=False, repr=False, compare=False)

    def fit(
        self,
        model: Classifier,
        clean: Dataset,
        *,
        checkpoint: Path | None = None,
        on_epoch: OnEpoch | None = None,
        completion_cache: Path | None = None,
    ) -> Self:
        """Keeps the model, and trains the completion network on the clean images, whose labels it ignores.

        That network depends on no model: with a folder `completion_cache` the one that was trained for the
        same images and settings is taken from there, and `log_` is empty; else it is left there. With a
        `checkpoint` path a fit that was killed goes on after its last whole epoch.
        """
        if not 0 < self.cam_threshold <= 1:
            raise ValueError(f"cam_threshold is {self.cam_threshold}: give a number above 0, at most 1")
        self.stage_ = self._stage(model)
        settings = self._completion_settings()
        # labels would only be checked, or predicted where they are missing
        usable(model, Dataset(clean.images, torch.zeros(len(clean), dtype=torch.long), ()), settings)
        if self.inpaint == "telea":
            self.network_, self.log_ = Telea(), []
        elif self.inpaint == "completion":
            self._complete(model, clean, settings, checkpoint, on_epoch, completion_cache)
        else:
            raise ValueError(f"inpaint is {self.inpaint!r}: take completion or telea")
        self.model_ = model
        return self

    def __call__(self, images: Images) -> Images:
        """The images, changed inside their masks alone; what becomes of one does not depend on the others."""
        if getattr(self, "model_", None) is None:
            raise ValueError("the Februus filter is not fitted: call fit(model, clean) first")
        check_images(self.model_, images)
        device = self.model_.mean.device
        self.network_.to(device).eval()
        # the map needs gradients, also where the caller has turned them off
        with torch.inference_mode(False):
            parts = [self._purified(part.clone().to(device)) for part in images.split(BATCH)]
        return torch.cat(parts).to(images.device)

    def masks(self, images: Images) -> Masks:
        """What is cut out of each image, on the model's device."""
        return region(class_activation(self.model_, self.stage_, images), self.cam_threshold)

    def _purified(self, images: Images) -> Images:
        masks = self.masks(images)
        with torch.no_grad():
            return self.network_(images, masks)

    def _stage(self, model: Classifier) -> Stage:
        stages = {stage.name: stage for stage in convolution_stages(model)}
        if self.layer == "last":
            return list(stages.values())[-1]
        if self.layer not in stages:
            raise ValueError(f"layer is {self.layer!r}: take last, or one of {', '.join(stages)}")
        return stages[self.layer]

    def _completion_settings(self) -> CompletionSettings:
        ours = {entry.name for entry in fields(self)}
        shared = [entry.name for entry in fields(CompletionSettings) if entry.name in ours]
        return CompletionSettings(**{name: getattr(self, name) for name in shared})

    def _complete(  # noqa: PLR0913
        self,
        model: Classifier,
        clean: Dataset,
        settings: CompletionSettings,
        checkpoint: Path | None,
        on_epoch: OnEpoch | None,
        cache: Path | None,
    ) -> None:
        """The network and its log, from the cache or from training."""
        device = model.mean.device
        kept = None if cache is None else completion_file(cache, settings, clean)
        if kept is not None and kept.exists():
            self.network_, self.log_ = load_completion(kept, settings, clean.image_shape, device), []
            return
        network, self.log_ = train_completion(
            settings, clean, device, checkpoint=checkpoint, on_epoch=on_epoch
        )
        if kept is not None:
            save_completion(network, kept)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        self.network_ = network


def class_activation(model: Classifier, stage: Stage, images: Images) -> Float[Tensor, "n 1 h w"]:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of each image's own class at a stage, as large as the image.

    relu(sum_c a_c F_c), where F_c is a channel of the stage's features and a_c the mean over its pixels of
    the gradient of the class's logit; enlarged bilinearly. 0 everywhere where the class has no support.
    """
    with frozen(model), torch.enable_grad(), watched(model, [stage]) as seen:
        logits = model(images.detach().requires_grad_(True))
        own = logits.gather(1, logits.argmax(1, keepdim=True)).sum()
        (gradients,) = torch.autograd.grad(own, seen[stage.name])
    weights = gradients.mean((2, 3), keepdim=True)
    maps = (weights * seen[stage.name].detach()).sum(1, keepdim=True).relu()
    return functional.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)


def region(maps: Float[Tensor, "n 1 h w"], threshold: float) -> Masks:
    """1 where a map, stretched to [0, 1], is at least `threshold`; 0 everywhere for a constant map."""
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    varied = high - low > ROUNDING * high
    stretched = (maps - low) / torch.where(varied, high - low, torch.ones_like(high))
    return (stretched >= threshold).to(maps.dtype)


class Telea(nn.Module):
    """OpenCV's inpainting after Telea (2004): holes are filled from their rims; pixels in 256 steps there."""

    def __init__(self) -> None:
        super().__init__()
        try:
            import cv2
        except ImportError as error:
            raise ImportError(f"Telea's inpainting needs OpenCV: {install_line('inpaint')}") from error
        self.fill = lambda image, mask: cv2.inpaint(image, mask, TELEA_RADIUS, cv2.INPAINT_TELEA)

    def forward(self, images: Images, masks: Masks) -> Images:
        """The images with their holes filled, and untouched outside them."""
        pixels = (images * 255).round().clamp(0, 255).byte().cpu().numpy()
        holes = masks[:, 0].byte().cpu().numpy()
        filled = torch.zeros(images.shape, dtype=torch.uint8)
        for index in masks.flatten(1).any(1).nonzero().flatten().tolist():
            for channel, plane in enumerate(pixels[index]):
                filled[index, channel] = torch.from_numpy(self.fill(plane, holes[index]))
        return paste(images, filled.to(images.device).to(images.dtype) / 255, masks)
