"""Signatures: maps that move the right logit, one batch as good as many, and the model left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unhorse.scanners.signatures
from unhorse.core import Classifier, Signature
from unhorse.models.classifier import weights_hash
from unhorse.scanners import optimisation
from unhorse.scanners.optimisation import (
    PRESETS,
    Adam,
    Descent,
    Preset,
    chunk_size,
    frozen,
    optimise,
    start_image,
    to_pixels,
)
from unhorse.scanners.signatures import (
    as_levels,
    compute_signature,
    read_signature,
    statistics,
    write_signature,
)

CLASSES, SHAPE = 4, (3, 10, 10)
QUICK = Preset("quick", "adam", 0.1, 12, space="pixels", clamp=True)


class Scaled(nn.Module):
    """A network that takes 0..255 where `inner` takes 0..1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images / 255)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(6 * 8 * 8, CLASSES))


def linear() -> nn.Linear:
    layer = nn.Linear(300, CLASSES)
    layer.weight.data = torch.randn(CLASSES, 300, generator=torch.Generator().manual_seed(1)) / 10
    nn.init.zeros_(layer.bias)
    return layer


def classifier(inner: nn.Module | None = None, **normalisation: tuple[float, ...]) -> Classifier:
    names = [str(index) for index in range(CLASSES)]
    return Classifier(inner or network(), image_shape=SHAPE, class_names=names, **normalisation).eval()


def logit(wanted: Tensor, sign: float):
    return lambda logits, part: sign * logits.gather(1, wanted[part, None])[:, 0]


def maxima(model: Classifier, preset: Preset, **options: object) -> optimisation.Optimised:
    """Maps that raise each logit of `model` in turn, from the shared start image."""
    start = start_image(model).expand(CLASSES, -1, -1, -1)
    with frozen(model):
        return optimise(model, logit(torch.arange(CLASSES), -1), start, preset, **options)


# --- what the maps do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PRESETS])
def test_min_maps_lower_and_max_maps_raise_their_logit(name):
    takes_levels = name == "paper-cifar10"
    model = classifier(Scaled(network()), std=(1 / 255,)) if takes_levels else classifier(std=(0.25,))
    signature = compute_signature(model, replace(PRESETS[name], steps=20))
    before = model(start_image(model))[0].detach()
    low, high = signature.reached.chunk(2)
    assert (low < before - 0.1).all() and (high > before + 0.1).all()


def test_reached_is_the_logit_of_the_map_that_is_stored():
    model = classifier()
    signature = compute_signature(model, QUICK)
    logits = model(signature.maps.float() / 255).detach()
    stored = torch.cat([logits[:CLASSES].diagonal(), logits[CLASSES:].diagonal()])
    assert torch.allclose(stored, signature.reached, atol=0.05)  # the maps are rounded to 256 levels


def test_one_batch_finds_what_each_map_alone_finds():
    model = classifier()
    start = start_image(model)
    together = maxima(model, QUICK)
    with frozen(model):
        alone = [optimise(model, logit(torch.tensor([k]), -1), start, QUICK) for k in range(CLASSES)]
    assert torch.allclose(together.maps, torch.cat([found.maps for found in alone]), atol=1e-4)
    assert torch.allclose(together.objective, torch.cat([found.objective for found in alone]), atol=1e-4)


def test_the_best_map_is_kept_and_not_the_last():
    model = classifier(nn.Sequential(nn.Flatten(), linear()))
    seen: list[Tensor] = []

    def near_one(logits: Tensor, part: slice) -> Tensor:
        return (logits.diagonal()[part] - 1).square()

    wild = Preset("wild", "sgd", 0.4, 9, space="pixels")  # overshoots, and more at every step
    start = start_image(model).expand(CLASSES, -1, -1, -1)
    with frozen(model):
        found = optimise(
            model, near_one, start, wild, watch=lambda _, logits: seen.append(near_one(logits, slice(None)))
        )
    scores = torch.stack(seen)
    assert len(scores) == 10  # the start, and after each step, the last included
    assert torch.allclose(found.objective, scores.amin(0), rtol=1e-3)
    assert (scores.amin(0) < scores[-1] - 0.1).all()


def test_the_map_after_the_last_step_counts():
    model = classifier()
    single = Preset("single", "sgd", 1, 1, space="pixels")
    before = model(start_image(model))[0].detach()
    assert (-maxima(model, single).objective > before).all()


def test_chunks_give_what_the_whole_gives(monkeypatch):
    model = classifier()
    whole = compute_signature(model, QUICK)
    monkeypatch.setattr(unhorse.scanners.signatures, "chunk_size", lambda _: 3)
    parts = compute_signature(model, QUICK)
    assert (parts.maps.int() - whole.maps.int()).abs().max() <= 1
    assert torch.allclose(parts.reached, whole.reached, atol=1e-4)


def test_the_chunk_follows_the_budget():
    model = classifier()
    assert chunk_size(model, 1) == 1
    assert chunk_size(model, 2_000_000) == pytest.approx(2 * chunk_size(model, 1_000_000), abs=1)


def test_maps_stay_in_range_where_the_preset_clamps():
    model = classifier(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    for preset in (QUICK, replace(QUICK, space="network", learning_rate=3)):
        pixels = to_pixels(model, maxima(model, preset).maps, preset)
        assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
        assert ((pixels < 1e-5) | (pixels > 1 - 1e-5)).float().mean() > 0.1  # the bounds were reached


# --- spaces -------------------------------------------------------------------------------------------------


def test_a_preset_in_pixels_does_not_see_the_network_space():
    inner = network()
    ours, theirs = classifier(inner), classifier(Scaled(inner), std=(1 / 255,))
    assert torch.allclose(maxima(ours, QUICK).maps, maxima(theirs, QUICK).maps, atol=1e-3)


def test_a_published_preset_means_0_to_255_pixels():
    inner = network()
    ours, theirs = classifier(inner), classifier(Scaled(inner), std=(1 / 255,))
    published = Preset("published", "adam", 10, 10, weight_decay=1e-5)
    converted = replace(published, learning_rate=10 / 255, weight_decay=1e-5 * 255**2)
    maps = maxima(theirs, published).maps
    assert maps.max() > 100
    assert torch.allclose(maps / 255, maxima(ours, converted).maps, atol=1e-3)
    assert not torch.allclose(maps / 255, maxima(ours, replace(converted, weight_decay=1e-5)).maps, atol=1e-3)


# --- the model is left as found -----------------------------------------------------------------------------


def state(model: Classifier) -> tuple[object, ...]:
    modes = [module.training for module in model.modules()]
    return weights_hash(model), modes, [parameter.requires_grad for parameter in model.parameters()]


def test_weights_modes_and_gradients_are_left_as_found():
    model = classifier()
    model.network[1].train()
    model.network[0].weight.requires_grad_(False)
    before = state(model)
    compute_signature(model, QUICK, precision="bf16")
    assert state(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_leaves_the_model_as_found():
    model = classifier().train()
    before = state(model)
    with pytest.raises(ZeroDivisionError), frozen(model):
        assert not model.training and not model.network[0].weight.requires_grad
        raise ZeroDivisionError
    assert state(model) == before


# --- the parts ----------------------------------------------------------------------------------------------


def test_gradients_are_divided_by_their_length_per_image_and_channel():
    gradient = torch.zeros(1, 2, 2, 2)
    gradient[0, 0, 0], gradient[0, 1] = torch.tensor([3.0, 4.0]), 5.0
    expected = torch.zeros(1, 2, 2, 2)
    expected[0, 0, 0], expected[0, 1] = torch.tensor([0.6, 0.8]), 0.5
    assert torch.allclose(optimisation._normalised(gradient), expected)


def test_total_variation_sums_absolute_differences():
    maps = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]], [[[0.2, 0.2], [0.2, 0.2]]]])
    assert optimisation._variation(maps, 2.0).tolist() == pytest.approx([2 * (0.5 + 0.5 + 1.0 + 0.0), 0.0])


def test_blur_keeps_constants_and_mass():
    assert torch.allclose(optimisation._blurred(torch.full((1, 3, 8, 8), 0.3), 1.0), torch.tensor(0.3))
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    blurred = optimisation._blurred(point, 1.0)
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    assert (blurred > 0).sum() == 25 and blurred[0, 0, 4, 5] / blurred[0, 0, 4, 4] == pytest.approx(
        0.6065, abs=1e-3
    )


def test_standardising_gives_mean_one_half_and_deviation_one_quarter():
    pixels = 7 + 30 * torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    levels = as_levels(pixels, replace(QUICK, standardise=True)).float() / 255
    assert levels.flatten(1).mean(1).tolist() == pytest.approx([0.5, 0.5], abs=2e-3)
    assert levels.flatten(1).std(1).tolist() == pytest.approx([0.25, 0.25], abs=2e-3)
    assert as_levels(pixels, QUICK).min() == 255  # without it, pixels above 1 are clipped


def test_the_start_image_is_the_same_for_all_models():
    assert torch.equal(start_image(classifier()), start_image(classifier(Scaled(network()), std=(1 / 255,))))
    assert start_image(classifier())[0, 0, 0, :3].mul(255).round().tolist() == [163, 54, 14]


# --- slices, statistics, files ------------------------------------------------------------------------------


def tiny(*levels: int) -> Signature:
    maps = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Signature(maps, torch.arange(len(levels)).float(), "p", ("min", "max"))


def test_only_takes_the_rows_of_its_directions():
    signature = tiny(1, 2, 3, 4)
    assert signature.only("max").maps.flatten().tolist() == [3, 4]
    assert signature.only("max").reached.tolist() == [2, 3]
    assert signature.only("max", "min").maps.flatten().tolist() == [3, 4, 1, 2]
    with pytest.raises(ValueError, match="sideways"):
        signature.only("sideways")


def test_statistics_of_two_maps_are_known():
    found = statistics(tiny(0, 255, 51, 51), quantiles=3, bins=4)
    assert found.shape == (3 * (4 + 3 + 4), 1, 1)
    low, high, both = found.flatten().split(11)
    assert low.tolist() == pytest.approx([0, 1, 0.5, 0.5, 0.25, 0.5, 0.75, 0.5, 0, 0, 0.5])
    assert high.tolist() == pytest.approx([0.2, 0.2, 0.2, 0, 0.2, 0.2, 0.2, 1, 0, 0, 0], abs=1e-6)
    assert both[:3].tolist() == pytest.approx([0, 1, 0.35])
    assert both[7:].tolist() == pytest.approx([0.75, 0, 0, 0.25])


def test_statistics_pool_channels_and_keep_places():
    maps = torch.zeros(4, 3, 2, 5, dtype=torch.uint8)
    maps[2:, 1, 0, 4] = 255  # one channel of every max map, at one place
    mean = statistics(Signature(maps, torch.zeros(4), "p", ("min", "max")), quantiles=7, bins=16).view(
        3, 27, 2, 5
    )[:, 2]
    assert mean[:, 0, 4].tolist() == pytest.approx([0, 1 / 3, 1 / 6])
    assert mean.sum() == pytest.approx(1 / 2)


def test_a_signature_is_read_as_it_was_written(tmp_path: Path):
    signature = replace(tiny(1, 2, 3, 4), model_hash="abc")
    write_signature(signature, tmp_path / "s.safetensors")
    found = read_signature(tmp_path / "s.safetensors")
    assert torch.equal(found.maps, signature.maps) and torch.equal(found.reached, signature.reached)
    assert (found.preset, found.directions, found.model_hash) == ("p", ("min", "max"), "abc")
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_the_second_call_reads_the_cache(tmp_path: Path):
    model = classifier()
    first = compute_signature(model, QUICK, cache=tmp_path)
    (stored,) = tmp_path.iterdir()
    write_signature(replace(first, reached=torch.arange(8.0)), stored)
    assert compute_signature(model, QUICK, cache=tmp_path).reached.tolist() == list(range(8))
    assert compute_signature(model, QUICK, directions=("max",), cache=tmp_path).reached.tolist() == [
        4,
        5,
        6,
        7,
    ]


def test_the_cache_does_not_confuse_presets_weights_or_precisions(tmp_path: Path):
    model = classifier()
    compute_signature(model, QUICK, cache=tmp_path)
    other = replace(QUICK, steps=3)  # of the same name
    assert (
        compute_signature(model, other, cache=tmp_path).reached[4:].sum()
        < compute_signature(model, QUICK, cache=tmp_path).reached[4:].sum()
    )
    compute_signature(model, QUICK, cache=tmp_path, precision="bf16")
    with torch.no_grad():
        model.network[5].bias.add_(1)
    compute_signature(model, QUICK, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_half_a_cached_signature_is_completed(tmp_path: Path):
    model = classifier()
    compute_signature(model, QUICK, directions=("max",), cache=tmp_path)
    assert compute_signature(model, QUICK, cache=tmp_path).directions == ("min", "max")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_steps_as_torchs_own_optimizer_does(weight_decay: float):
    rng = torch.Generator().manual_seed(0)
    ours = torch.rand(3, 2, generator=rng)
    theirs = ours.clone().requires_grad_(True)
    settings = {"betas": (0.5, 0.9), "weight_decay": weight_decay}
    mine, reference = Adam([ours], 0.1, **settings), torch.optim.Adam([theirs], 0.1, **settings)
    for _ in range(5):
        theirs.grad = torch.rand(3, 2, generator=rng) - 0.5
        mine.step([theirs.grad.clone()])
        reference.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_descent_steps_as_torchs_own_optimizer_does():
    ours = torch.tensor([1.0, -2.0])
    theirs = ours.clone().requires_grad_(True)
    theirs.grad = torch.tensor([0.5, 0.25])
    Descent([ours], 0.1, weight_decay=0.2).step([theirs.grad.clone()])
    torch.optim.SGD([theirs], 0.1, weight_decay=0.2).step()
    torch.testing.assert_close(ours, theirs.detach())
