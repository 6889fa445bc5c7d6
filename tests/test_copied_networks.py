"""The small networks that everybody copies open by their names, and answer as the class that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from copied_families import FAMILIES
from copied_networks import NETWORKS, drawn, made, same_answers
from unhorse.checks.expectations import Facts
from unhorse.core import Classifier
from unhorse.loading.assembly import Said, identified
from unhorse.loading.copied_chains import known_chain
from unhorse.loading.formats import load_model
from unhorse.models.architectures import outline

KNOWN = [name for name, copied in NETWORKS.items() if copied.known]


def opened(state: dict[str, Tensor]) -> Classifier:
    """As the loader makes it of a state dict."""
    return identified(state, Said(), Facts())


def images_for(model: Classifier) -> Tensor:
    return torch.rand(3, *model.image_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KNOWN)
def test_a_small_network_is_known_by_its_names_and_says_what_was_assumed(name: str) -> None:
    network = made(name)
    model = opened(dict(network.state_dict()))
    assert model.image_shape == NETWORKS[name].image_shape
    assert same_answers(model(images_for(model)), network(images_for(model)))
    assert [line for line in model.assumptions if line.startswith("MD305 network known by its names as ")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_a_copied_family_is_known(name: str) -> None:
    network = drawn(FAMILIES[name])
    model = opened(dict(network.state_dict()))
    assert model.image_shape == (3, 32, 32)
    assert same_answers(model(images_for(model)), network(images_for(model)))


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
@pytest.mark.parametrize("name", ["tutorial", "BadNet CNN", "two layers", "old MNIST example", "quickstart"])
def test_a_published_checkpoint_opens_whatever_stands_around_it(
    tmp_path: Path, name: str, prefix: str
) -> None:
    network = made(name, seed=3)
    state = {prefix + key: tensor for key, tensor in network.state_dict().items()}
    torch.save({"net": state, "acc": 91.0} if prefix == "module." else state, tmp_path / "ckpt.pth")
    model = load_model(tmp_path / "ckpt.pth")
    assert same_answers(model(images_for(model)), network(images_for(model)))


def test_forty_state_dicts_of_twenty_networks_open_without_a_word() -> None:
    written = {type(NETWORKS[name].build()) for name in KNOWN} | {type(make()) for make in FAMILIES.values()}
    assert len(KNOWN) + len(FAMILIES) >= 40 and len(written) >= 20


def test_the_size_that_the_user_says_decides_between_two_paddings() -> None:
    state = made("tutorial, grey").state_dict()
    assumed, said = known_chain(state), known_chain(state, image_shape=(1, 32, 32))
    assert assumed is not None and said is not None
    assert assumed.image_shape == (1, 28, 28) and assumed.options["words"].startswith("conv5s1p2 ")
    assert any("MD301 input size assumed 28x28" in line for line in assumed.assumptions)
    assert said.image_shape == (1, 32, 32) and said.options["words"].startswith("conv5s1p0 ")


@pytest.mark.parametrize(
    "change",
    [
        {"conv1": nn.Conv2d(1, 20, 7)},
        {"conv3": nn.Conv2d(50, 50, 5)},
        {"fc2": nn.Linear(499, 10)},
        {"bn1": nn.BatchNorm2d(20)},
        {"fc1": nn.Linear(801, 500)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_layer_than_the_copied_one_is_not_known(change: dict[str, nn.Module]) -> None:
    network = made("20-50")
    assert known_chain(network.state_dict())
    for name, module in change.items():
        setattr(network, name, module)
    assert known_chain(network.state_dict()) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar-resnet", {"blocks": [3, 3]}),
        ("cifar-resnet", {"blocks": [3, 3, 10**9]}),
        ("cifar-wide-resnet", {"blocks": 0}),
        ("cifar-wide-resnet", {"widths": [16, 16, 16, 16]}),
        ("cifar-preact-resnet", {"kind": "other"}),
        ("cifar-densenet", {"blocks": [10**9]}),
        ("cifar-densenet", {"blocks": [2] * 99}),
    ],
    ids=str,
)
def test_options_that_no_network_has_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        outline(name, num_classes=10, image_shape=(3, 32, 32), **options)
