"""Rivals that cost a millisecond: one class whose weights in the last linear layer stand out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from unhorse.core import Bars, Classifier, Dataset, Logits, Reference, ScanResult, Verdict
from unhorse.metrics import evaluation, judge

CONSISTENCY = 1.4826
"""Makes the median absolute deviation of normal samples their standard deviation."""
PROBES, FEW_CLASSES = 8, 8
MILLIONTH = 1e-6
SMALLEST_P = 1e-300


class NoLastLayer(ValueError):
    """A model whose last layer cannot be read, and why; scan() says UNDECIDED."""


class LastLayer(NamedTuple):
    """The linear layer whose outputs are the logits, in float64 on the CPU: a row of weights per class."""

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    kind: str


class Anomalies(NamedTuple):
    """How much each class stands out (k,), the score of the model, and what to report."""

    classes: Float[Tensor, " k"]
    score: float
    facts: Mapping[str, object]


class LayerScanner(Protocol):
    name: str

    @property
    def threshold(self) -> float: ...

    @property
    def reference(self) -> Reference | None: ...

    def anomalies(self, layer: LastLayer) -> Anomalies: ...


@dataclass(frozen=True)
class LastLayerOutlier:
    """Trojan signatures (Fields et al., arXiv 2109.02836): the target's mean weight is an outlier.

    Q is the gap between the largest and the second largest mean weight of a class in the last linear layer,
    over their range. The score is -log10 p of Dixon's test for one outlier above K normal samples, so
    `threshold` means p <= 0.05. Neither data nor other models are needed. UNDECIDED: fewer than 3 classes, or
    a network without such a layer.
    """

    threshold: float = -math.log10(0.05)
    reference: Reference | None = field(default=None, repr=False)

    name = "last-layer-outlier"

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judges the last layer of `model`; clean images are not needed."""
        return _scanned(self, model)

    def measure(self, model: Classifier) -> float:
        """The score alone; ValueError where scan() would be UNDECIDED."""
        return self.anomalies(last_layer(model)).score

    def anomalies(self, layer: LastLayer) -> Anomalies:
        """Mean weights per class, and the score of the largest."""
        means = layer.weight.mean(1)
        q = dixon_q(means)
        p_value = dixon_p_value(q, len(means))
        facts = {"Q": q, "p-value of Dixon's test": p_value}
        return Anomalies(means, -math.log10(max(p_value, SMALLEST_P)), facts)


@dataclass(frozen=True)
class DfbScanner:
    """After DFBScanner (Yu et al., arXiv 2605.18907): the class with the largest anomaly decides.

    Each of `indicators` is a number per class of the last linear layer, taken in robust deviations from the
    median over classes. The score is the largest mean of them. Which indicators the paper takes, and its
    threshold, are not known to us: both were chosen on development models (docs/methods/last-layer.md).
    UNDECIDED: fewer than 3 classes, or a network without such a layer.
    """

    indicators: tuple[str, ...] = ("skewness", "positive", "upper")
    threshold: float = 2.5
    reference: Reference | None = field(default=None, repr=False)

    name = "dfb-scanner"

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judges the last layer of `model`; clean images are not needed."""
        return _scanned(self, model)

    def measure(self, model: Classifier) -> float:
        """The score alone; ValueError where scan() would be UNDECIDED."""
        return self.anomalies(last_layer(model)).score

    def anomalies(self, layer: LastLayer) -> Anomalies:
        """The mean deviation of each class over all indicators."""
        unknown = [name for name in self.indicators if name not in INDICATORS]
        if unknown or not self.indicators:
            raise ValueError(f"indicators {unknown or 'are none'}: take some of {', '.join(INDICATORS)}")
        each = {name: robust_deviations(INDICATORS[name](layer)) for name in self.indicators}
        classes = torch.stack(list(each.values())).mean(0)
        suspect = int(classes.argmax())
        return Anomalies(
            classes, float(classes.max()), {name: float(values[suspect]) for name, values in each.items()}
        )


def _skewness(layer: LastLayer) -> Tensor:
    centred = layer.weight - layer.weight.mean(1, keepdim=True)
    return centred.pow(3).mean(1) / centred.square().mean(1).pow(1.5).clamp_min(1e-30)


INDICATORS: Mapping[str, Callable[[LastLayer], Tensor]] = {
    "mean": lambda layer: layer.weight.mean(1),
    "norm": lambda layer: layer.weight.norm(dim=1),
    "deviation": lambda layer: layer.weight.std(1, correction=0),
    "largest": lambda layer: layer.weight.amax(1),
    "smallest": lambda layer: layer.weight.amin(1),
    "skewness": _skewness,
    "positive": lambda layer: layer.weight.clamp_min(0).mean(1),
    "upper": lambda layer: layer.weight.quantile(0.9, dim=1),
    "bias": lambda layer: layer.bias,
}
"""One number per class of the last layer; "upper" is the upper decile, "positive" the mean of max(w, 0)."""


# --- the layer ----------------------------------------------------------------------------------------------


def last_layer(model: Classifier) -> LastLayer:
    """The linear layer, or convolution of one pixel, that gives the logits; NoLastLayer where there is none.

    Found by running the model: it is the last layer of K outputs by which, averaged over pixels, the logits
    of each image are ordered. So a softmax, a temperature or a ReLU may follow, but no further weights.
    """
    if model.num_classes < 3:
        raise NoLastLayer(f"{model.num_classes} class(es): an outlier needs 3 or more; check --classes")
    logits, ran = _run(model)
    if not logits.isfinite().all():
        raise NoLastLayer(
            "the outputs are not finite: check the weights, and the normalisation (--mean, --std)"
        )
    for module, output in reversed(ran):
        if _orders(output, logits):
            weight = module.weight.detach().double().cpu().flatten(1)
            bias = module.bias
            offsets = weight.new_zeros(len(weight)) if bias is None else bias.detach().double().cpu()
            return LastLayer(weight, offsets, type(module).__name__)
    architecture = model.architecture.get("name", "this network")
    raise NoLastLayer(
        f"{architecture} does not end in a linear layer whose outputs are the logits: take another scanner"
    )


def _run(model: Classifier) -> tuple[Logits, list[tuple[nn.Linear | nn.Conv2d, Tensor]]]:
    """The logits of a few random images, and what each layer of K outputs made of them (n, k)."""
    ran: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []
    k = model.num_classes

    def note(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        per_class = output.movedim(-1, 1) if isinstance(module, nn.Linear) else output
        if len(output) == PROBES:
            ran.append((module, per_class.reshape(PROBES, k, -1).float()))

    rng = torch.Generator().manual_seed(0)
    images = torch.rand(PROBES, *model.image_shape, generator=rng).to(model.mean.device)
    with ExitStack() as hooks, evaluation(model):
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and _width(layer) == k:
                hooks.callback(layer.register_forward_hook(note).remove)
        return model(images), ran


def _width(layer: nn.Linear | nn.Conv2d) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    pixelwise = set(layer.kernel_size) == {1} and layer.groups == 1
    return layer.out_channels if pixelwise else 0


def _orders(output: Float[Tensor, "n k pixels"], logits: Logits) -> bool:
    """Whether the logits never fall in the order of these outputs; some networks cut them off at 0 first."""
    slack = MILLIONTH * float(logits.abs().max())
    for pooled in (output.mean(2), output.relu().mean(2)):
        ordered = logits.gather(1, pooled.argsort(1))
        if float((ordered[:, :-1] - ordered[:, 1:]).max()) <= slack:
            return True
    return False


# --- statistics ---------------------------------------------------------------------------------------------


def dixon_q(values: Float[Tensor, " k"]) -> float:
    """(largest - second largest) / (largest - smallest), Dixon's r10; 0 where all are equal."""
    ordered = values.double().sort().values
    span = float(ordered[-1] - ordered[0])
    return float(ordered[-1] - ordered[-2]) / span if span > 0 else 0.0


def dixon_p_value(q: float, count: int) -> float:
    """The probability of a Dixon's r10 of at least `q` above `count` independent normal samples.

    By quadrature over smallest sample u and range w: all others lie between u and u + (1 - q) w.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(128))
    u, w = 9 * nodes[:, None], 9 * (nodes + 1)  # standard normal samples leave [-9, 9] once in 1e18
    between = torch.special.ndtr(u + (1 - q) * w) - torch.special.ndtr(u)
    density = torch.exp(-(u.square() + (u + w).square()) / 2) / (2 * math.pi)
    inside = (count - 2) * between.clamp_min(torch.finfo(torch.float64).tiny).log()
    total = (81 * weights[:, None] * weights * density * inside.exp()).sum()
    return min(1.0, float(count * (count - 1) * total))


def robust_deviations(values: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """(value - median) / (1.4826 * median absolute deviation), which counts as a tenth of the standard
    deviation at least; 0 where all are equal.
    """
    distances = values - values.quantile(0.5)
    scale = torch.maximum(CONSISTENCY * distances.abs().quantile(0.5), 0.1 * values.std(correction=0))
    return torch.where(scale > 0, distances / scale, torch.zeros_like(values))


def _scanned(scanner: LayerScanner, model: Classifier) -> ScanResult:
    try:
        layer = last_layer(model)
    except NoLastLayer as error:
        return ScanResult.undecided(scanner.name, str(error))
    found = scanner.anomalies(layer)
    k, width = layer.weight.shape
    judgement = judge(found.score, scanner.threshold, scanner.reference)
    suspect = int(found.classes.argmax())
    target = suspect if judgement.flagged else None
    few = (f"only {k} classes: an outlier among them says little",) if k < FEW_CLASSES else ()
    return ScanResult(
        Verdict.of(flagged=judgement.flagged, demonstrated=False),
        scanner.name,
        score=found.score,
        threshold=scanner.threshold,
        p_value=judgement.p_value,
        class_scores=tuple(found.classes.tolist()),
        target=target,
        reference=scanner.reference,
        facts={"layer": f"{layer.kind}, {width} weights for each of {k} classes", **found.facts},
        exhibits=(
            Bars(
                "How much the weights of each class stand out",
                tuple(model.class_names),
                tuple(found.classes.tolist()),
                marked=() if target is None else (target,),
                note="Of the last linear layer. A Trojan's class often has larger weights than the others.",
            ),
        ),
        warnings=(*judgement.warnings, *few),
    )
