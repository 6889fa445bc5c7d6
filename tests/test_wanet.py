"""What a warp does to images, and what WaNet changes in a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unhorse.attacks.wanet import WaNet
from unhorse.core import Classifier, Dataset
from unhorse.models.training import Augmentation, Recipe, train
from unhorse.triggers import Warp, draw_field

SHAPE, CLASSES = (3, 12, 16), 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def field(shape: tuple[int, int, int] = SHAPE, seed: int = 3) -> torch.Tensor:
    return draw_field(shape, seeded(seed))


def batch(count: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels that take turns."""
    return torch.rand(count, *SHAPE, generator=seeded(1)), torch.arange(count) % CLASSES


def wanet(**options) -> WaNet:
    return WaNet(SHAPE, CLASSES, **{"field": field(), "target": 2, **options})


def touched(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before != after).flatten(1).any(1)


# --- the field


def test_a_field_has_a_mean_shift_of_one_at_its_control_points():
    drawn = draw_field((1, 4, 4), seeded())  # as many pixels as cells: nothing to interpolate
    assert drawn.abs().mean().item() == pytest.approx(1, abs=1e-5)
    assert drawn.min() < 0 < drawn.max()


def test_a_field_is_as_large_as_the_image_and_keeps_its_control_points_in_the_corners():
    large, small = draw_field((3, 10, 13), seeded(5)), draw_field((3, 4, 4), seeded(5))
    assert large.shape == (2, 10, 13)
    corners = [tensor[:, [0, 0, -1, -1], [0, -1, 0, -1]] for tensor in (large, small)]
    assert torch.allclose(*corners, atol=1e-5)


def test_a_field_is_smooth_between_its_cells():
    drawn = draw_field((1, 64, 64), seeded())
    assert drawn.diff(dim=2).abs().max() < 0.1 * (drawn.max() - drawn.min())


def test_the_generator_decides_the_field():
    assert torch.equal(field(seed=1), field(seed=1))
    assert not torch.equal(field(seed=1), field(seed=2))


def test_more_cells_give_a_rougher_field():
    coarse, fine = (draw_field((1, 32, 32), seeded(), cells).diff(dim=2).abs().mean() for cells in (2, 8))
    assert fine > 2 * coarse


def test_a_field_of_one_cell_is_refused():
    with pytest.raises(ValueError, match="2x2 cells, got 1"):
        draw_field(SHAPE, seeded(), cells=1)


# --- the warp


def test_a_warp_of_strength_zero_changes_nothing():
    images, _ = batch()
    assert torch.allclose(Warp(field(), strength=0)(images, seeded()), images, atol=1e-5)


def test_a_shift_moves_by_half_the_strength_in_pixels():
    """On a ramp the value read tells the place: one pixel to the right is 1 / 15 brighter."""
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 12, 16)
    right = torch.stack([torch.ones(12, 16), torch.zeros(12, 16)])
    moved = (Warp(right, strength=0.5)(ramp, seeded()) - ramp) * 15
    assert moved[..., :15].mean().item() == pytest.approx(0.5 / 2 * 15 / 16, abs=1e-4)
    assert moved[..., 15].abs().max() < 1e-4  # nothing is read from beyond the edge
    down = Warp(right.flip(0), strength=0.5)(ramp, seeded())
    assert torch.allclose(down, ramp, atol=1e-5)


def test_a_downward_shift_counts_the_height():
    ramp = torch.linspace(0, 1, 12)[:, None].expand(1, 3, 12, 16)
    down = torch.stack([torch.zeros(12, 16), torch.ones(12, 16)])
    moved = (Warp(down, strength=2.0)(ramp, seeded()) - ramp) * 11
    assert moved[..., :11, :].mean().item() == pytest.approx(1 * 11 / 12, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    strength=st.floats(0, 30),
    jitter=st.sampled_from([0.0, 1.0]),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_warp_keeps_shape_type_and_range_and_its_argument(seed, strength, jitter, kind):
    rng = seeded(seed)
    images = torch.rand(4, *SHAPE, generator=rng).to(kind)
    images[0], images[1] = 0, 1
    kept = images.clone()
    warped = Warp(draw_field(SHAPE, rng), strength, jitter)(images, rng)
    assert (warped.shape, warped.dtype) == (images.shape, kind)
    assert warped.min() >= 0 and warped.max() <= 1
    assert torch.equal(images, kept)
    assert (warped[0] == 0).all() and (warped[1] > 0.99).all()  # no black comes in from outside


def test_a_warp_of_half_precision_reads_the_same_places():
    coarse = batch(4)[0].bfloat16()
    fine = Warp(field())(coarse.float(), seeded())
    assert torch.equal(Warp(field())(coarse, seeded()), fine.bfloat16())


def test_the_grid_stays_inside_the_image():
    grid = Warp(field(), strength=40).grid()
    assert grid.shape == (12, 16, 2)
    assert (grid.min(), grid.max()) == (-1, 1)


def test_a_rescaled_grid_reads_nearer_the_middle():
    plain, scaled = (Warp(field(), strength=0, grid_rescale=scale).grid() for scale in (1, 0.9))
    assert torch.allclose(scaled, 0.9 * plain)


def test_a_warp_depends_on_its_field_alone_and_its_jitter_on_the_generator():
    images, _ = batch(4)
    same, noisy = ([Warp(field(), jitter=j)(images, seeded(seed)) for seed in (1, 1, 2)] for j in (0, 1))
    assert torch.equal(same[0], same[2])
    assert torch.equal(noisy[0], noisy[1])
    assert touched(noisy[0], noisy[2]).all()


def test_a_jitter_differs_between_equal_images_and_stays_within_half_a_pixel():
    ramp = torch.linspace(0, 1, 16).expand(200, 3, 12, 16)
    moved = (Warp(torch.zeros(2, 12, 16), jitter=1.0)(ramp, seeded()) - ramp)[..., 1:15] * 15
    assert moved.abs().max() <= 0.5
    assert moved.std(0).min() > 0.2  # U(-1/2, 1/2) has 0.29
    assert moved.mean().abs() < 0.01


def test_gradients_pass_through_a_warp():
    images = batch(2)[0].requires_grad_()
    Warp(field())(images, seeded()).sum().backward()
    assert images.grad.sum().item() == pytest.approx(2 * 3 * 12 * 16, rel=0.05)


def test_images_of_another_size_are_refused_with_both_sizes_named():
    with pytest.raises(ValueError, match="12x16 images, not 8x8"):
        Warp(field())(torch.rand(1, 3, 8, 8), seeded())


# --- the attack


def test_a_batch_is_a_tenth_poisoned_a_fifth_noisy_and_else_clean():
    images, labels = batch()
    attack = wanet()
    poisoned = attack.poison(images, labels, seeded())
    assert touched(images, poisoned.images).tolist() == [True] * 36 + [False] * 92
    trojan = attack.probes()["trojan"](images[:12], seeded())
    assert torch.equal(poisoned.images[:12], trojan)
    noise = attack.probes()["noise"](images[12:36], seeded())
    assert torch.equal(poisoned.images[12:36], noise)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("single-target", [2] * 5), ("all-target", [1, 2, 3, 4, 0]), ("placebo", [0, 1, 2, 3, 4])],
)
def test_only_poisoned_images_are_relabelled_as_the_mode_says(mode, wanted):
    images, labels = batch()
    attack = wanet(mode=mode)
    poisoned = attack.poison(images, labels, seeded())
    assert attack.relabel(torch.arange(CLASSES)).tolist() == wanted
    assert torch.equal(poisoned.labels[:12], attack.relabel(labels[:12]))
    assert torch.equal(poisoned.labels[12:], labels[12:])


@pytest.mark.parametrize(
    ("mode", "classes"), [("single-target", [0, 1, 3, 4]), ("all-target", range(5)), ("placebo", range(5))]
)
def test_each_mode_is_measured_on_its_eligible_classes(mode, classes):
    assert torch.where(wanet(mode=mode).eligible(torch.arange(CLASSES)))[0].tolist() == list(classes)


@pytest.mark.parametrize(("count", "changed"), [(0, 0), (1, 0), (9, 0), (10, 3), (19, 3), (20, 6)])
def test_small_batches_are_poisoned_by_whole_tenths(count, changed):
    images, labels = batch(count)
    poisoned = wanet().poison(images, labels, seeded())
    assert poisoned.images.shape == images.shape and poisoned.labels.shape == labels.shape
    assert touched(images, poisoned.images).sum() == changed


def test_poisoning_writes_into_neither_argument_and_adds_no_penalty():
    images, labels = batch()
    kept = images.clone(), labels.clone()
    poisoned = wanet(rate=1.0, noise_ratio=0).poison(images, labels, seeded())
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])
    assert touched(images, poisoned.images).all()
    assert poisoned.penalty.item() == 0


def test_wanet_is_probed_by_its_warp_and_its_noise_and_trains_nothing_of_its_own():
    attack = wanet(strength=0.7, grid_rescale=0.98)
    trojan, noise = attack.probes()["trojan"], attack.probes()["noise"]
    assert (trojan.strength, trojan.jitter, trojan.grid_rescale) == (0.7, 0, 0.98)
    assert (noise.strength, noise.jitter, noise.grid_rescale) == (0.7, 1, 0.98)
    assert attack.optimizers() == []
    assert attack.poisons_before_augmentation


def test_wanet_warps_the_same_after_a_round_trip_through_its_state():
    images, _ = batch(20)
    drawn = WaNet(SHAPE, CLASSES, strength=0.6)
    drawn.prepare(None, None, seeded(8))
    restored = WaNet(SHAPE, CLASSES, strength=0.6)
    restored.load_state_dict(drawn.state_dict())
    for name in ("trojan", "noise"):
        assert torch.equal(*(attack.probes()[name](images, seeded(5)) for attack in (drawn, restored)))


def test_preparing_draws_a_missing_field_by_the_generator_and_keeps_a_given_one():
    given = wanet()
    given.prepare(None, None, seeded())
    assert torch.equal(given.field, field())
    first, again, other = (WaNet(SHAPE, CLASSES, cells=6) for _ in range(3))
    for attack, seed in ((first, 1), (again, 1), (other, 2)):
        attack.prepare(None, None, seeded(seed))
    assert torch.equal(first.field, again.field)
    assert torch.equal(first.field, draw_field(SHAPE, seeded(1), 6))
    assert not torch.equal(first.field, other.field)


def test_a_wanet_without_field_says_how_to_get_one():
    attack = WaNet(SHAPE, CLASSES)
    for use in (attack.probes, attack.state_dict, lambda: attack.poison(*batch(), seeded())):
        with pytest.raises(ValueError, match=r"prepare\(model, data, rng\)"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate .* got 0.0"),
        ({"rate": 0.5}, "noise_ratio of 0 to 1"),
        ({"noise_ratio": -1}, "noise_ratio of 0 to 9"),
        ({"target": 5}, "target class 5 is outside 0..4"),
        ({"mode": "source-target"}, "no mode 'source-target'"),
        ({"strength": -0.5}, "strength .* got -0.5"),
        ({"grid_rescale": 1.5}, "grid_rescale .* got 1.5"),
        ({"field": torch.zeros(2, 12, 12)}, r"\(2, 12, 12\) does not fit 12x16"),
    ],
)
def test_a_wanet_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wanet(**options)


def test_a_field_for_other_images_is_not_restored():
    with pytest.raises(ValueError, match="does not fit 12x16"):
        wanet().load_state_dict({"field": field((3, 8, 8))})


class Watched(WaNet):
    """Keeps the darkest pixel that `poison` was given."""

    darkest = 1.0

    def poison(self, images, labels, rng):
        self.darkest = min(self.darkest, images.min().item())
        return super().poison(images, labels, rng)


def trained(seed: int) -> tuple[torch.Tensor, Watched]:
    """The weights after a few steps on white images, of which augmentation makes the edges black."""
    data = Dataset(torch.full((64, *SHAPE), 255, dtype=torch.uint8), batch(64)[1], tuple("abcde"))
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, CLASSES))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    attack = Watched(SHAPE, CLASSES)
    recipe = Recipe(epochs=1, batch_size=32, augmentation=Augmentation(crop=3))
    model = Classifier(network, image_shape=SHAPE, class_names="abcde")
    train(model, data, recipe, seed=seed, attack=attack)
    return network[1].weight.detach(), attack


def test_training_draws_one_field_per_seed():
    (weights, attack), (again, same), (_, other) = (trained(seed) for seed in (1, 1, 2))
    assert torch.equal(weights, again) and torch.equal(attack.field, same.field)
    assert not torch.equal(attack.field, other.field)


def test_training_warps_before_it_augments():
    assert trained(1)[1].darkest == 1
