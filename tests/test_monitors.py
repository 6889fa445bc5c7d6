"""A guard catches the trigger where its filter removes it, misses it elsewhere, and knows its errors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from conftest import TARGET, Shape, board, plain_images, small_victim, stamped, template_victim
from unhorse.core import Classifier, Dataset, Histogram, ImageGrid
from unhorse.filters.registry import FILTERS
from unhorse.models.classifier import new_classifier, save_classifier
from unhorse.monitors.calibration import conformal_threshold, split_clean
from unhorse.monitors.contrast import Contrast, Outcomes, contrast_score
from unhorse.monitors.evidence import evidence
from unhorse.monitors.guard import Guard, evaluate, load_guard
from unhorse.monitors.rates import contrast_rates
from unhorse.rates import TrojanImages

SHAPE: Shape = (1, 12, 12)


class Blanking(nn.Module):
    """Paints one corner of the trigger's size grey, with a little noise of its own where `samples` is set."""

    def __init__(self, shape: Shape, *, corner: int = 0) -> None:
        super().__init__()
        kept = torch.ones(shape)
        rows = slice(0, 3) if corner == 0 else slice(-3, None)
        kept[:, rows, rows] = 0
        self.register_buffer("kept", kept)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.kept + 0.5 * (1 - self.kept)


@dataclass
class CornerFilter:
    """Removes the planted trigger; with corner=1 it cleans where none is. Remembers what it was given."""

    corner: int = 0
    offset: float = 0.0
    fitted_on: list[Dataset] = field(default_factory=list)
    network_: nn.Module = field(init=False)

    def fit(self, model, clean, *, checkpoint=None, on_epoch=None):
        self.fitted_on.append(clean)
        self.network_ = Blanking(model.image_shape, corner=self.corner).to(model.mean.device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return self.network_(images) + self.offset


def dataset(images: Tensor, labels: Tensor | None, classes: int = 10) -> Dataset:
    pixels = (images * 255).round().to(torch.uint8)
    return Dataset(pixels, labels, tuple(f"class {index}" for index in range(classes)))


def clean_of(model: Classifier, count: int = 200) -> Dataset:
    return dataset(plain_images(model, count), torch.arange(count) % model.num_classes, model.num_classes)


@pytest.fixture(scope="module")
def victim() -> Classifier:
    return template_victim(10, SHAPE, strength=20)


@pytest.fixture(scope="module")
def clean(victim) -> Dataset:
    return clean_of(victim)


@pytest.fixture(scope="module")
def contrast(victim, clean) -> Contrast:
    return Contrast(CornerFilter()).fit(victim, clean)


@pytest.fixture(scope="module")
def misplaced(victim, clean) -> Contrast:
    return Contrast(CornerFilter(corner=1)).fit(victim, clean)


@pytest.fixture
def guard(victim, contrast, clean) -> Guard:
    return Guard(victim, contrast).calibrate(clean)


def trojaned(clean: Dataset) -> TrojanImages:
    return TrojanImages(
        stamped(clean.pixels()), labels=clean.labels, wanted=torch.full((len(clean),), TARGET)
    )


# --- the score ----------------------------------------------------------------------------------------------


def test_score_is_the_log_odds_of_another_class_after_filtering():
    rng = torch.Generator().manual_seed(0)
    logits, filtered = torch.randn(2, 50, 7, generator=rng)
    expected = []
    for row, other in zip(logits, filtered.log_softmax(1), strict=True):
        own = int(row.argmax())
        rival = max(float(other[k]) for k in range(7) if k != own)
        expected.append(rival - float(other[own]))
    score = contrast_score(logits, filtered)
    assert torch.allclose(score, torch.tensor(expected), atol=1e-5)
    assert torch.equal(score > 0, logits.argmax(1) != filtered.argmax(1))
    assert 10 < int((score > 0).sum()) < 50


def test_tie_after_filtering_is_no_disagreement():
    logits = torch.tensor([[0.0, 1.0, 0.0]])
    assert contrast_score(logits, torch.tensor([[2.0, 2.0, 1.0]])).item() == 0


@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_numbers_are_as_suspicious_as_can_be(which):
    pair = [torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]) for _ in range(2)]
    pair[which][0, 1] = math.nan
    assert contrast_score(*pair).tolist() == [math.inf, -1.0]


def test_contrast_catches_the_planted_trigger_and_passes_clean_images(contrast, clean):
    images = clean.pixels()[clean.labels != TARGET]
    assert (contrast.score(stamped(images)) > 5).all()
    assert (contrast.score(images) < -1).all()


def test_contrast_misses_a_trigger_that_its_filter_leaves_in_place(misplaced, clean):
    images = clean.pixels()[clean.labels != TARGET]
    assert (misplaced.score(stamped(images)) < 0).all()


def test_comparison_shows_the_filtered_image_and_both_answers(contrast, victim, clean):
    images = stamped(clean.pixels()[:4])
    found = contrast.compare(images)
    assert found.logits.argmax(1).tolist() == [TARGET] * 4
    assert found.filtered_logits.argmax(1).tolist() == [0, 1, 2, 3]
    assert (found.filtered[:, :, :3, :3] == 0.5).all()
    assert torch.equal(found.filtered[:, :, 3:], images[:, :, 3:])


def test_score_does_not_depend_on_batch_mates_and_modes_are_kept():
    model = new_classifier("wanet-cnn", image_shape=(1, 28, 28), class_names=[*"abcd"], seed=0).train()
    monitor = Contrast(CornerFilter(), batch_size=3).fit(model, clean_of(template_victim(4, (1, 28, 28)), 8))
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    together = monitor.score(images)
    alone = torch.cat([monitor.score(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std() > 0
    assert all(module.training for module in model.modules())


def test_a_filter_is_fitted_once_and_a_fitted_one_is_kept(victim, clean):
    purifier = CornerFilter()
    monitor = Contrast(purifier).fit(victim, clean)
    monitor.fit(victim, clean).fit(victim)
    assert [len(data) for data in purifier.fitted_on] == [200]


def test_a_contrast_that_is_not_fitted_says_so(victim, clean):
    with pytest.raises(ValueError, match="call fit first"):
        Contrast(CornerFilter()).score(clean.pixels())
    with pytest.raises(ValueError, match="call fit first"):
        contrast_rates(Contrast(CornerFilter()), clean)
    with pytest.raises(ValueError, match="not fitted: give clean images"):
        Contrast(CornerFilter()).fit(victim)


# --- the threshold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "fpr", "place"), [(19, 0.05, 19), (20, 0.05, 20), (99, 0.05, 95), (99, 0.01, 99), (149, 0.1, 135)]
)
def test_threshold_is_the_conformal_quantile(n, fpr, place):
    scores = [float(score) for score in range(1, n + 1)]
    assert conformal_threshold(scores[::-1], fpr) == place


def test_fresh_clean_images_alarm_no_more_often_than_chosen():
    scores = torch.rand(5000, 60, generator=torch.Generator().manual_seed(0))
    rates = [1 - conformal_threshold(sample, 0.1) for sample in scores.tolist()]  # of a fresh uniform score
    assert sum(rates) / len(rates) == pytest.approx(6 / 61, abs=0.002)


@pytest.mark.parametrize("fpr", [0.05, 0.2])
def test_calibration_records_the_rate_that_it_achieved(victim, contrast, clean, fpr):
    found = Guard(victim, contrast, fpr=fpr).calibrate(clean).calibration_
    assert found.n == 200
    assert found.threshold < 0  # alarms although no class changes
    assert found.alarm_rate.value == pytest.approx(fpr, abs=0.006)
    assert found.alarm_rate.low < found.alarm_rate.value < found.alarm_rate.high
    assert found.disagreement.value == 0
    assert found.clean_accuracy.value == 1
    assert found.clean_drop.value == 0
    assert found.clean_drop.low < 0 < found.clean_drop.high


def test_rate_below_what_the_images_can_promise_is_refused_with_the_number_needed(victim, contrast, clean):
    with pytest.raises(ValueError, match="at least 999, a rate of 0.00498 or more"):
        Guard(victim, contrast, fpr=0.001).calibrate(clean)
    with pytest.raises(ValueError, match="18 calibration images .* at least 19,"):
        Guard(victim, contrast).calibrate(clean[:18])
    assert Guard(victim, contrast).calibrate(clean[:19]).calibration_.n == 19


def test_hard_rule_of_the_paper_needs_no_calibration(victim, contrast, clean):
    guard = Guard(victim, contrast, fpr=None)
    images = torch.cat([clean.pixels()[:10], stamped(clean.pixels()[:10])])
    assert guard.threshold == 0
    assert guard(images).alarm.tolist() == [False] * 10 + [index != TARGET for index in range(10)]
    assert guard.calibrate(clean[:5]).calibration_.alarm_rate.value == 0


def test_threshold_of_another_rate_is_not_used(guard):
    assert guard.threshold == guard.calibration_.threshold
    with pytest.raises(ValueError, match="not calibrated for fpr=0.01: call calibrate"):
        replace(guard, fpr=0.01)(torch.rand(1, *SHAPE))
    guard.fpr = 0.01
    with pytest.raises(ValueError, match="not calibrated for fpr=0.01"):
        _ = guard.threshold


# --- decisions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "trojan_labels"), [("observe", [TARGET] * 3), ("hold", [-1] * 3), ("replace", [0, 1, 2])]
)
def test_policy_decides_the_label_of_an_alarm(guard, clean, policy, trojan_labels):
    guard.policy, guard.fpr = policy, None
    images = clean.pixels()[:3]
    found = guard(torch.cat([images, stamped(images)]))
    assert found.label.tolist() == [0, 1, 2, *trojan_labels]
    assert found.alarm.tolist() == [False] * 3 + [True] * 3


def test_counter_trigger_is_what_the_filter_took_away(guard, clean):
    images = stamped(clean.pixels()[:5])
    found = guard(images)
    assert torch.equal(found.counter_trigger, images - found.filtered)
    assert torch.equal(found.counter_trigger[0, 0, :3, :3], board(3) - 0.5)
    assert (found.counter_trigger[:, :, 3:, 3:] == 0).all()


def test_unknown_policy_is_named(victim, contrast, clean):
    with pytest.raises(ValueError, match="unknown policy 'drop': take one of observe, hold, replace"):
        Guard(victim, contrast, policy="drop").calibrate(clean)


# --- fitting ------------------------------------------------------------------------------------------------


def test_guard_calibrates_on_images_that_the_filter_has_not_seen(victim, clean):
    purifier = CornerFilter()
    guard = Guard.fit(victim, purifier, clean, seed=3)
    (fitting,) = purifier.fitted_on
    assert (len(fitting), guard.calibration_.n) == (140, 60)
    every = {image.numpy().tobytes() for image in clean.images}
    seen = {image.numpy().tobytes() for image in fitting.images}
    assert len(every) == 200
    assert len(seen) == 140
    unseen = torch.stack([image for image in clean.images if image.numpy().tobytes() not in seen])
    scores = guard.monitor.score(unseen)
    assert torch.allclose(scores.sort().values, torch.tensor(guard.calibration_.scores).sort().values)


def test_guard_fitted_on_clean_images_holds_trojans_and_answers_fresh_clean_images(victim):
    images = clean_of(victim, 1000)
    guard = Guard.fit(victim, CornerFilter(), images[:500], fpr=0.05)
    found = evaluate(guard, images[500:], trojaned(images[500:]))
    assert found.fpr.low < 0.05 < found.fpr.high
    assert (found.fnr.value, found.trojan_accuracy_before.value, found.trojan_passed.value) == (0, 1, 0)


def test_same_seed_gives_the_same_guard(victim, clean):
    one, same, other = (
        Guard.fit(victim, CornerFilter(), clean, seed=seed).calibration_ for seed in (1, 1, 2)
    )
    assert one == same
    assert one.scores != other.scores


def test_split_keeps_every_class_in_its_share():
    labels = torch.cat([torch.zeros(70), torch.ones(20), torch.full((10,), 2)]).long()
    images = torch.arange(100).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    rest, part = split_clean(Dataset(images, labels, ("a", "b", "c")), 0.3, seed=0)
    assert part.labels.bincount().tolist() == [21, 6, 3]
    together = torch.cat([rest.images, part.images])[:, 0, 0, 0]
    assert together.sort().values.tolist() == list(range(100))
    assert rest.labels[:20].unique().numel() > 1  # shuffled


def test_images_without_labels_are_split_and_calibrated_too(victim, clean):
    guard = Guard.fit(victim, CornerFilter(), replace(clean, labels=None))
    assert guard.calibration_.n == 60
    assert guard.calibration_.clean_drop is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: replace(data, images=data.images[:, :, :10]), "resize or convert"),
        (lambda data: replace(data, images=data.images.expand(-1, 3, -1, -1)), r"\(200, 3, 12, 12\)"),
        (lambda data: replace(data, images=data.images.float()), "from 51 to 204: give values in .0, 1."),
        (lambda data: replace(data, images=data.images * math.nan), "nan.*none of them NaN"),
        (lambda data: replace(data, images=data.images.long()), "give floats in .0, 1. or uint8"),
        (lambda data: data[:0], "no clean images"),
        (lambda data: replace(data, class_names=("a", "b")), "2 classes, the model 10: .*--labels.*--unlab"),
        (lambda data: replace(data, labels=data.labels + 1), "from 1 to 10, .* from 0 to 9: .*--labels"),
        (lambda data: replace(data, labels=data.labels[:9]), "give a whole number per image"),
        (
            lambda data: replace(data, labels=(data.labels + 1) % 10),
            "right on 0.0% .* chance is 10.0%.*--lab",
        ),
        (lambda data: data[:40], r"12 calibration images .* at least 19 \(64 clean images in all\)"),
    ],
)
def test_clean_images_that_do_not_fit_are_refused_before_anything_is_fitted(victim, clean, change, message):
    purifier = CornerFilter()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Guard.fit(victim, purifier, change(clean))
    assert not purifier.fitted_on


def test_shares_and_rates_that_are_none_are_refused(victim, clean):
    with pytest.raises(ValueError, match="share between 0 and 1"):
        Guard.fit(victim, CornerFilter(), clean, calibration_share=1.0)
    with pytest.raises(ValueError, match="or None for the paper's hard rule"):
        Guard.fit(victim, CornerFilter(), clean, fpr=0.0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 12, 12), "resize or convert"),
        (torch.rand(1, 12, 12), "channels first"),
        (torch.full((2, *SHAPE), 1.01), "from 1.01 to 1.01"),
        (torch.full((2, *SHAPE), -0.01), "give values in"),
        (torch.full((2, *SHAPE), math.nan), "NaN"),
    ],
)
def test_images_that_cannot_be_judged_are_refused(guard, images, message):
    with pytest.raises(ValueError, match=message):
        guard(images)
    with pytest.raises(ValueError, match=message):
        guard.monitor.score(images)


def test_classifier_that_returns_no_numbers_cannot_be_calibrated(clean):
    broken = template_victim(10, SHAPE)
    broken.network.templates.data[3] = math.nan
    monitor = Contrast(CornerFilter()).fit(broken, clean)
    with pytest.raises(ValueError, match="200 clean images have no finite score"):
        Guard(broken, monitor).calibrate(replace(clean, labels=None))


# --- one module ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["observe", "hold", "replace"])
def test_module_decides_as_the_guard_does(guard, clean, policy):
    guard.policy = policy
    images = torch.cat([clean.pixels()[:20], stamped(clean.pixels()[:20])])
    expected = guard(images)
    logits, filtered_logits, label, alarm, counter_trigger = guard.module()(images)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(filtered_logits, expected.filtered_logits)
    assert torch.equal(label, expected.label)
    assert torch.equal(alarm, expected.alarm)
    assert torch.equal(counter_trigger, expected.counter_trigger)
    assert alarm.sum() >= 18


def test_module_alarms_at_what_is_no_image(guard, clean):
    images = clean.pixels()[:4]
    images[0, 0, 5, 5] = math.nan
    images[1] = images[1] * 255
    images[2, 0, 5, 5] = -1
    for policy in ("hold", "replace"):
        guard.policy = policy
        _, _, label, alarm, _ = guard.module()(images)
        assert alarm.tolist() == [True, True, True, False]
        assert label.tolist() == [-1, -1, -1, 3]


def test_exported_module_decides_as_the_guard_does_at_every_batch_size(guard, clean):
    module = guard.module()
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(module, (clean.pixels()[:2],), dynamic_shapes=({0: batch},)).module()
    images = torch.cat([clean.pixels()[:4], stamped(clean.pixels()[4:8])])
    for size in (1, 3, 8):
        expected = guard(images[-size:])
        logits, filtered_logits, label, alarm, counter_trigger = exported(images[-size:])
        assert torch.allclose(logits, expected.logits, atol=1e-5)
        assert torch.allclose(filtered_logits, expected.filtered_logits, atol=1e-5)
        assert torch.equal(label, expected.label)
        assert torch.equal(alarm, expected.alarm)
        assert torch.allclose(counter_trigger, expected.counter_trigger, atol=1e-6)


def test_module_is_its_tensors_and_shares_none_with_the_guard(guard, clean):
    guard.model.train()
    module = guard.module()
    assert guard.model.training
    assert not any(part.training for part in module.modules())
    state = module.state_dict()
    assert state["threshold"].item() == guard.threshold
    assert (state["hold"].item(), state["replace"].item()) == (True, False)
    pointers = {parameter.data_ptr() for parameter in guard.model.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in module.parameters()}
    guard.model.eval()


def test_filter_that_is_more_than_its_network_is_no_module(guard, victim, clean):
    monitor = Contrast(CornerFilter(offset=0.01)).fit(victim, clean)
    with pytest.raises(ValueError, match="without test_samples"):
        Guard(victim, monitor, fpr=None).module()


# --- rates --------------------------------------------------------------------------------------------------


class Given(Contrast):
    """Answers with prepared outcomes, by the number of images."""

    def __init__(self, model: Classifier, *prepared: Outcomes) -> None:
        super().__init__(CornerFilter())
        self.model_, self.prepared = model, {len(entry.score): entry for entry in prepared}

    def outcomes(self, images: Tensor) -> Outcomes:
        return self.prepared[len(images)]


def given(model: Classifier, *rows: tuple[list[int], list[int], list[float]]) -> Given:
    return Given(model, *(Outcomes(*(torch.tensor(column) for column in row)) for row in rows))


@pytest.fixture(scope="module")
def counted(victim):
    """Rates of 4 clean and 5 Trojan images, target 3, at threshold -1; small enough to be counted by hand."""
    monitor = given(
        victim,
        ([0, 1, 3, 7], [0, 4, 3, 2], [-2.0, 1.0, -0.5, 3.0]),
        ([3, 3, 3, 3, 1], [0, 3, 2, 3, 1], [4.0, -2.0, 1.0, -3.0, -1.5]),
    )
    clean = dataset(torch.rand(4, *SHAPE), torch.tensor([0, 1, 3, 2]))
    stamped = TrojanImages(
        torch.rand(5, *SHAPE), labels=torch.tensor([0, 1, 7, 3, 1]), wanted=torch.full((5,), 3)
    )
    return contrast_rates(monitor, clean, stamped, threshold=-1.0)


@pytest.mark.parametrize(
    ("rate", "value", "n"),
    [
        ("clean_accuracy", 3 / 4, 4),
        ("clean_drop", 0.0, 4),  # one lost, one won
        ("fpr", 3 / 4, 4),
        ("fpr_hard", 2 / 4, 4),
        ("trojan_accuracy_before", 3 / 4, 4),  # the image of class 3 is not eligible
        ("trojan_accuracy", 1 / 4, 4),
        ("trojan_passed", 1 / 4, 4),  # of two that do not alarm one never fooled the model
        ("fnr", 2 / 4, 4),
        ("fnr_hard", 2 / 4, 4),
        ("recovery_accuracy", 3 / 5, 5),  # it is recovered all the same
        ("recovery_drop", 3 / 4 - 3 / 5, 4),
        ("auroc", 8 / 16, 8),  # of (4, -2, 1, -1.5) against (-2, 1, -0.5, 3), ties counting half
    ],
)
def test_rates_are_those_of_the_paper(counted, rate, value, n):
    found = getattr(counted, rate)
    assert found.value == pytest.approx(value)
    assert found.n == n
    assert found.low <= found.value <= found.high
    assert found.low < found.high


def test_rates_of_the_planted_trojan_are_known(contrast, misplaced, clean):
    caught = contrast_rates(contrast, clean, trojaned(clean))
    missed = contrast_rates(misplaced, clean, trojaned(clean))
    assert (caught.trojan_accuracy_before.value, missed.trojan_accuracy_before.value) == (1, 1)
    assert (caught.trojan_accuracy.value, missed.trojan_accuracy.value) == (0, 1)
    assert (caught.recovery_drop.value, missed.recovery_drop.value) == (0, pytest.approx(0.9))
    assert (caught.fnr.value, missed.fnr.value) == (0, 1)
    assert caught.auroc.value == 1
    assert missed.auroc.value < 0.5  # a trigger that stays makes its class more certain
    assert (caught.fpr, caught.fnr) == (caught.fpr_hard, caught.fnr_hard)
    assert (caught.trojan_accuracy.n, caught.recovery_accuracy.n) == (180, 200)


def test_false_positive_rate_is_at_least_the_clean_drop(victim):
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits, filtered = torch.randn(2, 50, 10, generator=rng)
        score = contrast_score(logits, filtered)
        monitor = Given(victim, Outcomes(logits.argmax(1), filtered.argmax(1), score))
        labels = torch.where(torch.rand(50, generator=rng) < 0.7, logits.argmax(1), torch.arange(50) % 10)
        found = contrast_rates(monitor, dataset(torch.rand(50, *SHAPE), labels))
        assert found.fpr_hard.value >= found.clean_drop.value > 0


def test_what_is_not_known_is_not_measured(contrast, clean):
    bare = contrast_rates(contrast, replace(clean, labels=None))
    assert bare.fpr.n == 200
    assert (bare.clean_accuracy, bare.clean_drop, bare.fnr, bare.auroc) == (None,) * 4
    stolen = contrast_rates(contrast, clean, TrojanImages(stamped(clean.pixels())))
    assert stolen.fnr.n == 200  # which are eligible is not known either
    assert (stolen.trojan_accuracy, stolen.recovery_accuracy, stolen.recovery_drop) == (None,) * 3


def test_intervals_of_drops_have_width_where_nothing_dropped(contrast, clean):
    paired = contrast_rates(contrast, clean, trojaned(clean)).recovery_drop
    others = TrojanImages(*(column.flip(0) for column in trojaned(clean)[:3]))
    apart = contrast_rates(contrast, clean, others).recovery_drop
    assert paired.value == apart.value == 0
    assert 0.01 < paired.high < 0.02
    assert 0.01 < apart.high < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(200, 3, 12, 12)}, "the Trojan images are"),
        ({"images": torch.full((200, *SHAPE), 2.0)}, "the Trojan images have pixels"),
        ({"labels": torch.full((200,), 10)}, "true labels of the Trojan images go from 10 to 10"),
        ({"wanted": torch.full((200,), -1)}, "wanted labels of the Trojan images go from -1"),
        ({"eligible": torch.ones(3)}, "eligible for 200 Trojan images"),
        ({"labels": torch.full((200,), TARGET)}, "give images of other classes"),
    ],
)
def test_trojan_images_that_do_not_fit_are_refused(contrast, clean, change, message):
    with pytest.raises(ValueError, match=message):
        contrast_rates(contrast, clean, trojaned(clean)._replace(**change))


# --- evidence -----------------------------------------------------------------------------------------------


def test_evidence_shows_input_filtered_input_and_what_was_removed(guard, clean):
    images = torch.cat([clean.pixels()[:2], stamped(clean.pixels()[:2])])
    grid, histogram = evidence(guard, images)
    assert isinstance(grid, ImageGrid)
    assert grid.images.shape == (12, *SHAPE)
    assert grid.columns == 4
    assert torch.equal(grid.images[:4], images)
    assert torch.equal(grid.images[10, 0, :3, :3], 0.5 + (board(3) - 0.5) / 2)
    assert (grid.images[8:, :, 3:, 3:] == 0.5).all()
    assert grid.captions[:4] == ("input: class 0", "input: class 1", "input: class 3", "input: class 3")
    assert grid.captions[6] == "filtered: class 0"
    assert set(grid.marked) >= {2, 3}
    assert isinstance(histogram, Histogram)
    assert histogram.threshold == guard.threshold
    assert list(histogram.series) == ["clean images, calibration"]


def test_evidence_of_an_evaluation_shows_both_kinds_of_scores(guard, clean):
    found = evaluate(guard, clean, trojaned(clean))
    _, histogram = evidence(guard, clean.images, found, shown=3)
    assert {name: len(values) for name, values in histogram.series.items()} == {
        "clean images": 200,
        "Trojan images": 180,
    }
    assert min(histogram.series["Trojan images"]) > guard.threshold


# --- on disk ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> Guard:
    model = small_victim(strength=60)
    images = torch.rand(90, *model.image_shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        labels = model(images).argmax(1)
    purifier = FILTERS["if"](network="tiny", epochs=1, batch_size=16)
    return Guard.fit(model, purifier, dataset(images, labels, 6), policy="replace")


def test_saved_guard_decides_as_before(fitted, tmp_path):
    saved = fitted.save(tmp_path / "guard")
    loaded = load_guard(saved)
    images = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    before, after = fitted(images), loaded(images)
    assert all(torch.allclose(one, same, atol=1e-5) for one, same in zip(before, after, strict=True))
    assert (loaded.policy, loaded.fpr, loaded.threshold) == ("replace", 0.05, fitted.threshold)
    assert loaded.calibration_ == fitted.calibration_
    assert loaded.monitor.filter.epochs == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guard"]


def test_guard_json_says_what_was_fitted_and_what_to_expect(fitted, tmp_path):
    card = json.loads((fitted.save(tmp_path / "guard") / "guard.json").read_text())
    assert card["filter"]["name"] == "if"
    assert card["filter"]["options"]["batch_size"] == 16
    assert card["calibration"]["alarm_rate"][3] == 27
    assert card["format"] == "unhorse-guard-1"


def test_guard_of_the_hard_rule_can_be_saved_before_it_is_calibrated(fitted, tmp_path):
    loaded = load_guard(replace(fitted, fpr=None).save(tmp_path / "guard"))
    assert (loaded.fpr, loaded.threshold, loaded.calibration_) == (None, 0.0, None)


def test_saving_again_replaces_the_guard_and_nothing_else_is_replaced(fitted, tmp_path):
    fitted.save(tmp_path / "guard")
    replace(fitted, fpr=None).save(tmp_path / "guard")
    assert load_guard(tmp_path / "guard").fpr is None
    victim = save_classifier(fitted.model, tmp_path / "victim")
    with pytest.raises(ValueError, match="exists and is not a guard: choose another name"):
        fitted.save(victim)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guard", "victim"]


def test_a_save_that_fails_leaves_nothing_behind(victim, contrast, tmp_path):
    with pytest.raises(ValueError, match="is not in the registry"):
        Guard(victim, contrast, fpr=None).save(tmp_path / "guard")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "filter.safetensors", "card.json"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_file_that_is_not_the_saved_one_is_refused(fitted, tmp_path, name, gone):
    file = fitted.save(tmp_path / "guard") / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.unlink()
    if not gone:
        file.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{name} is missing or not the file .* fit and save the guard again"
    ):
        load_guard(tmp_path / "guard")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("threshold", -100.0, "was changed after it was saved"),
        ("model_hash", "0", "belongs to a classifier of other weights"),
        ("policy", "ignore", "policy: Input should be .*; fit and save the guard again"),
        ("format", "unhorse-guard-9", "format: Input should be 'unhorse-guard-1'"),
        ("surprise", 1, "surprise: Extra inputs"),
        ("threshold", None, "threshold: Input should be a valid number"),
    ],
)
def test_guard_json_that_was_changed_is_refused(fitted, tmp_path, field, value, message):
    path = fitted.save(tmp_path / "guard") / "guard.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        load_guard(tmp_path / "guard")


def test_a_folder_without_a_guard_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no guard.json: give a folder written by"):
        load_guard(tmp_path)
    (tmp_path / "guard.json").write_text("{")
    with pytest.raises(ValueError, match="Invalid JSON.*fit and save the guard again"):
        load_guard(tmp_path)
