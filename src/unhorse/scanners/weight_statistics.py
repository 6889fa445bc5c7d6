"""The cheapest learned rival: a logistic regression on norms and moments of the weights, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unhorse.core import Classifier, Dataset, ScanResult, Scores, Verdict
from unhorse.scanners.last_layer import (
    INDICATORS,
    LastLayer,
    NoLastLayer,
    dixon_q,
    last_layer,
    robust_deviations,
)
from unhorse.scanners.signature_storage import read_scanner, write_scanner
from unhorse.scanners.signature_training import best_threshold

Features = Float[Tensor, "n features"]
Progress = Callable[[int, int, float], None]
"""Called with the strengths tried, all of them, and the held-out loss of the last."""
Form = Literal["layers", "summary"]
ROW_STATISTICS = ("mean", "norm", "skewness", "positive", "bias")
EXTREMES = 3
POWER_ITERATIONS = 50
SMALLEST = 1e-6
HYPERPARAMETERS = ("form", "strengths", "folds", "seed")
LEARNED = ("threshold_", "strength_", "held_out_losses_", "fitted_on_", "layers_")
REQUIRED = (*HYPERPARAMETERS, *LEARNED)


class NotReadable(ValueError):
    """A model that has no finite statistics, and why; scan() says UNDECIDED."""


class Layers(NamedTuple):
    """What "layers" compares between models: image shape, number of classes, shape of every parameter."""

    image_shape: tuple[int, ...]
    classes: int
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(model: Classifier) -> Layers:
        shapes = tuple(tuple(parameter.shape) for parameter in model.network.parameters())
        return Layers(tuple(model.image_shape), model.num_classes, shapes)


@dataclass
class WeightStatistics:
    """A ridge-penalised logistic regression on statistics of the weights (ours, a baseline; the idea is that
    of Huster et al., arXiv 2411.03445, who classify the weights themselves).

    Of each parameter: size, mean, skewness, kurtosis, largest value and spectral norm; of the last linear
    layer also statistics of its rows, sorted, so that the order of classes does not matter. Form "layers"
    takes models of one architecture, image shape and class count; "summary" reduces all layers to a fixed
    number of statistics, for any of them. The penalty of lowest held-out loss over `folds` is taken, and the
    threshold of best held-out balanced accuracy. The score is the probability of "trojaned".
    """

    form: Form = "layers"
    strengths: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0)
    folds: int = 5
    seed: int = 0

    weights_: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    threshold_: float = field(default=0.5, init=False)
    strength_: float = field(default=0.0, init=False)
    held_out_losses_: tuple[float, ...] = field(default=(), init=False, repr=False)
    fitted_on_: int = field(default=0, init=False)
    layers_: Layers | None = field(default=None, init=False, repr=False)

    name = "weight-statistics"

    def fit(
        self,
        models: Sequence[Classifier],
        trojaned: Sequence[bool],
        *,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from models whose kind is known, at least 2 of each; reading them takes most of the time."""
        self._check()
        flags = torch.tensor([bool(flag) for flag in trojaned])
        least = min(int(flags.sum()), int((~flags).sum()))
        if len(models) != len(flags) or least < 2:
            raise ValueError(
                f"{len(models)} models with {int(flags.sum())} of {len(flags)} labels trojaned: give a label "
                "for each, and at least 2 models of either kind"
            )
        self.layers_ = Layers.of(models[0]) if self.form == "layers" else None
        features = self._described(models)
        fold = _folds(flags, min(self.folds, least), self.seed)
        losses, held_out = [], []
        for done, strength in enumerate(self.strengths, start=1):
            scores = _held_out_scores(features, flags, fold, strength)
            held_out.append(scores)
            losses.append(_log_loss(scores, flags))
            if progress is not None:
                progress(done, len(self.strengths), losses[-1])
        best = losses.index(min(losses))
        self.strength_, self.held_out_losses_ = self.strengths[best], tuple(losses)
        self.threshold_ = best_threshold(held_out[best], flags)
        self.weights_, self.fitted_on_ = _regression(features, flags, self.strength_), len(models)
        return self

    def describe(self, model: Classifier) -> Float[Tensor, " features"]:
        """The statistics of `model` in float64; ValueError where it has none."""
        if model.num_classes < 3:
            raise NotReadable(f"{model.num_classes} class(es): this needs 3 or more; check --classes")
        if not all(bool(parameter.isfinite().all()) for parameter in model.network.parameters()):
            raise NotReadable("weights are not finite: check the file")
        try:
            rows = last_layer(model)
        except NoLastLayer as error:
            raise NotReadable(str(error)) from error
        parameters = [parameter.detach().double().cpu() for parameter in model.network.parameters()]
        if self.form == "layers":
            return torch.cat([*map(_layer_statistics, parameters), _sorted_rows(rows)])
        matrices = torch.stack([_layer_statistics(each) for each in parameters if each.ndim > 1])
        ends = torch.cat([matrices[0], matrices[-1]])
        return torch.cat([matrices.quantile(_QUARTILES, dim=0).flatten(), ends, _extreme_rows(rows)])

    def scores(self, models: Sequence[Classifier]) -> Scores:
        """Probability of "trojaned" per model, in float64 on the CPU."""
        weights = self._fitted()
        return _probabilities(self._described(models), weights)

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """SUSPICIOUS or NO SIGN FOUND: a learned score demonstrates no trigger; `clean` is not used."""
        self._fitted()
        try:
            score = float(self.scores([model])[0])
        except NotReadable as error:
            return ScanResult.undecided(self.name, str(error))
        flagged = score >= self.threshold_
        return ScanResult(
            Verdict.of(flagged=flagged, demonstrated=False),
            self.name,
            score=score,
            threshold=self.threshold_,
            facts={"form": self.form, "fitted on": self.fitted_on_, "penalty": self.strength_},
        )

    def save(self, folder: Path) -> Path:
        """Write scanner.json and the weights it names; what was there stays valid until the last moment."""
        weights = self._fitted()
        card = {name: getattr(self, name) for name in REQUIRED}
        return write_scanner(Path(folder), card, {"weights": weights})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The scanner of a folder that save() wrote; ValueError where files are missing or do not fit."""
        card, weights = read_scanner(Path(folder), required=REQUIRED)
        if "weights" not in weights:
            raise ValueError(f"{folder} holds no weights of a WeightStatistics: fit and save it again")
        scanner = cls(**{name: card[name] for name in HYPERPARAMETERS})
        for name in LEARNED:
            setattr(scanner, name, card[name])
        scanner.layers_ = None if card["layers_"] is None else Layers(*card["layers_"])
        scanner.weights_ = weights["weights"]
        return scanner

    # --- inside ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}: take one of {', '.join(get_args(Form))}")
        if self.folds < 2 or not self.strengths or min(self.strengths) <= 0:
            raise ValueError(
                f"folds={self.folds}, strengths={self.strengths}: give 2 or more, and some above 0"
            )

    def _fitted(self) -> Tensor:
        if self.weights_ is None:
            raise ValueError("nothing was learned yet: call fit() or WeightStatistics.load()")
        return self.weights_

    def _described(self, models: Sequence[Classifier]) -> Features:
        if not models:
            raise ValueError("no models: give at least one")
        for model in models:
            if self.layers_ is not None and Layers.of(model) != self.layers_:
                raise ValueError(
                    f"this was fitted on one architecture with {self.layers_.classes} classes and images of "
                    f"{self.layers_.image_shape}, and a model has others ({model.num_classes}, "
                    f"{tuple(model.image_shape)}): fit with form='summary'"
                )
        return torch.stack([self.describe(model) for model in models])


_QUARTILES = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


# --- statistics ---------------------------------------------------------------------------------------------


def _layer_statistics(parameter: Tensor) -> Float[Tensor, " 6"]:
    """Of one parameter: log size, mean, skewness, log kurtosis, log largest value, log spectral norm.

    All but the first are free of scale; size is the root mean square times the root of the inputs, which does
    not grow with a layer's width.
    """
    values = parameter.flatten()
    matrix = parameter.flatten(1) if parameter.ndim > 1 else values[None]
    size = values.square().mean().sqrt().clamp_min(SMALLEST)
    centred = (values - values.mean()) / values.std(correction=0).clamp_min(SMALLEST)
    return torch.stack(
        [
            (size * matrix.shape[1] ** 0.5).log(),
            values.mean() / size,
            centred.pow(3).mean(),
            centred.pow(4).mean().clamp_min(SMALLEST).log(),
            (values.abs().max() / size).clamp_min(SMALLEST).log(),
            (spectral_norm(matrix) / (size * len(values) ** 0.5)).clamp_min(SMALLEST).log(),
        ]
    )


def spectral_norm(matrix: Float[Tensor, "rows columns"]) -> Tensor:
    """The largest singular value, by power iteration: an exact one of a wide layer takes minutes."""
    vector = torch.rand(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    for _ in range(POWER_ITERATIONS):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    return (matrix @ vector).norm()


def _rows(layer: LastLayer) -> Float[Tensor, "statistics k"]:
    return torch.stack([INDICATORS[name](layer) for name in ROW_STATISTICS])


def _sorted_rows(layer: LastLayer) -> Float[Tensor, " n"]:
    return _rows(layer).sort(1).values.flatten()


def _extreme_rows(layer: LastLayer) -> Float[Tensor, " n"]:
    """How far the largest and smallest rows stand out, and Dixon's Q of both ends; any number of classes."""
    rows = _rows(layer)
    ordered = torch.stack([robust_deviations(row) for row in rows]).sort(1).values
    gaps = torch.tensor([[dixon_q(row), dixon_q(-row)] for row in rows], dtype=rows.dtype)
    return torch.cat([ordered[:, :EXTREMES], ordered[:, -EXTREMES:], gaps], 1).flatten()


# --- regression ---------------------------------------------------------------------------------------------


def _regression(features: Features, trojaned: Bool[Tensor, " n"], strength: float) -> Float[Tensor, "3 f"]:
    """Mean, deviation and slope of each feature; the last column is the intercept's."""
    from sklearn.linear_model import LogisticRegression  # a second that only fitting needs

    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = torch.where(deviation > 1e-9, deviation, torch.ones_like(deviation))
    found = LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000)
    found.fit(((features - mean) / deviation).numpy(), trojaned.numpy())
    slope = torch.from_numpy(found.coef_[0])
    end = torch.tensor([[0.0], [1.0], [float(found.intercept_[0])]], dtype=features.dtype)
    return torch.cat([torch.stack([mean, deviation, slope]), end], 1)


def _probabilities(features: Features, weights: Float[Tensor, "3 f"]) -> Scores:
    mean, deviation, slope = weights[:, :-1]
    return (((features - mean) / deviation) @ slope + weights[2, -1]).sigmoid()


def _folds(trojaned: Bool[Tensor, " n"], folds: int, seed: int) -> Tensor:
    """The fold of each model (n,), every fold with its share of both kinds."""
    rng = torch.Generator().manual_seed(seed)
    fold = torch.zeros(len(trojaned), dtype=torch.long)
    for kind in (False, True):
        index = (trojaned == kind).nonzero()[:, 0]
        fold[index[torch.randperm(len(index), generator=rng)]] = torch.arange(len(index)) % folds
    return fold


def _held_out_scores(
    features: Features, trojaned: Bool[Tensor, " n"], fold: Tensor, strength: float
) -> Scores:
    scores = torch.zeros(len(features), dtype=torch.float64)
    for number in fold.unique():
        rest = fold != number
        scores[~rest] = _probabilities(features[~rest], _regression(features[rest], trojaned[rest], strength))
    return scores


def _log_loss(scores: Scores, trojaned: Bool[Tensor, " n"]) -> float:
    right = torch.where(trojaned, scores, 1 - scores).clamp_min(1e-12)
    return float(-right.log().mean())
