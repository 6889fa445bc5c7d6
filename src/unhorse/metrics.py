"""What is measured: accuracies of models, how well scores separate, and the intervals of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unhorse.core import Attack, Dataset, Images, Labels, Logits, Reference

Numbers = Sequence[float] | Sequence[bool] | np.ndarray | Tensor
Predictor = Callable[[Images], Logits]
"""A Classifier, or any function from images to logits, such as a classifier behind an input filter."""


class Interval(NamedTuple):
    low: float
    high: float


class MeanInterval(NamedTuple):
    """A mean and the half width of its interval."""

    mean: float
    half_width: float


class Difference(NamedTuple):
    """A difference a - b with its interval."""

    difference: float
    low: float
    high: float


@contextmanager
def evaluation(model: Predictor) -> Iterator[None]:
    """Puts every module of `model` in eval mode under torch.inference_mode; each gets its own mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


# --- of a model ---------------------------------------------------------------------------------------------


def accuracy(
    model: Predictor, data: Dataset, *, device: torch.device | str | None = None, batch_size: int = 1024
) -> float:
    """Share of images classified as their label; `device` defaults to the model's own."""
    return _agreement(model, data, lambda images, labels: (images, labels), device, batch_size)


clean_accuracy = accuracy
"""The same quantity by its name in the tables, where `accuracy` is that of a scanner's decisions."""


def trojan_accuracy(
    model: Predictor,
    data: Dataset,
    attack: Attack,
    *,
    rng: torch.Generator,
    device: torch.device | str | None = None,
    batch_size: int = 1024,
) -> float:
    """Share of the eligible images that, once stamped, are classified as the attack wants."""
    trigger = attack.probes()["trojan"]
    eligible = data[attack.eligible(_labels(data))]
    if not len(eligible):
        raise ValueError(
            f"no image of {data.name!r} is eligible for this attack: give images of other classes"
        )
    return _agreement(
        model,
        eligible,
        lambda images, labels: (trigger(images, rng), attack.relabel(labels)),
        device,
        batch_size,
    )


def recovery_accuracy(
    model: Predictor,
    data: Dataset,
    attack: Attack,
    *,
    rng: torch.Generator,
    device: torch.device | str | None = None,
    batch_size: int = 1024,
    probe: str = "trojan",
) -> float:
    """Share of all images, the target class included, that are classified as their own label once stamped.

    As in Do et al. (ECCV 2022), whose recovery drop is the undefended clean accuracy minus this. Other probes
    of an attack are measured the same way: the cross accuracy of Input-Aware, the noise accuracy of WaNet.
    """
    trigger = attack.probes()[probe]
    return _agreement(model, data, lambda images, labels: (trigger(images, rng), labels), device, batch_size)


def _agreement(
    model: Predictor,
    data: Dataset,
    prepare: Callable[[Images, Labels], tuple[Images, Labels]],
    device: torch.device | str | None,
    batch_size: int,
) -> float:
    _labels(data)
    if not len(data):
        raise ValueError(f"data set {data.name!r} has no images: nothing to measure")
    if device is None and isinstance(model, nn.Module):
        device = next((parameter.device for parameter in model.parameters()), None)
    while len(data) > 1 and len(data) % batch_size == 1:  # a lone last image has no other
        batch_size += 1
    hits = torch.zeros((), dtype=torch.long, device=device)
    with evaluation(model):
        for images, labels in data.batches(batch_size, device):
            images, wanted = prepare(images, labels)
            hits += (model(images).argmax(1) == wanted).sum()
    return hits.item() / len(data)


def _labels(data: Dataset) -> Labels:
    if data.labels is None:
        raise ValueError(f"data set {data.name!r} has no labels: give images in one folder per class")
    return data.labels


# --- of scores ----------------------------------------------------------------------------------------------


def auroc(scores: Numbers, positive: Numbers) -> float:
    """Probability that a positive scores higher than a negative, ties counting half (Mann-Whitney)."""
    above, below = _sides(scores, positive)
    below = np.sort(below)
    wins = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return float(wins.sum() / (2 * len(above) * len(below)))


def auroc_interval(
    scores: Numbers, positive: Numbers, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap, positives and negatives resampled apart; no width where separation is perfect."""
    return _percentiles(_resampled_aurocs([scores], positive, resamples, seed)[0], level)


def paired_auroc_difference(
    scores_a: Numbers,
    scores_b: Numbers,
    positive: Numbers,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """AUROC of a minus that of b on the same items, each resample drawing the same items for both."""
    first, second = _resampled_aurocs([scores_a, scores_b], positive, resamples, seed)
    difference = auroc(scores_a, positive) - auroc(scores_b, positive)
    return Difference(difference, *_percentiles(first - second, level))


def tpr_at_fpr(scores: Numbers, positive: Numbers, fpr: float = 0.01) -> float:
    """Share of positives above the lowest threshold that at most `fpr` of the negatives exceed."""
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1), got {fpr}: 0.01 is one false alarm in a hundred")
    above, below = _sides(scores, positive)
    allowed = int(fpr * len(below) + 1e-9)  # 0.29 * 100 is a hair under 29
    return float(np.mean(above > np.sort(below)[-1 - allowed]))


def accuracy_at_threshold(scores: Numbers, positive: Numbers, threshold: float) -> float:
    """Share of items judged rightly when a score of at least `threshold` counts as positive."""
    above, below = _sides(scores, positive)
    right = np.sum(above >= threshold) + np.sum(below < threshold)
    return float(right / (len(above) + len(below)))


def _sides(scores: Numbers, positive: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the positives and those of the negatives."""
    values, truth = _array(scores), _array(positive) != 0
    if values.shape != truth.shape or values.ndim != 1:
        raise ValueError(f"{values.shape} scores for {truth.shape} truths: give one of each per item")
    if np.isnan(values).any():
        raise ValueError(
            f"{np.isnan(values).sum()} scores are NaN: leave out what was not judged and report its number"
        )
    if truth.all() or not truth.any():
        raise ValueError(
            f"{truth.sum()} of {len(truth)} items are positive: give at least one of either side"
        )
    return values[truth], values[~truth]


def _array(numbers: Numbers) -> np.ndarray:
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().cpu().numpy()
    return np.asarray(numbers, dtype=np.float64)


def _resampled_aurocs(several: Sequence[Numbers], positive: Numbers, resamples: int, seed: int) -> np.ndarray:
    """AUROCs (len(several), resamples) of stratified resamples; all of `several` see the same draws."""
    rng = np.random.default_rng(seed)
    sides = [_sides(scores, positive) for scores in several]
    # An AUROC depends on the order alone, so a resample is its counts per distinct score.
    grouped = [np.unique(np.concatenate(pair), return_inverse=True)[1].reshape(-1) for pair in sides]
    n_above, n_below = len(sides[0][0]), len(sides[0][1])
    chunk = max(1, 2_000_000 // (n_above + n_below))
    results = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        above = rng.integers(n_above, size=(size, n_above))
        below = rng.integers(n_below, size=(size, n_below)) + n_above
        results.append([_grouped_aurocs(groups[above], groups[below]) for groups in grouped])
    return np.concatenate(results, axis=1)


def _grouped_aurocs(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """AUROC of each row of ranks, `above` (b, p) being of positives and `below` (b, q) of negatives."""
    rows, distinct = len(above), int(max(above.max(), below.max())) + 1
    offsets = np.arange(rows)[:, None] * distinct
    positives, negatives = (
        np.bincount((ranks + offsets).ravel(), minlength=rows * distinct).reshape(rows, distinct)
        for ranks in (above, below)
    )
    beaten = negatives.cumsum(1) - negatives / 2
    return (positives * beaten).sum(1) / (above.shape[1] * below.shape[1])


def _percentiles(values: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


# --- of rates and seeds -------------------------------------------------------------------------------------


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson, JASA 1927): of sensible width at 0 and 1 too."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: give 0 <= successes <= n and n > 0")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = successes / n, z * z / n
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * ((share * (1 - share) + spread / 4) / n) ** 0.5
    return Interval(max(0.0, center - half), min(1.0, center + half))


def t_interval(values: Sequence[float], level: float = 0.95) -> MeanInterval:
    """Mean over seeds and the half width of Student's interval, NaN for one seed."""
    if not len(values):
        raise ValueError("no values to average: give one per seed")
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) == 1:
        return MeanInterval(float(numbers[0]), float("nan"))
    from scipy.stats import t  # 0.3 s that only tables need

    error = numbers.std(ddof=1) / len(numbers) ** 0.5
    return MeanInterval(float(numbers.mean()), float(t.ppf((1 + level) / 2, len(numbers) - 1) * error))


class Judgement(NamedTuple):
    """Whether a score is flagged, its split-conformal p-value or None, and what to warn of."""

    flagged: bool
    p_value: float | None
    warnings: tuple[str, ...]


def judge(score: float, threshold: float, reference: Reference | None, *, alpha: float = 0.05) -> Judgement:
    """Where a score meets its threshold: p <= alpha against a large enough reference, else `threshold`."""
    if reference is None:
        return Judgement(score >= threshold, None, ())
    p_value, n = reference.p_value(score), len(reference.scores)
    needed = round(1 / alpha) - 1
    if n >= needed:
        return Judgement(p_value <= alpha, p_value, ())
    warning = f"{n} benign references cannot give p <= {alpha}, so the threshold decided: give {needed}"
    return Judgement(score >= threshold, p_value, (warning,))
