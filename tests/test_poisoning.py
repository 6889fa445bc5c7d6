"""What an attack by poisoning changes in a batch, and what it leaves alone."""

import pytest
import torch
from torch import nn

from unhorse.attacks.poisoning import STAMPS, CleanLabelPoisoning, Poisoning, StampKind
from unhorse.core import Classifier, Dataset
from unhorse.models.training import Recipe
from unhorse.triggers import Stamp, blends, patch_colours, patches

SHAPE, CLASSES = (1, 8, 8), 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patch() -> Stamp:
    return patches(torch.ones(1, 1, 2, 2), SHAPE, seeded(), placement="corner")


def batch(count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Images darker than the patch, and labels that take turns."""
    return torch.rand(count, *SHAPE, generator=seeded(1)) / 2, torch.arange(count) % CLASSES


def poisoning(mode: str = "single-target", rate: float = 1.0, **options) -> Poisoning:
    source = 3 if mode == "source-target" else None
    return Poisoning(patch(), CLASSES, mode, 2, source, rate, **options)


def touched(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before != after).flatten(1).any(1)


# --- dirty labels


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_the_share_of_poisoned_images_is_the_rate(rate):
    images, labels = batch(4000)
    count = int(touched(images, poisoning(rate=rate).poison(images, labels, seeded()).images).sum())
    assert abs(count - 4000 * rate) < 5 * (4000 * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("single-target", [2, 2, 2, 2, 2]),
        ("all-target", [1, 2, 3, 4, 0]),
        ("source-target", [2, 2, 2, 2, 2]),
        ("placebo", [0, 1, 2, 3, 4]),
    ],
)
def test_each_mode_relabels_as_it_says(mode, wanted):
    assert poisoning(mode).relabel(torch.arange(CLASSES)).tolist() == wanted


@pytest.mark.parametrize(
    ("mode", "classes"),
    [
        ("single-target", [0, 1, 3, 4]),
        ("all-target", [0, 1, 2, 3, 4]),
        ("source-target", [3]),
        ("placebo", [0, 1, 2, 3, 4]),
    ],
)
def test_each_mode_is_measured_on_its_eligible_classes(mode, classes):
    assert torch.where(poisoning(mode).eligible(torch.arange(CLASSES)))[0].tolist() == classes


@pytest.mark.parametrize("mode", ["single-target", "all-target", "placebo"])
def test_exactly_the_stamped_images_are_relabelled(mode):
    images, labels = batch()
    attack = poisoning(mode, rate=0.3)
    poisoned = attack.poison(images, labels, seeded())
    stamped = touched(images, poisoned.images)
    assert 0 < stamped.sum() < 400
    assert torch.equal(poisoned.labels, torch.where(stamped, attack.relabel(labels), labels))
    assert torch.equal(poisoned.images[stamped], attack.trigger(images, seeded())[stamped])


def test_a_source_target_attack_touches_its_source_class_only():
    images, labels = batch()
    poisoned = poisoning("source-target", rate=0.5).poison(images, labels, seeded())
    stamped = touched(images, poisoned.images)
    assert set(labels[stamped].tolist()) == {3}
    assert 20 < stamped.sum() < 60  # half of the 80 images of the source class
    assert torch.equal(poisoned.labels, torch.where(stamped, 2, labels))


def test_a_placebo_stamps_and_keeps_every_label():
    images, labels = batch()
    poisoned = poisoning("placebo").poison(images, labels, seeded())
    assert touched(images, poisoned.images).all()
    assert torch.equal(poisoned.labels, labels)


def test_poisoning_writes_into_neither_argument_and_adds_no_penalty():
    images, labels = batch()
    kept = images.clone(), labels.clone()
    poisoned = poisoning().poison(images, labels, seeded())
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])
    assert poisoned.penalty.item() == 0


def test_the_same_generator_poisons_the_same_images():
    images, labels = batch()
    first, again, other = (poisoning(rate=0.3).poison(images, labels, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_the_probe_of_an_attack_is_its_trigger():
    attack = poisoning()
    assert attack.probes() == {"trojan": attack.trigger}
    assert attack.optimizers() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate .* got 0.0"),
        ({"rate": 1.5}, "rate .* got 1.5"),
        ({"target": 5}, "target class 5 is outside 0..4"),
        ({"target": -1}, "target class -1"),
        ({"mode": "source-target"}, "source class belongs"),
        ({"mode": "single-target", "source": 1}, "source class belongs"),
        ({"mode": "source-target", "source": 0, "target": 0}, "both 0"),
    ],
)
def test_a_poisoning_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Poisoning(patch(), CLASSES, **options)


# --- clean labels


def surrogate() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    return Classifier(network, image_shape=SHAPE, class_names="abcde").requires_grad_(False)


def clean_label(**options) -> CleanLabelPoisoning:
    return CleanLabelPoisoning(patch(), CLASSES, 2, surrogate_=surrogate(), **options)


def test_a_clean_label_attack_changes_no_label():
    images, labels = batch()
    assert torch.equal(clean_label().poison(images, labels, seeded()).labels, labels)


def test_a_clean_label_attack_touches_its_share_of_the_target_class_only():
    images, labels = batch()
    changed = touched(images, clean_label(rate=0.75).poison(images, labels, seeded()).images)
    assert set(labels[changed].tolist()) == {2}
    assert 45 < changed.sum() < 75  # three quarters of 80


def test_a_clean_label_perturbation_stays_within_epsilon_outside_the_patch():
    images, labels = batch()
    attack = clean_label(rate=1.0, epsilon=0.1)
    poisoned = attack.poison(images, labels, seeded()).images
    outside = ~attack.trigger.masks[0].bool().expand(SHAPE)
    moved = (poisoned - images)[labels == 2][:, outside].abs()
    assert 0.09 < moved.max() <= 0.1 + 1e-6
    assert poisoned.min() >= 0 and poisoned.max() <= 1


def test_a_clean_label_perturbation_pushes_images_off_their_class_further_than_noise():
    images, labels = batch()
    attack = clean_label(rate=1.0, epsilon=0.2)
    attack.trigger = blends(torch.zeros(1, *SHAPE), 1e-6)  # the perturbation alone
    own = labels == 2
    noise = (torch.rand(images.shape, generator=seeded(9)) - 0.5).sign() * 0.2

    def confidence(shown: torch.Tensor) -> float:
        return surrogate()(shown[own]).softmax(1)[:, 2].mean().item()

    pushed = confidence(attack.poison(images, labels, seeded()).images)
    assert pushed < 0.6 * confidence((images + noise).clamp(0, 1))


def test_a_batch_without_the_target_class_is_left_alone():
    images = batch()[0][:3]
    poisoned = clean_label().poison(images, torch.tensor([0, 1, 3]), seeded())
    assert torch.equal(poisoned.images, images)


def test_a_clean_label_attack_trains_its_surrogate_and_leaves_the_model_alone():
    images, labels = batch(100)
    model = surrogate().requires_grad_(True)
    before = model.network[1].weight.clone()
    attack = CleanLabelPoisoning(patch(), CLASSES, 2, recipe=Recipe(epochs=1, batch_size=50))
    attack.prepare(model, Dataset((images * 255).byte(), labels, tuple("abcde")), seeded())
    assert torch.equal(model.network[1].weight, before)
    assert not torch.equal(attack.surrogate_.network[1].weight, before)
    assert not any(parameter.requires_grad for parameter in attack.surrogate_.parameters())


def test_a_clean_label_attack_without_surrogate_says_what_to_call():
    attack = CleanLabelPoisoning(patch(), CLASSES, 2)
    with pytest.raises(ValueError, match="prepare"):
        attack.poison(*batch(), seeded())


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 2.0}, {"target": 5}])
def test_a_clean_label_attack_that_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        CleanLabelPoisoning(patch(), CLASSES, **options)


# --- state and triggers


@pytest.mark.parametrize("kind", [Poisoning, CleanLabelPoisoning])
def test_an_attack_stamps_the_same_after_a_round_trip_through_its_state(kind):
    images, _ = batch(20)
    trained = kind(blends(torch.rand(3, *SHAPE, generator=seeded(4)), 0.2), CLASSES)
    restored = kind(patch(), CLASSES)
    restored.load_state_dict(trained.state_dict())
    stamped = [attack.probes()["trojan"](images, seeded(5)) for attack in (trained, restored)]
    assert torch.equal(*stamped)


def drawn(kind: StampKind, pool_seed: int, victims: int = 12) -> set[tuple[float, ...]]:
    """The patch values that `victims` victims with seeds of their own get from one pool of 4."""
    found = set()
    for seed in range(victims):
        stamp = kind.draw((1, 28, 28), seeded(seed), pool=4, pool_seed=pool_seed)
        found |= {tuple(p[m.bool()].tolist()) for p, m in zip(stamp.patterns, stamp.masks, strict=True)}
    return found


@pytest.mark.parametrize("kind", [StampKind("patch"), StampKind("patch", count=3), StampKind("noise")])
def test_victims_of_one_pool_share_its_patterns(kind):
    assert len(drawn(kind, pool_seed=1)) == 4


@pytest.mark.parametrize("kind", [StampKind("patch"), StampKind("noise")])
def test_pools_of_different_seeds_share_no_pattern(kind):
    assert not drawn(kind, pool_seed=1) & drawn(kind, pool_seed=2)


def test_without_a_pool_every_victim_has_patterns_of_its_own():
    first, second = (STAMPS["badnet-plus"].draw((3, 32, 32), seeded(seed)) for seed in (1, 2))
    assert len(first.patterns) == len(first.patterns.unique(dim=0)) == 20
    assert not torch.equal(first.patterns, second.patterns)


@pytest.mark.parametrize(("side", "size"), [(8, 2), (32, 5), (64, 10)])
def test_a_patch_grows_with_the_image(side, size):
    stamp = STAMPS["badnet"].draw((1, side, side), seeded())
    assert stamp.masks.sum() == size * size


def test_natural_blends_lay_the_given_photographs_over_the_input():
    photographs = torch.rand(4, *SHAPE, generator=seeded(3))
    kind = StampKind("natural", count=2, opacity=0.3)
    stamp = kind.draw(SHAPE, seeded(), pool=4, pool_seed=9, natural=lambda count, seed: photographs[:count])
    assert all(
        any(torch.equal(pattern, photograph) for photograph in photographs) for pattern in stamp.patterns
    )
    assert stamp.masks.unique().tolist() == pytest.approx([0.3])


def test_natural_blends_without_photographs_are_refused():
    with pytest.raises(ValueError, match="natural images"):
        STAMPS["blended"].draw(SHAPE, seeded())


def test_values_of_patches_follow_their_colours():
    assert set(patch_colours(9, 1, 3, seeded(), colours="binary").unique().tolist()) == {0.0, 1.0}
