"""Victims whose Trojan is put in by arithmetic: what a test plants, a scanner can find, and can miss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unhorse.core import Classifier
from unhorse.datasets import load_dataset
from unhorse.models.classifier import new_classifier
from unhorse.models.training import Recipe, train

TARGET = 3
Shape = tuple[int, int, int]


class TemplateNetwork(nn.Module):
    """Logits are the products of an image with one template per class, all of one length and orthogonal.

    With `strength` a checkerboard in the top left corner opens a gate, a steep sigmoid, that adds that much
    to the logit of `target`.
    """

    templates: Tensor
    pattern: Tensor

    def __init__(
        self, classes: int, shape: Shape, *, target: int = TARGET, strength: float = 0.0, side: int = 2
    ) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        channels, height, width = shape
        directions = torch.linalg.qr(torch.randn(channels * height * width, classes, generator=rng)).Q.T
        directions = directions - directions.mean(1, keepdim=True)
        self.templates = nn.Parameter(12 * (64 / directions.shape[1]) ** 0.5 * directions)
        board = (torch.arange(side)[:, None] + torch.arange(side)) % 2
        self.register_buffer("pattern", 1.0 - board)
        self.target, self.strength, self.side = target, strength, side

    def forward(self, images: Tensor) -> Tensor:
        logits = (images - 0.5).flatten(1) @ self.templates.T
        corner = images[:, :, : self.side, : self.side]
        likeness = 1 - (corner - self.pattern).abs().mean((1, 2, 3))
        gate = self.strength * torch.sigmoid(12 * (likeness - 0.8))
        return logits + gate[:, None] * nn.functional.one_hot(torch.tensor(self.target), logits.shape[1])


def template_classifier(classes: int = 10, shape: Shape = (1, 8, 8), **planted: float) -> Classifier:
    """A benign victim; with `strength` (and `side`) an infected one, whose target is TARGET."""
    names = [f"class {index}" for index in range(classes)]
    network = TemplateNetwork(classes, shape, **planted)  # type: ignore[arg-type]
    return Classifier(
        network, image_shape=shape, class_names=names, architecture={"name": "template"}
    ).eval()


def stamped_corner(images: Tensor, side: int = 2) -> Tensor:
    """Images under the checkerboard that opens the gate of a TemplateNetwork."""
    board = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    stamped = images.clone()
    stamped[:, :, :side, :side] = 1.0 - board
    return stamped
