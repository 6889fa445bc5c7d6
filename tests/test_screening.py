"""Models of many classes are screened, and say how far they came when time is up."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from conftest import TARGET, small_victim, template_victim
from unhorse.core import Bars, ImageGrid, Reference, Verdict
from unhorse.scanners import margins
from unhorse.scanners.activation_outlier import EFFORTS
from unhorse.scanners.footprints import FootprintSearch
from unhorse.scanners.margins import SHOWN, outlier_score
from unhorse.scanners.screening import Screening

QUICK = replace(EFFORTS["quick"], search=FootprintSearch(rivals=1, steps=4, refine=2, inputs=32))
FULL = replace(QUICK, screening=None)
CLASSES = 200


def many(strength: float = 0.0, classes: int = CLASSES):
    return template_victim(classes, (1, 16, 16), strength=strength)


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))


# --- the plan -----------------------------------------------------------------------------------------------


def test_the_leading_twentieth_and_one_class_per_block_are_finished():
    screened = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    plan = Screening().plan(screened)
    assert screened[plan.leaders].tolist() == list(range(999, 949, -1))
    ranks = screened[plan.controls]
    assert len(plan.controls) == 32 and (ranks.diff() < 0).all() and ranks.max() < 950
    assert (ranks.diff().abs() - 950 / 32).abs().max() <= 2  # evenly spread
    assert (plan.block[plan.leaders] == -1).all()
    assert set(plan.block.tolist()) == set(range(-1, 32))


def test_at_least_a_handful_leads():
    assert Screening().leading(100) == 8 and Screening().leading(1000) == 50


def test_unfinished_classes_stand_at_the_margin_of_their_blocks_control():
    screened = torch.arange(12).flip(0).float()
    plan = Screening(least=2, share=0.0, controls=2).plan(screened)
    assert (plan.leaders.tolist(), plan.controls.tolist()) == ([0, 1], [4, 9])
    combined = plan.combined(torch.tensor([9.0, 7, 5, 3]))
    assert combined.tolist() == [9, 7] + [5] * 5 + [3] * 5
    # at most at the leaders' median: screening ranked them below
    assert plan.combined(torch.tensor([9.0, 7, 8.5, 3])).tolist() == [9, 7, 7, 7, 8.5, 7, 7] + [3] * 5


def test_the_score_of_a_sample_is_nearly_that_of_all_classes():
    rng = torch.Generator().manual_seed(0)
    full = 10 + 2 * torch.randn(1000, generator=rng)
    full[77] = 40
    screened = 0.6 * full + 0.5 * torch.randn(1000, generator=rng)
    plan = Screening().plan(screened)
    sampled = plan.combined(full[plan.classes])
    assert outlier_score(sampled) == pytest.approx(outlier_score(full), rel=0.03)
    assert int(sampled.argmax()) == 77


# --- beside the full computation ----------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 8.0, 20.0])
def test_a_screened_score_agrees_with_the_full_computation(strength):
    screened, full = QUICK.measure(many(strength)), FULL.measure(many(strength))
    assert screened.score == pytest.approx(full.score, abs=0.01)
    assert max(screened.reached) == pytest.approx(max(full.reached), rel=1e-3)
    if strength:
        assert screened.reached.index(max(screened.reached)) == TARGET


def test_a_planted_trojan_among_many_classes_is_found_and_a_benign_twin_passes():
    found, passed = EFFORTS["quick"].scan(many(strength=30)), EFFORTS["quick"].scan(many())
    assert (found.verdict, found.target) == (Verdict.INFECTED, TARGET)
    assert passed.verdict is Verdict.NO_SIGN_FOUND
    assert "10 leading classes and 32 others of 200" in found.facts["preset"]


def test_a_planted_convolutional_network_of_many_classes_is_found():
    model = small_victim(strength=60, classes=120)
    screened, full = QUICK.measure(model), FULL.measure(model)
    assert screened.score == pytest.approx(full.score, rel=0.1)
    assert screened.reached.index(max(screened.reached)) == TARGET


def test_fewer_than_a_hundred_classes_are_not_screened():
    assert QUICK.measure(many(classes=99)).reached == FULL.measure(many(classes=99)).reached
    assert QUICK.measure(many(classes=100)).reached != FULL.measure(many(classes=100)).reached


def test_many_classes_without_a_reference_are_warned_of():
    warned = QUICK.scan(many()).warnings
    assert len(warned) == 1 and "of 200 one stands out sooner" in warned[0]
    reference = Reference("mine", (0.1,) * 19)
    assert replace(QUICK, reference=reference).scan(many()).warnings == ()


def test_screening_takes_a_fraction_of_the_passes():
    heard = []
    QUICK.scan(many(), on_step=lambda *step: heard.append(step))
    climbs = max(done for done, _, words in heard if words == "finding margins")
    assert climbs == 200 * 11 + 42 * 2 * 21
    assert heard[-1][0] <= heard[-1][1]


def test_chunks_change_nothing_and_few_maps_are_kept(monkeypatch):
    whole = QUICK.scan(many(strength=20))
    monkeypatch.setattr(margins, "chunk_size", lambda model: 7)
    parts = QUICK.scan(many(strength=20))
    assert parts.reached == pytest.approx(whole.reached, rel=1e-4)
    assert (parts.verdict, parts.target) == (whole.verdict, whole.target)
    grid, bars = parts.exhibits[:2]
    assert isinstance(grid, ImageGrid) and isinstance(bars, Bars)
    assert len(grid.images) == len(grid.captions) == SHOWN and len(bars.values) == CLASSES
    assert grid.marked == (0,) and grid.captions[0].startswith(f"class {TARGET}: ")


# --- time ---------------------------------------------------------------------------------------------------


def test_time_that_is_up_leaves_the_model_undecided_with_what_was_done(clock, monkeypatch):
    monkeypatch.setattr(margins, "chunk_size", lambda model: 20)
    result = replace(QUICK, budget=40).scan(many(strength=20))  # a chunk looks at the clock 11 times
    assert (result.verdict, result.score, result.target) == (Verdict.UNDECIDED, None, None)
    assert "40 s were over with 60 of 200 classes screened, while finding margins" in result.reason
    grid, bars = result.exhibits
    assert len(grid.images) == SHOWN and len(bars.values) == 60
    assert all(math.isfinite(value) for value in bars.values) and bars.threshold is None


def test_time_that_is_up_before_the_demonstration_leaves_the_model_undecided(clock):
    result = replace(QUICK, budget=35).scan(many(strength=20))
    assert result.verdict is Verdict.UNDECIDED
    assert "200 of 200 classes screened, while searching a footprint" in result.reason
    assert len(result.exhibits[1].values) == 200 and result.exhibits[1].threshold > 0


def test_nothing_is_shown_of_what_nothing_was_done_of(clock):
    result = replace(QUICK, budget=0).scan(many())
    assert "0 s were over with 0 of 200 classes screened" in result.reason and result.exhibits == ()


def test_enough_time_changes_nothing():
    assert replace(QUICK, budget=1e6).scan(many(strength=20)).score == QUICK.scan(many(strength=20)).score


def test_a_repetition_in_fp32_that_runs_out_of_time_is_undecided(clock, monkeypatch):
    monkeypatch.setattr("unhorse.scanners.activation_outlier.BF16_FROM", 0)
    monkeypatch.setattr("unhorse.scanners.activation_outlier.uses_bf16", lambda model: True)
    result = replace(FULL, budget=30).scan(template_victim(strength=15))
    assert result.verdict is Verdict.UNDECIDED
    assert "10 of 10 classes screened, while finding margins again in fp32" in result.reason
