"""Whether a verdict depends on what was only assumed of a file: the score under the usual normalisations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unhorse.core import Classifier, ScanResult
from unhorse.models.registry import IMAGENET_MEAN, IMAGENET_STD
from unhorse.scanners.activation_outlier import ActivationOutlier
from unhorse.scanners.generalist import Generalist

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "pixels 0..1": ((0.0,), (1.0,)),
    "pixels 0..255": ((0.0,), (1 / 255,)),
    "pixels -1..1": ((0.5,), (0.5,)),
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
}
"""What is tried where a file does not say it: means and deviations for pixels in 0..1."""
PATIENCE = 30.0
"""A scan that is longer than so many seconds is not repeated with each of them."""


def doubts(scanner: ActivationOutlier | Generalist, model: Classifier, result: ScanResult) -> list[str]:
    """Says where the verdict depends on a normalisation that was only assumed: the score under others."""
    assumed = [line for line in model.assumptions if line.startswith("MD301 input normalisation")]
    if not assumed or result.score is None or scanner.estimate(model) > PATIENCE:
        return []
    flagged = result.score >= scanner.threshold
    changed = []
    for name, (mean, std) in NORMALISATIONS.items():
        if len(mean) not in (1, model.image_shape[0]):
            continue
        other = renormalised(model, mean, std)
        if _alike(other.mean, model.mean) and _alike(other.std, model.std):
            continue
        score = scanner.measure(other).score
        if score is not None and (score >= scanner.threshold) != flagged:
            changed.append(f"{score:.3g} for {name}")
    if not changed:
        return []
    return [
        f"MD301 the verdict depends on the assumed normalisation: the score is {result.score:.3g} as "
        f"assumed, {', '.join(changed)} (threshold {scanner.threshold:.3g}); say it with --mean/--std/--range"
    ]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two means or deviations are the same, be they of one channel or of several."""
    return bool(torch.isclose(one, other).all())


def renormalised(model: Classifier, mean: Sequence[float], std: Sequence[float]) -> Classifier:
    """The same network for images normalised otherwise."""
    return (
        Classifier(
            model.network,
            image_shape=model.image_shape,
            class_names=model.class_names,
            mean=mean,
            std=std,
            architecture=model.architecture,
        )
        .to(model.mean.device)
        .eval()
    )
