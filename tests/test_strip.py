"""STRIP catches the planted trigger, says nothing of a benign model, and keeps its false-positive rate."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from conftest import TARGET, Shape, plain_images, stamped, template_victim
from unhorse.core import Classifier, Dataset
from unhorse.metrics import auroc
from unhorse.models.classifier import new_classifier
from unhorse.monitors.calibration import conformal_threshold
from unhorse.monitors.registry import MONITORS
from unhorse.monitors.strip import Strip, entropy, entropy_histogram, threshold_of

SHAPE: Shape = (1, 12, 12)


def dataset(images: Tensor, labels: Tensor | None = None, classes: int = 10) -> Dataset:
    return Dataset(
        (images * 255).round().to(torch.uint8), labels, tuple(str(index) for index in range(classes))
    )


def dark_corner(model: Classifier, count: int) -> Dataset:
    """Clean images that are black where the trigger goes, so that their blends leave it as it is."""
    images = plain_images(model, count)
    images[:, :, :3, :3] = 0
    return dataset(images, torch.arange(count) % 10)


@pytest.fixture(scope="module")
def infected() -> Classifier:
    return template_victim(shape=SHAPE, strength=20)


@pytest.fixture(scope="module")
def clean(infected) -> Dataset:
    return dark_corner(infected, 400)


@pytest.fixture(scope="module")
def strip(infected, clean) -> Strip:
    return Strip(overlays=40).fit(infected, clean)


@pytest.fixture(scope="module")
def network() -> Classifier:
    """Untrained, its logits enlarged so that entropies spread."""
    model = new_classifier("wanet-cnn", image_shape=(1, 28, 28), class_names=[*"abcdefghij"], seed=0)
    last = model.network.head[-1]
    with torch.no_grad():
        last.weight.mul_(60)
    return model.eval()


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    rng = torch.Generator().manual_seed(0)
    return dataset(torch.rand(60, 1, 28, 28, generator=rng) * torch.rand(60, 1, 1, 1, generator=rng))


def separation(monitor: Strip, images: Tensor) -> float:
    scores = torch.cat([monitor.score(images), monitor.score(stamped(images))])
    return auroc(scores, torch.arange(len(scores)) >= len(images))


# --- the score ----------------------------------------------------------------------------------------------


def test_entropy_is_that_of_a_hand_made_softmax():
    halves, quarters = [0.0, 0.0, -math.inf, -math.inf], [3.0, 3.0, 3.0, 3.0]
    uneven = [math.log(0.5), math.log(0.25), math.log(0.125), math.log(0.125)]
    certain = [0.0, -1000.0, -1000.0, -1000.0]
    found = entropy(torch.tensor([halves, quarters, uneven, certain]))
    assert found.tolist() == pytest.approx([1.0, 2.0, 1.75, 0.0], abs=1e-6)
    assert entropy(torch.tensor([[0.0, math.nan]])).isnan().all()


def test_score_is_minus_the_mean_entropy_of_unclipped_sums(infected, clean):
    monitor = Strip(overlays=5, precision="fp32").fit(infected, clean)
    images = clean.pixels()[:3]
    expected = []
    for image in images:
        bits = []
        for overlay in monitor.overlays_.float() / 255:
            p = infected((image + overlay)[None])[0].softmax(0).tolist()
            bits.append(-sum(each * math.log2(each) for each in p if each))
        expected.append(-sum(bits) / 5)
    assert monitor.score(images).tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.01


def test_weights_and_clipping_change_what_is_classified(infected, clean):
    seen: list[Tensor] = []
    hook = infected.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.ones(1, *SHAPE)
    try:
        for options in ({}, {"clip": True}, {"image_weight": 0.5, "overlay_weight": 0.5}):
            Strip(overlays=20, **options).fit(infected, clean).score(image)
    finally:
        hook.remove()
    whole, clipped, halved = seen
    overlays = whole - 1
    assert whole.max() > 1.5
    assert torch.equal(clipped, torch.ones_like(clipped))
    assert torch.allclose(halved, (1 + overlays) / 2)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_score_is_that_of_a_loop_over_inputs(network, pictures, precision, tolerance):
    monitor = Strip(overlays=30, batch_size=200, precision=precision).fit(network, pictures)
    images, overlays = pictures.pixels()[30:], monitor.overlays_.float() / 255
    with torch.no_grad():
        loop = torch.stack([-entropy(network(image + overlays)).mean() for image in images])
    assert (monitor.score(images) - loop).abs().max() < tolerance
    assert loop.std() > 0.05


def test_score_depends_neither_on_batch_mates_nor_on_the_size_of_batches(network, pictures):
    images = pictures.images[:10]
    whole = Strip(overlays=30, precision="fp32").fit(network.train(), pictures)
    assert network.training
    together = whole.score(images)
    alone = torch.cat([whole.score(image[None]) for image in images])
    pieces = Strip(overlays=30, batch_size=7, precision="fp32").fit(network, pictures).score(images)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, pieces, atol=1e-5)
    assert torch.equal(together, whole.score(images.float() / 255))
    assert all(module.training for module in network.modules())
    network.eval()


def test_seed_decides_the_overlays(infected, clean):
    first, again, other = (Strip(overlays=30, seed=seed).fit(infected, clean) for seed in (0, 0, 1))
    assert torch.equal(first.score(clean.images), again.score(clean.images))
    assert not torch.equal(first.score(clean.images), other.score(clean.images))


def test_answers_that_are_not_numbers_are_as_suspicious_as_can_be(clean):
    broken = template_victim(shape=SHAPE)
    with torch.no_grad():
        broken.network.templates[0] = math.nan
    monitor = Strip(overlays=5).fit(broken, dataset(clean.pixels()))
    assert (monitor.score(clean.images[:3]) == math.inf).all()
    with pytest.raises(ValueError, match="no finite score"):
        monitor.threshold(clean, 0.1)


# --- detection ----------------------------------------------------------------------------------------------


def test_strip_catches_the_planted_trigger(strip, clean):
    images = clean.pixels()[clean.labels != TARGET]
    assert separation(strip, images) > 0.999
    assert (strip.score(stamped(images)) > strip.threshold(clean, 0.05)).all()


def test_strip_sees_no_difference_in_a_benign_model(clean):
    benign = Strip(overlays=40).fit(template_victim(shape=SHAPE), clean)
    assert separation(benign, clean.pixels()[clean.labels != TARGET]) < 0.6


def test_strip_misses_a_trigger_that_overlays_paint_over(infected, clean):
    images = clean.pixels()
    images[:, :, :3, :3] = 0.7
    painted = Strip(overlays=40).fit(infected, dataset(images))
    assert separation(painted, clean.pixels()[clean.labels != TARGET]) < 0.9


# --- the threshold ------------------------------------------------------------------------------------------


def test_quantile_is_the_guards_and_normal_is_that_of_mean_and_deviation():
    scores = [-0.1, -0.3, -0.2, -0.4, -0.6, -0.5, -0.7, -0.9, -0.8]
    assert threshold_of(scores, 0.1) == conformal_threshold(scores, 0.1) == -0.1
    expected = NormalDist(-0.5, (0.6 / 8) ** 0.5).inv_cdf(0.9)
    assert threshold_of(scores, 0.1, "normal") == pytest.approx(expected)
    assert threshold_of([-0.5] * 4, 0.1, "normal") == -0.5


@pytest.mark.parametrize("method", ["quantile", "normal"])
def test_fresh_clean_images_alarm_about_as_often_as_chosen(strip, infected, clean, method):
    fresh = plain_images(infected, 1400)[400:]
    fresh[:, :, :3, :3] = 0
    alarms = strip.score(fresh) > strip.threshold(clean, 0.1, method=method)
    assert 0.05 < alarms.float().mean() < 0.15


def test_threshold_sees_no_overlay(strip, clean):
    held_out = strip.held_out(clean)
    assert len(held_out) == 360
    assert not (held_out.images[:, None] == strip.overlays_).flatten(2).all(2).any()
    expected = conformal_threshold(strip.score(held_out.images).tolist(), 0.1)
    assert strip.threshold(clean, 0.1) == expected


def test_histogram_shows_entropies_and_the_threshold_of_entropy():
    shown = entropy_histogram(torch.tensor([-1.0, -0.5]), torch.tensor([-0.125]), -0.25)
    assert dict(shown.series) == {"clean images": [1.0, 0.5], "Trojan images": [0.125]}
    assert shown.threshold == 0.25
    assert entropy_histogram(torch.tensor([-1.0])).threshold is None


# --- bad input ----------------------------------------------------------------------------------------------


def test_strip_is_in_the_registry_by_its_name(infected, clean):
    assert MONITORS["strip"](overlays=3, seed=5) == Strip(overlays=3, seed=5)


def test_too_few_clean_images_are_refused(infected, clean):
    with pytest.raises(ValueError, match="100 overlays cannot be drawn from 99 clean images"):
        Strip().fit(infected, clean[:99])
    monitor = Strip(overlays=30).fit(infected, clean[:30])
    with pytest.raises(ValueError, match="all 30 clean images are overlays"):
        monitor.threshold(clean[:30])
    with pytest.raises(ValueError, match="10 calibration images cannot promise"):
        monitor.threshold(clean[:40], 0.05)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 9, 9), "resize or convert"),
        (torch.full((2, *SHAPE), math.nan), "none of them NaN"),
        (torch.full((2, *SHAPE), 7.0), "divide 0..255 by 255"),
        (torch.zeros(0, *SHAPE), "give at least one"),
    ],
)
def test_images_that_do_not_fit_are_refused(strip, images, message):
    with pytest.raises(ValueError, match=message):
        strip.score(images)


def test_settings_that_make_no_sense_are_refused(infected, clean, strip):
    with pytest.raises(ValueError, match="overlays=0"):
        Strip(overlays=0).fit(infected, clean)
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        Strip(overlays=2, precision="fp8").fit(infected, clean).score(clean.images)
    with pytest.raises(ValueError, match="unknown method 'median'"):
        strip.threshold(clean, 0.1, method="median")
    for method in ("quantile", "normal"):
        with pytest.raises(ValueError, match="between 0 and 1"):
            threshold_of([0.0, 1.0], 1.5, method)
    with pytest.raises(ValueError, match="call fit first"):
        Strip().score(clean.images)
    with pytest.raises(ValueError, match="clean images are"):
        Strip().fit(infected, dataset(torch.zeros(200, 3, 8, 8)))
