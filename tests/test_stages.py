"""Stages are found by running a network, and its head answers for any features."""

import pytest
import torch
from torch import nn

from unhorse.core import Classifier
from unhorse.models.classifier import new_classifier
from unhorse.models.stages import convolution_stages, features_at, head, watched

NAMES = [str(index) for index in range(10)]


def made(architecture: str, shape: tuple[int, int, int]) -> Classifier:
    return new_classifier(architecture, image_shape=shape, class_names=NAMES, seed=0, mean=(0.3,)).eval()


@pytest.mark.parametrize(
    ("architecture", "shape", "last"),
    [
        ("small-cnn", (1, 28, 28), ("network.features.4", 32, 14, 14)),
        ("wanet-cnn", (1, 28, 28), ("network.features", 64, 4, 4)),
        ("wanet-cnn", (3, 32, 32), ("network.features", 64, 4, 4)),
        ("preact-resnet18", (3, 32, 32), ("network.layer4", 512, 4, 4)),
        ("resnet18", (3, 64, 64), ("network.layer4", 512, 2, 2)),
    ],
)
def test_the_last_stage_is_what_the_head_sees(architecture, shape, last):
    assert tuple(convolution_stages(made(architecture, shape))[-1]) == last


def test_a_residual_network_has_its_groups_for_stages():
    names = [stage.name for stage in convolution_stages(made("resnet18-64", (3, 64, 64)))]
    assert names == ["network.layer1", "network.layer2", "network.layer3", "network.layer4"]


def test_the_head_answers_for_more_images_than_the_network_was_started_on():
    model = made("wanet-cnn", (1, 28, 28))
    images = torch.rand(5, 1, 28, 28)
    for stage in convolution_stages(model):
        with torch.no_grad():
            assert torch.allclose(
                head(model, stage, features_at(model, stage, images)), model(images), atol=1e-5
            )


def test_a_module_around_which_something_passes_is_no_stage():
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.after = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
            self.last = nn.Linear(4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(self.after(self.inner(images) + images).mean((2, 3)))

    model = Classifier(Shortcut(), image_shape=(1, 8, 8), class_names="abc").eval()
    assert [stage.name for stage in convolution_stages(model)] == ["network.after"]


def test_features_keep_their_gradient():
    model = made("small-cnn", (1, 28, 28))
    stage = convolution_stages(model)[-1]
    with watched(model, [stage]) as seen:
        model(torch.rand(2, 1, 28, 28))
    assert seen[stage.name].requires_grad
    model(torch.rand(1, 1, 28, 28))
    assert len(seen[stage.name]) == 2  # outside nothing is watched


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (made("vit-b-16", (3, 32, 32)), "is a transformer: use fine-tuning"),
        (
            Classifier(
                nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), image_shape=(1, 8, 8), class_names="abc"
            ),
            "without convolutions",
        ),
    ],
)
def test_what_has_no_stages_says_what_to_use_instead(model, message):
    with pytest.raises(ValueError, match=message):
        convolution_stages(model)


def test_too_few_stages_are_counted():
    with pytest.raises(ValueError, match="needs 3 convolutional stages .* has 2"):
        convolution_stages(made("small-cnn", (1, 28, 28)), least=3)


def test_training_mode_and_weights_stay_as_found():
    model = made("wanet-cnn", (1, 28, 28)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convolution_stages(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
