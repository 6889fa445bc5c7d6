"""A logistic regression on statistics of the weights: what it reads, that it learns, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from conftest import small_victim, template_victim
from unhorse.core import Classifier, Verdict
from unhorse.models.classifier import new_classifier, weights_hash
from unhorse.scanners.weight_statistics import WeightStatistics, _layer_statistics, spectral_norm

FORMS = pytest.mark.parametrize("form", ["layers", "summary"])


def model_of(
    seed: int, *, trojaned: bool = False, classes: int = 6, architecture: str = "small-cnn", side: int = 16
) -> Classifier:
    """A network of random weights; the trojaned ones have one row of the last layer raised."""
    options = {"widths": [4, 8], "hidden": 16} if architecture == "small-cnn" else {"widths": [4, 4]}
    names = [f"class {index}" for index in range(classes)]
    shape = (1, side, side)
    model = new_classifier(
        architecture, image_shape=shape, class_names=names, options=options, seed=seed
    ).eval()
    if trojaned:
        head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        with torch.no_grad():
            head.weight[seed % classes] += 0.3
    return model


FLAGS = [index % 2 == 1 for index in range(24)]


def population(start: int = 0, count: int = 24) -> list[Classifier]:
    return [model_of(start + index, trojaned=FLAGS[index]) for index in range(count)]


@pytest.fixture(scope="module")
def fitted() -> dict[str, WeightStatistics]:
    return {form: WeightStatistics(form=form).fit(population(), FLAGS) for form in ("layers", "summary")}


# --- what it reads ------------------------------------------------------------------------------------------


def test_the_statistics_of_a_layer_are_what_they_are_called():
    weight = torch.tensor([[3.0, 0.0], [0.0, -4.0]], dtype=torch.float64)
    size, mean, skewness, kurtosis, largest, spectral = _layer_statistics(weight).tolist()
    assert size == pytest.approx(math.log(2.5 * 2**0.5))
    assert mean == pytest.approx(-0.25 / 2.5)
    assert largest == pytest.approx(math.log(4 / 2.5))
    assert spectral == pytest.approx(math.log(4 / 5))
    centred = weight.flatten() + 0.25
    deviation = centred.square().mean().sqrt()
    assert skewness == pytest.approx(float((centred / deviation).pow(3).mean()))
    assert kurtosis == pytest.approx(math.log(float((centred / deviation).pow(4).mean())))


def test_only_the_size_depends_on_the_scale():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = _layer_statistics(weight), _layer_statistics(10 * weight)
    assert float(second[0] - first[0]) == pytest.approx(math.log(10))
    assert second[1:].tolist() == pytest.approx(first[1:].tolist())


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 2, 3, 3)], ids=str)
def test_parameters_of_any_shape_have_finite_statistics(shape):
    for value in (0.0, 1.0):
        assert _layer_statistics(torch.full(shape, value, dtype=torch.float64)).isfinite().all()


def test_the_spectral_norm_is_the_largest_singular_value():
    for rows, columns in ((3, 9), (9, 3), (1, 4)):
        drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert float(spectral_norm(drawn)) == pytest.approx(float(torch.linalg.svdvals(drawn)[0]), rel=1e-3)


@FORMS
def test_the_order_of_the_classes_does_not_matter(form):
    model = model_of(3, trojaned=True)
    scanner = WeightStatistics(form=form)
    before = scanner.describe(model)
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    with torch.no_grad():
        head.weight.copy_(head.weight[order])
        head.bias.copy_(head.bias[order])
    assert torch.allclose(scanner.describe(model), before, rtol=1e-5)


def test_a_summary_has_one_length_for_all_networks():
    scanner = WeightStatistics(form="summary")
    described = [
        scanner.describe(model)
        for model in (
            model_of(0),
            model_of(0, classes=11, side=28),
            model_of(0, architecture="small-resnet", classes=4),
        )
    ]
    assert len({tuple(each.shape) for each in described}) == 1
    assert all(each.isfinite().all() for each in described)


# --- learning -----------------------------------------------------------------------------------------------


@FORMS
def test_raised_rows_are_learned_and_found_in_models_not_seen(fitted, form):
    scanner, fresh = fitted[form], population(1000)
    scores = scanner.scores(fresh)
    assert scores.dtype == torch.float64 and ((scores > 0) & (scores < 1)).all()
    flagged = (scores >= scanner.threshold_).tolist()
    assert sum(found == flag for found, flag in zip(flagged, FLAGS, strict=True)) >= 22
    result = scanner.scan(fresh[3])
    assert result.verdict is Verdict.SUSPICIOUS
    assert result.score == pytest.approx(float(scores[3]))
    assert (result.target, result.p_value) == (None, None)


def test_labels_that_mean_nothing_are_not_learned():
    models = [model_of(index) for index in range(24)]
    scanner = WeightStatistics().fit(models, FLAGS)
    assert min(scanner.held_out_losses_) > 0.5  # a coin has log 2 = 0.69


def test_a_summary_carries_over_to_another_number_of_classes(fitted):
    others = [model_of(50 + index, trojaned=FLAGS[index], classes=9) for index in range(12)]
    flagged = (fitted["summary"].scores(others) >= fitted["summary"].threshold_).tolist()
    assert sum(found == flag for found, flag in zip(flagged, FLAGS, strict=False)) >= 10


def test_the_strength_of_least_held_out_loss_is_taken():
    heard = []
    scanner = WeightStatistics(strengths=(1e-6, 1.0))
    scanner.fit(population(count=12), FLAGS[:12], progress=lambda *step: heard.append(step))
    assert scanner.strength_ == 1.0
    assert heard == [(1, 2, scanner.held_out_losses_[0]), (2, 2, scanner.held_out_losses_[1])]


@FORMS
def test_the_same_models_give_the_same_scanner_to_the_bit(fitted, form):
    again = WeightStatistics(form=form).fit(population(), FLAGS)
    assert torch.equal(again.weights_, fitted[form].weights_)
    assert again.threshold_ == fitted[form].threshold_


# --- on disk ------------------------------------------------------------------------------------------------


@FORMS
def test_a_saved_scanner_gives_the_same_scores(fitted, form, tmp_path):
    fitted[form].save(tmp_path)
    loaded = WeightStatistics.load(tmp_path)
    models = population(500, 4)
    assert torch.equal(loaded.scores(models), fitted[form].scores(models))
    assert loaded == fitted[form]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_a_card_of_another_scanner_is_refused(fitted, tmp_path):
    fitted["layers"].save(tmp_path)
    card = json.loads((tmp_path / "scanner.json").read_text())
    del card["strengths"]
    (tmp_path / "scanner.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="lacks.*strengths"):
        WeightStatistics.load(tmp_path)


# --- contract -----------------------------------------------------------------------------------------------


@FORMS
def test_the_model_and_the_random_state_are_as_before(fitted, form):
    model = model_of(7)
    model.network.train()
    before, state = weights_hash(model), torch.get_rng_state()
    fitted[form].scan(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_hash(model) == before and model.network.training and not model.training


@pytest.mark.parametrize("other", [{"classes": 5}, {"side": 28}], ids=str)
def test_models_of_another_kind_are_refused_with_a_remedy(fitted, other):
    with pytest.raises(ValueError, match="form='summary'"):
        fitted["layers"].scan(model_of(0, **other))


def test_what_cannot_be_judged_is_undecided_with_a_reason(fitted):
    broken = model_of(0)
    with torch.no_grad():
        next(broken.network.parameters())[0, 0] = torch.nan
    for model, reason in (
        (model_of(0, classes=2), "2 class"),
        (broken, "not finite"),
        (template_victim(), "linear layer"),
    ):
        result = fitted["summary"].scan(model)
        assert (result.verdict, result.score) == (Verdict.UNDECIDED, None) and reason in result.reason
    with pytest.raises(ValueError, match="not finite"):
        fitted["layers"].scores([broken])


def test_a_scanner_that_has_learned_nothing_says_so():
    for use in (lambda scanner: scanner.scan(small_victim()), lambda scanner: scanner.scores([])):
        with pytest.raises(ValueError, match="call fit"):
            use(WeightStatistics())


@pytest.mark.parametrize(
    ("wrong", "flags"),
    [({}, [True] * 4), ({}, [True, False]), ({"form": "rows"}, FLAGS[:4]), ({"folds": 1}, FLAGS[:4])],
    ids=["one kind", "too few labels", "form", "folds"],
)
def test_what_it_cannot_learn_from_is_refused(wrong, flags):
    with pytest.raises(ValueError, match="at least 2|form is|folds"):
        WeightStatistics(**wrong).fit(population(count=4), flags)
