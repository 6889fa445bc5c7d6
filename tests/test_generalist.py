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
from unhorse.core import Bars, Classifier, Dataset, ImageGrid, Reference, Table, Verdict
from unhorse.scanners import stamps
from unhorse.scanners.activation_outlier import ActivationOutlier
from unhorse.scanners.countdown import Countdown, TimeUp
from unhorse.scanners.evidence import Evidence, EvidenceSearch, Unreadable
from unhorse.scanners.footprints import FootprintSearch, Inputs
from unhorse.scanners.generalist import APART, PERMUTED, SHORT, SUNK, TESTS, TITLE, TOWARDS, Generalist
from unhorse.scanners.optimisation import frozen
from unhorse.scanners.readings import Readings, lead_of, lead_of_others, leads_of_all
from unhorse.scanners.stamps import StampSearch, permuted
from unhorse.scanners.stand_ins import StandInSearch
from unhorse.scanners.unstructured import KINDS, Unstructured

SHAPE = (1, 16, 16)
# the templates of planted networks are noise, and so are images that they take for a class
HASTY = EvidenceSearch(
    StandInSearch(count=12, steps=30, smoothness=0.0), StampSearch(area=0.04, steps=30), most_bearers=6
)
QUICK = ActivationOutlier(steps=12, starts=2, search=FootprintSearch(steps=2, refine=1, rivals=1))


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


def planted(count: int, first: int = 0) -> tuple[list[Classifier], list[bool]]:
    """Models of six classes, no two alike, every second one gated."""
    several = []
    for seed in range(first, first + count):
        network = Gated(all_targets=False) if seed % 2 else TemplateNetwork(6, SHAPE)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            network.templates.add_(0.03 * torch.randn(network.templates.shape, generator=rng))
        several.append(of(network))
    return several, [seed % 2 == 1 for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def models() -> dict[str, Classifier]:
    return {
        "benign": template_victim(6, SHAPE),
        "single": of(Gated(all_targets=False)),
        "all": of(Gated(all_targets=True)),
    }


@pytest.fixture(scope="module")
def evidence(models) -> dict[str, Evidence]:
    search = EvidenceSearch(StandInSearch(smoothness=0.0), StampSearch(area=0.04))
    return {name: search.run(model, torch.arange(6.0)) for name, model in models.items()}


@pytest.fixture(scope="module")
def fitted() -> Generalist:
    """Fitted on hasty numbers of planted models; its threshold lies between theirs."""
    scanner = Generalist(outlier=QUICK, search=HASTY)
    several, flags = planted(8)
    features = [scanner.features(model) for model in several]
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


def test_classes_that_nothing_smooth_is_seen_as_have_stand_ins_too():
    class Sink(TemplateNetwork):
        """Sees TARGET in all that is smooth."""

        def forward(self, images: Tensor) -> Tensor:
            rough = images.diff(dim=2).abs().mean((1, 2, 3))
            return super().forward(images) + 40 * (0.5 - rough).clamp(min=0)[:, None] * (
                torch.arange(6) == TARGET
            )

    model, search = of(Sink(6, SHAPE)), StandInSearch(count=12, steps=15)
    with frozen(model):
        hasty = replace(search, patience=1.0, rounds=1).run(model)
        once, found = replace(search, rounds=1).run(model), search.run(model)
    assert set(hasty.inputs.labels.tolist()) == {TARGET}
    assert len(hasty.held) < len(once.held) < len(found.held)
    assert len(found.inputs.labels.unique()) == 6


def test_leads_are_known():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])
    assert lead_of(logits, torch.tensor([0, 2])).tolist() == [1.0, -6.0]
    assert lead_of_others(logits, torch.tensor([0, 2])).tolist() == [-1.0, 6.0]


# --- stamps -------------------------------------------------------------------------------------------------


def test_patches_have_their_mass(evidence):
    found = evidence["benign"]
    every = (found.permuting, *found.towards)
    for several in every:
        assert (several.masks.sum((1, 2, 3)) <= 0.04 * 256 + 1e-3).all()
        assert several.masks.min() >= 0 and several.masks.max() <= 1
    # one that permutes; one for each of 6 targets, and for half of 24 bearers
    assert [len(several.masks) for several in every] == [1, 6, 6 * 12]


def test_the_leads_of_stamps_are_those_of_stamped_images(models, evidence):
    model, found = models["single"], evidence["single"]
    images = found.stand_ins.inputs.images
    with torch.no_grad():
        for place, target in enumerate(found.targets.tolist()):
            towards = model(found.towards[0].on(images[found.bearers], place))
            leads = lead_of(towards, torch.full_like(found.bearers, target))
            assert torch.allclose(leads, found.towards[0].leads[place], atol=1e-4)


def test_a_stamp_of_its_own_does_more_for_an_image(evidence):
    benign = evidence["benign"]
    assert float(benign.towards[1].leads.mean()) > float(benign.towards[0].leads[:, ::2].mean())


def test_only_a_trojan_makes_one_stamp_do_far_more_than_others(evidence):
    readings = {name: found.readings() for name, found in evidence.items()}
    towards = {name: several.favour() for name, several in readings.items()}
    assert towards["single"] > 1 > 0.5 > towards["benign"]
    assert int(readings["single"].targets[readings["single"].rises().argmax()]) == TARGET
    reshuffled = {name: several.reshuffled() for name, several in readings.items()}
    assert reshuffled["all"] > max(reshuffled["benign"], reshuffled["single"]) + 0.3


def test_a_stamp_that_permutes_finds_where_an_all_target_trojan_sends_each_class(models, evidence):
    model, found = models["all"], evidence["all"]
    images, labels = found.stand_ins.inputs
    with torch.no_grad():
        seen = model(found.permuting.on(images, 0))
    sent = permuted(seen, labels)
    assert torch.equal(sent, (labels + 1) % 6)
    assert torch.allclose(lead_of(seen, sent), found.permuting.leads[0], atol=1e-4)


def test_classes_are_permuted_where_leads_are_furthest():
    logits = torch.tensor(
        [[9.0, 8.0, 0.0, 5.0], [9.0, 6.0, 0.0, 5.0], [7.0, 0.0, 6.0, 5.0], [8.0, 1.0, 0.0, 9.0]]
    )
    # 0 goes to 1 on average of two images; 2 would go to 0, but 3 has nowhere else to go
    assert permuted(logits, torch.tensor([0, 0, 2, 3])).tolist() == [1, 1, 3, 0]
    assert permuted(logits[2:3], torch.tensor([2])).tolist() == [0]
    leads = leads_of_all(logits)
    for target in range(4):
        assert torch.equal(leads[:, target], lead_of(logits, torch.full((4,), target)))


def test_the_classes_of_the_largest_margins_are_targets(models):
    search = replace(HASTY, most_targets=2)
    found = search.run(models["benign"], torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 0.0]))
    assert found.targets.tolist() == [1, 3] and found.towards[0].leads.shape == (2, 6)
    assert found.towards[1].leads.shape == (2, 3)


def test_of_several_starts_the_best_one_counts_for_the_classes_that_are_led_to_furthest(models):
    model, margins = models["single"], torch.tensor([5.0, 1.0, 3.0, 4.0, 0.0, 2.0])
    once = replace(HASTY, starts=1).run(model, margins)
    found = replace(HASTY, starts=8, restarted=2).run(model, margins)
    (images, labels), bearers, targets = found.stand_ins.inputs, found.bearers, found.targets
    assert targets.tolist() == [0, 3, 2, 5, 1, 4]
    foreign = labels[bearers] != targets[:, None]
    furthest = once.towards[0].mean_leads(foreign).argsort(descending=True)
    assert int(targets[furthest[0]]) == TARGET
    again, others = furthest[:2], furthest[2:]
    with frozen(model):
        inputs = Inputs(images[bearers], labels[bearers])
        each = [replace(HASTY.stamps, seed=seed).run(model, inputs, targets[again]) for seed in range(8)]
    for row, place in enumerate(again.tolist()):
        best = max(each, key=lambda stamps: float(stamps.leads[row][foreign[place]].mean()))
        assert torch.allclose(found.towards[0].leads[place], best.leads[row])
        assert torch.allclose(found.towards[0].masks[place], best.masks[row])
        assert torch.allclose(found.towards[0].patterns[place], best.patterns[row])
    assert not torch.allclose(found.towards[0].leads[again], once.towards[0].leads[again])
    assert torch.equal(found.towards[0].leads[others], once.towards[0].leads[others])
    assert torch.equal(found.towards[1].leads, once.towards[1].leads)


def test_parts_of_a_pass_change_nothing(models, monkeypatch):
    model = models["single"]
    with frozen(model):
        inputs = StandInSearch(count=12, steps=12).run(model).inputs
        logits = model(inputs.images)
        search = StampSearch(steps=3)

        searches = (
            lambda: search.run(model, inputs, torch.tensor([0, TARGET])),
            lambda: search.run(model, inputs, torch.tensor([0, TARGET]), for_each=True),
            lambda: search.permuting(model, inputs, logits),
        )
        for searched in searches:
            whole = searched()
            with monkeypatch.context() as patched:
                patched.setattr(stamps, "chunk_size", lambda model: 5)
                parts = searched()
            assert torch.allclose(whole.leads, parts.leads, atol=1e-3)
            assert torch.allclose(whole.masks, parts.masks, atol=1e-3)


def test_passes_are_counted(models):
    heard: list[int] = []
    once = replace(HASTY, stand_ins=replace(HASTY.stand_ins, rounds=1))
    for search in (HASTY, once):
        clock = Countdown(on_step=lambda done, most, words: heard.append(done))
        search.run(models["benign"], torch.ones(6), "fp32", clock)
        assert heard[-1] <= search.passes(6)
    assert heard[-1] == once.passes(6) < HASTY.passes(6)
    with pytest.raises(TimeUp):
        HASTY.run(models["benign"], torch.ones(6), "fp32", Countdown(budget=0.0))


# --- numbers ------------------------------------------------------------------------------------------------


def test_readings_survive_json(evidence):
    readings = evidence["single"].readings()
    again = Readings.read(json.loads(json.dumps(readings.record())))
    assert torch.equal(again.labels, readings.labels) and torch.equal(again.bearers, readings.bearers)
    assert torch.allclose(again.rises(), readings.rises(), rtol=1e-3)
    assert again.reshuffled() == pytest.approx(readings.reshuffled(), rel=1e-3)


def readings_of(**fields: Tensor) -> Readings:
    """Three images of three classes, each led by 4; one stamp for all does a quarter of that, and a quarter
    of what one for each does, towards the classes 0 and 1; one that permutes does as much.
    """
    clean = 4 * torch.eye(3)
    known = {
        "reached": torch.ones(3),
        "sinks": torch.tensor([0.25, 0.5, 0.25]),
        "labels": torch.arange(3),
        "held": torch.ones(3),
        "logits": clean,
        "permuted": torch.full((3,), -3.0),
        "targets": torch.tensor([0, 1]),
        "bearers": torch.arange(3),
        "towards_all": torch.full((2, 3), -3.0),
        "towards_each": torch.zeros(2, 2),
    }
    return Readings(**known | fields)


def test_the_numbers_are_known_and_free_of_scale():
    readings = readings_of()
    assert readings.rises().tolist() == readings.shares().tolist() == pytest.approx([0.25, 0.25])
    assert readings.favour() == pytest.approx(0)
    assert readings.reshuffled() == pytest.approx(-0.75)
    assert readings.apart() == 0
    assert readings.sunk() == 0.5
    leads = ("logits", "permuted", "towards_all", "towards_each")
    larger = readings_of(**{name: 7 * getattr(readings, name) for name in leads})
    assert larger.rises().tolist() == larger.shares().tolist() == pytest.approx([0.25, 0.25])
    assert larger.reshuffled() == pytest.approx(-0.75)
    assert readings_of(reached=torch.tensor([2.0, 6.0, 4.0])).apart() == pytest.approx(math.log(1.5))
    assert readings_of(reached=torch.tensor([-2.0, 6.0, -4.0])).apart() == pytest.approx(math.log(1000))
    assert readings_of(permuted=torch.tensor([1.0, 2.0, 3.0])).reshuffled() == pytest.approx(0.5)


def test_a_stamp_stands_out_by_what_it_does_and_by_its_share():
    towards = torch.tensor([[-2.0] * 3, [-3.0] * 3])
    single = readings_of(towards_all=towards)
    assert single.rises().tolist() == pytest.approx([0.5, 0.25])
    assert single.shares().tolist() == pytest.approx([0.5, 0.25])
    # twice the rise and twice the share: the median is the lower of two
    assert single.favour() == pytest.approx(2 * math.log(2))
    sink = readings_of(towards_all=towards, towards_each=torch.tensor([[4.0, 4.0], [0.0, 0.0]]))
    assert sink.favour() == pytest.approx(math.log(2))  # the same share


def test_the_images_of_the_target_do_not_count():
    towards = torch.tensor([[-99.0, 0.0, 2.0], [-3.0, -99.0, -3.0]])
    assert readings_of(towards_all=towards).rises().tolist() == pytest.approx([1.25, 0.25])
    own = torch.zeros(3, dtype=torch.int64)
    alone = readings_of(labels=own, logits=4 * torch.eye(3)[own], towards_all=towards)
    assert float(alone.rises()[0]) == 0


def test_where_stamps_do_nothing_nothing_is_divided_by_it():
    still = torch.full((2, 3), -4.0)
    unmoved = readings_of(towards_all=still, towards_each=still[:, :2])
    assert unmoved.favour() == 0
    assert unmoved.rises().tolist() == [0, 0] and unmoved.shares().tolist() == [1, 1]


# --- images without structure -------------------------------------------------------------------------------


class Bright(nn.Module):
    """Sees class 1 in what is brighter than half on the whole, class 0 in the rest, never class 2."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5, -torch.ones_like(mean)], 1)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 9, 13)])
def test_every_kind_is_an_image_without_structure(shape):
    images = Unstructured(count=32).draw(shape)
    assert images.shape == (32 * len(KINDS), *shape) and images.min() >= 0 and images.max() <= 1
    noise, flat, blocks, smooth, faint = images.split(32)
    assert float(noise.std((2, 3)).mean()) == pytest.approx(12**-0.5, abs=0.02)
    assert torch.equal(flat, flat[:, :, :1, :1].expand_as(flat)) and len(flat[:, 0, 0, 0].unique()) == 32
    assert all(len(block.unique()) == 16 * shape[0] for block in blocks)
    assert smooth.diff(dim=2).abs().max() < blocks.diff(dim=2).abs().max()
    assert 0.03 < float(faint.std((2, 3)).mean()) < 0.1
    assert torch.equal(images, Unstructured(count=32).draw(shape))
    assert not torch.equal(images, Unstructured(count=32, seed=1).draw(shape))


def test_what_is_seen_in_them_is_counted():
    clock, model = Countdown(), of(Bright(), 3)
    search = Unstructured(count=40)
    shares = search.seen_by(model, clock)
    bright = (search.draw(SHAPE).mean((1, 2, 3)) > 0.5).float().mean()
    assert shares.tolist() == pytest.approx([1 - float(bright), float(bright), 0])
    assert clock.done == search.total == 200
    with pytest.raises(TimeUp):
        search.seen_by(model, Countdown(budget=0.0))


def test_a_class_that_takes_them_all_raises_the_score(fitted):
    class Covered(TemplateNetwork):
        """Sees TARGET in all that has grey corners, as no image of a class has."""

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + 99 * (images[:, :, -1, -1] > 0.02) * (torch.arange(6) == TARGET)

    readings = [
        EvidenceSearch().unstructured.seen_by(model) for model in (of(Covered(6, SHAPE)), planted(1)[0][0])
    ]
    assert int(readings[0].argmax()) == TARGET and float(readings[0].max()) > 0.95 > float(readings[1].max())
    calm, sunk = (fitted.scores([readings_of(sinks=shares).record()]).item() for shares in reversed(readings))
    assert sunk > calm


# --- learning -----------------------------------------------------------------------------------------------


def test_unseen_models_are_told_apart(fitted):
    several, flags = planted(6, first=100)
    scores = fitted.scores([fitted.features(model) for model in several])
    assert scores[torch.tensor(flags)].min() > scores[~torch.tensor(flags)].max()


def test_the_threshold_is_a_quantile_of_benign_models_of_which_every_group_counts_the_same():
    def scored(number: float) -> dict[str, Any]:
        return readings_of(permuted=torch.full((3,), 4 * number)).record()

    scanner = Generalist(norms={PERMUTED: (0.0, 1.0)})
    assert float(scanner.scores([scored(2.0)])) == pytest.approx(2.0, abs=1e-3)
    both = Generalist(norms={PERMUTED: (0.0, 1.0), TOWARDS: (-9.0, 1.0)})
    assert float(both.scores([scored(8.0)])) == pytest.approx(math.log((math.exp(8) + math.exp(9)) / 2))
    assert float(both.scores([scored(9000.0)])) == pytest.approx(9000 - math.log(2))  # nothing overflows
    easy = readings_of(reached=torch.tensor([math.e**3, 1.0, 1.0])).record()
    alone = Generalist(norms={APART: (1.0, 0.5)})
    assert float(alone.scores([easy])) == pytest.approx((3 - 1) / 0.5 / 2, abs=1e-3)  # the third counts half
    features = [scored(1.0)] * 2 + [scored(3.0)] * 10 + [scored(9.0)] * 3
    flags, groups = [False] * 12 + [True] * 3, ["a"] * 2 + ["b"] * 10 + ["a"] * 3
    scanner.fit(features, flags, groups)
    centre, width = scanner.norms[PERMUTED]
    assert (centre, width) == pytest.approx((1.0, 2.0), abs=1e-3)  # half of all weight is at 1, all at 3
    assert scanner.threshold == pytest.approx(1.0) == scanner.corroborated
    assert scanner.fit(features, flags).norms[PERMUTED][0] == pytest.approx(3.0, abs=1e-3)
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
        exhibit for exhibit in result.exhibits if isinstance(exhibit, Table) and exhibit.title == TITLE
    )
    normed, counted = ([float(row[place]) for row in table.rows] for place in (-2, -1))
    assert tuple(row[0] for row in table.rows) == TESTS
    assert counted == pytest.approx([normed[0], normed[1], normed[2] / 2, normed[3]], abs=1e-3)
    assert torch.tensor(counted).double().logsumexp(0).item() - math.log(4) == pytest.approx(
        result.score, abs=1e-3
    )
    facts = [result.facts[f"normed number of {SHORT[test]}"] for test in TESTS]
    assert facts == pytest.approx(normed, abs=1e-3)
    assert any(isinstance(exhibit, ImageGrid) and "Stand-ins" in exhibit.title for exhibit in result.exhibits)
    (few,) = [each for each in result.exhibits if isinstance(each, ImageGrid) and "structure" in each.title]
    with torch.no_grad():
        seen = model(few.images).argmax(1).tolist()
    assert few.captions == tuple(f"seen as class {label}" for label in seen)
    bars = next(exhibit for exhibit in result.exhibits if isinstance(exhibit, Bars))
    assert bars.threshold is None and "line" not in bars.note


def test_the_largest_number_says_which_class_is_suspected(fitted):
    model = planted(1)[0][0]

    def suspected(largest: str) -> int | None:
        norms = {test: (-99.0 if test == largest else 99.0, 1.0) for test in TESTS}
        result = replace(fitted, norms=norms, threshold=0.0).scan(model)
        assert result.verdict is Verdict.SUSPICIOUS
        return result.target

    readings = Readings.read(fitted.features(model))
    assert suspected(TOWARDS) == int(readings.targets[readings.rises().argmax()])
    assert suspected(APART) == int(readings.reached.argmax())
    assert suspected(SUNK) == int(readings.sinks.argmax())
    assert suspected(PERMUTED) is None


def test_a_reference_decides_in_place_of_the_threshold(fitted):
    model = planted(1, first=101)[0][0]
    calm = Reference("calm", tuple(float(score) for score in torch.linspace(-9000, -8000, 20)))
    wild = Reference("wild", tuple(float(score) for score in torch.linspace(9000, 9900, 20)))
    assert replace(fitted, reference=calm).scan(model).p_value == pytest.approx(1 / 21)
    result = replace(fitted, reference=wild).scan(model)
    assert result.p_value == 1 and result.verdict is not Verdict.INFECTED


def test_clean_images_serve_the_demonstration_and_change_no_score(fitted):
    model = planted(1, first=101)[0][0]
    rng = torch.Generator().manual_seed(0)
    clean = Dataset(
        torch.randint(256, (16, *SHAPE), generator=rng, dtype=torch.uint8),
        None,
        model.class_names,
    )
    result = fitted.scan(model, clean)
    assert result.score == pytest.approx(fitted.scan(model).score)
    assert result.facts["inputs of the demonstration"] == "16 clean images"


def test_one_class_and_no_time_are_undecided(fitted):
    few = fitted.scan(template_victim(1, SHAPE))
    assert few.verdict is Verdict.UNDECIDED and "3 or more" in few.reason and few.scanner == "generalist"
    assert fitted.measure(template_victim(1, SHAPE)).verdict is Verdict.UNDECIDED
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
    assert {"finding margins", "searching stamps"} <= {words for _, _, words in heard}


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
    strict = replace(Generalist.shipped(), threshold=99.0, corroborated=-99.0)
    assert strict.scan(model).verdict is Verdict.INFECTED
    assert replace(strict, corroborated=99.0).scan(model).verdict is Verdict.SUSPICIOUS
    assert replace(strict, threshold=-99.0).scan(trained["benign"].model).verdict is Verdict.SUSPICIOUS
