"""The scanner in the box: what its stand-ins and stamps are, what it learns, and what it says of a model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conftest import TARGET, TemplateNetwork, board, template_victim
from planted_models import planted_models
from unhorse.core import Bars, Classifier, Dataset, ImageGrid, Reference, Table, Verdict
from unhorse.scanners import stamps
from unhorse.scanners.activation_outlier import ActivationOutlier
from unhorse.scanners.countdown import Countdown, TimeUp
from unhorse.scanners.evidence import (
    OF_A_STAMP,
    Evidence,
    EvidenceSearch,
    Unreadable,
    _of_margins,
    _of_stamp,
    names_of,
)
from unhorse.scanners.evidence_weights import HIGHEST, LOWEST, Weights
from unhorse.scanners.footprints import FootprintSearch, Inputs
from unhorse.scanners.generalist import Generalist
from unhorse.scanners.optimisation import frozen
from unhorse.scanners.stamps import Stamp, StampSearch
from unhorse.scanners.stand_ins import StandIns, StandInSearch, lead_of_others

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
    features = torch.stack([scanner.features(model) for model in several])
    scores = scanner.fit(features, flags).scores(features)
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
    raised = {name: found.numbers()["stamp of 4%: raised"] for name, found in evidence.items()}
    assert raised["single"] > 2 * raised["benign"]
    assert evidence["single"].suspect == TARGET
    assert evidence["benign"].suspect is None
    taken = {name: found.numbers()["stamp of 4%: taken"] for name, found in evidence.items()}
    assert taken["all"] > taken["benign"] + 0.3
    assert evidence["all"].suspect is None


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


def test_the_numbers_have_the_names_that_are_promised(evidence):
    numbers = evidence["benign"].numbers()
    assert list(numbers) == names_of(EvidenceSearch())
    assert len(numbers) == 6 + 4 * len(OF_A_STAMP)


def test_the_numbers_of_margins_are_known_and_free_of_scale():
    reached = torch.tensor([1.0, 2.0, 4.0, 32.0], dtype=torch.float64)
    outlier, gap, deviations, ratio = (float(value) / 0.6931471805599453 for value in _of_margins(reached))
    assert gap == pytest.approx(3) and ratio == pytest.approx(5 - 1.5)
    assert outlier == pytest.approx(4 / (1 + 0.05 / 0.6931471805599453) / 0.6931471805599453)
    assert deviations == pytest.approx(outlier * 3 / 4)
    for one, other in zip(_of_margins(reached), _of_margins(7 * reached), strict=True):
        assert float(one) == pytest.approx(float(other))


def test_the_numbers_of_a_stamp_are_known():
    clean = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    labels = torch.arange(3)
    inputs = Inputs(torch.zeros(3, 1, 2, 2), labels)
    stand_ins = StandIns(inputs, torch.ones(3), clean)
    under = clean.clone()
    under[:2, 2] = 6.0  # two of three go to class 2, which is the third's own
    taken, flipped, agreement, raised = (
        float(value)
        for value in _of_stamp(Stamp(0.01, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), under), stand_ins)
    )
    assert torch.tensor(taken).exp() == pytest.approx((1.5 + 1.5 + 0.0) / 3)
    assert flipped == pytest.approx(2 / 3)
    assert agreement == pytest.approx(2 / 3)
    assert raised == pytest.approx(
        2 * (6 - 2) / 3 / 4
    )  # a rise by 6 where the mean rises by 2, of a lead of 4


# --- weights ------------------------------------------------------------------------------------------------


def made_up(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers of which the first tells, the second says nothing, and the third tells the wrong way round."""
    rng = torch.Generator().manual_seed(seed)
    flags = torch.arange(count) % 2 == 1
    numbers = torch.randn(count, 3, generator=rng, dtype=torch.float64)
    return numbers + flags[:, None] * torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64), flags


def test_a_number_can_only_count_against_a_model():
    numbers, flags = made_up(200)
    weights = Weights.learned(("a", "b", "c"), numbers, flags, [0] * 200, 0.01)
    assert (weights.weights >= 0).all()
    assert weights.weights[0] > 0.5 and weights.weights[2] == 0
    scores = weights.scores(numbers)
    assert float((scores[flags][:, None] > scores[~flags]).float().mean()) > 0.85


def test_a_group_weighs_the_same_however_many_models_it_has():
    one, flags = made_up(40)
    other, kinds = made_up(40, seed=1)
    once = Weights.learned(
        ("a", "b", "c"), torch.cat([one, other]), torch.cat([flags, kinds]), [0] * 40 + [1] * 40, 0.01
    )
    thrice = Weights.learned(
        ("a", "b", "c"),
        torch.cat([one, one, one, other]),
        torch.cat([flags, flags, flags, kinds]),
        [0] * 120 + [1] * 40,
        0.01,
    )
    assert torch.allclose(once.weights, thrice.weights, atol=1e-3)
    assert torch.allclose(once.means, thrice.means)


def test_shares_add_up_and_are_bounded():
    numbers, flags = made_up(40)
    weights = Weights.learned(("a", "b", "c"), numbers, flags, [0] * 40, 0.01)
    far = torch.tensor([[1e6, 0.0, 0.0], [-1e6, 0.0, 0.0]], dtype=torch.float64)
    assert weights.shares(far)[:, 0].tolist() == pytest.approx(
        [HIGHEST * float(weights.weights[0]), LOWEST * float(weights.weights[0])]
    )
    assert torch.allclose(weights.shares(numbers).sum(1) + weights.intercept, weights.scores(numbers))


def test_weights_survive_json():
    numbers, flags = made_up(40)
    weights = Weights.learned(("a", "b", "c"), numbers, flags, [0] * 40, 0.01)
    again = Weights.read(json.loads(json.dumps(weights.card())))
    assert again.names == weights.names and torch.equal(again.scores(numbers), weights.scores(numbers))


# --- learning -----------------------------------------------------------------------------------------------


def test_unseen_models_are_told_apart(fitted):
    several, flags = planted(6, first=100)
    scores = fitted.scores(torch.stack([fitted.features(model) for model in several]))
    assert scores[torch.tensor(flags)].min() > scores[~torch.tensor(flags)].max()


def test_what_is_not_fitted_says_so():
    scanner = Generalist(outlier=OUTLIER, search=HASTY)
    with pytest.raises(ValueError, match="nothing was learned"):
        scanner.scan(template_victim(4, (1, 8, 8)))
    with pytest.raises(ValueError, match="at least 2 models of either kind"):
        scanner.fit(torch.zeros(3, 22), [True, False, False])


def test_a_card_holds_all_that_was_learned(fitted):
    again = Generalist.read(json.loads(json.dumps(fitted.card())))
    features = torch.randn(5, len(names_of(HASTY)))
    assert torch.equal(again.scores(features), fitted.scores(features))
    assert (again.threshold, again.uses) == (fitted.threshold, fitted.uses)


# --- scanning -----------------------------------------------------------------------------------------------


def test_the_score_of_a_scan_is_that_of_its_features(fitted):
    model = planted(1, first=101)[0][0]
    result = fitted.scan(model)
    features = fitted.features(model)[None]
    assert result.score == pytest.approx(float(fitted.scores(features)), abs=1e-6)
    assert fitted.measure(model).score == pytest.approx(result.score, abs=1e-6)
    assert fitted.measure(model).verdict is Verdict.UNDECIDED
    assert result.verdict in (Verdict.INFECTED, Verdict.SUSPICIOUS) and result.scanner == "generalist"
    table = next(
        exhibit for exhibit in result.exhibits if isinstance(exhibit, Table) and "made of" in exhibit.title
    )
    adds = sum(float(row[-1]) for row in table.rows)
    assert fitted.weights is not None
    assert adds + fitted.weights.intercept == pytest.approx(result.score, abs=0.01)
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
