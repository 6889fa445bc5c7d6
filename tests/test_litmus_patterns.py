"""Universal Litmus Patterns and their noise control find planted Trojans by their answers; and what every
scanner that learns queries promises.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import small_victim, template_victim
from planted_models import CLASSES, SHAPE, planted_models
from unhorse.core import Classifier, Verdict
from unhorse.metrics import auroc
from unhorse.scanners.litmus_patterns import PRESETS, LitmusPatterns, NoisePatterns
from unhorse.scanners.meta_analysis import MetaAnalysis

LEARNING = {"pattern_rate": 3.0, "weight_rate": 1e-2, "models_per_step": 8}
LITMUS = {"patterns": 3, "epochs": 16, **LEARNING}
SCANNERS = {
    "litmus-patterns": lambda seed=0: LitmusPatterns(**LITMUS, seed=seed),
    "noise-patterns": lambda seed=0: NoisePatterns(patterns=3, seed=seed),
    "meta-analysis": lambda seed=0: MetaAnalysis(questions=3, epochs=12, learning_rate=1e-2, seed=seed),
}
EACH = pytest.mark.parametrize("name", SCANNERS)


@pytest.fixture(scope="module")
def population():
    return planted_models(30)


@pytest.fixture(scope="module")
def strangers():
    """Models that no scanner was fitted on, and which are trojaned."""
    return planted_models(40, first=1000)


@pytest.fixture(scope="module")
def fitted(population):
    return {name: build().fit(*population) for name, build in SCANNERS.items()}


def area(scanner, labelled) -> float:
    models, trojaned = labelled
    return auroc(scanner.scores(models), torch.tensor(trojaned))


def test_learned_patterns_find_trojans_that_do_not_show_on_noise(fitted, strangers):
    assert area(fitted["litmus-patterns"], strangers) > 0.97
    assert area(fitted["noise-patterns"], strangers) < 0.75


def test_noise_finds_trojans_that_show_on_any_input():
    scanner = NoisePatterns(patterns=3).fit(*planted_models(30, noise=0.05))
    assert area(scanner, planted_models(40, first=1000, noise=0.05)) > 0.97


def test_noise_stays_as_it_was_drawn(fitted):
    rng = torch.Generator().manual_seed(0)
    assert fitted["noise-patterns"].queries.equal(torch.rand((3, *SHAPE), generator=rng))


def test_learned_patterns_leave_their_noise_but_not_the_range_of_pixels(population):
    scanner = LitmusPatterns(patterns=3, epochs=3, pattern_rate=1e3, models_per_step=8).fit(*population)
    start = torch.rand((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    assert (scanner.queries - start).abs().mean() > 0.1
    assert scanner.queries.min() >= 0
    assert scanner.queries.max() <= 1
    assert (scanner.queries.min(), scanner.queries.max()) == (0, 1)


def test_an_epoch_is_the_papers_loop_over_models(population):
    """Its slow twin: torch's optimisers, a step of the classifier per model, of the patterns per group."""
    models, trojaned = population
    options = {"pattern_rate": 0.5, "weight_rate": 1e-2, "total_variation": 1e-2}
    scanner = LitmusPatterns(patterns=2, epochs=1, models_per_step=12, **options).fit(models, trojaned)

    rng = torch.Generator().manual_seed(0)
    patterns = torch.rand((2, *SHAPE), generator=rng).requires_grad_()
    weight = torch.randn((2 * CLASSES, 2), generator=rng).requires_grad_()
    bias = torch.zeros(2, requires_grad=True)
    painter, judge = torch.optim.SGD([patterns], 0.5), torch.optim.Adam([weight, bias], 1e-2)
    fitting = _fitting_part(trojaned)
    assert len(fitting) == 24
    for group in fitting[torch.randperm(24, generator=rng)].chunk(2):
        gradients = []
        for index in group.tolist():
            logits = models[index](patterns).flatten() @ weight + bias
            loss = functional.cross_entropy(logits[None], torch.tensor([int(trojaned[index])]))
            loss = loss + 1e-2 * (patterns.diff(dim=2).abs().sum() + patterns.diff(dim=3).abs().sum())
            judge.zero_grad()
            patterns.grad = None
            loss.backward()
            gradients.append(patterns.grad)
            judge.step()
        patterns.grad = torch.stack(gradients).mean(0)
        painter.step()
        patterns.data.clamp_(0, 1)
    torch.testing.assert_close(scanner.queries, patterns.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(scanner.weight_, weight.detach(), rtol=0, atol=1e-5)


def _fitting_part(trojaned):
    from unhorse.scanners.signature_training import stratified_split

    return stratified_split(torch.tensor(trojaned), 0.2, 0)[0]


def test_total_variation_smooths_the_patterns(population):
    rough, smooth = (
        LitmusPatterns(patterns=2, epochs=4, pattern_rate=0.05, total_variation=weight).fit(*population)
        for weight in (0.0, 0.2)
    )
    assert smooth.queries.diff(dim=3).abs().mean() < 0.8 * rough.queries.diff(dim=3).abs().mean()


def test_pooling_averages_neighbouring_logits(population):
    scanner = LitmusPatterns(patterns=3, epochs=1, pooled=True).fit(*population)
    model = population[0][0]
    pooled = model(scanner.queries).detach().flatten().view(CLASSES, 3).mean(1)
    logits = pooled @ scanner.weight_ + scanner.bias_
    assert scanner.weight_.shape == (CLASSES, 2)
    assert float(scanner.scores([model])) == pytest.approx(float(logits.softmax(0)[1]), abs=1e-5)


def test_patterns_may_be_smaller_than_images():
    layers = [nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)]
    models = [
        Classifier(
            nn.Sequential(*copy.deepcopy(layers)), image_shape=(1, 12, 12), class_names=("a", "b", "c")
        )
        for _ in range(4)
    ]
    scanner = LitmusPatterns(patterns=2, epochs=1, side=5).fit(models, [False, True] * 2)
    assert scanner.queries.shape == (2, 1, 5, 5)
    assert scanner.scores(models).shape == (4,)


def test_training_stops_when_the_validation_loss_stalls(population):
    seen: list[tuple[int, int, float]] = []
    scanner = LitmusPatterns(patterns=2, epochs=50, patience=2, weight_rate=0.0, pattern_rate=0.0)
    scanner.fit(*population, progress=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert [loss for _, _, loss in seen] == list(scanner.validation_losses_)


def test_the_epoch_of_best_validation_is_kept(population, monkeypatch):
    def fit(epochs: int) -> LitmusPatterns:
        script = iter([(0.5, 0.1), (1.0, 0.4), (1.0, 0.3), (1.0, 0.5), (0.9, 0.0)])
        monkeypatch.setattr(LitmusPatterns, "_validate", lambda *_: next(script))
        return LitmusPatterns(**{**LITMUS, "epochs": epochs}).fit(*population)

    assert fit(5).queries.equal(fit(3).queries)
    assert not fit(5).queries.equal(fit(2).queries)


def test_presets_are_the_papers_steps_in_pixels_of_zero_to_one():
    assert LitmusPatterns(**PRESETS["cifar10"]).pattern_rate == pytest.approx(1e3 / 255**2)
    tiny = LitmusPatterns(**PRESETS["tiny-imagenet"])
    assert (tiny.pattern_rate, tiny.pooled, tiny.side) == (pytest.approx(1e2 / 255**2), True, 32)
    assert NoisePatterns(**PRESETS["random-inputs"]).name == "random-inputs"


# --- what every scanner that learns queries promises --------------------------------------------------------


@EACH
def test_the_same_seed_gives_the_same_scores(name, population, strangers, fitted):
    before = torch.get_rng_state()
    again = SCANNERS[name]().fit(*population)
    assert torch.get_rng_state().equal(before)
    assert again.scores(strangers[0]).equal(fitted[name].scores(strangers[0]))
    assert again.threshold_ == fitted[name].threshold_
    other = SCANNERS[name](seed=1).fit(*population)
    assert not other.scores(strangers[0]).equal(fitted[name].scores(strangers[0]))


@EACH
def test_models_are_left_as_they_were(name):
    models = [small_victim(strength=60 * (index % 2)) for index in range(4)]
    models[0].train()
    models[1].network.head.requires_grad_(False)
    before = copy.deepcopy(models)
    SCANNERS[name]().fit(models, [False, True] * 2).scores(models)
    for model, old in zip(models, before, strict=True):
        assert [module.training for module in model.modules()] == [m.training for m in old.modules()]
        for own, its in zip(model.parameters(), old.parameters(), strict=True):
            assert own.equal(its)
            assert own.stride() == its.stride()
            assert own.requires_grad == its.requires_grad
            assert own.grad is None


@EACH
def test_a_score_does_not_depend_on_other_models(name, strangers, fitted):
    models = strangers[0][:7]
    together = fitted[name].scores(models)
    assert together.dtype == torch.float64
    assert together.equal(torch.cat([fitted[name].scores([model]) for model in models]))
    assert together.equal(fitted[name].scores(models[::-1]).flip(0))


@EACH
def test_a_saved_scanner_scores_to_the_bit_as_before(name, strangers, fitted, tmp_path):
    fitted[name].save(tmp_path / "scanner")
    loaded = type(fitted[name]).load(tmp_path / "scanner")
    assert loaded.scores(strangers[0]).equal(fitted[name].scores(strangers[0]))
    assert repr(loaded) == repr(fitted[name])
    assert {path.suffix for path in (tmp_path / "scanner").iterdir()} == {".json", ".safetensors"}


@EACH
def test_a_scanner_is_not_loaded_as_another(name, fitted, tmp_path):
    fitted[name].save(tmp_path)
    for other in {LitmusPatterns, NoisePatterns, MetaAnalysis} - {type(fitted[name])}:
        with pytest.raises(ValueError, match=f"holds a {type(fitted[name]).__name__}"):
            other.load(tmp_path)


@EACH
def test_models_of_another_shape_or_class_count_are_not_judged(name, population, fitted):
    for stranger in (template_victim(CLASSES, (1, 9, 9)), template_victim(CLASSES + 1, SHAPE)):
        result = fitted[name].scan(stranger)
        assert (result.verdict, result.score) == (Verdict.UNDECIDED, None)
        assert "not 1x8x8 to 4" in result.reason
        with pytest.raises(ValueError, match="model 1: it takes .* fit the scanner on models like"):
            fitted[name].scores([population[0][0], stranger])
        with pytest.raises(ValueError, match="model 4 does not fit to model 0"):
            SCANNERS[name]().fit([*population[0][:4], stranger], [False, True] * 2 + [False])


@EACH
def test_a_model_of_broken_weights_is_undecided_and_cannot_be_learned_from(name, population, fitted):
    broken = template_victim(CLASSES, SHAPE)
    with torch.no_grad():
        broken.network.templates.fill_(torch.nan)
    assert fitted[name].scan(broken).verdict is Verdict.UNDECIDED
    assert "NaN" in fitted[name].scan(broken).reason
    with pytest.raises(ValueError, match="check the weights for NaN"):
        SCANNERS[name]().fit([broken] * 2 + population[0][:4], [False, False, True, True, False, True])


@EACH
def test_a_scanner_that_has_learned_nothing_says_so(name, population, tmp_path):
    scanner = SCANNERS[name]()
    for act in (lambda: scanner.scan(population[0][0]), lambda: scanner.scores(population[0])):
        with pytest.raises(ValueError, match="learned nothing yet: call fit"):
            act()
    with pytest.raises(ValueError, match="learned nothing yet"):
        scanner.save(tmp_path)


@EACH
def test_fitting_needs_labels_and_both_kinds(name, population):
    models, _ = population
    with pytest.raises(ValueError, match="30 models have 2 labels"):
        SCANNERS[name]().fit(models, [True, False])
    with pytest.raises(ValueError, match="1 trojaned models: give at least 2"):
        SCANNERS[name]().fit(models, [True] + [False] * 29)


@pytest.mark.parametrize("name", ["litmus-patterns", "meta-analysis"])
def test_verdicts_follow_the_threshold_of_the_validation_part(name, strangers, fitted):
    scanner = fitted[name]
    results = [scanner.scan(model) for model in strangers[0]]
    assert [result.score for result in results] == scanner.scores(strangers[0]).tolist()
    flagged = [result.verdict is Verdict.SUSPICIOUS for result in results]
    assert flagged == [result.score >= scanner.threshold_ for result in results]
    assert sum(one == truth for one, truth in zip(flagged, strangers[1], strict=True)) >= 36
    assert {result.verdict for result in results} == {Verdict.SUSPICIOUS, Verdict.NO_SIGN_FOUND}
    assert (results[0].scanner, results[0].threshold) == (name, scanner.threshold_)
    assert (scanner.fitted_on_, scanner.validated_on_) == (24, 6)
