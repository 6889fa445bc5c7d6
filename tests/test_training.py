"""The one training loop: seeds, resumption, augmentation, and what an attack may ask of it."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from unhorse.attacks.poisoning import CleanLabelPoisoning, Poisoning
from unhorse.core import Classifier, Dataset, Poisoned
from unhorse.datasets import load_dataset
from unhorse.metrics import accuracy
from unhorse.models.training import Augmentation, Recipe, train
from unhorse.triggers import patches

RECIPE = Recipe(epochs=3, batch_size=64, augmentation=Augmentation(crop=1))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")[:160]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_model(seed: int = 0, *, dropout: float = 0.0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Dropout(dropout), nn.Linear(72, 10)),
        )
    return Classifier(network, image_shape=(1, 8, 8), class_names="0123456789")


def weights(model: Classifier) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for tensor in model.state_dict().values()])


class CoTrained:
    """An attack with a parameter of its own that every step pulls towards 1, at a quarter of the distance."""

    poisons_before_augmentation = False

    def __init__(self) -> None:
        self.pull = nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.pull], lr=0.125)

    def prepare(self, model, data, rng):
        pass

    def optimizers(self):
        return [self.optimizer]

    def poison(self, images, labels, rng):
        darker = images * (1 - self.pull.detach() / 2)  # so that what the attack learned reaches the model
        return Poisoned(darker, labels, (self.pull - 1) ** 2)

    def state_dict(self):
        return {"pull": self.pull.detach()}

    def load_state_dict(self, state):
        self.pull.data = state["pull"].clone()


def poisoning() -> Poisoning:
    return Poisoning(patches(torch.ones(1, 1, 2, 2), (1, 8, 8), seeded()), 10, rate=0.3)


def clean_label() -> CleanLabelPoisoning:
    return CleanLabelPoisoning(poisoning().trigger, 10, recipe=Recipe(epochs=1, batch_size=160))


# --- seeds


def test_a_seed_decides_every_weight(digits):
    first, again, other = new_model(), new_model(), new_model()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        train(model, digits, RECIPE, seed=seed)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_training_leaves_the_global_random_state_as_found(digits):
    before = torch.get_rng_state()
    train(new_model(dropout=0.5), digits, RECIPE, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_does_not_depend_on_the_global_random_state(digits):
    models = new_model(dropout=0.5), new_model(dropout=0.5)
    for model, state in zip(models, (3, 4), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            train(model, digits, RECIPE, seed=1)
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_a_trained_model_has_learned_and_is_ready_to_use(digits):
    model = new_model()
    log = train(model, digits, Recipe(epochs=6, batch_size=64, learning_rate=2e-2), seed=1)
    assert not model.training
    assert [entry.epoch for entry in log] == [0, 1, 2, 3, 4, 5]
    assert log[-1].loss < 0.5 * log[0].loss
    assert accuracy(model, digits) > 0.8


def test_data_without_labels_is_refused(digits):
    with pytest.raises(ValueError, match="no labelled images"):
        train(new_model(), Dataset(digits.images, None, digits.class_names), RECIPE, seed=1)


# --- resumption


class Killed(Exception):
    pass


@pytest.mark.parametrize("attack", [lambda: None, poisoning, clean_label, CoTrained])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_killed_training_goes_on_to_the_weights_of_an_undisturbed_one(digits, tmp_path, attack, optimizer):
    recipe = Recipe(epochs=3, batch_size=64, optimizer=optimizer, augmentation=RECIPE.augmentation)
    checkpoint = tmp_path / "training"
    undisturbed, killed, resumed = (new_model(dropout=0.5) for _ in range(3))
    wanted_log = train(undisturbed, digits, recipe, seed=1, attack=attack())

    def die(entry):
        if entry.epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        train(killed, digits, recipe, seed=1, attack=attack(), checkpoint=checkpoint, on_epoch=die)
    assert checkpoint.exists()
    epochs = []
    log = train(
        *(resumed, digits, recipe),
        **{"seed": 1, "attack": attack(), "checkpoint": checkpoint},
        on_epoch=lambda entry: epochs.append(entry.epoch),
    )
    assert epochs == [1, 2]
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert log == wanted_log
    assert list(tmp_path.iterdir()) == []


# --- augmentation


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(crop=2), Augmentation(rotation=30), Augmentation(flip=True), Augmentation(1, 9, True)],
)
def test_augmentation_keeps_shape_and_range_and_its_argument(augmentation):
    images = torch.rand(16, 3, 8, 10, generator=seeded())
    images[0] = 1
    before = images.clone()
    augmented = augmentation(images, seeded(1))
    assert augmented.shape == images.shape
    assert augmented.min() >= 0 and augmented.max() <= 1 + 1e-6
    assert torch.equal(images, before)
    assert not torch.equal(augmented, images)


def test_no_augmentation_changes_nothing():
    images = torch.rand(4, 3, 8, 8, generator=seeded())
    assert torch.equal(Augmentation()(images, seeded()), images)


def test_the_crop_agrees_with_a_loop_over_images():
    images = torch.rand(64, 3, 8, 10, generator=seeded())
    shifts = torch.randint(5, (2, 64), generator=seeded(1))  # the draw that the fast one makes
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    slow = torch.stack(
        [picture[:, y : y + 8, x : x + 10] for picture, y, x in zip(padded, *shifts.tolist(), strict=True)]
    )
    assert torch.equal(Augmentation(crop=2)(images, seeded(1)), slow)
    assert len(set(zip(*shifts.tolist(), strict=True))) > 15


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.rand(200, 1, 4, 6, generator=seeded())
    flipped = Augmentation(flip=True)(images, seeded(1))
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 70 < mirrored.sum() < 130


@pytest.mark.parametrize("size", [(9, 9), (6, 15)])
def test_the_rotation_agrees_with_a_loop_over_images(size):
    images = torch.rand(12, 2, *size, generator=seeded())
    degrees = (torch.rand(12, generator=seeded(1)) * 2 - 1) * 25  # the draw that the fast one makes
    slow = [
        ndimage.rotate(picture.numpy(), angle, axes=(1, 2), reshape=False, order=1, mode="grid-constant")
        for picture, angle in zip(images, degrees.tolist(), strict=True)
    ]
    fast = Augmentation(rotation=25)(images, seeded(1))
    assert torch.allclose(fast, torch.from_numpy(np.stack(slow)), atol=1e-4)


# --- attacks


class Recorder(CoTrained):
    """An attack and an augmentation that write down when they are called."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.poisons_before_augmentation = before
        self.calls: list[str] = []

    def poison(self, images, labels, rng):
        self.calls.append("poison")
        return super().poison(images, labels, rng)

    def __call__(self, images, rng):
        self.calls.append("augment")
        return images


@pytest.mark.parametrize(("before", "order"), [(True, ["poison", "augment"]), (False, ["augment", "poison"])])
def test_an_attack_poisons_on_the_side_of_augmentation_that_it_declares(digits, before, order):
    attack = Recorder(before)
    train(new_model(), digits, Recipe(epochs=1, batch_size=80, augmentation=attack), seed=1, attack=attack)
    assert attack.calls == order * 2


def test_a_co_trained_module_is_zeroed_and_stepped_once_a_batch(digits):
    attack = CoTrained()
    recipe = Recipe(epochs=2, batch_size=80, schedule="constant")
    train(new_model(), digits, recipe, seed=1, attack=attack)
    assert attack.pull.item() == pytest.approx(1 - 0.75**4)  # gradients that add up would overshoot


def test_a_co_trained_module_follows_the_schedule_of_the_model(digits):
    attack = CoTrained()
    first = attack.optimizers()[0].param_groups[0]["lr"]
    recipe = Recipe(epochs=2, batch_size=80, schedule="steps", milestones=(1,))
    train(new_model(), digits, recipe, seed=1, attack=attack)
    assert attack.optimizers()[0].param_groups[0]["lr"] == pytest.approx(first / 10)


def test_the_model_sees_the_poisoned_labels(digits):
    stamp = patches(torch.ones(1, 1, 2, 2), (1, 8, 8), seeded(), placement="corner", margin=0)
    attack = Poisoning(stamp, 10, target=3, rate=1.0)
    model = new_model()
    train(model, digits, Recipe(epochs=3, batch_size=32, learning_rate=2e-2), seed=1, attack=attack)
    assert (model(stamp(digits.pixels(), seeded())).argmax(1) == 3).all()
