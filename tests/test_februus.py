"""Februus: maps and masks by hand, completion from clean images alone, and what a planted trigger is left."""

import builtins
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from conftest import TARGET, small_victim, stamped, template_victim
from unhorse.core import Classifier, Dataset
from unhorse.datasets import load_dataset
from unhorse.filters.completion import (
    CompletionNetwork,
    Critic,
    around,
    random_holes,
    slopes,
)
from unhorse.filters.februus import Februus, class_activation, region
from unhorse.filters.registry import FILTERS, filter_name, save_filter
from unhorse.metrics import trojan_accuracy
from unhorse.models.stages import convolution_stages
from unhorse.monitors.contrast import Contrast

NO_OPENCV = pytest.mark.skipif(
    find_spec("cv2") is None, reason="OpenCV is missing: pip install opencv-python-headless"
)
CPU = torch.device("cpu")
SHORT = {"width": 4, "batch_size": 50, "learning_rate": 1e-2, "precision": "fp32"}
SHAPE = (1, 16, 16)


class Linear(nn.Module):
    """Two filters of one pixel, the mean over all pixels, and a matrix: its map is known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 1, bias=False)
        self.head = nn.Linear(2, 2, bias=False)
        self.features.weight.data = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
        self.head.weight.data = torch.tensor([[3.0, 0.5], [-1.0, 0.0]])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


@pytest.fixture(scope="module")
def linear() -> Classifier:
    return Classifier(Linear(), image_shape=(1, 4, 4), class_names=("zero", "one")).eval()


@pytest.fixture(scope="module")
def victim() -> Classifier:
    """Its trigger is a checkerboard of 3x3 pixels in a corner, which it wants nearly whole: Grad-CAM marks
    the one cell of 2x2 pixels where its channel answers.
    """
    model = small_victim(strength=240)
    first = next(layer for layer in model.network.modules() if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        first.bias[0] = -4.0  # the answer to the trigger is 1, to all but two of its pixels 0
    return model


def flat_images(count: int) -> Dataset:
    """Smooth images, which a hole can be filled in of: a slope of random direction and level."""
    rng = torch.Generator().manual_seed(3)
    slope, level = torch.rand(2, count, 1, 1, generator=rng) - 0.5, torch.rand(count, 1, 1, generator=rng)
    place = torch.linspace(-1, 1, 16)
    images = 0.3 + 0.4 * level + 0.2 * (slope[0] * place + slope[1] * place[:, None])
    return Dataset((images[:, None] * 255).round().byte(), None, ())


@pytest.fixture(scope="module")
def clean() -> Dataset:
    return flat_images(200)


@pytest.fixture(scope="module")
def few(clean) -> Dataset:
    """One batch."""
    return clean[:50]


@pytest.fixture(scope="module")
def fitted(victim, clean) -> Februus:
    """40 steps."""
    return Februus(**SHORT | {"width": 8, "epochs": 10}).fit(victim, clean)


def weights(one: Februus) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in one.network_.state_dict().values()])


def predicted(model: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


# --- where the model looks


def test_the_map_of_a_linear_model_is_the_one_known_by_hand(linear):
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    (stage,) = convolution_stages(linear)
    # class 0 wins, 3 * x - 1 * x against -x; each of its gradients is its weight over 16 pixels
    assert predicted(linear, images).eq(0).all()
    assert torch.allclose(class_activation(linear, stage, images), (3 * 1 + 0.5 * -2) / 16 * images)


def test_the_map_is_of_the_class_that_each_image_gets(linear):
    turned = Classifier(Linear(), image_shape=(1, 4, 4), class_names=("zero", "one")).eval()
    turned.network.head.weight.data = torch.tensor([[-1.0, 0.0], [0.0, -1.0]])  # x for -x: class 1 wins
    images = torch.rand(2, 1, 4, 4)
    (stage,) = convolution_stages(turned)
    assert torch.allclose(class_activation(turned, stage, images), 2 / 16 * images)


def test_what_speaks_against_the_class_is_not_on_the_map(linear):
    turned = Classifier(Linear(), image_shape=(1, 4, 4), class_names=("zero", "one")).eval()
    turned.network.head.weight.data = torch.tensor([[-1.0, 0.0], [-2.0, 0.0]])
    (stage,) = convolution_stages(turned)
    assert class_activation(turned, stage, torch.rand(2, 1, 4, 4)).eq(0).all()


def test_a_smaller_map_is_enlarged_bilinearly(victim):
    stage = convolution_stages(victim)[-1]
    assert (stage.height, stage.width) == (8, 8)
    grown = class_activation(victim, stage, torch.rand(2, *SHAPE))
    assert grown.shape == (2, 1, 16, 16) and grown.amax() > 0
    first = grown[..., 0]  # lies left of the first cell's middle
    second = (grown[..., 2] - first / 4) / 0.75
    torch.testing.assert_close(grown[..., 1], 0.75 * first + 0.25 * second)


def test_the_model_is_left_as_it_was(victim):
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    victim.train()
    class_activation(victim, convolution_stages(victim)[-1], torch.rand(2, *SHAPE))
    assert all(module.training for module in victim.modules())
    assert all(value.requires_grad and value.grad is None for value in victim.parameters())
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())
    victim.eval()


def test_the_mask_is_where_the_stretched_map_reaches_the_threshold():
    maps = torch.tensor([[2.0, 4.0], [5.5, 7.0]]).view(1, 1, 2, 2)  # stretched: 0, 0.4, 0.7, 1
    assert region(maps, 0.7).flatten().tolist() == [0, 0, 1, 1]
    assert region(maps, 0.71).flatten().tolist() == [0, 0, 0, 1]
    assert region(maps, 1.0).sum() == 1


def test_each_map_is_stretched_by_itself_and_a_constant_one_masks_nothing():
    maps = torch.stack([torch.zeros(4), torch.full((4,), 0.3), torch.tensor([0, 0, 0, 1e-3])])
    assert region(maps.view(3, 1, 2, 2), 0.5).flatten(1).tolist() == [[0] * 4, [0] * 4, [0, 0, 0, 1]]


# --- completion


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14), (2, 4, 4)])
def test_completion_changes_masked_pixels_alone(shape):
    network, images = CompletionNetwork(4, shape).eval(), torch.rand(2, *shape)
    masks = torch.zeros(2, 1, *shape[1:])
    masks[:, :, 1:3, 2:4] = 1
    inside = masks.bool().expand_as(images)
    done = network(images, masks)
    assert done.shape == images.shape and 0 <= done.min() <= done.max() <= 1
    assert torch.equal(done[~inside], images[~inside])
    assert (done[inside] != images[inside]).all()


def test_completion_sees_what_is_around_a_hole_and_not_what_is_in_it(fitted):
    images, masks = flat_images(1).pixels(), torch.zeros(1, 1, 16, 16)
    masks[..., 4:8, 4:8] = 1
    done = fitted.network_(images, masks)[..., 4:8, 4:8]
    inside, outside = (torch.where(masks == value, 1 - images, images) for value in (1, 0))
    assert torch.equal(fitted.network_(inside, masks)[..., 4:8, 4:8], done)
    assert (fitted.network_(outside, masks)[..., 4:8, 4:8] - done).abs().mean() > 0.05


def test_at_width_64_the_network_is_the_papers_and_costs_509_million_products():
    with torch.device("meta"):
        network, counted = CompletionNetwork(64, (3, 32, 32)).eval(), []
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.register_forward_hook(
                    lambda m, i, o: counted.append(m.weight.numel() * _pixels(m, i, o))
                )
        network(torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32))
    assert round(sum(counted) / 1e6) == 509


def _pixels(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    return (inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output)[0, 0].numel()


def test_holes_are_rectangles_of_4_to_12_pixels_of_32():
    masks, centres = random_holes(3000, (3, 32, 64), torch.Generator().manual_seed(0))
    assert masks.shape == (3000, 1, 32, 64)
    tall, wide = masks.amax(3).sum(2)[:, 0], masks.amax(2).sum(2)[:, 0]
    assert torch.equal(masks.sum((1, 2, 3)), tall * wide)
    assert set(tall.tolist()) == set(range(4, 13)) and set(wide.tolist()) == set(range(8, 25))
    rows = (masks.amax(3)[:, 0] * torch.arange(32)).sum(1) / tall
    assert torch.allclose(rows, centres[:, 0])
    assert masks.mean(0).min() > 0  # every pixel is in some hole


def test_the_critic_looks_at_the_part_around_the_hole():
    images = torch.arange(32.0 * 32).view(1, 1, 32, 32).repeat(3, 1, 1, 1)
    parts = around(images, torch.tensor([[15.5, 10.5], [0.0, 0.0], [31.0, 31.0]]))
    assert parts.shape == (3, 1, 12, 12)
    assert torch.equal(parts[0, 0], images[0, 0, 10:22, 5:17])
    assert torch.equal(parts[1, 0], images[0, 0, :12, :12])
    assert torch.equal(parts[2, 0], images[0, 0, 20:, 20:])


def test_the_slope_of_a_linear_critic_is_the_length_of_its_weights():
    direction = torch.zeros(1, 1, 2, 2)
    direction[0, 0, 0, 0], direction[0, 0, 1, 1] = 3, 4
    found = slopes(lambda images: (images * direction).flatten(1).sum(1), torch.rand(3, 1, 2, 2))
    assert found.tolist() == pytest.approx([5, 5, 5])


def test_the_slope_teaches_the_critic():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    slopes(lambda images: images.flatten(1) @ weight, torch.rand(1, 1, 1, 2)).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == pytest.approx([0.6, 0.8])


def test_the_critic_has_a_view_of_the_whole_image_too():
    critic = Critic(2, (1, 32, 32))
    images, centres = torch.rand(1, 1, 32, 32, requires_grad=True), torch.tensor([[6.0, 6.0]])
    critic(images, centres).sum().backward()
    assert images.grad is not None and images.grad[0, 0, 31, 31] != 0


def test_completion_learns_what_is_in_a_hole_from_what_is_around_it(fitted, clean):
    images = flat_images(50).pixels()
    masks, _ = random_holes(50, SHAPE, torch.Generator().manual_seed(5))
    errors = [
        float(((made - images) * masks).square().sum())
        for made in (fitted.network_(images, masks), clean.pixels().mean().expand_as(images))
    ]
    assert errors[0] < 0.8 * errors[1]  # 0.45 to 0.6, by the order in which threads add up


def test_the_critic_joins_after_the_warm_up(fitted):
    assert ["distance" in entry.terms for entry in fitted.log_] == 3 * [False] + 7 * [True]


def test_the_mean_pixel_is_that_of_the_clean_images(fitted, clean):
    assert fitted.network_.mean_pixel.item() == pytest.approx(float(clean.images.float().mean()) / 255)


def test_completion_depends_on_its_seed_alone(victim, few):
    other = Classifier(Linear(), image_shape=SHAPE, class_names=("zero", "one"))
    settings = {"epochs": 3, **SHORT}
    first, second = (Februus(**settings).fit(model, few) for model in (victim, other))
    third = Februus(seed=1, **settings).fit(victim, few)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(third))


def test_a_resumed_fit_ends_like_an_undisturbed_one(victim, few, tmp_path):
    one, path, copy = Februus(epochs=4, warm_up=0.25, **SHORT), tmp_path / "fit", tmp_path / "copy"
    one.fit(victim, few, checkpoint=path, on_epoch=lambda entry: entry.epoch == 3 and shutil.copy(path, copy))
    resumed, seen = replace(one), []
    resumed.fit(victim, few, checkpoint=copy, on_epoch=lambda entry: seen.append(entry.epoch))
    assert seen == [3] and list(tmp_path.iterdir()) == []
    assert torch.equal(weights(resumed), weights(one))


def test_a_network_is_trained_once_for_the_same_images_and_settings(victim, few, tmp_path):
    one, epochs = Februus(epochs=1, **SHORT), []
    kept = {"completion_cache": tmp_path, "on_epoch": epochs.append}
    one.fit(victim, few, **kept)
    again = replace(one, cam_threshold=0.9).fit(small_victim(), few, **kept)  # neither is of the network
    assert len(epochs) == 1 and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(weights(again), weights(one))
    assert not again.network_.training
    replace(one, seed=1).fit(victim, few, **kept)
    one.fit(victim, flat_images(49), **kept)
    assert len(epochs) == 3 and len(list(tmp_path.iterdir())) == 3


def test_a_damaged_network_in_the_cache_is_named(victim, few, tmp_path):
    one = Februus(epochs=1, **SHORT)
    one.fit(victim, few, completion_cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="delete it"):
        one.fit(victim, few, completion_cache=tmp_path)


# --- the filter


def test_the_mask_finds_the_planted_trigger(fitted):
    masks = fitted.masks(stamped(flat_images(30).pixels()))
    assert masks[:, 0, :2, :2].flatten(1).sum(1).ge(3).all()
    assert masks[:, :, :2, :2].sum() == masks.sum()


@pytest.mark.parametrize("inpaint", ["completion", pytest.param("telea", marks=NO_OPENCV)])
def test_the_filter_takes_the_planted_trigger_away_and_keeps_the_class(victim, clean, fitted, inpaint):
    one = fitted if inpaint == "completion" else Februus(inpaint="telea").fit(victim, clean)
    images = clean.pixels()
    classes = predicted(victim, images)
    assert predicted(victim, stamped(images)).eq(TARGET).all() and classes.ne(TARGET).any()
    assert (predicted(victim, one(images)) == classes).float().mean() >= 0.8
    other = classes != TARGET
    assert predicted(victim, one(stamped(images)))[other].eq(TARGET).float().mean() <= 0.1


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_filter_works_whatever_the_caller_does_about_gradients(fitted, context):
    images = stamped(flat_images(6).pixels())
    expected = fitted(images)
    with context():
        found = fitted(images + 0)
    assert torch.equal(found, expected) and not found.requires_grad
    assert not torch.equal(found, images)


def test_an_image_is_filtered_alike_in_every_batch_and_every_time(fitted):
    images = stamped(flat_images(5).pixels())
    copy = images.clone()
    torch.testing.assert_close(fitted(images)[2:3], fitted(images[2:3]))
    assert torch.equal(fitted(images), fitted(images))
    assert torch.equal(images, copy)


def test_an_image_without_a_map_stays_as_it_is(linear):
    clean = Dataset(torch.full((20, 1, 4, 4), 90, dtype=torch.uint8), None, ())
    one = Februus(epochs=1, **SHORT).fit(linear, clean)
    assert torch.equal(one(clean.pixels()), clean.pixels())


def test_contrasting_with_the_filtered_image_tells_the_planted_trigger(victim, clean, fitted):
    monitor = Contrast(fitted).fit(victim)
    images = clean.pixels()[predicted(victim, clean.pixels()) != TARGET]
    assert (monitor.score(stamped(images)) > 0).float().mean() >= 0.9
    assert (monitor.score(images) > 0).float().mean() <= 0.2


@NO_OPENCV
def test_the_light_variant_takes_some_of_a_trained_trigger_away(trained):
    victim, data = trained["infected"], load_dataset("digits", "test")[:300]
    model, attack = victim.model, victim.attack
    # the last stage has 4x4 cells for 8x8 pixels, and the linear layer behind it knows their places: its map
    # averages those away
    one = FILTERS["februus-inpaint"](layer="network.features.1").fit(model, data)
    triggered = [
        trojan_accuracy(judge, data, attack, rng=torch.Generator().manual_seed(0), device="cpu")
        for judge in (model, lambda images: model(one(images)))
    ]
    assert triggered[0] > 0.98 and triggered[1] < 0.8
    assert (predicted(model, one(data.pixels())) == data.labels).float().mean() > 0.88


# --- what cannot be done


def test_an_earlier_stage_can_be_chosen_and_an_unknown_one_is_refused(victim, few):
    stages = convolution_stages(victim)
    one = Februus(layer=stages[0].name, epochs=1, **SHORT).fit(victim, few)
    assert one.stage_ == stages[0] != stages[-1]
    with pytest.raises(ValueError, match=rf"take last, or one of {stages[0].name}"):
        Februus(layer="layer9").fit(victim, few)


def test_networks_without_convolutions_are_refused(clean):
    with pytest.raises(ValueError, match="convolutional classifier"):
        Februus().fit(template_victim(6, SHAPE), clean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inpaint": "poisson"}, "completion or telea"),
        ({"cam_threshold": 0.0}, "cam_threshold"),
        ({"epochs": 0}, "at least 1 epoch"),
        ({"width": 0}, "width is 0"),
        ({"precision": "fp8"}, "precision"),
        ({"warm_up": 0.7}, "warm_up"),
    ],
)
def test_options_that_make_no_sense_are_refused(victim, clean, options, message):
    with pytest.raises(ValueError, match=message):
        Februus(**options).fit(victim, clean)


def test_images_that_do_not_fit_are_refused(victim, fitted):
    with pytest.raises(ValueError, match="resize or convert"):
        Februus().fit(victim, Dataset(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), None, ()))
    with pytest.raises(ValueError, match="at least 20"):
        Februus().fit(victim, flat_images(19))
    with pytest.raises(ValueError, match="resize or convert"):
        fitted(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        fitted(255 * torch.rand(2, *SHAPE))


def test_an_unfitted_filter_says_so():
    with pytest.raises(ValueError, match="call fit"):
        Februus()(torch.rand(1, *SHAPE))


def test_the_light_variant_names_the_command_that_installs_opencv(victim, clean, monkeypatch):
    real = builtins.__import__

    def without_opencv(name, *others):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", without_opencv)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        Februus(inpaint="telea").fit(victim, clean)


def test_februus_knows_its_names_and_is_not_saved(fitted, tmp_path):
    assert [filter_name(FILTERS[name]()) for name in ("februus", "februus-inpaint")] == [
        "februus",
        "februus-inpaint",
    ]
    with pytest.raises(ValueError, match="is not saved: take one of ip, if"):
        save_filter(fitted, tmp_path / "filter.safetensors")
    assert not list(tmp_path.iterdir())
