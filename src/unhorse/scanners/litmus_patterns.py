"""Universal Litmus Patterns (Kolouri et al., CVPR 2020): images learned so that a model's logits on them tell
whether it is trojaned; and their control, images that are noise and stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Dataset, Images, ScanResult, Scores
from unhorse.scanners.optimisation import Adam, Descent
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
from unhorse.scanners.signature_training import margins

LEVELS = 255  # the paper's pixels are 0..255, ours 0..1
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {"epochs": 1000, "patience": None, "pattern_rate": 1e3 / LEVELS**2, "weight_rate": 1e-3},
    "tiny-imagenet": {
        **{"epochs": 500, "patience": None, "pattern_rate": 1e2 / LEVELS**2, "weight_rate": 1e-4},
        **{"side": 32, "pooled": True},
    },
    "small-population": {
        **{"epochs": 100, "patience": 30, "pattern_rate": 1.0, "weight_rate": 1e-4},
        **{"weight_deviation": 0.1},
    },
    "random-inputs": {"patterns": 50, "name": "random-inputs"},
}
"""Options: the paper's two settings and one of ours for LitmusPatterns, more noise for NoisePatterns."""


class _Learned(NamedTuple):
    """Patterns (m, c, h, w) and the linear classifier (d, 2), (2,) of their logits."""

    patterns: Images
    weight: Float[Tensor, "d 2"]
    bias: Float[Tensor, " 2"]

    def copy(self) -> _Learned:
        return _Learned(*(tensor.detach().clone() for tensor in self))


@dataclass
class LitmusPatterns:
    """Universal Litmus Patterns (Kolouri et al., CVPR 2020): `patterns` images and a linear classifier of
    their logits, learned together from benign and trojaned models.

    Fields are the paper's for CIFAR-10 with pixels in [0, 1]; `patience` stops where the validation loss has
    not improved for so many epochs (None: never). `side` is the patterns' height and width where it is not
    the models' own; `pooled` averages neighbouring logits to as many as there are classes. The score is the
    probability of "trojaned".
    """

    patterns: int = 10
    epochs: int = 1000
    patience: int | None = 100
    pattern_rate: float = 1e3 / LEVELS**2
    weight_rate: float = 1e-3
    weight_deviation: float = 1.0
    total_variation: float = 1e-6 * LEVELS
    models_per_step: int = 50
    side: int | None = None
    pooled: bool = False
    validation_fraction: float = 0.2
    seed: int = 0

    name: ClassVar[str] = "litmus-patterns"
    patterns_: Images | None = field(default=None, init=False, repr=False)
    weight_: Tensor | None = field(default=None, init=False, repr=False)
    bias_: Tensor | None = field(default=None, init=False, repr=False)
    threshold_: float = field(default=0.5, init=False)
    image_shape_: tuple[int, ...] = field(default=(), init=False)
    num_classes_: int = field(default=0, init=False)
    validation_losses_: tuple[float, ...] = field(default=(), init=False, repr=False)
    fitted_on_: int = field(default=0, init=False)
    validated_on_: int = field(default=0, init=False)

    @property
    def queries(self) -> Images:
        assert self.patterns_ is not None
        return self.patterns_

    def fit(
        self, models: Sequence[Classifier], trojaned: Sequence[bool], *, progress: Progress | None = None
    ) -> Self:
        """Learn from labelled models; a stratified part of them chooses the epoch and the threshold."""
        population = divide(models, trojaned, self.validation_fraction, self.seed)
        rng = torch.Generator().manual_seed(self.seed)
        start = self._start(population, rng)
        ask_all(models, start.patterns)
        with ready(models):
            best, self.validation_losses_ = self._train(population, start, rng, progress)
        self.patterns_, self.weight_, self.bias_ = (tensor.cpu() for tensor in best)
        note_population(self, population)
        return self

    def scores(self, models: Sequence[Classifier]) -> Scores:
        """Probability of "trojaned" per model, in float64 on the CPU."""
        return score_models(self, models)

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judge a model by its logits on the patterns; clean images are not needed."""
        return scan_model(self, model)

    def save(self, folder: Path) -> Path:
        """Write scanner.json and the weights it names."""
        return save_queries(self, folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The scanner of a folder that save() wrote; ValueError where files are missing or do not fit."""
        return load_queries(cls, folder)

    def log_odds(self, answers: Answers) -> Scores:
        """Log odds of "trojaned" (n,) of answers on the patterns."""
        assert self.weight_ is not None and self.bias_ is not None
        return margins(self._features(answers) @ self.weight_ + self.bias_)

    # --- inside ---------------------------------------------------------------------------------------------

    def _start(self, population: Population, rng: torch.Generator) -> _Learned:
        channels, height, width = population.image_shape
        shape = (height, width) if self.side is None else (self.side, self.side)
        answers = population.num_classes * (1 if self.pooled else self.patterns)
        patterns = torch.rand((self.patterns, channels, *shape), generator=rng)
        weight = self.weight_deviation * torch.randn((answers, 2), generator=rng)
        return _Learned(*(tensor.to(population.device) for tensor in (patterns, weight, torch.zeros(2))))

    def _features(self, answers: Answers) -> Float[Tensor, "n d"]:
        flat = answers.flatten(1)
        return functional.adaptive_avg_pool1d(flat, answers.shape[2]) if self.pooled else flat

    def _train(
        self, population: Population, learned: _Learned, rng: torch.Generator, progress: Progress | None
    ) -> tuple[_Learned, tuple[float, ...]]:
        """Steps on `learned` in place; what had the best validation accuracy, and each epoch's loss."""
        painter = Descent([learned.patterns], self.pattern_rate)
        judge = Adam([learned.weight, learned.bias], self.weight_rate)
        steps = max(1, round(len(population.fitting) / self.models_per_step))
        best, highest, losses = learned.copy(), (-1.0, 0.0), []
        for epoch in range(1, self.epochs + 1):
            order = population.fitting[torch.randperm(len(population.fitting), generator=rng)]
            for group in order.chunk(steps):
                self._step(population, group, learned, painter, judge)
            accuracy, loss = self._validate(population, learned)
            losses.append(loss)
            # of epochs that are equally accurate, and with few models many are, the one of the lowest loss
            if (accuracy, -loss) > highest:
                best, highest = learned.copy(), (accuracy, -loss)
            if progress is not None:
                progress(epoch, self.epochs, loss)
            if self.patience is not None and epoch - losses.index(min(losses)) > self.patience:
                break
        return best, tuple(losses)

    def _step(
        self, population: Population, group: Tensor, learned: _Learned, painter: Descent, judge: Adam
    ) -> None:
        """A step of the classifier after each model, one of the patterns by the group's mean gradient."""
        patterns, weight, bias = (tensor.detach().requires_grad_(True) for tensor in learned)
        total = torch.zeros_like(patterns)
        labels = population.trojaned.long().to(patterns.device)
        for index in group.tolist():
            features = self._features(population.models[index](patterns)[None])
            loss = functional.cross_entropy(features @ weight + bias, labels[index, None])
            to_patterns, *to_judge = torch.autograd.grad(loss, (patterns, weight, bias))
            total += to_patterns
            judge.step(to_judge)
        variation = self.total_variation * _variation(patterns)
        painter.step([total / len(group) + torch.autograd.grad(variation, patterns)[0]])
        learned.patterns.clamp_(0, 1)

    @torch.no_grad()
    def _validate(self, population: Population, learned: _Learned) -> tuple[float, float]:
        """Accuracy and loss on the validation part."""
        answers = torch.stack([model(learned.patterns) for model in population.validators()])
        logits = (self._features(answers) @ learned.weight + learned.bias).cpu()
        truth = population.trojaned[population.validation]
        accuracy = ((logits[:, 1] > logits[:, 0]) == truth).double().mean()
        return float(accuracy), float(functional.cross_entropy(logits, truth.long()))


def _variation(patterns: Images) -> Tensor:
    down, across = patterns.diff(dim=2), patterns.diff(dim=3)
    return down.abs().sum() + across.abs().sum()


@dataclass
class NoisePatterns:
    """The control of Universal Litmus Patterns (Kolouri et al., CVPR 2020): fixed noise, logistic regression
    on its logits.

    What it reaches needs no learned pattern. The score is the probability of "trojaned".
    """

    patterns: int = 10
    inverse_penalty: float = 10.0
    validation_fraction: float = 0.2
    seed: int = 0
    name: str = "noise-patterns"

    patterns_: Images | None = field(default=None, init=False, repr=False)
    weight_: Tensor | None = field(default=None, init=False, repr=False)
    bias_: float = field(default=0.0, init=False)
    threshold_: float = field(default=0.5, init=False)
    image_shape_: tuple[int, ...] = field(default=(), init=False)
    num_classes_: int = field(default=0, init=False)
    fitted_on_: int = field(default=0, init=False)
    validated_on_: int = field(default=0, init=False)

    @property
    def queries(self) -> Images:
        assert self.patterns_ is not None
        return self.patterns_

    def fit(
        self, models: Sequence[Classifier], trojaned: Sequence[bool], *, progress: Progress | None = None
    ) -> Self:
        """Learn from labelled models; a stratified part of them chooses the threshold alone."""
        from sklearn.linear_model import LogisticRegression  # a second that scoring does not need

        population = divide(models, trojaned, self.validation_fraction, self.seed)
        rng = torch.Generator().manual_seed(self.seed)
        self.patterns_ = torch.rand((self.patterns, *population.image_shape), generator=rng)
        chosen = population.fitting.tolist()
        features = ask_all([models[index] for index in chosen], self.patterns_).flatten(1).double()
        regression = LogisticRegression(C=self.inverse_penalty, max_iter=10_000)
        regression.fit(features.numpy(), population.trojaned[population.fitting].numpy())
        self.weight_ = torch.from_numpy(regression.coef_[0].copy())
        self.bias_ = float(regression.intercept_[0])
        note_population(self, population)
        return self

    def scores(self, models: Sequence[Classifier]) -> Scores:
        """Probability of "trojaned" per model, in float64 on the CPU."""
        return score_models(self, models)

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judge a model by its logits on the noise; clean images are not needed."""
        return scan_model(self, model)

    def save(self, folder: Path) -> Path:
        """Write scanner.json and the weights it names."""
        return save_queries(self, folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The scanner of a folder that save() wrote; ValueError where files are missing or do not fit."""
        return load_queries(cls, folder)

    def log_odds(self, answers: Answers) -> Scores:
        """Log odds of "trojaned" (n,) of answers on the noise."""
        assert self.weight_ is not None
        return answers.flatten(1).double() @ self.weight_ + self.bias_
