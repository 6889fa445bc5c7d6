"""Model scanners by the names of their rows: what each learns from, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from unhorse.scanners.activation_outlier import EFFORTS
from unhorse.scanners.neural_cleanse import NEURAL_CLEANSE
from unhorse.scanners.signature_scanner import KINDS, SignatureScanner

OF_THE_TRIAL = {"seed", "device", "cache", "reference", "kind", "name"}
"""Fields that no spec sets: the trial does, or the name of the method."""


class Method(NamedTuple):
    """What a scanner learns from ("nothing" if it needs no population), and how it is made from its options.

    From "signatures" it learns as SignatureScanner does; from "models" by fit(models, trojaned) and
    scores(models); from "features" by features(model), which JSON can hold, fit(features, trojaned,
    groups) and scores(features) -> (n,), of the features of n models.
    """

    learns_from: Literal["nothing", "signatures", "models", "features"]
    made: Callable[..., Any]
    needs_images: bool = False

    @property
    def learns(self) -> bool:
        return self.learns_from != "nothing"


def make(name: str, options: Mapping[str, Any], seed: int = 0) -> Any:
    """The scanner called `name`; ValueError for an unknown name or option. One without a seed gets none."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: one of {', '.join(METHODS)}")
    if foreign := sorted(OF_THE_TRIAL & options.keys()):
        raise ValueError(f"{name}: {foreign[0]} is no option of a table; `seeds` and the name decide")
    try:
        scanner = METHODS[name].made(**options)
    except TypeError as error:
        raise ValueError(f"{name} cannot be made with options {dict(options)}: {error}") from error
    return replace(scanner, seed=seed) if hasattr(scanner, "seed") else scanner


def _activation_outlier(effort: str = "standard", **options: Any) -> Any:
    if effort not in EFFORTS:
        raise ValueError(f"effort is {effort!r}: take one of {', '.join(EFFORTS)}")
    return replace(EFFORTS[effort], **options)


# --- imported late: a spec pays for the methods that it names -----------------------------------------------


def _litmus_patterns(**options: Any) -> Any:
    from unhorse.scanners.litmus_patterns import LitmusPatterns

    return LitmusPatterns(**options)


def _noise_patterns(**options: Any) -> Any:
    from unhorse.scanners.litmus_patterns import NoisePatterns

    return NoisePatterns(**options)


def _random_inputs(**options: Any) -> Any:
    from unhorse.scanners.litmus_patterns import PRESETS, NoisePatterns

    return NoisePatterns(**(PRESETS["random-inputs"] | options))


def _meta_analysis(**options: Any) -> Any:
    from unhorse.scanners.meta_analysis import MetaAnalysis

    return MetaAnalysis(**options)


def _last_layer_outlier(**options: Any) -> Any:
    from unhorse.scanners.last_layer import LastLayerOutlier

    return LastLayerOutlier(**options)


def _dfb_scanner(**options: Any) -> Any:
    from unhorse.scanners.last_layer import DfbScanner

    return DfbScanner(**options)


def _maximum_margin(**options: Any) -> Any:
    from unhorse.scanners.maximum_margin import MaximumMargin

    return MaximumMargin(**options)


def _generalist(**options: Any) -> Any:
    from unhorse.scanners.generalist import Generalist

    return Generalist(**options)


def _default_scan(effort: str = "standard", seed: int = 0) -> Any:
    from unhorse.scanners.named import named_scanner

    return named_scanner(None, effort, seed=seed)


def _weight_statistics(**options: Any) -> Any:
    from unhorse.scanners.weight_statistics import WeightStatistics

    return WeightStatistics(**options)


METHODS: dict[str, Method] = {
    "default-scan": Method("nothing", _default_scan),
    "activation-outlier": Method("nothing", _activation_outlier),
    **{
        name: Method("nothing", partial(replace, scanner), needs_images=True)
        for name, scanner in NEURAL_CLEANSE.items()
    },
    "last-layer-outlier": Method("nothing", _last_layer_outlier),
    "dfb-scanner": Method("nothing", _dfb_scanner),
    "maximum-margin": Method("nothing", _maximum_margin),
    **{f"signature-{kind}": Method("signatures", partial(SignatureScanner, kind=kind)) for kind in KINDS},
    "litmus-patterns": Method("models", _litmus_patterns),
    "noise-patterns": Method("models", _noise_patterns),
    "random-inputs": Method("models", _random_inputs),
    "meta-analysis": Method("models", _meta_analysis),
    "weight-statistics": Method("models", _weight_statistics),
    "generalist": Method("features", _generalist),
}
