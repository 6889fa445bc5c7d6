"""Signatures of many models at once: those of the models one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import unhorse.scanners.stacked_signatures as stacked
from unhorse.core import Classifier
from unhorse.models.classifier import new_classifier, weights_hash
from unhorse.scanners.optimisation import Preset
from unhorse.scanners.signatures import compute_signature
from unhorse.scanners.stacked_signatures import stacked_signatures

NAMES = "0123"
OPTIONS = {"widths": (4, 8), "hidden": 16}
PIXELS = Preset("quick", "adam", 0.1, 10, space="pixels", clamp=True)
NETWORK = Preset("quick-network", "adam", 5, 8, gradient_normalization=True, standardise=True)
BLURRED = Preset("quick-blur", "sgd", 5, 8, total_variation=1e-3, blur_every=3, clamp=True)


def models(count: int = 3, name: str = "small-cnn", **settings: object) -> list[Classifier]:
    chosen = {"image_shape": (2, 8, 8), "std": (0.25,), "options": OPTIONS} | settings
    return [new_classifier(name, class_names=NAMES, seed=seed, **chosen).eval() for seed in range(count)]


def resnets(count: int = 2) -> list[Classifier]:
    return models(count, "small-resnet", options={"widths": (4, 8)})


def assert_alike(found, wanted):
    assert torch.allclose(found.reached, wanted.reached, rtol=1e-3, atol=1e-4)
    levels = (found.maps.int() - wanted.maps.int()).abs()
    assert (levels > 1).float().mean() < 0.01
    assert (found.preset, found.directions) == (wanted.preset, wanted.directions)
    assert found.model_hash == wanted.model_hash


@pytest.mark.parametrize("preset", [PIXELS, NETWORK, BLURRED], ids=lambda preset: preset.name)
def test_stacked_signatures_are_those_of_the_models_one_by_one(preset):
    several = models()
    for model, found in zip(several, stacked_signatures(several, preset, precision="fp32"), strict=True):
        assert_alike(found, compute_signature(model, preset, precision="fp32"))
    assert not torch.equal(found.maps, stacked_signatures(several[:2], preset, precision="fp32")[0].maps)


def test_models_of_several_kinds_come_back_in_their_order():
    first, second = models(2), resnets()
    unstackable = Classifier(
        nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(128, 4)),
        image_shape=(2, 8, 8),
        class_names=NAMES,
    ).eval()
    mixed = [first[0], second[0], unstackable, first[1], second[1]]
    found = stacked_signatures(mixed, PIXELS, precision="fp32")
    for model, signature in zip(mixed, found, strict=True):
        assert_alike(signature, compute_signature(model, PIXELS, precision="fp32"))


def test_one_direction_can_be_asked_for():
    (found, _) = stacked_signatures(models(2), PIXELS, directions=("max",), precision="fp32")
    assert_alike(found, compute_signature(models(1)[0], PIXELS, directions=("max",), precision="fp32"))
    assert found.directions == ("max",) and len(found.maps) == 4


def test_chunks_over_models_change_nothing_but_rounding(monkeypatch):
    several = models(5)
    at_once = stacked_signatures(several, PIXELS, precision="fp32")
    sizes = []
    original = stacked.StackedClassifier
    monkeypatch.setattr(stacked, "chunk_size", lambda model: 17)  # 8 maps a model: two models a batch
    monkeypatch.setattr(stacked, "StackedClassifier", lambda some: sizes.append(len(some)) or original(some))
    for one, other in zip(stacked_signatures(several, PIXELS, precision="fp32"), at_once, strict=True):
        assert_alike(one, other)
    assert sizes == [2, 2]  # and the fifth alone


def test_the_cache_is_shared_with_signatures_one_by_one(tmp_path, monkeypatch):
    several = models()
    alone = compute_signature(several[0], PIXELS, cache=tmp_path)
    found = stacked_signatures(several, PIXELS, cache=tmp_path)
    assert torch.equal(found[0].maps, alone.maps)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(stacked, "optimise", None)
    again = stacked_signatures(several, PIXELS, cache=tmp_path)
    assert all(torch.equal(one.maps, other.maps) for one, other in zip(found, again, strict=True))
    assert torch.equal(compute_signature(several[2], PIXELS, cache=tmp_path).maps, found[2].maps)


def test_models_stay_as_they_are():
    several = models(2)
    several[0].train()
    before = [weights_hash(model) for model in several]
    stacked_signatures(several, PIXELS, device=torch.device("cpu"))
    assert [weights_hash(model) for model in several] == before
    assert [model.training for model in several] == [True, False]
    assert all(parameter.requires_grad for model in several for parameter in model.parameters())


def test_precision_is_chosen_by_the_size_of_one_model(monkeypatch):
    seen = []
    original = stacked.optimise
    monkeypatch.setattr(
        stacked,
        "optimise",
        lambda *args, **settings: seen.append(settings["precision"]) or original(*args, **settings),
    )
    monkeypatch.setattr(
        stacked, "bf16_pays", lambda model, device: not isinstance(model, stacked.StackedClassifier)
    )
    stacked_signatures(models(2), PIXELS)
    assert seen == ["bf16"]
