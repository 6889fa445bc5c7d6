"""MM-BD: margins known by construction, the Gamma p-value, and planted Trojans found."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import gamma
from torch import Tensor, nn

from conftest import TARGET, small_victim, template_victim
from unhorse.core import Bars, Classifier, Reference, Verdict
from unhorse.models.classifier import weights_hash
from unhorse.scanners import maximum_margin
from unhorse.scanners.maximum_margin import MAXIMUM_MARGIN, MaximumMargin, gamma_p_value, outlier_ratio

QUICK, HASTY = MaximumMargin(starts=4, steps=60), MaximumMargin(starts=2, steps=6)
MARGINS = torch.tensor([11.0, 9, 10, 12, 8, 10.5, 9.5, 11.5, 8.5, 10.2])


class Blocks(nn.Module):
    """Each logit is its strength times the mean of its own four pixels, so its margin can be its strength."""

    def __init__(self, *strengths: float) -> None:
        super().__init__()
        self.strengths = nn.Parameter(torch.tensor(strengths))

    def forward(self, images: Tensor) -> Tensor:
        return self.strengths * images.flatten(2).mean(1).unflatten(1, (-1, 4)).mean(2)


class Constant(nn.Module):
    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits + 0 * images.sum((1, 2, 3))[:, None]


def of(network: nn.Module, classes: int, shape: tuple[int, int, int]) -> Classifier:
    names = [f"class {index}" for index in range(classes)]
    return Classifier(network, image_shape=shape, class_names=names).eval()


def blocks(*strengths: float) -> Classifier:
    return of(Blocks(*strengths), len(strengths), (1, 4, len(strengths)))


# --- the statistic ------------------------------------------------------------------------------------------


def test_margins_known_by_construction_are_reached():
    strengths = (5.0, 6.0, 7.0, 20.0)
    found = MaximumMargin(starts=4, steps=300, learning_rate=0.05).margins(blocks(*strengths))
    # others have their pixels pushed to 0 one at a time, so a little is left
    assert found.tolist() == pytest.approx(strengths, abs=0.4)


def one_class_after_the_other(model: Classifier, scanner: MaximumMargin) -> list[float]:
    """A slow twin in the order of the authors' code."""
    rng, found = torch.Generator().manual_seed(scanner.seed), []
    for target in range(model.num_classes):
        images = torch.rand(scanner.starts, *model.image_shape, generator=rng).requires_grad_(True)
        velocity, last = torch.zeros_like(images), 1000.0
        for _ in range(scanner.steps):
            logits = model(images.clamp(0, 1))
            others = torch.cat([logits[:, :target], logits[:, target + 1 :]], 1).amax(1)
            loss = (others - logits[:, target]).sum()
            velocity = scanner.momentum * velocity + torch.autograd.grad(loss, images)[0]
            images = (images - scanner.learning_rate * velocity).detach().requires_grad_(True)
            if abs(last - loss.item()) / abs(last) < scanner.tolerance:
                break
            last = loss.item()
        found.append(float((logits[:, target] - others).detach().max()))
    return found


@pytest.mark.parametrize("momentum", [0.2, 0.0])
def test_all_classes_at_once_agree_with_one_after_the_other(momentum):
    scanner = MaximumMargin(starts=2, steps=20, momentum=momentum, tolerance=1e-3)
    model = small_victim(strength=20)
    assert scanner.margins(model).tolist() == pytest.approx(
        one_class_after_the_other(model, scanner), rel=1e-3
    )


def test_memory_changes_the_chunks_and_not_the_margins(monkeypatch):
    model = small_victim()
    scanner = MaximumMargin(starts=4, steps=12)
    whole = scanner.margins(model)
    sizes = []
    inner = maximum_margin._margins

    def noting(*arguments):
        sizes.append(len(arguments[1]))
        return inner(*arguments)

    monkeypatch.setattr(maximum_margin, "_margins", noting)
    for chunk in (3, 9):  # less than the starts of a class; two classes, and a part of their starts
        monkeypatch.setattr(maximum_margin, "chunk_size", lambda model, budget=0, size=chunk: size)
        sizes.clear()
        assert torch.allclose(scanner.margins(model), whole, rtol=1e-4)
        assert max(sizes) == min(chunk, 8)


def test_a_class_that_no_longer_moves_stops():
    passes = []
    scanner = MaximumMargin(starts=2, steps=200, learning_rate=1.0)
    stopped = scanner.margins(
        blocks(5.0, 6.0, 7.0), on_step=lambda done, most, phase: passes.append((done, most))
    )
    assert passes[-1][1] == 3 * 2 * 200 and passes[-1][0] < passes[-1][1] / 2
    endless = MaximumMargin(starts=2, steps=200, learning_rate=1.0, tolerance=0.0)
    assert torch.allclose(stopped, endless.margins(blocks(5.0, 6.0, 7.0)), atol=0.05)


def test_the_largest_over_the_starts_counts():
    few, many = MaximumMargin(starts=1, steps=10), MaximumMargin(starts=16, steps=10)
    model = small_victim()
    assert (many.margins(model) > few.margins(model)).float().mean() > 0.5


def test_the_p_value_is_that_of_the_largest_of_k_draws():
    ordered = MARGINS.double().sort().values.numpy()
    shape, location, scale = gamma.fit(ordered[:-1])
    expected = 1 - gamma.cdf(ordered[-1], shape, loc=location, scale=scale) ** 10
    assert 0.1 < expected < 0.9
    assert gamma_p_value(MARGINS) == pytest.approx(expected)


def test_the_p_value_falls_with_the_largest_margin_and_does_not_round_to_zero():
    found = []
    for largest in (12.0, 14.0, 18.0, 40.0):
        margins = MARGINS.clone()
        margins[3] = largest
        found.append(gamma_p_value(margins))
    assert found == sorted(found, reverse=True) and 0 < found[-1] < 1e-12


def test_the_ratio_is_that_of_the_largest_to_the_median_of_the_others():
    assert outlier_ratio(torch.tensor([2.0, 8, 4, 6])) == pytest.approx(math.log(8 / 4))
    assert outlier_ratio(torch.tensor([-2.0, 8, -4, 6])) == pytest.approx(math.log(1000))


def test_the_scores_of_both_statistics_are_documented_functions_of_the_margins(monkeypatch):
    monkeypatch.setattr(MaximumMargin, "margins", lambda self, model, on_step=None: MARGINS)
    model = template_victim()
    assert MaximumMargin().measure(model) == pytest.approx(-math.log10(gamma_p_value(MARGINS)))
    assert MaximumMargin(statistic="ratio").measure(model) == pytest.approx(outlier_ratio(MARGINS))


def test_the_threshold_is_a_p_value_of_five_percent():
    assert MAXIMUM_MARGIN["maximum-margin"].threshold == pytest.approx(-math.log10(0.05))
    assert MAXIMUM_MARGIN["maximum-margin-ratio"].threshold == pytest.approx(math.log(2))


# --- finding and passing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["p", "ratio"])
def test_planted_trojans_are_found_with_their_target(statistic):
    scanner = MaximumMargin(starts=4, steps=60, statistic=statistic, threshold=math.log(2))
    for model in (template_victim(10, (1, 8, 8), strength=30, side=2), small_victim(strength=60)):
        result = scanner.scan(model)
        assert (result.verdict, result.target) == (Verdict.SUSPICIOUS, TARGET)
        assert result.score == scanner.measure(model) >= result.threshold
        assert max(range(model.num_classes), key=result.reached.__getitem__) == TARGET
        assert result.p_value is None and isinstance(result.exhibits[0], Bars)


def test_a_trained_trojan_is_found_and_its_benign_twin_passes(trained):
    found, passed = (QUICK.scan(trained[name].model) for name in ("infected", "benign"))
    assert (found.verdict, found.target) == (Verdict.SUSPICIOUS, 3)
    assert (passed.verdict, passed.target) == (Verdict.NO_SIGN_FOUND, None)
    assert passed.score < found.score


def test_benign_victims_pass():
    for model in (template_victim(10, (1, 8, 8)), small_victim()):
        assert QUICK.scan(model).verdict is Verdict.NO_SIGN_FOUND


# --- contract -----------------------------------------------------------------------------------------------


def test_the_model_and_the_random_state_are_as_before():
    model = small_victim()
    model.network.train()
    before, state = weights_hash(model), torch.get_rng_state()
    HASTY.scan(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_hash(model) == before and model.network.training and not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_seed_alone_decides_the_margins():
    model = small_victim()
    first, again, other = (MaximumMargin(starts=2, steps=8, seed=seed).margins(model) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def broken() -> Classifier:
    model = small_victim()
    with torch.no_grad():
        next(model.network.parameters())[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (blocks(5.0, 6.0), "2 class"),
        (broken(), "not finite"),
        (of(Constant(1.0, 2, 3, 4), 4, (1, 8, 8)), "no image changes"),
    ],
    ids=["two classes", "NaN", "constant"],
)
def test_what_cannot_be_judged_is_undecided_with_a_reason(model, reason):
    result = QUICK.scan(model)
    assert (result.verdict, result.score) == (Verdict.UNDECIDED, None) and reason in result.reason
    with pytest.raises(ValueError, match=reason):
        QUICK.measure(model)


def test_margins_that_no_gamma_fits_are_undecided_but_have_a_ratio(monkeypatch):
    monkeypatch.setattr(
        MaximumMargin, "margins", lambda self, model, on_step=None: torch.tensor([1.0, 1, 1, 5])
    )
    model = small_victim(classes=4)
    assert "statistic 'ratio'" in MaximumMargin().scan(model).reason
    assert MaximumMargin(statistic="ratio").scan(model).score == pytest.approx(math.log(5))


def test_a_p_value_from_few_classes_is_warned_of():
    assert any("fitted to 5 margins" in line for line in HASTY.scan(small_victim()).warnings)


def test_a_reference_of_benign_models_decides_instead_of_the_threshold():
    strict = MaximumMargin(starts=2, steps=5, threshold=1e9, reference=Reference("benign", (-9.0,) * 19))
    result = strict.scan(small_victim())
    assert (result.p_value, result.verdict) == (pytest.approx(0.05), Verdict.SUSPICIOUS)


@pytest.mark.parametrize("wrong", [{"statistic": "mean"}, {"starts": 0}, {"steps": 0}], ids=str)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MaximumMargin(**wrong).scan(small_victim())
