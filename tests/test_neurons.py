"""The neuron check finds images that carry a reversed trigger, and asks for the scan that reverses one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import TARGET, Shape, board, plain_images, small_victim, stamped, template_victim
from unhorse.core import Classifier, Dataset, ReconstructedTrigger, ScanResult, Verdict
from unhorse.datasets import load_dataset, split_dataset
from unhorse.metrics import auroc
from unhorse.models.classifier import new_classifier
from unhorse.monitors.calibration import conformal_threshold
from unhorse.monitors.neurons import NeuronCheck, most_excited
from unhorse.monitors.registry import MONITORS

SHAPE: Shape = (1, 16, 16)


def reversed_trigger(shape: Shape = SHAPE) -> ReconstructedTrigger:
    """The planted trigger as a scan would return it if it were perfect."""
    mask, pattern = torch.zeros(1, *shape[1:]), torch.zeros(shape)
    mask[:, :3, :3], pattern[:, :3, :3] = 1, board(3)
    return ReconstructedTrigger(mask, pattern, 1.0)


def finding(*triggers: ReconstructedTrigger, target: int | None = TARGET) -> ScanResult:
    numbered = {TARGET + index: trigger for index, trigger in enumerate(triggers)}
    return ScanResult(Verdict.INFECTED, "neural-cleanse", target=target, triggers=numbered)


def smooth_images(count: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=rng)
    return torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")


def dataset(images: Tensor, classes: int = 6) -> Dataset:
    return Dataset(
        (images * 255).round().to(torch.uint8), None, tuple(str(index) for index in range(classes))
    )


@pytest.fixture(scope="module")
def infected() -> Classifier:
    return small_victim(strength=60)


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return dataset(smooth_images(200, 0))


@pytest.fixture(scope="module")
def check(infected, clean) -> NeuronCheck:
    return NeuronCheck().fit(infected, clean, finding(reversed_trigger()))


def separation(monitor: NeuronCheck, plain: Tensor, trojaned: Tensor) -> float:
    scores = torch.cat([monitor.score(plain), monitor.score(trojaned)])
    return auroc(scores, torch.arange(len(scores)) >= len(plain))


# --- known answers ------------------------------------------------------------------------------------------


def test_neurons_rank_by_the_activation_that_the_trigger_adds():
    plain = torch.tensor([[0.0, 5.0, 1.0, 2.0], [2.0, 5.0, 1.0, 0.0]])
    under_trigger = torch.tensor([[1.0, 5.0, 9.0, 5.0], [1.0, 5.0, 9.0, 1.0]])  # gaps 0, 0, 8, 2
    assert most_excited(plain, under_trigger, 0.01).tolist() == [2]
    assert most_excited(plain, under_trigger, 0.5).tolist() == [2, 3]


def test_score_is_the_mean_over_watched_neurons_in_clean_deviations(infected, clean):
    monitor = NeuronCheck(share=0.05).fit(infected, clean, finding(reversed_trigger()))
    network = infected.network
    with torch.no_grad():
        layers = [*network.features, *network.head][:-1]
        found = []
        for images in (clean.pixels(), stamped(clean.pixels())):
            for layer in layers:
                images = layer(images)
            found.append(images)
    plain, under_trigger = found
    watched = (under_trigger - plain).mean(0).argsort(descending=True)[:3]
    assert sorted(monitor.neurons_.tolist()) == sorted(watched.tolist())
    spread = plain.std(0, correction=0)
    spread = spread.clamp_min(0.1 * spread.mean())
    expected = ((under_trigger - plain.mean(0)) / spread)[:, watched].mean(1)
    assert torch.allclose(monitor.score(stamped(clean.pixels())), expected, rtol=1e-4, atol=1e-4)


def test_planted_neuron_is_watched(check):
    assert check.neurons_.tolist() == [0]  # conftest leads the trigger through neuron 0


# --- detection ----------------------------------------------------------------------------------------------


def test_check_catches_the_planted_trigger_on_fresh_images(check, clean):
    fresh = smooth_images(200, 1)
    assert separation(check, fresh, stamped(fresh)) > 0.999


def test_check_sees_no_difference_in_a_benign_model(clean):
    benign = small_victim()
    monitor = NeuronCheck().fit(benign, clean, finding(reversed_trigger()))
    fresh = smooth_images(200, 1)
    assert separation(monitor, fresh, stamped(fresh)) < 0.98


def test_check_catches_a_trained_trojan_by_its_patch(trained):
    victim = trained["infected"]
    test = load_dataset("digits", "test")
    fitting, calibration, fresh = split_dataset(test, (0.3, 0.4, 0.3), seed=0)
    stamp = victim.attack.trigger
    trigger = ReconstructedTrigger(stamp.masks[0], stamp.patterns[0])
    monitor = NeuronCheck().fit(victim.model, fitting, finding(trigger))
    threshold = conformal_threshold(monitor.score(calibration.images).tolist(), 0.05)
    plain = fresh[victim.attack.eligible(fresh.labels)].pixels()
    trojaned = trigger(plain, torch.Generator())
    assert separation(monitor, plain, trojaned) > 0.99
    assert (monitor.score(trojaned) > threshold).float().mean() > 0.9
    assert (monitor.score(plain) > threshold).float().mean() < 0.12


def test_flagged_class_decides_the_trigger_and_otherwise_the_smallest_mask(infected, clean):
    half = torch.zeros(1, *SHAPE[1:])
    half[:, :, 8:] = 1
    other = ReconstructedTrigger(half, torch.ones(SHAPE))
    both = NeuronCheck().fit(infected, clean, finding(reversed_trigger(), other))
    unflagged = NeuronCheck().fit(infected, clean, finding(other, reversed_trigger(), target=None))
    misled = NeuronCheck().fit(infected, clean, finding(other, reversed_trigger()))
    assert both.neurons_.tolist() == unflagged.neurons_.tolist() == [0]
    assert misled.neurons_.tolist() != [0]


# --- the layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [("input-aware-cnn", (1, 28, 28), 512), ("ulp-vgg", (3, 32, 32), 192)],
)
def test_layer_is_found_whatever_the_architecture(name, shape, width):
    model = new_classifier(name, image_shape=shape, class_names=[*"abc"], seed=0)
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    monitor = NeuronCheck(share=0.02).fit(model, dataset(images, 3), finding(reversed_trigger(shape)))
    assert len(monitor.neurons_) == round(0.02 * width)
    assert int(monitor.neurons_.max()) < width
    assert monitor.score(images).isfinite().all()


def test_classifier_without_a_last_linear_layer_is_refused():
    model = template_victim(6, SHAPE)
    with pytest.raises(ValueError, match="ends in a linear layer, and template does not"):
        NeuronCheck().fit(model, dataset(plain_images(model, 20)), finding(reversed_trigger()))


# --- behaviour and bad input --------------------------------------------------------------------------------


def test_score_does_not_depend_on_batch_mates_and_the_model_is_left_as_found(infected, clean):
    infected.train()
    monitor = NeuronCheck(share=0.1, batch_size=7).fit(infected, clean, finding(reversed_trigger()))
    together = monitor.score(clean.images)
    alone = torch.cat([monitor.score(image[None]) for image in clean.images[:10]])
    assert torch.allclose(together[:10], alone, atol=1e-4)
    assert together.std() > 0
    assert all(module.training and not module._forward_pre_hooks for module in infected.modules())
    infected.eval()


def test_activations_that_are_not_numbers_are_as_suspicious_as_can_be(clean):
    model = small_victim(strength=60)
    monitor = NeuronCheck().fit(model, clean, finding(reversed_trigger()))
    with torch.no_grad():
        model.network.head[1].bias[0] = math.nan
    assert (monitor.score(clean.images[:3]) == math.inf).all()


@pytest.mark.parametrize("nothing", [None, finding()])
def test_check_without_a_trigger_names_the_scan_to_run(infected, clean, nothing):
    with pytest.raises(ValueError, match="unhorse scan MODEL --clean IMAGES --scanner neural-cleanse"):
        NeuronCheck().fit(infected, clean, nothing)


def test_what_does_not_fit_is_refused(infected, clean, check):
    with pytest.raises(ValueError, match="give a finding of this model"):
        NeuronCheck().fit(infected, clean, finding(reversed_trigger((1, 28, 28))))
    with pytest.raises(ValueError, match="share=0"):
        NeuronCheck(share=0).fit(infected, clean, finding(reversed_trigger()))
    with pytest.raises(ValueError, match="resize or convert"):
        check.score(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="none of them NaN"):
        check.score(torch.full((2, *SHAPE), math.nan))
    with pytest.raises(ValueError, match="call fit first"):
        MONITORS["neurons"]().score(clean.images)
