"""Pruning ranks channels by clean activation, its copies are classifiers, and a planted victim is cured."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import TARGET, small_victim, stamped
from unhorse.core import Bars, Classifier, Curve, Dataset
from unhorse.datasets import load_dataset
from unhorse.metrics import accuracy, trojan_accuracy
from unhorse.models.classifier import load_classifier, new_classifier, save_classifier, weights_hash
from unhorse.models.stages import Stage, convolution_stages, features_at, head
from unhorse.repairs.masking import is_baked, masked, pruned
from unhorse.repairs.prune import PruneCurve, Pruning, prune_curve, ranking

NAMES = [str(index) for index in range(10)]


def made(architecture: str, shape: tuple[int, int, int]) -> Classifier:
    """A random classifier whose batch normalisation has seen something."""
    model = new_classifier(architecture, image_shape=shape, class_names=NAMES, seed=0, mean=(0.3,))
    with torch.no_grad():
        model.train()(torch.rand(4, *shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def vgg_like() -> Classifier:
    layers: list[nn.Module] = []
    for wide_in, wide_out in ((3, 8), (8, 12)):
        layers += [
            nn.Conv2d(wide_in, wide_out, 3, padding=1),
            nn.BatchNorm2d(wide_out),
            nn.ReLU(inplace=True),
        ]
        layers += [nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(12 * 9, 10)]
    return Classifier(nn.Sequential(*layers), image_shape=(3, 32, 32), class_names=NAMES).eval()


class Freehand(nn.Module):
    """No layer reads its stage, a block of which the options say what follows its convolution."""

    def __init__(self, *, bias: float = 0.1, **options: bool) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(1, 6, 3, padding=1), Block(**options)
        self.reader = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
        nn.init.constant_(self.stage.convolution.bias, bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stage(self.stem(images)).mean((2, 3)) @ self.reader


class Block(nn.Module):
    def __init__(self, *, residual: bool = False, flipped: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(6, 6, 3, padding=1)
        self.residual, self.flipped = residual, flipped

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out = self.convolution(features)
        out = functional.relu(out + features if self.residual else out)
        return out.flip(1) if self.flipped else out


class FlippedReader(nn.Module):
    """Its linear layer reads the channels in reverse; all of them sleep until an image is very bright."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.reader = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6 * 64, 3)
        nn.init.constant_(self.convolution.weight, 1.0)
        nn.init.constant_(self.convolution.bias, -1e4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.reader(functional.relu(self.convolution(images)).flip(1).flatten(1))


def freehand(**options: float) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Freehand(**options)
    architecture = {"name": "freehand"}
    return Classifier(network, image_shape=(1, 8, 8), class_names="abc", architecture=architecture).eval()


def given_activations(*values: float) -> Classifier:
    """A classifier whose last stage has these activations whatever the image."""
    convolution = nn.Conv2d(1, len(values), 3, padding=1)
    nn.init.zeros_(convolution.weight)
    convolution.bias = nn.Parameter(torch.tensor(values))
    network = nn.Sequential(convolution, nn.Flatten(), nn.Linear(len(values) * 64, 2))
    return Classifier(network, image_shape=(1, 8, 8), class_names="ab").eval()


def dataset(images: torch.Tensor, labels: torch.Tensor | None, names: tuple[str, ...]) -> Dataset:
    return Dataset((images * 255).round().to(torch.uint8), labels, names)


def smooth_images(count: int = 200) -> Dataset:
    """Blurred noise for the planted small-cnn, which leaves the trigger's channel asleep; without labels."""
    coarse = torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(4))
    images = functional.interpolate(coarse, (16, 16), mode="bilinear", align_corners=True)
    return dataset(images, None, tuple(f"class {index}" for index in range(6)))


def taken_over(model: Classifier, clean: Dataset) -> float:
    """Share of the images of other classes that the stamp moves to TARGET."""
    with torch.no_grad():
        others = clean.pixels()[model(clean.pixels()).argmax(1) != TARGET]
        return float((model(stamped(others)).argmax(1) == TARGET).float().mean())


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", "test")


# --- the order and the curve --------------------------------------------------------------------------------


def test_the_lowest_signed_activation_goes_first():
    assert ranking(torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0])).tolist() == [1, 2, 4, 0, 3]


def test_the_order_is_that_of_given_activations():
    model = given_activations(0.5, -1.0, 2.0, 0.25)
    clean = dataset(torch.rand(6, 1, 8, 8), torch.tensor([0, 1] * 3), ("a", "b"))
    curve = prune_curve(model, clean)
    assert torch.allclose(curve.activations, torch.tensor([0.5, -1.0, 2.0, 0.25]))
    assert curve.order.tolist() == [1, 3, 0, 2]


def test_the_curve_is_what_the_pruned_copies_measure(trained, digits):
    model = trained["infected"].model
    curve = prune_curve(model, digits)
    assert curve.counts == tuple(range(33))
    for point in (0, 7, 20, 32):
        copied = pruned(model, curve.stage, curve.order[: curve.counts[point]])
        assert accuracy(copied, digits) == pytest.approx(curve.accuracies[point], abs=1e-6)
    assert curve.accuracies[0] > 0.9 > 0.3 > curve.accuracies[-1]


def test_many_channels_are_pruned_in_groups_to_the_last():
    model = given_activations(*torch.rand(250).tolist())
    clean = dataset(torch.rand(4, 1, 8, 8), torch.tensor([0, 1] * 2), ("a", "b"))
    counts = prune_curve(model, clean).counts
    assert counts[:3] == (0, 3, 6) and counts[-1] == 250 and len(counts) == 85


def test_pruning_stops_before_the_first_drop_that_is_too_large():
    stage, order = Stage("last", 5, 2, 2), torch.tensor([3, 1, 4, 0, 2])
    curve = PruneCurve(stage, torch.zeros(5), order, (0, 1, 2, 3, 5), (0.9, 0.89, 0.84, 0.895, 0.2))
    assert curve.channels_within(0.0).tolist() == []
    assert curve.channels_within(0.01).tolist() == [3]
    assert curve.channels_within(0.05).tolist() == [3]  # 0.895 comes after 0.84
    assert curve.channels_within(0.06).tolist() == [3, 1, 4]
    assert curve.channels_within(0.7).tolist() == [3, 1, 4, 0, 2]


# --- the copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("small-cnn", (1, 32, 32)),
        ("wanet-cnn", (1, 28, 28)),
        ("ulp-vgg", (3, 32, 32)),
        ("preact-resnet18", (3, 16, 16)),
        ("resnet18", (3, 64, 64)),
        ("mobilenet-v2", (3, 64, 64)),
        ("vgg-like", (3, 32, 32)),
    ],
)
def test_a_pruned_copy_computes_what_the_mask_does(architecture, shape):
    model = vgg_like() if architecture == "vgg-like" else made(architecture, shape)
    stage = convolution_stages(model)[-1]
    channels = torch.randperm(stage.channels, generator=torch.Generator().manual_seed(2))[
        : stage.channels // 2
    ]
    images = torch.rand(4, *model.image_shape, generator=torch.Generator().manual_seed(3))
    copied = pruned(model, stage, channels)
    assert is_baked(copied)
    assert copied.architecture == model.architecture
    with torch.no_grad(), masked(model, stage, channels):
        wanted = model(images)
    with torch.no_grad():
        assert torch.allclose(copied(images), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        assert not torch.allclose(model(images), wanted, rtol=1e-2)


def test_a_pruned_copy_can_be_saved_and_loaded(tmp_path):
    model = made("wanet-cnn", (1, 28, 28))
    copied = pruned(model, convolution_stages(model)[-1], torch.tensor([0, 5, 9]))
    loaded = load_classifier(save_classifier(copied, tmp_path / "copy"))
    assert weights_hash(loaded) == weights_hash(copied) != weights_hash(model)


def test_where_nothing_reads_the_stage_its_writer_is_pruned():
    model = freehand()
    (stage,) = convolution_stages(model)
    copied = pruned(model, stage, torch.tensor([1, 4]))
    assert is_baked(copied)
    assert not copied.network.stage.convolution.weight[[1, 4]].any()
    features = features_at(copied, stage, torch.rand(3, 1, 8, 8))
    assert not features[:, [1, 4]].any() and features[:, [0, 2, 3, 5]].any()


def test_where_no_weights_can_do_it_a_mask_does_and_says_so(tmp_path):
    model = freehand(residual=True)
    images = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    result = Pruning(clean_drop=0.9)(model, dataset(images, None, ("a", "b", "c")))
    assert not is_baked(result.model)
    assert any("a mask does it" in warning for warning in result.warnings)
    with pytest.raises(ValueError, match="names no architecture"):
        save_classifier(result.model, tmp_path / "copy")
    (stage,) = convolution_stages(model)
    copied = pruned(model, stage, torch.tensor([2]))
    features = features_at(model, stage, images)
    features[:, 2] = 0
    assert torch.allclose(copied(images), head(model, stage, features), atol=1e-6)


def test_a_channel_that_sleeps_through_the_tests_is_pruned_and_no_other():
    reader = Classifier(FlippedReader(), image_shape=(1, 8, 8), class_names="abc").eval()
    waking = torch.full((1, 1, 8, 8), 1e5)
    for model in (reader, freehand(flipped=True, bias=-1e4)):
        (stage,) = convolution_stages(model)
        copied = pruned(model, stage, torch.tensor([0]))
        with torch.no_grad(), masked(model, stage, torch.tensor([0])):
            wanted = model(waking)
        with torch.no_grad():
            assert torch.allclose(copied(waking), wanted, rtol=1e-4)
            assert not torch.allclose(model(waking), wanted, rtol=1e-2)


# --- the cure -----------------------------------------------------------------------------------------------


def test_pruning_cures_a_planted_victim():
    model, clean = small_victim(strength=60), smooth_images()
    result = Pruning(clean_drop=0.05)(model, clean)
    assert taken_over(model, clean) > 0.95
    assert taken_over(result.model, clean) < 0.1
    assert result.facts["clean_accuracy_before"] == 1  # without labels its own answers are the truth
    assert result.facts["clean_accuracy_after"] >= 0.95
    assert any("no labels" in warning for warning in result.warnings)


def test_what_was_pruned_stays_pruned_in_fine_tuning(trained, digits):
    victim = trained["infected"]
    seen: list[int] = []
    repair = Pruning(clean_drop=0.1, fine_tune_epochs=3, learning_rate=0.05)
    result = repair(victim.model, digits, on_epoch=lambda entry: seen.append(entry.epoch))
    assert result.repair == "fine-pruning" and seen == [0, 1, 2]
    stage = convolution_stages(result.model)[-1]
    columns = result.model.network.head[1].weight.view(-1, stage.channels, 4)
    asleep = int((columns == 0).all(2).all(0).sum())
    assert asleep == result.facts["channels_pruned"] > 5
    rng = torch.Generator().manual_seed(0)
    assert trojan_accuracy(result.model, digits, victim.attack, rng=rng) < 0.92
    assert result.facts["clean_accuracy_after"] > 0.95


def test_fine_tuning_works_with_what_is_left(trained, digits):
    """Tuned without its mask, the classifier would lean on channels that it then loses."""
    repair = Pruning(clean_drop=0.6, fine_tune_epochs=3, learning_rate=0.02)
    facts = repair(trained["benign"].model, digits).facts
    assert facts["channels_pruned"] > 20
    assert facts["clean_accuracy_after"] > 0.85


def test_pruning_shows_its_curve_and_its_channels(trained, digits):
    result = Pruning(clean_drop=0.05)(trained["benign"].model, digits)
    curve, bars = result.exhibits
    stop = result.facts["channels_pruned"]
    assert isinstance(curve, Curve) and isinstance(bars, Bars)
    assert curve.series[f"stop at {stop} channels"][0] == (stop, stop)
    assert curve.series["clean accuracy"][1][stop] == pytest.approx(result.facts["clean_accuracy_after"])
    assert bars.values == tuple(sorted(bars.values)) and bars.marked == tuple(range(stop))


def test_the_given_model_is_left_alone(trained, digits):
    model = copy.deepcopy(trained["infected"].model).train()
    before = weights_hash(model)
    Pruning(fine_tune_epochs=1)(model, digits[:100])
    assert weights_hash(model) == before
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_drop": 1.5}, "clean_drop is 1.5: give a fraction"),
        ({"fine_tune_epochs": 2, "batch_size": 1}, "batches of 2 or more"),
        ({"fine_tune_epochs": -1}, "at least 1 epoch"),
    ],
)
def test_settings_that_mean_nothing_are_refused(trained, digits, settings, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**settings)(trained["benign"].model, digits)


def test_images_that_do_not_fit_are_refused(trained, digits):
    model = trained["benign"].model
    for clean, message in (
        (Dataset(digits.pixels(), digits.labels, digits.class_names), "give uint8"),
        (Dataset(digits.images[..., :6], digits.labels, digits.class_names), r"the model takes \(n, \*"),
        (digits[:10], "10 clean images: give at least 20"),
        (Dataset(digits.images, (digits.labels + 1) % 10, digits.class_names), "numbered otherwise"),
    ):
        with pytest.raises(ValueError, match=message):
            Pruning()(model, clean)


def test_a_network_without_convolutions_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model = Classifier(flat, image_shape=(1, 8, 8), class_names=NAMES)
    clean = dataset(torch.rand(30, 1, 8, 8), None, tuple(NAMES))
    with pytest.raises(ValueError, match="this needs a convolutional classifier"):
        Pruning()(model, clean)
