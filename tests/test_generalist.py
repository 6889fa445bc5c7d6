"""The scanner in the box: what its stand-ins and stamps are, what it learns, and what it says of a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TARGET, TemplateNetwork, board, template_victim
from planted_models import planted_models
from unhorse.core import Bars, Classifier, Dataset, ImageGrid, Reference, Table, Verdict
from unhorse.scanners import stamps
from unhorse.scanners.activation_outlier import ActivationOutlier
from unhorse.scanners.countdown import Countdown, TimeUp
from unhorse.scanners.evidence import Evidence, EvidenceSearch, Unreadable
from unhorse.scanners.footprints import FootprintSearch
from unhorse.scanners.generalist import Generalist
from unhorse.scanners.optimisation import frozen
from unhorse.scanners.readings import LEAST_SPREAD, Readings, lead_of_others
from unhorse.scanners.stamps import StampSearch
from unhorse.scanners.stand_ins import StandInSearch

SHAPE = (1, 16, 16)
HASTY = EvidenceSearch(StandInSearch(count=12, steps=12), StampSearch(steps=4, more_steps=2, restarts=1))
OUTLIER = ActivationOutlier(steps=12, starts=2, search=FootprintSearch(steps=2, refine=1, rivals=1))


def planted(count: int, first: int = 0) -> tuple[list[Classifier], list[bool]]:
    """Models whose Trojans show."""
    return planted_models(count, first=first, noise=0.1)


class Gated(TemplateNetwork):
    """Sees TARGET, or the class after each, the more so the more the corner is like the trigger."""

    def __init__(self, *, all_targets: bool) -> None:
        super().__init__(6, SHAPE)
        self.all_targets = all_targets

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        corner = images[:, :, : self.side, : self.side]
        likeness = 1 - (corner - board(self.side).to(corner)).abs().mean((1, 2, 3))
        gate = (2 * likeness - 1).clamp(min=0)[:, None]
        if self.all_targets:
            return logits + 2 * gate * (logits.roll(1, 1) - logits)
        return logits + 40 * gate * (torch.arange(6) == TARGET)


class Constant(nn.Module):
    """Sees class 0 in everything."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.eye(classes)[0])

    def forward(self, images: Tensor) -> Tensor:
        return self.logits + 1e-3 * images.sum((1, 2, 3))[:, None] * self.logits


def of(network: nn.Module, classes: int = 6) -> Classifier:
    names = [f"class {index}" for index in range(classes)]
    return Classifier(network, image_shape=SHAPE, class_names=names).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Classifier]:
    return {
        "benign": template_victim(6, SHAPE),
        "single": of(Gated(all_targets=False)),
        "all": of(Gated(all_targets=True)),
    }


@pytest.fixture(scope="module")
def evidence(models) -> dict[str, Evidence]:
    return {name: EvidenceSearch().run(model, torch.ones(6)) for name, model in models.items()}


@pytest.fixture(scope="module")
def fitted() -> Generalist:
    """Fitted on hasty numbers of planted models; its threshold lies between theirs."""
    scanner = Generalist(outlier=OUTLIER, search=HASTY)
    several, flags = planted(8)
    features = [scanner.features(model) for model in several]
    scores = scanner.scores(features)
    benign, trojaned = scores[~torch.tensor(flags)], scores[torch.tensor(flags)]
    assert benign.max() < trojaned.min()
    return replace(scanner, threshold=float(benign.max() + trojaned.min()) / 2)


# --- stand-ins ----------------------------------------------------------------------------------------------


def test_stand_ins_are_taken_for_their_classes_however_they_are_disturbed(models, evidence):
    stand_ins = evidence["benign"].stand_ins
    images, labels = stand_ins.inputs
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(labels.unique(), torch.arange(6))
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(5))).clamp(0, 1)
    with torch.no_grad():
        assert torch.equal(models["benign"](images).argmax(1), labels)
        assert float((models["benign"](noisy).argmax(1) == labels).float().mean()) > 0.9
        assert torch.allclose(stand_ins.logits, models["benign"](images))
    assert float(stand_ins.held.mean()) > 0.8
    assert (stand_ins.leads > 0).all()


def test_many_classes_are_spread_evenly_and_few_get_several_images():
    search = StandInSearch(count=40, most_classes=64)
    assert torch.bincount(search.classes(10)).tolist() == [4] * 10
    assert torch.bincount(search.classes(43)).tolist() == [1] * 43
    spread = search.classes(1000)
    assert len(spread) == 64 and spread[0] == 0 and spread[-1] == 999
    assert len(search.classes(1)) == 40


def test_what_the_model_takes_for_another_class_is_left_out():
    model = of(Constant(6))
    with frozen(model):
        found = StandInSearch(count=12, steps=2).run(model)
    assert found.inputs.labels.tolist() == [0, 0]
    with pytest.raises(Unreadable, match="only 2 images .* check the weights"):
        HASTY.run(model, torch.ones(6))


def test_the_lead_of_the_others_is_known():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    assert lead_of_others(logits, torch.tensor([0, 2])).tolist() == [-1.0, 6.0]


# --- stamps -------------------------------------------------------------------------------------------------


def test_a_patch_has_its_mass_and_a_larger_one_takes_more(evidence):
    stand_ins, found = evidence["benign"].stand_ins, evidence["benign"].stamps
    assert [stamp.area for stamp in found] == [0.005, 0.01, 0.02, 0.04]
    taken = []
    for stamp in found:
        assert float(stamp.mask.sum()) <= stamp.area * 256 + 1e-3
        assert stamp.mask.min() >= 0 and stamp.mask.max() <= 1
        taken.append(float(lead_of_others(stamp.logits, stand_ins.inputs.labels).mean()))
    assert taken == sorted(taken)


def test_the_logits_of_a_stamp_are_those_of_stamped_images(models, evidence):
    images, stamp = evidence["single"].stand_ins.inputs.images, evidence["single"].stamps[-1]
    with torch.no_grad():
        logits = models["single"](images + stamp.mask * (stamp.pattern - images))
    assert torch.allclose(logits, stamp.logits, atol=1e-4)


def test_the_trigger_is_found_where_there_is_one(evidence):
    """Of 256 pixels the trigger has 9, so 4 % hold it."""
    readings = {name: found.readings() for name, found in evidence.items()}
    assert readings["single"].rise(0.04) > 2 * readings["benign"].rise(0.04)
    assert readings["all"].rise(0.04) > 1.2 * readings["benign"].rise(0.04)
    assert [readings[name].suspect for name in ("benign", "single", "all")] == [None, TARGET, None]


def test_parts_of_a_pass_change_nothing(models, monkeypatch):
    model = models["single"]
    with frozen(model):
        inputs = StandInSearch(count=12, steps=12).run(model).inputs
        search = StampSearch(steps=3, more_steps=1)
        whole = search.run(model, inputs)
        monkeypatch.setattr(stamps, "chunk_size", lambda model: 5)
        parts = search.run(model, inputs)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one.logits, other.logits, atol=1e-3)


def test_passes_are_counted(models):
    heard: list[int] = []
    clock = Countdown(on_step=lambda done, most, words: heard.append(done))
    HASTY.run(models["benign"], torch.ones(6), "fp32", clock)
    assert heard[-1] == HASTY.passes(6)
    with pytest.raises(TimeUp):
        HASTY.run(models["benign"], torch.ones(6), "fp32", Countdown(budget=0.0))


# --- numbers ------------------------------------------------------------------------------------------------


def test_readings_survive_json(evidence):
    readings = evidence["single"].readings()
    again = Readings.read(json.loads(json.dumps(readings.record())))
    assert again.areas == readings.areas and torch.equal(again.labels, readings.labels)
    assert again.rise(0.01) == pytest.approx(readings.rise(0.01), rel=1e-3)
    assert again.suspect == readings.suspect


def readings_of(reached: Tensor, logits: Tensor, stamped: Tensor) -> Readings:
    return Readings(reached, torch.arange(3), torch.ones(3), logits, (0.01,), stamped[None])


def test_the_outlier_is_known_and_free_of_scale():
    reached = torch.tensor([1.0, 2.0, 4.0, 32.0])
    readings = readings_of(reached, torch.eye(3), torch.eye(3))
    log2 = math.log(2)
    assert readings.outlier() == pytest.approx(4 * log2 / (log2 + LEAST_SPREAD))
    assert readings._replace(reached=7 * reached).outlier() == pytest.approx(readings.outlier())
    equal = readings._replace(reached=torch.full((10,), 3.0))
    assert equal.outlier() == pytest.approx(0, abs=1e-6)


def test_the_rise_is_known_and_free_of_scale():
    clean, under = 4 * torch.eye(3), 4 * torch.eye(3)
    under[:2, 2] = 6.0  # two of three are drawn to class 2, which is the third's own
    readings = readings_of(torch.ones(3), clean, under)
    # a rise by 6 where the mean rises by 2, of a lead of 4, in two of three
    assert readings.rise(0.01) == pytest.approx(2 * (6 - 2) / 3 / 4)
    assert readings_of(torch.ones(3), 7 * clean, 7 * under).rise(0.01) == pytest.approx(readings.rise(0.01))
    assert readings.suspect == 2


# --- learning -----------------------------------------------------------------------------------------------


def test_unseen_models_are_told_apart(fitted):
    several, flags = planted(6, first=100)
    scores = fitted.scores([fitted.features(model) for model in several])
    assert scores[torch.tensor(flags)].min() > scores[~torch.tensor(flags)].max()


def test_the_threshold_is_a_quantile_of_benign_models_of_which_every_group_counts_the_same():
    def scored(score: float) -> dict[str, Any]:
        readings = readings_of(torch.tensor([1.0, 1.0, 1.0]), 4 * torch.eye(3), 4 * torch.eye(3))
        spread = readings._replace(reached=torch.tensor([1.0, 1.0, math.exp(score * 4.5 * LEAST_SPREAD)]))
        return spread.record()

    scanner = Generalist()
    assert float(scanner.scores([scored(2.0)])) == pytest.approx(2.0, rel=1e-2)
    features = [scored(1.0)] * 2 + [scored(3.0)] * 10 + [scored(9.0)] * 3
    flags, groups = [False] * 12 + [True] * 3, ["a"] * 2 + ["b"] * 10 + ["a"] * 3
    scanner.fit(features, flags, groups)
    assert scanner.threshold == pytest.approx(3.0, rel=1e-2)  # of 1, 1, 3 and 3
    assert scanner.corroborated == pytest.approx(3.0, rel=1e-2)
    assert scanner.fit(features, flags).corroborated == pytest.approx(3.0, rel=1e-2)
    with pytest.raises(ValueError, match="no benign models"):
        scanner.fit(features, [True] * 15)


# --- scanning -----------------------------------------------------------------------------------------------


def test_the_score_of_a_scan_is_that_of_its_features(fitted):
    model = planted(1, first=101)[0][0]
    result = fitted.scan(model)
    assert result.score == pytest.approx(float(fitted.scores([fitted.features(model)])), abs=1e-2)
    assert fitted.measure(model).score == pytest.approx(result.score, abs=1e-6)
    assert fitted.measure(model).verdict is Verdict.UNDECIDED
    assert result.verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS) and result.scanner == "generalist"
    table = next(
        exhibit for exhibit in result.exhibits if isinstance(exhibit, Table) and "Two tests" in exhibit.title
    )
    ratios = [float(row[-1]) for row in table.rows]
    assert max(ratios) == pytest.approx(result.score, abs=1e-3)
    assert any(isinstance(exhibit, ImageGrid) and "Stand-ins" in exhibit.title for exhibit in result.exhibits)
    bars = next(exhibit for exhibit in result.exhibits if isinstance(exhibit, Bars))
    assert bars.threshold is None and "line" not in bars.note


def test_a_reference_decides_in_place_of_the_threshold(fitted):
    model = planted(1, first=101)[0][0]
    calm = Reference("calm", tuple(float(score) for score in torch.linspace(-9, -8, 20)))
    wild = Reference("wild", tuple(float(score) for score in torch.linspace(90, 99, 20)))
    assert replace(fitted, reference=calm).scan(model).p_value == pytest.approx(1 / 21)
    result = replace(fitted, reference=wild).scan(model)
    assert result.p_value == 1 and result.verdict is not Verdict.INFECTED


def test_clean_images_serve_the_demonstration_and_change_no_score(fitted):
    model = planted(1, first=101)[0][0]
    rng = torch.Generator().manual_seed(0)
    clean = Dataset(
        torch.randint(256, (16, 1, 8, 8), generator=rng, dtype=torch.uint8),
        None,
        model.class_names,
    )
    result = fitted.scan(model, clean)
    assert result.score == pytest.approx(fitted.scan(model).score)
    assert result.facts["inputs of the demonstration"] == "16 clean images"


def test_two_classes_and_no_time_are_undecided(fitted):
    few = fitted.scan(template_victim(2, (1, 8, 8)))
    assert few.verdict is Verdict.UNDECIDED and "3 or more" in few.reason and few.scanner == "generalist"
    assert fitted.measure(template_victim(2, (1, 8, 8))).verdict is Verdict.UNDECIDED
    model = planted(1)[0][0]
    late = replace(fitted, budget=0.0).scan(model)
    assert late.verdict is Verdict.UNDECIDED and "--timeout" in late.reason
    assert "--timeout" in replace(fitted, budget=0.0).measure(model).reason


def test_time_that_ends_between_the_parts_is_said(fitted, monkeypatch):
    def slow(*_: object, **__: object) -> None:
        raise TimeUp

    monkeypatch.setattr(EvidenceSearch, "run", slow)
    result = replace(fitted, budget=60.0).scan(planted(1)[0][0])
    assert result.verdict is Verdict.UNDECIDED and "60 s were over" in result.reason


def test_the_steps_of_both_parts_are_one_count(fitted):
    heard: list[tuple[int, int, str]] = []
    fitted.scan(planted(1)[0][0], on_step=lambda *said: heard.append(said))
    done = [count for count, _, _ in heard]
    assert done == sorted(done)
    assert all(count <= most for count, most, _ in heard)
    assert {"finding margins", "searching universal stamps"} <= {words for _, _, words in heard}


# --- the one in the box -------------------------------------------------------------------------------------


def test_the_shipped_one_judges_the_trained_victims(trained):
    scanner = Generalist.shipped()
    infected = scanner.scan(trained["infected"].model)
    assert infected.verdict is Verdict.INFECTED and infected.target == 3
    assert scanner.scan(trained["benign"].model).verdict is Verdict.NO_SIGN_FOUND


def test_effort_changes_no_score(trained):
    model = trained["benign"].model
    quick = Generalist.shipped("quick").measure(model).score
    assert Generalist.shipped("deep").measure(model).score == quick


def test_a_demonstrated_trigger_needs_a_lower_score(trained):
    model = trained["infected"].model
    strict = replace(Generalist.shipped(), threshold=99.0, corroborated=0.0)
    assert strict.scan(model).verdict is Verdict.INFECTED
    assert replace(strict, corroborated=99.0).scan(model).verdict is Verdict.SUSPICIOUS
    assert replace(strict, threshold=0.0).scan(trained["benign"].model).verdict is Verdict.SUSPICIOUS
