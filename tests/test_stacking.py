"""A stack of victims: each one as it would have been alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Classifier
from unhorse.datasets import load_dataset
from unhorse.models.classifier import new_classifier
from unhorse.models.stacked_training import Part, train_stack
from unhorse.models.stacking import StackedClassifier, obstacle
from unhorse.models.training import Augmentation, Recipe, train
from unhorse.victims import (
    AttackSpec,
    DataSpec,
    VictimSpec,
    can_stack,
    load_victim,
    save_victim,
    train_victim,
    train_victims,
    why_not_stacked,
)

NAMES = "0123456789"
DATA = DataSpec(images=150, test_images=100)
RECIPE = Recipe(epochs=2, batch_size=64, optimizer="nesterov", learning_rate=2e-2, precision="fp32")
AUGMENTED = Recipe(
    epochs=2,
    batch_size=64,
    learning_rate=2e-3,
    weight_decay=1e-3,
    augmentation=Augmentation(crop=1, rotation=10, flip=True),
    precision="fp32",
)
SMALL_CNN: dict[str, object] = {"widths": (4, 8), "hidden": 16}
ARCHITECTURES = [
    ("small-cnn", (1, 8, 8), SMALL_CNN),
    ("small-resnet", (3, 16, 16), {"widths": (4, 8)}),
    ("ulp-vgg", (3, 32, 32), {"width": 4}),
    ("wanet-cnn", (1, 28, 28), {}),
    ("input-aware-cnn", (1, 28, 28), {}),
    ("ulp-resnet18", (3, 8, 8), {}),
]
ATTACKS = {
    "benign": None,
    "patch": AttackSpec(kind="badnet", rate=0.3),
    "twenty patches": AttackSpec(kind="badnet-plus", rate=0.3),
    "all-to-all": AttackSpec(kind="badnet", mode="all-target", rate=0.3),
    "source-target": AttackSpec(kind="badnet", mode="source-target", rate=0.8),
    "placebo": AttackSpec(kind="badnet", mode="placebo", rate=0.3),
    "noise blend": AttackSpec(kind="noise-blend-plus", rate=0.3),
    "warp": AttackSpec(kind="wanet"),
    "warp, all-to-all": AttackSpec(kind="wanet", mode="all-target", rate=0.2),
    "warp, placebo": AttackSpec(kind="wanet", mode="placebo"),
    "clean-label": AttackSpec(kind="clean-label", trigger={"size": 2}),
}


def models_of(name: str, shape: tuple[int, int, int], options: dict, count: int = 3) -> list[Classifier]:
    return [
        new_classifier(name, image_shape=shape, class_names=NAMES, std=(0.5,), options=options, seed=seed)
        for seed in range(count)
    ]


def small_models(count: int = 3) -> list[Classifier]:
    return models_of("small-cnn", (1, 8, 8), SMALL_CNN, count)


def weights(model: Classifier) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def spec(attack: AttackSpec | None, seed: int, recipe: Recipe = RECIPE) -> VictimSpec:
    same = {"data": DATA, "options": SMALL_CNN, "recipe": recipe}
    return VictimSpec(**same, attack=attack, seed=seed)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


# --- the network


@pytest.mark.parametrize(("name", "shape", "options"), ARCHITECTURES)
def test_a_stack_computes_what_its_models_compute_and_learns_what_they_learn(name, shape, options):
    """In float64, where chaos has no rounding to start from: logits, gradients and running statistics."""
    models = [model.double().train() for model in models_of(name, shape, options, count=2)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    stack = StackedClassifier(models).double()
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(4, len(models), *shape, dtype=torch.float64, generator=rng)
    labels = torch.randint(10, (4, len(models)), generator=rng)
    network = stack.network((images.flatten(0, 1) - stack.mean) / stack.std)  # Classifier rounds its logits
    loss_of(network, labels.flatten()).backward()
    gradients = [parameter.grad for parameter in stack.network.parameters()]
    for index, model in enumerate(models):
        logits = model.network((images[:, index] - model.mean) / model.std)
        assert torch.allclose(network.view(4, len(models), 10)[:, index], logits, atol=1e-12)
        loss_of(logits, labels[:, index]).backward()
        for whole, alone in zip(gradients, model.network.parameters(), strict=True):
            assert torch.allclose(whole.chunk(len(models))[index], alone.grad, atol=1e-11)
    back = copy.deepcopy(models)
    stack.unstack(back)
    for model, returned in zip(models, back, strict=True):
        assert torch.allclose(weights(model), weights(returned), atol=1e-12)


def test_a_stack_gives_every_model_its_own_weights_back():
    models, empty = (
        small_models(),
        [
            new_classifier("small-cnn", image_shape=(1, 8, 8), class_names=NAMES, options=SMALL_CNN, seed=9)
            for _ in range(3)
        ],
    )
    StackedClassifier(models).unstack(empty)
    assert [torch.equal(weights(a), weights(b)) for a, b in zip(models, empty, strict=True)] == [True] * 3
    assert not torch.equal(weights(empty[0]), weights(empty[1]))


def test_a_stack_leaves_its_models_alone():
    models = small_models()
    before = [weights(model) for model in models]
    stack = StackedClassifier(models)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    assert all(torch.equal(weights(model), old) for model, old in zip(models, before, strict=True))


class Sine(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.sin()


def other(network: nn.Module | None = None, **changes: object) -> Classifier:
    settings = {"image_shape": (1, 8, 8), "class_names": NAMES, "std": (0.5,)} | changes
    return Classifier(network or small_models(1)[0].network, **settings)


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        (other(nn.Sequential(Sine(), nn.Flatten(), nn.Linear(64, 10))), "a Sine has no stacked form"),
        (other(mean=(0.1,)), "normalisation"),
        (other(class_names="01234"), "class count"),
        (other(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), "architecture"),
    ],
)
def test_models_that_cannot_be_one_network_are_refused_with_the_reason(stranger, reason):
    models = [*small_models(1), stranger]
    assert reason in obstacle(models)
    with pytest.raises(ValueError, match=reason):
        StackedClassifier(models)


def test_models_of_other_strides_are_refused():
    def strided(stride: int) -> Classifier:
        return other(nn.Sequential(nn.Conv2d(1, 2, 1, stride=stride), nn.AdaptiveAvgPool2d(1), nn.Flatten()))

    assert "architecture" in obstacle([strided(1), strided(2)])


# --- the training loop


def test_dropout_of_a_stack_draws_for_each_model_as_it_would_alone():
    def dropping() -> list[Classifier]:
        return [
            other(
                nn.Sequential(
                    nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Dropout(0.3), copy.deepcopy(linear)
                )
            )
            for linear in [nn.Linear(144, 10)] * 2
        ]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        stacked = dropping()
    alone = copy.deepcopy(stacked)
    data = load_dataset("digits")[:96]
    train_stack(stacked, data, RECIPE, seeds=[3, 4])
    for model, seed in zip(alone, (3, 4), strict=True):
        train(model, data, RECIPE, seed=seed)
    assert all(torch.allclose(weights(a), weights(b), atol=1e-6) for a, b in zip(stacked, alone, strict=True))
    assert not torch.allclose(weights(alone[0]), weights(alone[1]), atol=1e-3)


def test_a_stack_trains_again_to_the_same_bits_and_leaves_the_global_random_state():
    data, before = load_dataset("digits")[:96], torch.get_rng_state()
    first, again = small_models(2), small_models(2)
    for models in (first, again):
        train_stack(models, data, RECIPE, seeds=[1, 2])
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_models_with_different_numbers_of_images_are_refused():
    rows = [torch.arange(10), torch.arange(11)]
    with pytest.raises(ValueError, match="different numbers of images"):
        train_stack(small_models(2), load_dataset("digits"), RECIPE, seeds=[1, 2], rows=rows)


def test_the_draws_of_a_window_do_not_depend_on_its_size(monkeypatch):
    data, stacks = load_dataset("digits")[:96], []
    for window in (1, 16):
        monkeypatch.setattr("unhorse.models.stacked_training.WINDOW", window)
        stacks.append(small_models(2))
        recipe = Recipe(epochs=1, batch_size=20, augmentation=Augmentation(crop=1), precision="fp32")
        train_stack(stacks[-1], data, recipe, seeds=[1, 2], parts=[Part(2)])
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(*stacks, strict=True))


# --- victims


def trained_both_ways(specs: Sequence[VictimSpec]) -> list[tuple]:
    return list(zip(train_victims(specs), [train_victim(each) for each in specs], strict=True))


@pytest.mark.parametrize("recipe", [RECIPE, AUGMENTED], ids=["nesterov", "adam, augmented"])
def test_stacked_victims_have_the_weights_attacks_and_cards_of_those_trained_alone(recipe):
    specs = [spec(attack, seed, recipe) for seed, attack in enumerate(ATTACKS.values())]
    for name, (stacked, alone) in zip(ATTACKS, trained_both_ways(specs), strict=True):
        assert torch.allclose(weights(stacked[0]), weights(alone[0]), atol=2e-6), name
        cards = [{**card, "training_log": None, "seconds": 0} for card in (stacked[2], alone[2])]
        assert cards[0].pop("stacked") == len(specs)
        assert cards[0] == cards[1], name
        for one, other_one in zip(stacked[2]["training_log"], alone[2]["training_log"], strict=True):
            assert one == pytest.approx(other_one, abs=1e-5), name
        if alone[1] is not None:
            states = stacked[1].state_dict(), alone[1].state_dict()
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[1]), name
        assert not stacked[0].training


def test_a_stacked_victim_is_judged_again_from_disk_as_it_was_in_the_stack(tmp_path):
    specs = [spec(ATTACKS["clean-label"], 1), spec(ATTACKS["twenty patches"], 2)]
    for index, (model, attack, card) in enumerate(train_victims(specs)):
        victim = load_victim(save_victim(tmp_path / str(index), model, attack, card))
        assert torch.equal(weights(victim.model), weights(model))
        assert victim.card["metrics"] == card["metrics"]


def test_a_stack_in_bf16_learns_as_well_as_models_alone():
    recipe = Recipe(epochs=10, batch_size=64, learning_rate=2e-2, precision="bf16")
    data = DataSpec(images=600, test_images=200)
    specs = [VictimSpec(data=data, recipe=recipe, attack=ATTACKS["patch"], seed=seed) for seed in range(2)]
    for stacked, alone in trained_both_ways(specs):
        assert stacked[2]["metrics"] == pytest.approx(alone[2]["metrics"], abs=0.05)
        assert stacked[2]["metrics"]["clean_accuracy"] > 0.6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": Recipe(epochs=9)}, "more than seed and attack"),
        ({"data": DataSpec(images=151)}, "more than seed and attack"),
        ({"attack": AttackSpec(kind="input-aware")}, "input-aware"),
    ],
)
def test_specs_that_cannot_be_stacked_are_refused_with_the_reason(changes, reason):
    specs = [spec(None, 0), spec(None, 1).model_copy(update=changes)]
    assert not can_stack(specs)
    assert reason in why_not_stacked(specs)
    with pytest.raises(ValueError, match=reason):
        train_victims(specs)


def test_an_architecture_without_a_stacked_form_is_refused():
    vit = VictimSpec(architecture="mobilenet-v2", data=DataSpec(size=(32, 32)))
    assert "has no stacked form" in why_not_stacked([vit])


def test_specs_that_differ_in_seed_and_attack_can_be_stacked():
    specs = [spec(attack, seed) for seed, attack in enumerate(ATTACKS.values())]
    assert can_stack(specs) and why_not_stacked(specs) == ""


@pytest.mark.gpu
def test_a_stack_on_the_gpu_learns_as_well_as_models_alone():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    device = torch.device("cuda")
    recipe = Recipe(epochs=6, batch_size=64, learning_rate=1e-2)
    data = DataSpec(images=600, test_images=200)
    kinds = [ATTACKS[name] for name in ("benign", "patch", "all-to-all", "warp", "clean-label")]
    specs = [VictimSpec(data=data, recipe=recipe, attack=kind, seed=seed) for seed, kind in enumerate(kinds)]
    for stacked, each in zip(train_victims(specs, device=device), specs, strict=True):
        alone = train_victim(each, device=device)
        assert stacked[0].mean.device.type == "cuda"
        for name, value in alone[2]["metrics"].items():
            if value is not None:
                assert stacked[2]["metrics"][name] == pytest.approx(value, abs=0.15), name
