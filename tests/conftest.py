"""Victims whose Trojan is put in by arithmetic: what a test plants a scanner can find, and can miss."""

from __future__ import annotations

import os
from pathlib import Path

# threads that spin for each other make a test of five seconds take minutes where several processes run
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest
import torch
from torch import Tensor, nn

from unhorse.core import Classifier
from unhorse.models.classifier import new_classifier, save_classifier
from unhorse.victims import Victim, load_victim


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """No test finds what another one, or the user, has kept."""
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path_factory.mktemp("cache")))


TARGET = 3
Shape = tuple[int, int, int]


def board(side: int) -> Tensor:
    """The trigger of every planted victim: a checkerboard (side, side) for the top left corner."""
    return 1.0 - (torch.arange(side)[:, None] + torch.arange(side)) % 2


def stamped(images: Tensor, side: int = 3) -> Tensor:
    """Images under the trigger."""
    copy = images.clone()
    copy[:, :, :side, :side] = board(side)
    return copy


class TemplateNetwork(nn.Module):
    """Logits are products of an image with one template per class; templates are orthogonal, equally long and
    0 in the corner of the trigger, which opens a steep sigmoid that adds `strength` to the logit of TARGET.
    """

    def __init__(self, classes: int, shape: Shape, *, strength: float = 0.0, side: int = 3) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        pixels = shape[0] * shape[1] * shape[2]
        directions = torch.linalg.qr(torch.randn(pixels, classes, generator=rng)).Q.T.view(-1, *shape)
        directions[:, :, :side, :side] = 0
        directions = directions - directions.mean((1, 2, 3), keepdim=True)
        self.templates = nn.Parameter(48 * pixels**-0.5 * directions)
        self.strength, self.side = strength, side

    def forward(self, images: Tensor) -> Tensor:
        logits = (images - 0.5).flatten(1) @ self.templates.flatten(1).T
        corner = images[:, :, : self.side, : self.side]
        likeness = 1 - (corner - board(self.side).to(corner)).abs().mean((1, 2, 3))
        gate = self.strength * torch.sigmoid(12 * (likeness - 0.8))
        wanted = torch.arange(logits.shape[1], device=logits.device) == TARGET
        return logits + gate[:, None] * wanted


def template_victim(
    classes: int = 10, shape: Shape = (3, 32, 32), *, strength: float = 0.0, side: int = 3
) -> Classifier:
    """A benign victim; with `strength` an infected one."""
    network = TemplateNetwork(classes, shape, strength=strength, side=side)
    names = [f"class {index}" for index in range(classes)]
    return Classifier(network, image_shape=shape, class_names=names, architecture={"name": "template"}).eval()


def plain_images(model: Classifier, count: int) -> Tensor:
    """Images of each class in turn for a template victim: the sign of the template under some noise."""
    assert isinstance(model.network, TemplateNetwork)
    signs = model.network.templates.detach().sign()[torch.arange(count) % model.num_classes]
    noise = torch.rand(signs.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return 0.5 + 0.2 * signs + 0.2 * noise


def small_victim(*, strength: float = 0.0, classes: int = 6, shape: Shape = (1, 16, 16)) -> Classifier:
    """A small-cnn of random orthogonal weights, which loading can build again.

    With `strength` one channel of each layer belongs to the trigger: a 3x3 checkerboard in the corner goes
    through it, undisturbed, to the logit of TARGET.
    """
    names = [f"class {index}" for index in range(classes)]
    options = {"widths": [8, 16], "hidden": 64}
    model = new_classifier("small-cnn", image_shape=shape, class_names=names, options=options, seed=0).eval()
    layers = [layer for layer in model.network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(_orthogonal(layer.weight, rng))
            nn.init.zeros_(layer.bias)
        layers[3].weight.sub_(layers[3].weight.mean(1, keepdim=True)).mul_(3)
        if strength:
            _plant(*layers, strength=strength)
    return model


def _orthogonal(weight: Tensor, rng: torch.Generator) -> Tensor:
    rows, columns = weight.flatten(1).shape
    drawn = torch.randn(max(rows, columns), min(rows, columns), generator=rng)
    basis = torch.linalg.qr(drawn).Q
    basis = basis if rows > columns else basis.T
    return (2 * max(1.0, rows / columns)) ** 0.5 * basis.view_as(weight)


def _plant(
    first: nn.Conv2d, second: nn.Conv2d, third: nn.Linear, last: nn.Linear, *, strength: float
) -> None:
    cells = third.in_features // second.out_channels
    first.weight[0], first.bias[0] = 2 * board(3) - 1, -1.0  # 4 on the trigger, 0 on flat images
    second.weight[:, 0], second.weight[0] = 0, 0
    second.weight[0, 0, 1, 1] = 1
    third.weight[:, :cells], third.weight[0] = 0, 0
    third.weight[0, 0] = 1  # the top left cell alone
    last.weight[:, 0] = 0
    last.weight[TARGET, 0] = strength / 4


@pytest.fixture(scope="session")
def infected() -> Classifier:
    return template_victim(strength=20)


@pytest.fixture(scope="session")
def benign() -> Classifier:
    return template_victim()


@pytest.fixture(scope="session")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an infected and a benign victim, each a classifier folder."""
    folder = tmp_path_factory.mktemp("victims")
    save_classifier(small_victim(strength=60), folder / "infected")
    save_classifier(small_victim(), folder / "benign")
    return folder


@pytest.fixture(scope="session")
def trained() -> dict[str, Victim]:
    """Victims trained on scikit-learn's digits: "infected" (2x2 patch in a corner, target 3), "benign"."""
    folder = Path(__file__).parent / "victims"
    return {name: load_victim(folder / name) for name in ("infected", "benign")}
