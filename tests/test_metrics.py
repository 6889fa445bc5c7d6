import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from unhorse.core import Classifier, Dataset, Reference
from unhorse.metrics import (
    accuracy,
    accuracy_at_threshold,
    auroc,
    auroc_interval,
    clean_accuracy,
    evaluation,
    judge,
    paired_auroc_difference,
    recovery_accuracy,
    t_interval,
    tpr_at_fpr,
    trojan_accuracy,
    wilson_interval,
)


class Tens(nn.Module):
    """Reads an image's class off its first pixel, which holds the class times ten."""

    def forward(self, images):
        return -(images[:, 0, 0, :1] * 25.5 - torch.arange(3.0)).abs()


class Stamp:
    """An attack on class 0 whose trigger works on images with a bright second pixel."""

    def probes(self):
        return {"trojan": self}

    def __call__(self, images, rng):
        stamped = images.clone()
        stamped[images[:, 0, 1, 0] > 0.5, 0, 0, 0] = 0
        return stamped

    def relabel(self, labels):
        return torch.zeros_like(labels)

    def eligible(self, labels):
        return labels != 0


@pytest.fixture
def model():
    return Classifier(Tens(), image_shape=(1, 2, 1), class_names=("a", "b", "c"))


@pytest.fixture
def data():
    """Ten images, three of class 0; the first is taken for class 0; all but the last two are bright."""
    labels = torch.tensor([1, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    images = torch.zeros(10, 1, 2, 1, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels.where(torch.arange(10) > 0, torch.tensor(0)) * 10
    images[:8, 0, 1, 0] = 255
    return Dataset(images, labels, ("a", "b", "c"), "ten")


def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("batch_size", [1, 3, 1024])
def test_accuracy_is_the_share_of_right_answers_whatever_the_batches(model, data, batch_size):
    assert accuracy(model, data, batch_size=batch_size) == 0.9
    assert clean_accuracy(model, data, batch_size=batch_size) == 0.9


def test_accuracy_takes_a_model_behind_a_filter(model, data):
    assert accuracy(lambda images: model(torch.zeros_like(images)), data) == 0.3


def test_trojan_accuracy_counts_eligible_images_that_reach_their_target(model, data):
    assert trojan_accuracy(model, data, Stamp(), rng=rng()) == pytest.approx(5 / 7)


def test_recovery_accuracy_counts_all_images_that_keep_their_label(model, data):
    assert recovery_accuracy(model, data, Stamp(), rng=rng()) == 0.5


@pytest.mark.parametrize("batch_size", [3, 9, 1024])
def test_no_image_is_measured_alone_where_its_trigger_needs_another(model, data, batch_size):
    class Crossed(Stamp):
        def probes(self):
            return {"cross": self.crossed}

        def crossed(self, images, rng):
            assert len(images) > 1
            return images.clone()

    found = recovery_accuracy(model, data, Crossed(), rng=rng(), probe="cross", batch_size=batch_size)
    assert found == accuracy(model, data)


def test_evaluation_gives_each_module_its_mode_back(model, data):
    model.train()
    model.network.eval()
    with pytest.raises(ZeroDivisionError), evaluation(model):
        assert not model.training
        assert torch.is_inference_mode_enabled()
        raise ZeroDivisionError
    assert model.training
    assert not model.network.training
    assert not torch.is_inference_mode_enabled()


def test_unlabelled_images_are_refused_with_a_remedy(model, data):
    unlabelled = Dataset(data.images, None, (), "loose")
    with pytest.raises(ValueError, match="'loose' has no labels: give images in one folder per class"):
        accuracy(model, unlabelled)


def test_data_without_eligible_images_is_refused(model, data):
    with pytest.raises(ValueError, match="no image of 'ten' is eligible"):
        trojan_accuracy(model, data[data.labels == 0], Stamp(), rng=rng())


def test_auroc_counts_ties_half():
    assert auroc([1, 2, 2, 3], [False, True, False, True]) == 0.875
    assert auroc([5, 5, 5, 5], [0, 1, 0, 1]) == 0.5
    assert auroc(torch.tensor([0.1, 0.2, 0.8]), torch.tensor([True, True, False])) == 0


def test_auroc_agrees_with_counting_all_pairs():
    scores = np.random.default_rng(1).integers(0, 6, 60)
    positive = np.arange(60) % 3 == 0
    pairs = list(itertools.product(scores[positive], scores[~positive]))
    assert auroc(scores, positive) == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))


def test_bootstrap_interval_agrees_with_resampling_one_by_one():
    rng = np.random.default_rng(2)
    positive = np.arange(80) < 30
    scores = np.round(rng.normal(size=80) + positive)  # many ties
    slow = []
    for _ in range(2000):
        drawn = np.concatenate([rng.integers(0, 30, 30), rng.integers(30, 80, 50)])
        slow.append(auroc(scores[drawn], positive[drawn]))
    assert auroc_interval(scores, positive) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.01)


def test_bootstrap_interval_covers_the_true_auroc():
    true, covered = 0.7602, 0  # of normals one standard deviation apart: Phi(1 / sqrt 2)
    positive = np.arange(120) < 60
    for seed in range(100):
        scores = np.random.default_rng(seed).normal(size=120) + positive
        low, high = auroc_interval(scores, positive, resamples=400)
        covered += low <= true <= high
    assert 88 <= covered <= 99


def test_bootstrap_interval_repeats_with_its_seed():
    scores, positive = np.random.default_rng(3).normal(size=50), np.arange(50) % 2
    first = auroc_interval(scores, positive, seed=1)
    assert first == auroc_interval(scores, positive, seed=1)
    assert first != auroc_interval(scores, positive, seed=2)


def test_bootstrap_in_chunks_keeps_every_resample(monkeypatch):
    from unhorse import metrics

    positive = np.arange(2000) % 2
    scores = np.random.default_rng(4).normal(size=2000) + positive
    drawn = metrics._resampled_aurocs([scores], positive, 2500, 0)
    assert drawn.shape == (1, 2500)
    assert len(np.unique(drawn)) > 2000


def test_paired_difference_of_equal_orders_is_zero():
    scores, positive = np.random.default_rng(5).normal(size=40), np.arange(40) % 2
    assert paired_auroc_difference(scores, np.exp(scores), positive) == (0, 0, 0)


def test_paired_difference_is_narrower_than_the_single_intervals():
    rng = np.random.default_rng(6)
    positive = np.arange(200) % 2
    scores = rng.normal(size=200) + positive
    nearly = scores + 0.05 * rng.normal(size=200)
    difference, low, high = paired_auroc_difference(scores, nearly, positive)
    single = auroc_interval(scores, positive)
    assert difference == pytest.approx(auroc(scores, positive) - auroc(nearly, positive))
    assert low <= difference <= high
    assert high - low < (single.high - single.low) / 4


def test_tpr_at_fpr_allows_just_that_many_false_alarms():
    scores = [*range(100), 98.5, 97.5, 96.5, 200]
    positive = [False] * 100 + [True] * 4
    assert tpr_at_fpr(scores, positive, 0.01) == 0.5
    assert tpr_at_fpr(scores, positive, 0.02) == 0.75
    assert tpr_at_fpr(scores, positive, 0) == 0.25


def test_tpr_at_fpr_gives_ties_with_negatives_no_credit():
    assert tpr_at_fpr([1, 1, 1, 1, 2], [False, False, True, True, True], 0.4) == pytest.approx(1 / 3)


def test_accuracy_at_threshold_flags_a_score_equal_to_it():
    assert accuracy_at_threshold([0.1, 0.5, 0.5, 0.9], [False, False, True, True], 0.5) == 0.75


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        ([1.0, math.nan], [True, False], "1 scores are NaN"),
        ([1.0, 2.0], [True, True], "2 of 2 items are positive"),
        ([1.0], [True, False], "give one of each per item"),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(scores, positive, message):
    with pytest.raises(ValueError, match=message):
        auroc(scores, positive)


def test_wilson_interval_has_known_values():
    assert wilson_interval(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_wilson_interval_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson_interval(11, 10)


def test_t_interval_has_known_values():
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2.4841), abs=1e-4)  # 4.3027 / sqrt 3


def test_t_interval_of_one_seed_has_no_width():
    mean, half_width = t_interval([0.5])
    assert mean == 0.5
    assert math.isnan(half_width)


@pytest.mark.parametrize(
    ("score", "n", "flagged", "warned"),
    [(0.9, None, True, False), (0.1, None, False, False), (0.9, 18, True, True), (0.1, 18, False, True)],
)
def test_the_threshold_decides_without_a_large_enough_reference(score, n, flagged, warned):
    reference = None if n is None else Reference("benign", tuple(i / 100 for i in range(n)))
    judgement = judge(score, 0.5, reference)
    assert judgement.flagged is flagged
    assert bool(judgement.warnings) is warned


def test_nineteen_benign_references_decide_by_p_value():
    reference = Reference("benign", tuple(i / 100 for i in range(19)))
    assert judge(0.19, 0.5, reference) == (True, 1 / 20, ())
    assert judge(0.18, 0.5, reference) == (False, 2 / 20, ())
