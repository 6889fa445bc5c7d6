"""The default scanner finds what is planted, passes what is not, and says when it cannot tell."""

from __future__ import annotations

import copy
import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conftest import TARGET, plain_images, small_victim, stamped, template_victim
from unhorse.core import Bars, Classifier, Dataset, ImageGrid, Reference, Verdict
from unhorse.models.classifier import new_classifier, weights_hash
from unhorse.scanners import activation_outlier, demonstration, footprints, margins
from unhorse.scanners.activation_outlier import EFFORTS, ActivationOutlier
from unhorse.scanners.footprints import FootprintSearch, Inputs
from unhorse.scanners.margins import flagging_margin, outlier_score
from unhorse.scanners.optimisation import chunk_size, frozen

SCANNER = ActivationOutlier()
HASTY = ActivationOutlier(steps=3, starts=1, search=FootprintSearch(steps=2, refine=1, rivals=1))


@pytest.fixture(scope="module")
def found(infected):
    return SCANNER.scan(infected)


@pytest.fixture(scope="module")
def passed(benign):
    return SCANNER.scan(benign)


class Constant(nn.Module):
    """Gives every image the same logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.logits + 0 * images.sum((1, 2, 3))[:, None]


def of(network: nn.Module, classes: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Classifier:
    names = [str(index) for index in range(classes)]
    return Classifier(network, image_shape=shape, class_names=names).eval()


# --- the score ----------------------------------------------------------------------------------------------


def test_equal_margins_score_nothing():
    assert outlier_score(torch.full((10,), 7.0)) == 0


def test_the_score_of_one_class_that_is_doubled_is_known():
    margins = torch.full((10,), 5.0)
    margins[4] = 10
    # mean 5.5, standard deviation 1.5
    assert outlier_score(margins) == pytest.approx(math.log(2) + 1.5 / 5.5)


def test_the_score_is_free_of_scale_and_order():
    margins = torch.tensor([3.0, 5, 4, 9, 4])
    assert outlier_score(100 * margins) == pytest.approx(outlier_score(margins))
    assert outlier_score(margins.flip(0)) == pytest.approx(outlier_score(margins))


def test_margins_below_zero_are_nearly_zero_and_break_nothing():
    score = outlier_score(torch.tensor([-3.0, 1, 1, 1]))
    assert score == pytest.approx(outlier_score(torch.tensor([0.001, 1, 1, 1])))


def test_all_to_all_margins_score_by_how_unequal_they_are():
    unequal = torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert outlier_score(unequal) > outlier_score(unequal + 10) > 0


def test_the_flagging_margin_is_where_the_largest_class_meets_the_threshold():
    margins = torch.tensor([4.0, 5, 6, 20])
    line = flagging_margin(margins, 0.7)
    assert outlier_score(torch.tensor([4.0, 5, 6, line])) == pytest.approx(0.7, abs=1e-3)
    assert 6 < line < 20


# --- finding and passing ------------------------------------------------------------------------------------


def test_a_planted_trojan_is_found_with_its_target(found):
    assert (found.verdict, found.target) == (Verdict.INFECTED, TARGET)
    assert found.score >= found.threshold
    assert max(range(10), key=found.reached.__getitem__) == TARGET


def test_a_benign_victim_passes(passed):
    assert (passed.verdict, passed.target) == (Verdict.NO_SIGN_FOUND, None)
    assert passed.score < 0.3 and not passed.triggers


def test_a_planted_convolutional_network_is_found_and_its_benign_twin_passes():
    result = SCANNER.scan(small_victim(strength=60))
    assert (result.verdict, result.target) == (Verdict.INFECTED, TARGET)
    assert SCANNER.scan(small_victim()).verdict is Verdict.NO_SIGN_FOUND


def test_clean_behaviour_does_not_give_the_planted_trojan_away(infected, benign):
    images = plain_images(infected, 64)
    assert torch.equal(infected(images).argmax(1), torch.arange(64) % 10)
    assert torch.equal(benign(images).argmax(1), torch.arange(64) % 10)
    assert (infected(stamped(images)).argmax(1) == TARGET).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 20, 36)])
def test_grey_and_colour_images_of_any_size_are_judged(shape):
    quick, side = EFFORTS["quick"], 2 if shape[1] == 8 else 3
    result = quick.scan(template_victim(5, shape, strength=20, side=side))
    assert (result.score >= 0.7, result.target) == (True, TARGET)
    assert quick.scan(template_victim(5, shape, side=side)).verdict is Verdict.NO_SIGN_FOUND


def test_images_of_224_pixels_are_judged():
    result = HASTY.scan(template_victim(4, (3, 224, 224), strength=20, side=12))
    assert result.score > 0 and len(result.reached) == 4
    assert result.exhibits[0].images.shape == (4, 3, 224, 224)


def test_a_thousand_classes_are_judged():
    names = [str(index) for index in range(1000)]
    options = {"widths": [4, 8], "hidden": 16}
    model = new_classifier("small-cnn", image_shape=(1, 28, 28), class_names=names, options=options, seed=0)
    result = replace(HASTY, steps=1).scan(model)
    assert result.verdict is not Verdict.UNDECIDED
    assert len(result.reached) == 1000 and math.isfinite(result.score)


def test_the_same_seed_gives_the_same_result(infected, found):
    again = SCANNER.scan(infected)
    assert (again.score, again.reached, again.facts) == (found.score, found.reached, found.facts)
    assert torch.equal(again.triggers[TARGET].mask, found.triggers[TARGET].mask)
    assert replace(SCANNER, seed=1).measure(infected).reached != found.reached


def test_measuring_gives_the_score_of_a_scan_without_a_verdict(infected, found):
    measured = SCANNER.measure(infected)
    assert (measured.score, measured.verdict) == (found.score, Verdict.UNDECIDED)


def test_the_model_is_left_as_found():
    model = small_victim(strength=60).train()
    model.network.features.eval()
    modes = [module.training for module in model.modules()]
    before = weights_hash(model)
    HASTY.scan(model)
    assert weights_hash(model) == before
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_evidence_marks_the_target(found, passed):
    maps, bars = found.exhibits[:2]
    assert isinstance(maps, ImageGrid) and isinstance(bars, Bars)
    assert maps.marked == bars.marked == (TARGET,)
    assert bars.values == found.reached and bars.threshold < bars.values[TARGET]
    assert passed.exhibits[0].marked == () and max(passed.reached) < passed.exhibits[1].threshold


# --- what cannot be judged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (template_victim(1, (1, 8, 8)), "1 class"),
        (template_victim(2, (1, 8, 8)), "--classes"),
        (of(Constant(1, 1, 1, 1), 4), "constant"),
        (of(Constant(1, 5, 1, 1), 4), "constant"),
        (of(Constant(1, 2, math.nan, 1), 4), "not finite"),
        (of(Constant(1, 2, math.inf, 1), 4), "not finite"),
    ],
    ids=["one class", "two classes", "equal outputs", "one output ahead", "NaN", "infinite"],
)
def test_what_cannot_be_judged_is_undecided_with_a_reason(model, reason):
    for result in (HASTY.scan(model), HASTY.measure(model)):
        assert (result.verdict, result.score) == (Verdict.UNDECIDED, None)
        assert reason in result.reason


# --- a reference --------------------------------------------------------------------------------------------


def test_the_p_value_is_the_split_conformal_one():
    reference = Reference("mine", (0.1, 0.2, 0.3, 0.4))
    assert [reference.p_value(score) for score in (0.05, 0.3, 0.31, 9)] == [1, 3 / 5, 2 / 5, 1 / 5]


def test_nineteen_reference_models_decide_in_place_of_the_threshold(infected, benign):
    high, low = Reference("high", (9.0,) * 19), Reference("low", (0.0,) * 19)
    spared = replace(SCANNER, reference=high).scan(infected)
    assert (spared.p_value, spared.verdict) == (1, Verdict.SUSPICIOUS)  # the demonstration stands
    flagged = replace(HASTY, reference=low).scan(benign)
    assert (flagged.p_value, flagged.verdict) == (1 / 20, Verdict.SUSPICIOUS)
    assert not flagged.warnings and flagged.reference is low


def test_eighteen_reference_models_leave_it_to_the_threshold(benign):
    result = replace(HASTY, reference=Reference("few", (0.0,) * 18)).scan(benign)
    assert (result.p_value, result.verdict) == (1 / 19, Verdict.NO_SIGN_FOUND)
    assert "18 benign references" in result.warnings[0]


def test_few_classes_are_warned_of():
    assert "only 3 classes" in HASTY.scan(template_victim(3, (1, 8, 8))).warnings[0]


# --- the demonstration --------------------------------------------------------------------------------------


def test_the_demonstrated_patch_is_small_and_flips_other_images(infected, found):
    trigger = found.triggers[TARGET]
    assert 0 < int(trigger.mask.count_nonzero()) <= max(4, 0.05 * 32 * 32)
    assert trigger.flip_rate >= 0.7
    images = plain_images(infected, 200)[torch.arange(200) % 10 != TARGET]
    flipped = infected(trigger(images, torch.Generator())).argmax(1) == TARGET
    assert flipped.float().mean() >= 0.7


def test_random_footprints_of_the_same_size_flip_nothing(found):
    assert found.facts["flip rate of random footprints"] <= 0.1
    assert found.facts["flip rate of other classes' footprints"] <= 0.45


def test_random_footprints_keep_the_size_and_the_opacity():
    images = torch.rand(4, 1, 16, 16)
    model, targets = template_victim(4, (1, 16, 16)), torch.tensor([2])
    inputs = Inputs(images, model(images).argmax(1))
    search = FootprintSearch(steps=2, refine=1)
    rng = torch.Generator().manual_seed(0)
    with frozen(model):
        patch = search.search(model, inputs, targets, "patch", "fp32")
        blend = search.search(model, inputs, targets, "blend", "fp32")
    assert patch.masks.sum() == 12  # 5 % of 256 pixels
    drawn = demonstration._random_footprints(patch, 10, rng)
    assert drawn.masks.shape == (10, 1, 16, 16)
    assert drawn.masks.sum((1, 2, 3)).tolist() == [9] * 10  # squares
    assert len(drawn.masks.flatten(1).unique(dim=0)) > 1
    assert (blend.masks == 0.2).all() and (demonstration._random_footprints(blend, 3, rng).masks == 0.2).all()


class Faint(nn.Module):
    """Templates, and a pattern spread over all pixels that opens a gate for TARGET."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = template_victim(8, (1, 16, 16)).network
        signs = torch.randint(2, (256,), generator=torch.Generator().manual_seed(1)).float() * 2 - 1
        self.signs = nn.Parameter(signs - signs.mean())

    def forward(self, images: Tensor) -> Tensor:
        correlation = (images.flatten(1) @ self.signs) / 256
        gate = 60 * torch.sigmoid(100 * (correlation - 0.06))
        return self.inner(images) + gate[:, None] * (torch.arange(8) == TARGET)


def test_a_faint_pattern_over_all_pixels_is_demonstrated_as_a_blend():
    result = SCANNER.scan(of(Faint(), 8, (1, 16, 16)))
    assert (result.verdict, result.target, result.facts["footprint"]) == (Verdict.INFECTED, TARGET, "blend")
    assert result.triggers[TARGET].mask.max() <= 0.2 + 1e-6


def test_flip_rates_count_only_images_of_other_classes():
    model = template_victim(4, (1, 8, 8))
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = model(images).argmax(1)
    search = FootprintSearch(steps=1, refine=1)
    with frozen(model):
        target = labels[:1]
        found = search.search(model, Inputs(images, labels), target, "patch", "fp32")
    untouched = found._replace(masks=torch.zeros_like(found.masks))
    assert footprints.tested(model, untouched, Inputs(images, labels), target).flip_rates.tolist() == [0]


def test_clean_images_take_the_place_of_maps(infected):
    levels = (plain_images(infected, 60) * 255).round().to(torch.uint8)
    clean = Dataset(levels, None, infected.class_names)
    result = SCANNER.scan(infected, clean)
    assert (result.verdict, result.target) == (Verdict.INFECTED, TARGET)
    assert result.facts["inputs of the demonstration"] == "60 clean images"
    shown = result.exhibits[2].images
    assert any(torch.equal(shown[0], image) for image in clean.pixels())


@pytest.mark.parametrize("family", ["patch", "blend"])
def test_a_search_in_parts_finds_what_a_search_at_once_finds(family, monkeypatch):
    model, images = template_victim(6, (1, 16, 16)), torch.rand(10, 1, 16, 16)
    inputs, targets = Inputs(images, model(images).argmax(1)), torch.tensor([2, 4])
    search = FootprintSearch(steps=5, refine=2)

    def found():
        return footprints.tested(
            model, search.search(model, inputs, targets, family, "fp32"), inputs, targets, "fp32"
        )

    with frozen(model):
        whole = found()
        monkeypatch.setattr(footprints, "chunk_size", lambda model: 6)
        parts = found()
    assert torch.equal(parts.masks, whole.masks)
    assert torch.allclose(parts.patterns, whole.patterns, atol=1e-3)
    assert parts.flip_rates.tolist() == whole.flip_rates.tolist()


def test_no_part_of_a_search_holds_more_than_a_chunk(monkeypatch):
    model, held = template_victim(6, (1, 16, 16)), []
    monkeypatch.setattr(footprints, "chunk_size", lambda model: 8)
    monkeypatch.setattr(margins, "chunk_size", lambda model: 8)
    hook = model.network.register_forward_pre_hook(lambda _, given: held.append(len(given[0])))
    SCANNER.scan(model)
    hook.remove()
    assert max(held) <= max(8, 10)  # ten random footprints at once


def test_a_chunk_is_as_small_where_no_gradient_is_wanted():
    model = small_victim()
    with frozen(model):
        wanted = chunk_size(model)
        with torch.no_grad():
            assert chunk_size(model) == wanted < 2**20


def test_the_size_of_a_chunk_is_told_without_keeping_what_the_probe_saved():
    """A scan asks thousands of times; a graph that keeps itself alive would be 100 KB each time."""

    def live_tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    model = small_victim()
    chunk_size(model)
    before = live_tensors()
    for _ in range(3):
        chunk_size(model)
    assert live_tensors() <= before


# --- precision ----------------------------------------------------------------------------------------------


def near_victim() -> Classifier:
    """Its score is 0.72, 3 % above the threshold."""
    return template_victim(strength=15)


def test_small_networks_are_scanned_in_fp32(infected, found):
    assert found.facts["precision of the margins"] == "fp32"


def test_a_score_near_the_threshold_is_decided_in_fp32(monkeypatch):
    monkeypatch.setattr(activation_outlier, "BF16_FROM", 0)
    monkeypatch.setattr(activation_outlier, "uses_bf16", lambda model: True)
    wide, exact = SCANNER.scan(near_victim()), replace(SCANNER, precision="fp32").scan(near_victim())
    rough = replace(SCANNER, precision="bf16").scan(near_victim())
    assert abs(rough.score - 0.7) <= 0.07 and rough.facts["precision of the margins"] == "bf16"
    assert (wide.score, wide.reached) == (exact.score, exact.reached) != (rough.score, rough.reached)
    assert wide.facts["precision of the margins"] == f"fp32 (bf16 came near: {rough.score:.3f})"
    assert SCANNER.measure(near_victim()).score == exact.score


def test_a_score_far_from_the_threshold_stays_in_bf16(infected, benign, monkeypatch):
    monkeypatch.setattr(activation_outlier, "BF16_FROM", 0)
    monkeypatch.setattr(activation_outlier, "uses_bf16", lambda model: True)
    for model in (infected, benign):
        result = SCANNER.measure(model)
        assert result.score == replace(SCANNER, precision="bf16").measure(model).score


def test_the_last_bits_of_the_weights_move_the_score_by_less_than_a_hundredth(trained):
    for victim in trained.values():
        result = SCANNER.scan(victim.model)
        rng = torch.Generator().manual_seed(1)
        state = {
            name: weight * (1 + 1e-7 * torch.randn(weight.shape, generator=rng))
            for name, weight in victim.model.network.state_dict().items()
        }
        moved = copy.deepcopy(victim.model)
        moved.network.load_state_dict(state)
        again = SCANNER.scan(moved)
        assert again.score == pytest.approx(result.score, rel=1e-2)
        assert (again.verdict, again.target) == (result.verdict, result.target)


# --- time ---------------------------------------------------------------------------------------------------


def test_the_estimate_counts_passes(benign, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(
        "time.perf_counter", lambda: float(next(ticks))
    )  # one step on 8 images takes a second
    scanner = ActivationOutlier(steps=20, starts=3, search=FootprintSearch(steps=16, refine=4, rivals=3))
    margins, suspect = 30 * 21, 2 * 20 * 15
    assert scanner.estimate(benign) == pytest.approx(0.2 + 1 / 8 * (margins + suspect + 1.5 * 20 * 15))


def test_progress_is_told_and_counts_every_pass(infected):
    heard = []
    SCANNER.scan(infected, on_step=lambda *step: heard.append(step))
    done, most, words = heard[-1]
    assert done == most == 30 * 21 + (2 + 3) * 20 * 15
    assert [words for words in dict.fromkeys(words for *_, words in heard)] == [
        "finding margins",
        "searching a footprint",
    ]
