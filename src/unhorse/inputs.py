"""What a guard refuses to be fitted, calibrated, measured or asked with, and how to put it right."""

from __future__ import annotations

import torch
from torch import Tensor

from unhorse.core import Classifier, Dataset, Images
from unhorse.metrics import accuracy

SLACK = 1e-4
"""How far a pixel may leave [0, 1]: resizing and blending round."""
TIMES_CHANCE = 1.5


def scaled(images: Tensor) -> Images:
    """Pixels in [0, 1] of uint8 images; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def check_images(model: Classifier, images: Tensor, what: str = "images") -> None:
    """Refuses images (n, c, h, w) of another shape or type, or with pixels that are NaN or outside [0, 1]."""
    if images.ndim != 4 or images.shape[1:] != tuple(model.image_shape):
        raise ValueError(
            f"the {what} are {tuple(images.shape)}, the model takes (n, *{tuple(model.image_shape)}), "
            "channels first: resize or convert them"
        )
    if not len(images):
        raise ValueError(f"there are no {what}: give at least one")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"the {what} are {images.dtype}: give floats in [0, 1] or uint8")
    low, high = images.aminmax()
    if not (low >= -SLACK and high <= 1 + SLACK):  # NaN fails too
        raise ValueError(
            f"the {what} have pixels from {low:.4g} to {high:.4g}: give values in [0, 1], none of them NaN "
            "(divide 0..255 by 255; undo mean and deviation, the model subtracts them itself)"
        )


def check_labels(model: Classifier, labels: Tensor, n: int, what: str = "labels") -> None:
    """Refuses labels that are not `n` whole numbers from 0 to the model's classes."""
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(
            f"the {what} are {tuple(labels.shape)} {labels.dtype}: give a whole number per image"
        )
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= model.num_classes:
        raise ValueError(
            f"the {what} go from {low} to {high}, the model's classes from 0 to {model.num_classes - 1}: "
            "map them to its classes (--labels FILE), or leave them out (--unlabelled)"
        )


def check_clean(model: Classifier, clean: Dataset) -> None:
    """Refuses clean images that do not fit the model, by their pixels, class count or labels."""
    check_images(model, clean.images, "clean images")
    if clean.labels is None:
        return
    if len(clean.class_names) not in (0, model.num_classes):
        raise ValueError(
            f"the clean images have {len(clean.class_names)} classes, the model {model.num_classes}: "
            "map their folders to its classes (--labels FILE), or leave the labels out (--unlabelled)"
        )
    check_labels(model, clean.labels, len(clean))


def check_recognised(model: Classifier, clean: Dataset) -> None:
    """Refuses labelled images on which the model is right less than 1.5 times as often as by chance."""
    if clean.labels is None:
        return
    right, chance = accuracy(model, clean), 1 / model.num_classes
    if right < TIMES_CHANCE * chance:
        raise ValueError(
            f"the model is right on {right:.1%} of the clean images, and chance is {chance:.1%}: probably "
            "the classes are numbered otherwise (map them by --labels FILE, or leave the labels out by "
            "--unlabelled) or the images are not of its task"
        )
