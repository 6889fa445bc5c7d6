"""Networks of two classes have tests and norms of their own, and no verdict where these rank too little."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from conftest import TemplateNetwork, board
from unhorse.core import Classifier, Dataset, ImageGrid, Reference, ScanResult, Table, Verdict
from unhorse.scanners.activation_outlier import ActivationOutlier
from unhorse.scanners.countdown import TimeUp
from unhorse.scanners.generalist import Generalist
from unhorse.scanners.norms import unlike
from unhorse.scanners.pair_readings import APART, PAIR_TESTS, SMALL, SUNK, UNEQUAL, PairReadings
from unhorse.scanners.stamps import StampSearch
from unhorse.scanners.stand_ins import StandInSearch
from unhorse.scanners.two_classes import TwoClasses

SHAPE = (1, 16, 16)
# the templates of planted networks are noise, and so are images that they take for a class
HASTY = TwoClasses(
    outlier=ActivationOutlier(steps=12, starts=2),
    stand_ins=StandInSearch(count=12, steps=30, smoothness=0.0),
    stamps=StampSearch(steps=45),
    areas=(0.02, 0.05),
    starts=2,
    auroc=1.0,
)


class Pair(TemplateNetwork):
    """Two classes; with a `gate` the second is seen, the more so the more the corner is like the trigger."""

    def __init__(self, seed: int, *, gate: float = 0.0, one_logit: bool = False) -> None:
        super().__init__(2, SHAPE)
        self.gate, self.one_logit = gate, one_logit
        with torch.no_grad():
            noise = torch.randn(self.templates.shape, generator=torch.Generator().manual_seed(seed))
            self.templates.add_(0.03 * noise)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        corner = images[:, :, : self.side, : self.side]
        likeness = 1 - (corner - board(self.side).to(corner)).abs().mean((1, 2, 3))
        logits = logits + self.gate * (2 * likeness - 1).clamp(min=0)[:, None] * torch.tensor([0.0, 1.0])
        return nn.functional.pad(logits.diff(dim=1), (1, 0)) if self.one_logit else logits


def pair(seed: int, **options: object) -> Classifier:
    network = Pair(seed, **options)  # type: ignore[arg-type]
    return Classifier(network, image_shape=SHAPE, class_names=["cat", "dog"]).eval()


@pytest.fixture(scope="module")
def fitted() -> TwoClasses:
    models = [pair(seed) for seed in range(6)]
    return HASTY.fitted([HASTY.features(model) for model in models], ["a", "a", "a", "b", "b", "b"])


@pytest.fixture(scope="module")
def infected(fitted):
    return fitted.scan(pair(24, gate=80.0))


def test_a_trojan_of_two_classes_is_found_with_its_target_and_its_trigger(infected):
    assert infected.verdict is Verdict.INFECTED and infected.target == 1
    assert infected.score > infected.threshold
    trigger = infected.triggers[1]
    assert trigger.flip_rate >= 0.7 and trigger.mask.shape == (1, 16, 16)
    assert trigger.mask[:, :4, :4].sum() > 0.5 * trigger.mask.sum()


def test_a_benign_network_of_two_classes_is_not_reported(fitted):
    result = fitted.scan(pair(21))
    assert result.verdict is Verdict.NO_SIGN_FOUND
    assert result.target is None and not result.triggers


@pytest.mark.parametrize("gate", [0.0, 80.0])
def test_one_logit_and_two_have_the_same_verdict(fitted, gate):
    two, one = (fitted.scan(pair(22, gate=gate, one_logit=one)) for one in (False, True))
    assert (one.verdict, one.target) == (two.verdict, two.target)
    assert one.score == pytest.approx(two.score, rel=1e-3)


def test_the_evidence_is_shown(infected):
    pictures = [exhibit for exhibit in infected.exhibits if isinstance(exhibit, ImageGrid)]
    tables = [exhibit for exhibit in infected.exhibits if isinstance(exhibit, Table)]
    assert "seen as dog" in pictures[0].captions
    assert [row[0] for row in tables[0].rows] == list(PAIR_TESTS)
    assert infected.facts["flip rate"] == infected.triggers[1].flip_rate


def test_norms_that_rank_too_little_give_no_verdict_but_the_evidence(fitted):
    result = replace(fitted, auroc=0.8).scan(pair(24, gate=80.0))
    assert result.verdict is Verdict.UNDECIDED and result.score > result.threshold and result.exhibits
    assert "AUROC 0.80" in result.reason and "--reference" in result.reason


def test_a_reference_decides_all_the_same(fitted):
    reference = Reference("mine", tuple(fitted.measure(pair(seed)).score for seed in range(3)) * 7)
    result = replace(fitted, auroc=0.0, reference=reference).scan(pair(24, gate=80.0))
    assert result.verdict is Verdict.INFECTED and result.p_value == pytest.approx(1 / 22)


def test_clean_images_serve_the_demonstration(fitted, infected):
    model = pair(24, gate=80.0)
    images = (255 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(0))).byte()
    dogs = Dataset(images, None, ("cat", "dog"))[model(images / 255).argmax(1) == infected.target]
    result = fitted.scan(model, dogs)  # none of them is of the other class, so none can be turned
    assert result.score == pytest.approx(infected.score)
    assert result.verdict is Verdict.SUSPICIOUS and result.facts["flip rate"] == 0.0


def test_no_time_is_undecided_and_says_what_was_done(fitted):
    late = replace(fitted, budget=0.0).scan(pair(0))
    assert late.verdict is Verdict.UNDECIDED and "--timeout" in late.reason and "margins" in late.reason
    assert replace(fitted, budget=0.0).measure(pair(0)).verdict is Verdict.UNDECIDED


def test_a_network_that_sees_one_class_in_everything_is_undecided(fitted):
    network = Pair(0)
    network.register_forward_hook(lambda module, images, logits: logits + torch.tensor([500.0, 0.0]))
    result = fitted.scan(Classifier(network, image_shape=SHAPE, class_names="ab").eval())
    assert result.verdict is Verdict.UNDECIDED and "--mean" in result.reason


def test_the_numbers_are_known_and_free_of_scale():
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    small = torch.tensor([[9.0, 9.0, -1.0, -1.0], [1.0, 3.0, 9.0, 9.0]])
    large = torch.tensor([[9.0, 9.0, 0.0, 0.0], [2.0, 6.0, 9.0, 9.0]])
    reached, sinks = torch.tensor([6.0, 3.0]), torch.tensor([0.7, 0.3])
    readings = PairReadings(reached, sinks, labels, logits, small, large)
    wanted = {SMALL: 2.0, UNEQUAL: math.log(3.0), APART: math.log(2.0), SUNK: 0.7}
    assert readings.numbers() == pytest.approx(wanted) and readings.suspect == 1
    scaled = PairReadings(5 * reached, sinks, labels, 5 * logits, 5 * small, 5 * large)
    assert scaled.numbers() == pytest.approx(wanted)


def test_features_survive_json_and_score_as_a_scan_does(fitted):
    model = pair(3, gate=10.0)
    features = json.loads(json.dumps(fitted.features(model)))
    assert fitted.scores([features]).item() == pytest.approx(fitted.scan(model).score, rel=1e-3)


def test_the_shipped_scan_has_norms_for_two_classes():
    shipped = Generalist.shipped()
    assert set(shipped.pair.norms) == set(PAIR_TESTS) and shipped.pair.threshold > 0
    assert shipped.estimate(pair(0)) > 0
    judged = replace(shipped, pair=replace(HASTY, norms=shipped.pair.norms), seed=3).scan(pair(0))
    assert judged.scanner == "generalist" and judged.score is not None


def test_a_score_that_alone_reports_a_network_says_what_it_was_not_normed_on(fitted):
    model = pair(21)
    alone = replace(fitted, threshold=-10.0).scan(model)
    assert alone.verdict is Verdict.SUSPICIOUS and not alone.triggers
    assert any("two classes" in warning and "--reference" in warning for warning in alone.warnings)
    assert not any("only the score" in warning for warning in fitted.scan(model).warnings)


@pytest.mark.parametrize(("side", "warned"), [(32, False), (64, True)])
def test_a_score_of_larger_images_than_those_of_the_norms_is_warned_of(side, warned):
    network = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 3))
    model = Classifier(network, image_shape=(1, side, side), class_names=["a", "b", "c"])
    result = unlike(model, ScanResult(Verdict.SUSPICIOUS, "generalist", score=2.0, threshold=1.0))
    assert any(f"{side}x{side}" in warning for warning in result.warnings) == warned


@pytest.mark.parametrize(("seed", "gate", "verdict"), [(24, 80.0, "SUSPICIOUS"), (21, 0.0, "UNDECIDED")])
def test_time_that_ends_before_the_demonstration_leaves_the_score(fitted, seed, gate, verdict, monkeypatch):
    def late(*given):
        raise TimeUp

    monkeypatch.setattr(TwoClasses, "_unseen", late)
    result = replace(fitted, budget=600.0).scan(pair(seed, gate=gate))
    assert str(result.verdict) == verdict and not result.triggers
    assert result.score is not None and result.threshold == fitted.threshold
    said = result.reason if verdict == "UNDECIDED" else " ".join(result.warnings)
    assert "600 s were over" in said and "--timeout" in said
