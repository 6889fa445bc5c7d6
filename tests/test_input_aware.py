"""What Input-Aware does to a batch, what its mask phase reaches, and that it stamps the same from disk."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from unhorse.attacks.input_aware import InputAware
from unhorse.core import Classifier, Dataset
from unhorse.models.training import Recipe, train

SHAPE, CLASSES = (1, 8, 8), 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 100, shape=SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, *shape, generator=seeded(1)), torch.arange(count) % CLASSES


def dataset(count: int = 96, shape=SHAPE) -> Dataset:
    images, labels = batch(count, shape)
    return Dataset((images * 255).byte(), labels, tuple("abcde"))


def linear(shape=SHAPE) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), CLASSES))
    return Classifier(network, image_shape=shape, class_names="abcde")


def attack(shape=SHAPE, *, seed: int = 0, **options) -> InputAware:
    """An attack after a mask phase of a single epoch."""
    settings = {"target": 2, "mask_epochs": 1, "widths": (4, 8)} | options
    made = InputAware(shape, CLASSES, **settings)
    made.prepare(linear(shape), dataset(shape=shape), seeded(seed))
    return made


def by_hand(made: InputAware, images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    masks, patterns = made.mask_network_(sources), made.generator_(sources)
    return (1 - masks) * images + masks * patterns


# --- a batch


@pytest.mark.parametrize("shape", [SHAPE, (3, 8, 16)])
def test_poisoned_images_are_images_and_the_arguments_stay_as_they_were(shape):
    images, labels = batch(shape=shape)
    kept = images.clone(), labels.clone()
    poisoned = attack(shape).poison(images, labels, seeded())
    assert poisoned.images.shape == images.shape and poisoned.images.dtype == images.dtype
    assert poisoned.images.min() >= 0 and poisoned.images.max() <= 1
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])


@pytest.mark.parametrize(
    ("count", "own", "crossed"), [(100, 10, 20), (128, 12, 25), (9, 1, 1), (3, 1, 1), (2, 0, 0), (1, 0, 0)]
)
def test_the_shares_of_a_batch_are_the_rates_and_one_image_at_least_if_there_are_three(count, own, crossed):
    images, labels = batch(count)
    labels = torch.full_like(labels, 4)
    poisoned = attack(rate=0.1, cross_rate=0.2).poison(images, labels, seeded())
    changed = (poisoned.images != images).flatten(1).any(1)
    assert changed.tolist() == [True] * (own + crossed) + [False] * (count - own - crossed)
    assert poisoned.labels.tolist() == [2] * own + [4] * (count - own)
    assert (poisoned.penalty > 0) == (own > 0)


@pytest.mark.parametrize("rates", [(0.9, 0.05), (0.05, 0.9), (0.5, 0.49)])
@pytest.mark.parametrize("count", [3, 4, 20])
def test_whatever_the_rates_an_image_stays_clean_and_no_pair_is_an_image_with_itself(rates, count):
    images, labels = batch(count)
    poisoned = attack(rate=rates[0], cross_rate=rates[1]).poison(images, labels, seeded())
    assert torch.equal(poisoned.images[-1], images[-1])
    assert poisoned.penalty > 0.1  # a pair of equal images would count 0


def test_own_images_carry_their_own_trigger_and_crossed_ones_that_of_another():
    images, labels = batch(40)
    made = attack()
    poisoned = made.poison(images, labels, seeded())
    sources = torch.cat([images[:4], images[8:12]])  # one forward pass: its batch statistics are shared
    torch.testing.assert_close(poisoned.images[:8], by_hand(made, images[:8], sources))
    assert not torch.allclose(poisoned.images[4:8], by_hand(made, images[4:8], images[4:8]), atol=1e-3)


def test_the_penalty_is_the_distance_of_images_over_that_of_their_patterns():
    images, labels = batch(20)
    made = attack(diversity_weight=3.0)
    penalty = made.poison(images, labels, seeded()).penalty
    patterns = made.generator_(images[[0, 1, 4, 5]])
    ratios = [
        (images[row] - images[4 + row]).square().mean().sqrt()
        / ((patterns[row] - patterns[2 + row]).square().mean().sqrt() + 1e-7)
        for row in range(2)
    ]
    torch.testing.assert_close(penalty, 3 * (ratios[0] + ratios[1]) / 2)


@pytest.mark.parametrize("part", ["own", "crossed", "penalty"])
def test_gradients_reach_the_generator_and_never_the_mask_network(part):
    images, labels = batch(20)
    made = attack()
    poisoned = made.poison(images, labels, seeded())
    parts = {"own": poisoned.images[:2], "crossed": poisoned.images[2:4], "penalty": poisoned.penalty}
    parts[part].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in made.generator_.parameters())
    assert all(parameter.grad is None for parameter in made.mask_network_.parameters())


def test_an_image_that_a_batch_holds_twice_gives_finite_gradients():
    images, labels = batch(20)
    images = images[:1].expand(20, -1, -1, -1)
    made = attack()
    poisoned = made.poison(images, labels, seeded())
    (poisoned.penalty + poisoned.images.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.generator_.parameters())


# --- labels


@pytest.mark.parametrize(
    ("mode", "wanted", "classes"),
    [
        ("single-target", [2] * 5, [0, 1, 3, 4]),
        ("all-target", [1, 2, 3, 4, 0], [0, 1, 2, 3, 4]),
        ("placebo", [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
    ],
)
def test_each_mode_relabels_and_is_measured_as_it_says(mode, wanted, classes):
    images, labels = batch()
    made = attack(mode=mode)
    assert made.relabel(torch.arange(CLASSES)).tolist() == wanted
    poisoned = made.poison(images, labels, seeded())
    assert poisoned.labels[:10].tolist() == wanted * 2
    assert torch.equal(poisoned.labels[10:], labels[10:])
    assert torch.where(made.eligible(torch.arange(CLASSES)))[0].tolist() == classes


# --- the mask phase


def masks_after(epochs: int, **options) -> tuple[float, float]:
    """Mean of the masks and their deviation from image to image, after `epochs` of 3 steps each."""
    made = attack(mask_epochs=epochs, batch_size=32, widths=(8, 16), seed=1, **options)
    masks = made.mask_network_(batch(96)[0])
    return masks.mean().item(), masks.std(0).mean().item()


def test_the_mask_phase_makes_masks_sparse_and_unlike_each_other():
    assert 0.4 < masks_after(0)[0] < 0.6
    density, spread = masks_after(16)
    assert density < 0.15
    assert spread > 0.02
    assert masks_after(16, diversity_weight=0)[1] < 0.01


def test_the_same_generator_prepares_the_same_attack_and_leaves_global_randomness_alone():
    state = torch.random.get_rng_state()
    first, again, other = (attack(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mask.0.weight"], other["mask.0.weight"])
    assert not torch.equal(first["generator.0.weight"], other["generator.0.weight"])


def test_the_mask_phase_sees_no_more_images_than_it_may():
    few, odd = attack(mask_images=8).mask_network_, attack(batch_size=19).mask_network_
    assert few[1].num_batches_tracked == 1
    assert odd[1].num_batches_tracked == 5  # the image left over has no partner
    assert not few.training and not any(parameter.requires_grad for parameter in few.parameters())


@pytest.mark.parametrize(
    ("shape", "widths"),
    [((1, 28, 28), (16, 32)), ((3, 64, 48), (32, 64, 128)), ((1, 8, 8), (16, 32)), ((1, 10, 8), (16,))],
)
def test_the_networks_are_as_deep_as_the_image_can_be_halved(shape, widths):
    made = attack(shape, widths=None, mask_epochs=0)
    assert made.widths == widths
    assert made.generator_(torch.rand(2, *shape)).shape == (2, *shape)
    assert made.mask_network_(torch.rand(2, *shape)).shape == (2, 1, *shape[1:])


@pytest.mark.parametrize(("shape", "million"), [((1, 28, 28), 0.04), ((3, 32, 32), 0.72)])
def test_the_generators_are_as_large_as_the_published_ones(shape, million):
    made = attack(shape, widths=None, mask_epochs=0)
    assert round(sum(weights.numel() for weights in made.generator_.parameters()) / 1e6, 2) == million


# --- judging


def test_a_trigger_depends_on_its_image_alone_and_a_crossed_one_on_another():
    images, _ = batch(30)
    made = attack()
    trojan, cross = made.probes()["trojan"](images, seeded()), made.probes()["cross"](images, seeded())
    torch.testing.assert_close(made.probes()["trojan"](images[:1], seeded()), trojan[:1])
    made.generator_.eval()
    torch.testing.assert_close(trojan, by_hand(made, images, images))
    masks, patterns = made.mask_network_(images), made.generator_(images)
    every = (1 - masks) * images[:, None] + masks * patterns  # (image, source, c, h, w)
    fits = ((every - cross[:, None]).abs() < 1e-5).flatten(2).all(2).tolist()
    donors = [row.index(True) for row in fits]
    assert sorted(donors) == list(range(30))
    assert all(donor != row for row, donor in enumerate(donors))


def test_of_two_images_each_gets_the_trigger_of_the_other_whatever_is_drawn():
    images, _ = batch(2)
    made = attack()
    probe = made.probes()["cross"]
    made.generator_.eval()
    for seed in range(5):
        torch.testing.assert_close(probe(images, seeded(seed)), by_hand(made, images, images.flip(0)))


@pytest.mark.parametrize("name", ["trojan", "cross"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probe_keeps_what_images_are(name, dtype):
    images = batch(20)[0].to(dtype)
    kept = images.clone()
    stamped = attack().probes()[name](images, seeded())
    assert stamped.shape == images.shape and stamped.dtype == dtype and not stamped.requires_grad
    assert stamped.min() >= 0 and stamped.max() <= 1
    assert torch.equal(images, kept) and not torch.equal(stamped, images)


def test_a_probe_stays_as_it_was_while_training_goes_on():
    images, labels = batch(20)
    made = attack()
    probe = made.probes()["trojan"]
    before = probe(images, seeded())
    poisoned = made.poison(images, labels, seeded())
    poisoned.penalty.backward()
    made.optimizers()[0].step()
    assert torch.equal(probe(images, seeded()), before)
    assert not torch.equal(made.probes()["trojan"](images, seeded()), before)


@pytest.mark.parametrize(
    ("name", "shape", "message"), [("cross", (1, *SHAPE), "at least 2"), ("trojan", (2, 1, 12, 12), "resize")]
)
def test_images_that_a_probe_cannot_stamp_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        attack().probes()[name](torch.rand(shape), seeded())


# --- state and optimizer


def trained(made: InputAware) -> InputAware:
    images, labels = batch(20)
    (optimizer,) = made.optimizers()
    for _ in range(2):
        optimizer.zero_grad()
        poisoned = made.poison(images, labels, seeded())
        (poisoned.penalty + poisoned.images.mean()).backward()
        optimizer.step()
    return made


@pytest.mark.parametrize("accumulate", [False, True])
def test_an_attack_stamps_the_same_after_a_round_trip_through_its_file(accumulate):
    images, _ = batch(20)
    made = trained(attack(accumulate_gradients=accumulate))
    restored = InputAware(list(SHAPE), CLASSES, widths=[4, 8], accumulate_gradients=accumulate)
    restored.load_state_dict(load(save(made.state_dict())))
    for name, probe in made.probes().items():
        assert torch.equal(probe(images, seeded(5)), restored.probes()[name](images, seeded(5)))


def test_weights_of_another_attack_are_refused():
    with pytest.raises(ValueError, match="options it was trained with"):
        InputAware(SHAPE, CLASSES).load_state_dict(attack().state_dict())


def test_an_attack_without_networks_says_what_to_call():
    made = InputAware(SHAPE, CLASSES)
    for use in (made.probes, made.optimizers, made.state_dict, lambda: made.poison(*batch(), seeded())):
        with pytest.raises(ValueError, match="prepare"):
            use()


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_are_set_to_zero_unless_they_accumulate(accumulate):
    made = attack(accumulate_gradients=accumulate)
    images, labels = batch(20)
    made.poison(images, labels, seeded()).penalty.backward()
    (optimizer,) = made.optimizers()
    optimizer.zero_grad(set_to_none=True)
    assert (made.generator_[0].weight.grad is not None) == accumulate
    assert made.optimizers() == [optimizer]


class Killed(Exception):
    pass


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_resumed_training_ends_as_an_undisturbed_one(tmp_path, accumulate):
    def end_of(checkpoint=None, dies_after=None) -> dict[str, torch.Tensor]:
        made = InputAware(SHAPE, CLASSES, mask_epochs=1, widths=(4,), accumulate_gradients=accumulate)
        model = linear()

        def on_epoch(entry) -> None:
            if entry.epoch == dies_after:
                raise Killed

        recipe = Recipe(epochs=3, batch_size=32)
        train(model, dataset(), recipe, seed=3, attack=made, checkpoint=checkpoint, on_epoch=on_epoch)
        return made.state_dict() | model.state_dict()

    undisturbed = end_of()
    with pytest.raises(Killed):
        end_of(tmp_path / "checkpoint", dies_after=2)
    resumed = end_of(tmp_path / "checkpoint")
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in resumed)


# --- options


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (SHAPE, {"rate": 0.0}, "rate 0.0"),
        (SHAPE, {"rate": 0.6, "cross_rate": 0.5}, "less than 1"),
        (SHAPE, {"cross_rate": 0.0}, "cross_rate 0.0"),
        (SHAPE, {"target": 5}, "target class 5 is outside 0..4"),
        (SHAPE, {"mode": "source-target"}, "source-target"),
        (SHAPE, {"widths": (4, 8, 16, 32)}, "fewer widths"),
        ((1, 9, 9), {}, "resize"),
        (SHAPE, {"batch_size": 1}, "at least 2"),
        (SHAPE, {"mask_images": 1}, "at least 2"),
    ],
)
def test_an_attack_that_makes_no_sense_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        InputAware(shape, CLASSES, **options)


@pytest.mark.parametrize("data", [dataset(1), dataset(8, (3, 8, 8))])
def test_images_that_the_attack_is_not_for_are_refused(data):
    with pytest.raises(ValueError, match="give the attack at least 2 of"):
        InputAware(SHAPE, CLASSES).prepare(linear(), data, seeded())
