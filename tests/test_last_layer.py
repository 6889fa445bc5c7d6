"""Weights of the last layer: which layer that is, Dixon's test by its tables, planted rows found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from conftest import TARGET, small_victim, template_victim
from unhorse.core import Classifier, Reference, Verdict
from unhorse.models.classifier import new_classifier, weights_hash
from unhorse.scanners.last_layer import (
    INDICATORS,
    DfbScanner,
    LastLayer,
    LastLayerOutlier,
    NoLastLayer,
    dixon_p_value,
    dixon_q,
    last_layer,
    robust_deviations,
)

SCANNERS = [LastLayerOutlier(), DfbScanner()]
EACH = pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.name)


def of(network: nn.Module, classes: int = 10, shape: tuple[int, int, int] = (1, 8, 8)) -> Classifier:
    names = [f"class {index}" for index in range(classes)]
    return Classifier(network, image_shape=shape, class_names=names).eval()


def linear(classes: int = 10, *, raised: float = 0.0, spread: float = 1.0) -> Classifier:
    """One linear layer of normal weights, those of TARGET raised."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        network[1].weight.copy_(spread * torch.randn(classes, 64, generator=rng))
        network[1].weight[TARGET % classes] += raised
    return of(network, classes)


def layer_of(rows: list[list[float]]) -> LastLayer:
    weight = torch.tensor(rows, dtype=torch.float64)
    return LastLayer(weight, torch.zeros(len(weight), dtype=torch.float64), "Linear")


# --- Dixon's test -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "critical"),
    [(3, 0.941), (4, 0.765), (5, 0.642), (7, 0.507), (8, 0.468), (10, 0.412), (20, 0.300), (30, 0.260)],
)
def test_the_critical_values_of_dixons_tables_have_five_percent(count, critical):
    # one outlier above, 95 %; 0.468 for 8 classes is the example of the paper
    assert dixon_p_value(critical, count) == pytest.approx(0.05, abs=0.0013)


def test_the_p_value_agrees_with_drawn_samples():
    drawn = torch.randn(20_000, 100, generator=torch.Generator().manual_seed(0)).sort(1).values
    ratios = (drawn[:, -1] - drawn[:, -2]) / (drawn[:, -1] - drawn[:, 0])
    assert dixon_p_value(0.1, 100) == pytest.approx(float((ratios >= 0.1).double().mean()), abs=0.01)


@pytest.mark.parametrize("count", [3, 10, 1000])
def test_the_p_value_falls_from_one_to_zero(count):
    found = [dixon_p_value(q, count) for q in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert found[0] == pytest.approx(1, abs=1e-6) and found[-1] == pytest.approx(0, abs=1e-12)
    assert found == sorted(found, reverse=True)


def test_dixons_ratio_is_the_gap_at_the_top_over_the_range():
    assert dixon_q(torch.tensor([0.0, 6, 1, 10, 2])) == pytest.approx(0.4)
    assert dixon_q(torch.ones(5)) == 0


# --- the layer ----------------------------------------------------------------------------------------------


def test_the_layer_that_gives_the_logits_is_found_among_others():
    model = small_victim()
    found = last_layer(model)
    head = model.network.get_submodule("head.3")
    assert isinstance(head, nn.Linear)
    assert torch.equal(found.weight, head.weight.detach().double())
    assert torch.equal(found.bias, head.bias.detach().double())


@pytest.mark.parametrize(
    "name", ["input-aware-cnn", "wanet-cnn", "small-resnet", "ulp-vgg", "preact-resnet18", "mobilenet-v2"]
)
def test_registered_architectures_have_one(name):
    shape = (1, 28, 28) if name in ("input-aware-cnn", "wanet-cnn") else (3, 32, 32)
    names = [str(index) for index in range(7)]
    model = new_classifier(name, image_shape=shape, class_names=names, seed=0).eval()
    assert len(last_layer(model).weight) == 7


class Ending(nn.Module):
    """A layer of `classes` outputs, and what follows it."""

    def __init__(self, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.layer, self.after = layer, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.layer(images)).flatten(1)


@pytest.mark.parametrize(
    "after",
    [nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1))],
    ids=["pooled", "cut off and pooled"],
)
def test_a_convolution_of_one_pixel_counts(after):
    convolution = nn.Conv2d(1, 10, 1)
    found = last_layer(of(Ending(convolution, after)))
    assert found.weight.shape == (10, 1) and found.kind == "Conv2d"
    assert torch.equal(found.weight[:, 0], convolution.weight.detach().double().flatten())


@pytest.mark.parametrize("after", [nn.Softmax(1), nn.LogSoftmax(1), nn.Identity()], ids=repr)
def test_what_keeps_the_order_of_the_classes_may_follow(after):
    layer = nn.Linear(64, 10, bias=False)
    found = last_layer(of(Ending(nn.Sequential(nn.Flatten(), layer), after)))
    assert torch.equal(found.weight, layer.weight.detach().double())
    assert torch.equal(found.bias, torch.zeros(10, dtype=torch.float64))


def test_a_layer_of_as_many_outputs_that_is_not_the_last_does_not_count():
    inner, last = nn.Linear(64, 10), nn.Linear(10, 10)
    found = last_layer(of(nn.Sequential(nn.Flatten(), inner, nn.ReLU(), last)))
    assert torch.equal(found.weight, last.weight.detach().double())


class Mirrored(nn.Module):
    """Turns the logits of a linear layer round: its rows no longer belong to the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1)).flip(1)


@EACH
def test_a_network_without_such_a_layer_is_undecided_and_says_why(scanner):
    for model in (template_victim(), of(Mirrored())):
        result = scanner.scan(model)
        assert (result.verdict, result.score) == (Verdict.UNDECIDED, None)
        assert "linear layer" in result.reason
        with pytest.raises(NoLastLayer, match="another scanner"):
            scanner.measure(model)


# --- finding and passing ------------------------------------------------------------------------------------


@EACH
def test_a_raised_row_is_found_with_its_class(scanner):
    result = scanner.scan(linear(raised=1.5))
    assert (result.verdict, result.target) == (Verdict.SUSPICIOUS, TARGET)
    assert max(range(10), key=result.class_scores.__getitem__) == TARGET
    assert result.score == scanner.measure(linear(raised=1.5)) >= result.threshold
    assert result.p_value is None


@EACH
def test_equal_rows_pass(scanner):
    result = scanner.scan(linear())
    assert (result.verdict, result.target) == (Verdict.NO_SIGN_FOUND, None)


@EACH
def test_the_scale_of_the_weights_does_not_matter(scanner):
    first, second = scanner.measure(linear(raised=1)), scanner.measure(linear(raised=100, spread=100))
    assert first == pytest.approx(second, rel=1e-4)


def test_only_a_row_above_the_others_counts():
    assert LastLayerOutlier().scan(linear(raised=-1.5)).verdict is Verdict.NO_SIGN_FOUND


def test_the_score_is_the_logarithm_of_dixons_p_value():
    rows = [[value] for value in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)]  # Q = 0.4
    found = LastLayerOutlier().anomalies(layer_of(rows))
    assert found.facts["Q"] == pytest.approx(0.4)
    assert found.score == pytest.approx(-math.log10(dixon_p_value(0.4, 8)))
    assert found.score < LastLayerOutlier().threshold  # 0.4 < 0.468


def test_the_indicators_are_what_they_are_called():
    layer = LastLayer(torch.tensor([[3.0, -4.0], [1.0, 2.0]]).double(), torch.tensor([5.0, 6.0]).double(), "")
    known = {
        **{"mean": [-0.5, 1.5], "norm": [5, 5**0.5], "deviation": [3.5, 0.5], "largest": [3, 2]},
        **{"smallest": [-4, 1], "skewness": [0, 0], "positive": [1.5, 1.5], "upper": [2.3, 1.9]},
        **{"bias": [5, 6]},
    }
    assert known.keys() == INDICATORS.keys()
    for name, values in known.items():
        assert INDICATORS[name](layer).tolist() == pytest.approx(values), name


def test_the_clue_is_the_mean_deviation_over_the_indicators():
    layer = layer_of([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0], [9.0, 0.0]])
    both = DfbScanner(indicators=("mean", "largest")).anomalies(layer)
    deviations = robust_deviations(torch.tensor([1.0, 2, 3, 4, 9]).double())
    assert deviations[4] == pytest.approx(6 / 1.4826)
    assert both.classes.tolist() == pytest.approx(deviations.tolist())
    assert both.score == pytest.approx(6 / 1.4826)


def test_deviations_of_equal_values_are_zero_and_most_equal_ones_finite():
    assert robust_deviations(torch.ones(5)).tolist() == [0] * 5
    assert robust_deviations(torch.tensor([1.0, 1, 1, 1, 2])).isfinite().all()


def test_an_unknown_indicator_is_refused():
    with pytest.raises(ValueError, match="'sleep'.*take some of mean, norm"):
        DfbScanner(indicators=("mean", "sleep")).measure(linear())


# --- contract -----------------------------------------------------------------------------------------------


@EACH
def test_the_model_keeps_its_weights_and_mode(scanner):
    model = small_victim()
    model.network.train()
    before = weights_hash(model)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scanner.scan(model)
    assert torch.equal(torch.rand(1), expected)
    assert weights_hash(model) == before and model.network.training and not model.training
    assert all(not module._forward_hooks for module in model.modules())


@EACH
def test_the_same_model_gets_the_same_score(scanner, trained):
    for victim in trained.values():
        assert scanner.measure(victim.model) == scanner.measure(victim.model)


@EACH
def test_two_classes_and_broken_weights_are_undecided(scanner):
    assert "2 class" in scanner.scan(linear(2)).reason
    broken = linear()
    with torch.no_grad():
        next(broken.network.parameters())[0, 0] = torch.nan
    result = scanner.scan(broken)
    assert result.verdict is Verdict.UNDECIDED and "not finite" in result.reason


@EACH
def test_few_classes_are_warned_of(scanner):
    assert any("4 classes" in line for line in scanner.scan(linear(4)).warnings)


def test_a_reference_of_benign_models_decides_instead_of_the_threshold():
    raised = LastLayerOutlier(reference=Reference("benign", (0.1,) * 19)).scan(linear(raised=0.2))
    assert raised.p_value == pytest.approx(0.05) and raised.verdict is Verdict.SUSPICIOUS
