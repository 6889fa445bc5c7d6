"""Meta Neural Trojan Detection (Xu et al., IEEE S&P 2021): a small network reads a model's answers to queries
that are tuned with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Dataset, Images, ScanResult, Scores
from unhorse.metrics import auroc
from unhorse.scanners.optimisation import Adam
from unhorse.scanners.queries import (
    Answers,
    Population,
    Progress,
    ask_all,
    divide,
    load_queries,
    note_population,
    ready,
    save_queries,
    scan_model,
    score_models,
)


class _Learned(NamedTuple):
    """Queries (m, c, h, w) and the meta-network: hidden layer (u, m*k), (u,) and output (u,), (1,)."""

    queries: Images
    hidden_weight: Float[Tensor, "u d"]
    hidden_bias: Float[Tensor, " u"]
    output_weight: Float[Tensor, " u"]
    output_bias: Float[Tensor, " 1"]

    def log_odds(self, answers: Answers) -> Scores:
        hidden = functional.linear(answers.flatten(1), self.hidden_weight, self.hidden_bias).relu()
        return hidden @ self.output_weight + self.output_bias

    def copy(self) -> _Learned:
        return _Learned(*(tensor.detach().clone() for tensor in self))


@dataclass
class MetaAnalysis:
    """MNTD (Xu et al., IEEE S&P 2021): `questions` images and a two-layer network that reads a model's logits
    on them, tuned together on benign and trojaned shadow models.

    Fields are the paper's. Questions start from normal noise of `start_mean` and `start_deviation` in pixels
    of [0, 1], clipped, for which the paper takes those of the data. The score is the probability of
    "trojaned".
    """

    questions: int = 10
    hidden: int = 20
    epochs: int = 10
    learning_rate: float = 1e-3
    start_mean: float = 0.5
    start_deviation: float = 0.25
    validation_fraction: float = 0.2
    seed: int = 0

    name: ClassVar[str] = "meta-analysis"
    queries_: Images | None = field(default=None, init=False, repr=False)
    hidden_weight_: Tensor | None = field(default=None, init=False, repr=False)
    hidden_bias_: Tensor | None = field(default=None, init=False, repr=False)
    output_weight_: Tensor | None = field(default=None, init=False, repr=False)
    output_bias_: Tensor | None = field(default=None, init=False, repr=False)
    threshold_: float = field(default=0.5, init=False)
    image_shape_: tuple[int, ...] = field(default=(), init=False)
    num_classes_: int = field(default=0, init=False)
    validation_losses_: tuple[float, ...] = field(default=(), init=False, repr=False)
    fitted_on_: int = field(default=0, init=False)
    validated_on_: int = field(default=0, init=False)

    @property
    def queries(self) -> Images:
        assert self.queries_ is not None
        return self.queries_

    def fit(
        self, models: Sequence[Classifier], trojaned: Sequence[bool], *, progress: Progress | None = None
    ) -> Self:
        """Learn from labelled models; a stratified part of them chooses the epoch and the threshold."""
        population = divide(models, trojaned, self.validation_fraction, self.seed)
        rng = torch.Generator().manual_seed(self.seed)
        start = self._start(population, rng)
        ask_all(models, start.queries)
        with ready(models):
            best, self.validation_losses_ = self._train(population, start, rng, progress)
        for name, tensor in best._asdict().items():
            setattr(self, f"{name}_", tensor.cpu())
        note_population(self, population)
        return self

    def scores(self, models: Sequence[Classifier]) -> Scores:
        """Probability of "trojaned" per model, in float64 on the CPU."""
        return score_models(self, models)

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judge a model by its answers to the questions; clean images are not needed."""
        return scan_model(self, model)

    def save(self, folder: Path) -> Path:
        """Write scanner.json and the weights it names."""
        return save_queries(self, folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The scanner of a folder that save() wrote; ValueError where files are missing or do not fit."""
        return load_queries(cls, folder)

    def log_odds(self, answers: Answers) -> Scores:
        """Log odds of "trojaned" (n,) of answers to the questions."""
        learned = (getattr(self, f"{name}_") for name in _Learned._fields)
        return _Learned(*learned).log_odds(answers)

    # --- inside ---------------------------------------------------------------------------------------------

    def _start(self, population: Population, rng: torch.Generator) -> _Learned:
        noise = torch.randn((self.questions, *population.image_shape), generator=rng)
        answers = self.questions * population.num_classes
        learned = _Learned(
            (self.start_mean + self.start_deviation * noise).clamp(0, 1),
            _uniform((self.hidden, answers), answers, rng),
            _uniform((self.hidden,), answers, rng),
            _uniform((self.hidden,), self.hidden, rng),
            _uniform((1,), self.hidden, rng),
        )
        return _Learned(*(tensor.to(population.device) for tensor in learned))

    def _train(
        self, population: Population, learned: _Learned, rng: torch.Generator, progress: Progress | None
    ) -> tuple[_Learned, tuple[float, ...]]:
        """Steps on `learned` in place; what had the best validation AUROC, and each epoch's loss."""
        optimizer = Adam(learned, self.learning_rate)
        labels = population.trojaned.float().to(population.device)
        best, highest, losses = learned.copy(), (-1.0, 0.0), []
        for epoch in range(1, self.epochs + 1):
            order = population.fitting[torch.randperm(len(population.fitting), generator=rng)]
            for index in order.tolist():
                leaves = _Learned(*(tensor.detach().requires_grad_(True) for tensor in learned))
                odds = leaves.log_odds(population.models[index](leaves.queries)[None])
                loss = functional.binary_cross_entropy_with_logits(odds, labels[index, None])
                optimizer.step(torch.autograd.grad(loss, tuple(leaves)))
                learned.queries.clamp_(0, 1)
            area, lost = _validate(population, learned)
            losses.append(lost)
            if (area, -lost) > highest:
                best, highest = learned.copy(), (area, -lost)
            if progress is not None:
                progress(epoch, self.epochs, lost)
        return best, tuple(losses)


@torch.no_grad()
def _validate(population: Population, learned: _Learned) -> tuple[float, float]:
    """AUROC and loss on the validation part."""
    answers = torch.stack([model(learned.queries) for model in population.validators()])
    odds, truth = learned.log_odds(answers).cpu(), population.trojaned[population.validation]
    loss = functional.binary_cross_entropy_with_logits(odds, truth.float())
    return auroc(odds, truth), float(loss)


def _uniform(shape: tuple[int, ...], inputs: int, rng: torch.Generator) -> Tensor:
    """A linear layer's usual start: uniform within 1 / sqrt(inputs)."""
    return (2 * torch.rand(shape, generator=rng) - 1) / inputs**0.5
