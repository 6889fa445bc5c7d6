"""MNTD learns questions and a network that reads the answers; what all such scanners promise is tested in
test_litmus_patterns.py.
"""

import torch
from torch import nn
from torch.nn import functional

from planted_models import CLASSES, SHAPE, planted_models
from unhorse.metrics import auroc
from unhorse.scanners import meta_analysis
from unhorse.scanners.meta_analysis import MetaAnalysis
from unhorse.scanners.signature_training import stratified_split


def test_it_finds_planted_trojans_in_models_it_has_not_seen():
    scanner = MetaAnalysis(questions=3, epochs=12, learning_rate=1e-2).fit(*planted_models(30))
    models, trojaned = planted_models(40, first=1000)
    assert auroc(scanner.scores(models), torch.tensor(trojaned)) > 0.97


def test_an_epoch_is_the_papers_loop_over_models():
    """Its slow twin: modules and torch's Adam, a step of questions and network after each model."""
    models, trojaned = planted_models(20)
    scanner = MetaAnalysis(questions=2, hidden=5, epochs=1).fit(models, trojaned)

    start = MetaAnalysis(questions=2, hidden=5, epochs=0).fit(models, trojaned)
    questions = start.queries.clone().requires_grad_()
    network = nn.Sequential(nn.Linear(2 * CLASSES, 5), nn.ReLU(), nn.Linear(5, 1))
    state = (start.hidden_weight_, start.hidden_bias_, start.output_weight_[None], start.output_bias_)
    network.load_state_dict(dict(zip(network.state_dict(), state, strict=True)))
    optimizer = torch.optim.Adam([questions, *network.parameters()], 1e-3)
    rng = torch.Generator().manual_seed(0)
    for shape in ((2, *SHAPE), (5, 2 * CLASSES), (5,), (5,), (1,)):  # what the start has drawn
        (torch.randn if len(shape) == 4 else torch.rand)(shape, generator=rng)
    fitting, _ = stratified_split(torch.tensor(trojaned), 0.2, 0)
    for index in fitting[torch.randperm(len(fitting), generator=rng)].tolist():
        odds = network(models[index](questions).flatten()[None])[:, 0]
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(odds, torch.tensor([float(trojaned[index])])).backward()
        optimizer.step()
        questions.data.clamp_(0, 1)
    torch.testing.assert_close(scanner.queries, questions.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(scanner.hidden_weight_, network[0].weight.detach(), rtol=0, atol=1e-5)
    assert (scanner.queries - start.queries).abs().max() > 5e-3


def test_questions_start_as_normal_noise_and_stay_pixels():
    population = planted_models(20)
    start = MetaAnalysis(questions=40, epochs=0, start_mean=0.4, start_deviation=0.1).fit(*population)
    assert abs(float(start.queries.mean()) - 0.4) < 0.01
    assert abs(float(start.queries.std()) - 0.1) < 0.01
    wild = MetaAnalysis(questions=3, epochs=2, learning_rate=0.5).fit(*population)
    assert (float(wild.queries.min()), float(wild.queries.max())) == (0, 1)


def test_the_epoch_of_best_validation_is_kept(monkeypatch):
    def fit(epochs: int) -> MetaAnalysis:
        script = iter([(0.5, 0.1), (1.0, 0.4), (1.0, 0.3), (1.0, 0.5), (0.9, 0.0)])
        monkeypatch.setattr(meta_analysis, "_validate", lambda *_: next(script))
        return MetaAnalysis(questions=2, epochs=epochs).fit(*planted_models(12))

    assert fit(5).queries.equal(fit(3).queries)
    assert not fit(5).queries.equal(fit(2).queries)


def test_progress_is_told_after_each_epoch():
    seen: list[tuple[int, int, float]] = []
    scanner = MetaAnalysis(questions=2, epochs=3)
    scanner.fit(*planted_models(12), progress=lambda *state: seen.append(state))
    assert [state[:2] for state in seen] == [(1, 3), (2, 3), (3, 3)]
    assert [loss for *_, loss in seen] == list(scanner.validation_losses_)
