import pytest
import torch

from conftest import TARGET, plain_images, template_victim
from unhorse.benchmark.synthesis import measure_synthesis, pictures, synthesise
from unhorse.core import Dataset

VARIANTS = ("per-image", "mask-generator", "image-generator")
SHAPE = (1, 12, 12)
CLASSES = 4
QUICK = {"delta": 1.5, "steps": 40, "seed": 0}


@pytest.fixture(scope="module")
def victim():
    return template_victim(CLASSES, SHAPE, strength=20)


@pytest.fixture(scope="module")
def clean(victim):
    """60 images and their labels, a quarter of each class; the victim knows them all."""
    images, labels = plain_images(victim, 60), torch.arange(60) % CLASSES
    with torch.no_grad():
        assert (victim(images).argmax(1) == labels).all()
    return images, labels


def dataset(clean, labels=None):
    names = tuple(f"class {index}" for index in range(CLASSES))
    return Dataset((clean[0] * 255).round().to(torch.uint8), labels, names)


# --- what is found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_planted_target_needs_a_smaller_trigger_than_another_class(victim, clean, variant):
    found = measure_synthesis(victim, dataset(clean, clean[1]), TARGET, variant=variant, **QUICK)
    assert set(found) == {"success_rate", "trigger_norm", "other_success_rate", "other_trigger_norm"}
    assert found["success_rate"] == 1.0
    assert found["trigger_norm"] < 0.8 * found["other_trigger_norm"]
    assert found["trigger_norm"] < 1.25 * QUICK["delta"]


def test_no_class_of_a_benign_victim_is_easy(clean):
    benign = template_victim(CLASSES, SHAPE)
    found = measure_synthesis(benign, dataset(clean, clean[1]), TARGET, variant="image-generator", **QUICK)
    assert found["trigger_norm"] > 0.8 * found["other_trigger_norm"]


def test_the_mask_of_the_generator_lies_on_the_planted_patch(victim, clean):
    masks = synthesise(victim, *clean, TARGET, "mask-generator", **QUICK).masks
    on_the_patch = masks[:, :, :3, :3].mean()
    assert on_the_patch > 5 * (masks.sum() - masks[:, :, :3, :3].sum()) / (masks.numel() - 9 * len(masks))


def test_a_larger_bound_leaves_a_larger_trigger(victim, clean):
    norms = [
        synthesise(victim, *clean, TARGET, "per-image", delta, steps=40, seed=0).norm.mean()
        for delta in (1.5, 4.0)
    ]
    assert norms[0] < 2.0 < 3.0 < norms[1] < 4.5


# --- what is measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_held_out_images_of_other_classes_are_measured(victim, clean, variant):
    found = synthesise(victim, *clean, TARGET, variant, 1.5, steps=1, seed=0)
    assert len(found.images) == 22  # half of the 45 images of other classes
    same = (found.originals[:, None] == clean[0][None]).flatten(2).all(2)
    assert same.any(1).all()
    assert (clean[1][same.int().argmax(1)] != TARGET).all()
    with torch.no_grad():
        assert torch.equal(found.success, victim(found.images).argmax(1) == TARGET)


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_the_norm_is_that_of_the_mask(victim, clean, variant):
    found = synthesise(victim, *clean, TARGET, variant, 1.5, steps=1, seed=0)
    torch.testing.assert_close(found.norm, found.masks.flatten(1).norm(dim=1))
    assert (found.norm < 1.5).all()  # it starts below the bound


def test_without_a_mask_the_norm_is_that_of_the_whole_change(victim, clean):
    found = synthesise(victim, *clean, TARGET, "image-generator", 1.5, steps=1, seed=0)
    torch.testing.assert_close(found.norm, (found.images - found.originals).flatten(1).norm(dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_triggered_images_are_pixels_and_a_seed_repeats_them(victim, clean, variant):
    before = clean[0].clone()
    first, again, other = (
        synthesise(victim, *clean, TARGET, variant, 1.5, steps=3, seed=seed) for seed in (0, 0, 1)
    )
    assert first.images.min() >= 0
    assert first.images.max() <= 1
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(clean[0], before)


def test_the_model_and_the_global_randomness_are_left_as_found(clean):
    model = template_victim(CLASSES, SHAPE, strength=20).train()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    synthesise(model, *clean, TARGET, "mask-generator", 1.5, steps=2, seed=0)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_colour_images_of_odd_sizes_are_no_trouble():
    model = template_victim(CLASSES, (3, 11, 14))
    images, labels = plain_images(model, 12), torch.arange(12) % CLASSES
    for variant in VARIANTS:
        found = synthesise(model, images, labels, 0, variant, 2.0, steps=2, seed=0)
        assert found.images.shape == (4, 3, 11, 14)
        assert found.masks.shape == (4, 1, 11, 14)


def test_pictures_show_images_triggered_images_and_masks_in_rows(victim, clean):
    found = synthesise(victim, *clean, TARGET, "mask-generator", 1.5, steps=1, seed=0)
    grid = pictures(found, "synthetic triggers", count=5)
    assert (grid.columns, len(grid.images)) == (5, 15)
    assert torch.equal(grid.images[5:10], found.images[:5])
    assert grid.captions[::5] == ("image", "with trigger", "mask")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 4}, "outside 0..3"),
        ({"variant": "by-hand"}, "one of per-image, mask-generator, image-generator"),
        ({"delta": 0.0}, "give a positive number"),
        ({"labels": torch.full((60,), TARGET)}, "0 images are not of class 3: give at least two"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(victim, clean, change, message):
    asked = {"images": clean[0], "labels": clean[1], "target": TARGET, "variant": "per-image", **QUICK}
    with pytest.raises(ValueError, match=message):
        synthesise(victim, **(asked | change))


def test_unlabelled_data_are_refused(victim, clean):
    with pytest.raises(ValueError, match="no labels: give images in one folder per class"):
        measure_synthesis(victim, dataset(clean), TARGET, variant="per-image", **QUICK)
