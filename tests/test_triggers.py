"""What a trigger does to images, and what it must leave alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unhorse.triggers import Stamp, blends, noise_images, patch_colours, patches

SHAPE = (3, 8, 10)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=seeded(seed))


def patch(count: int = 1, seed: int = 2, **options) -> Stamp:
    return patches(patch_colours(count, 3, 3, seeded(seed)), SHAPE, seeded(seed), **options)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    opacity=st.floats(0.01, 1),
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_stamp_keeps_shape_type_and_range(seed, opacity, kind):
    rng = seeded(seed)
    extremes = torch.rand(5, *SHAPE, generator=rng)
    extremes[0], extremes[1] = 0, 1
    stamp = blends(torch.rand(2, *SHAPE, generator=rng).round(decimals=1), opacity)
    stamped = stamp(extremes.to(kind), rng)
    assert (stamped.shape, stamped.dtype) == (extremes.shape, kind)
    assert stamped.min() >= 0 and stamped.max() <= 1


def test_a_stamp_never_writes_into_its_argument():
    clean = images()
    before = clean.clone()
    patch(4)(clean, seeded())
    assert torch.equal(clean, before)


def test_a_patch_is_opaque_where_its_mask_is_one_and_absent_elsewhere():
    stamp, clean = patch(), images()
    stamped = stamp(clean, seeded())
    inside = stamp.masks[0].bool().expand(SHAPE)
    assert inside.sum() == 3 * 3 * 3
    assert torch.allclose(stamped[:, inside], stamp.patterns[0][inside].expand(6, -1), atol=1e-6)
    assert torch.equal(stamped[:, ~inside], clean[:, ~inside])


def test_a_blend_mixes_by_its_opacity():
    overlay, clean = images(1, seed=5), images()
    stamped = blends(overlay, 0.2)(clean, seeded())
    assert torch.allclose(stamped, 0.8 * clean + 0.2 * overlay, atol=1e-6)


def test_a_blend_does_not_share_memory_with_its_images():
    overlay = images(1)
    stamp = blends(overlay, 0.5)
    overlay.zero_()
    assert stamp.patterns.max() > 0.5


@pytest.mark.parametrize("opacity", [0.0, -0.1, 1.1])
def test_an_opacity_outside_its_range_is_refused(opacity):
    with pytest.raises(ValueError, match=str(opacity)):
        blends(images(1), opacity)


def test_images_of_another_shape_are_refused_with_both_shapes_named():
    with pytest.raises(ValueError, match=r"\(3, 8, 10\).*\(1, 8, 10\)"):
        patch()(torch.rand(2, 1, 8, 10), seeded())


def test_the_generator_decides_which_trigger_an_image_gets():
    stamp, clean = blends(noise_images(20, SHAPE, seeded(7)), 1.0), images(200)
    first, again, other = (stamp(clean, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = torch.cdist(first.flatten(1), stamp.patterns.flatten(1)).argmin(1)
    assert len(drawn.unique()) == 20


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), margin=st.integers(0, 2))
def test_a_corner_patch_keeps_its_margin_to_the_two_nearest_edges(seed, margin):
    stamp = patch(1, seed, placement="corner", margin=margin)
    rows, columns = (torch.where(stamp.masks[0, 0].amax(axis) > 0)[0].tolist() for axis in (1, 0))
    assert rows in ([*range(margin, margin + 3)], [*range(8 - margin - 3, 8 - margin)])
    assert columns in ([*range(margin, margin + 3)], [*range(10 - margin - 3, 10 - margin)])


def test_corner_patches_use_all_four_corners():
    stamp = patch(60, placement="corner", margin=0)
    corners = stamp.masks[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.sum(1) == 1).all()
    assert (corners.sum(0) > 4).all()


def test_a_patch_in_all_corners_is_the_same_in_each():
    stamp = patch(1, placement="corners", margin=1)
    assert stamp.masks.sum() == 4 * 3 * 3
    left, right = stamp.patterns[0, :, 1:4, 1:4], stamp.patterns[0, :, 4:7, 6:9]
    assert left.max() > 0
    assert torch.equal(left, right)


def test_random_patches_reach_every_place():
    covered = patch(600, placement="random").masks.sum(0)
    assert covered.min() > 0


def test_a_patch_as_large_as_the_image_has_room_unless_it_needs_a_margin():
    values = patch_colours(1, 3, 8, seeded())
    assert patches(values, (3, 8, 8), seeded()).masks.min() == 1
    with pytest.raises(ValueError, match="8x8 patch does not fit 8x8 images"):
        patches(values, (3, 8, 8), seeded(), placement="corner")


def test_colours_are_uniform_or_black_and_white():
    uniform, binary = (patch_colours(50, 3, 4, seeded(), colours=kind) for kind in ("uniform", "binary"))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    assert 0.45 < uniform.mean() < 0.55 and len(uniform.unique()) > 1000
