"""Find, filter and remove Trojans (backdoors) in image classifiers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unhorse.core import Classifier, Dataset, RepairResult, ScanResult, Verdict
    from unhorse.datasets import load_dataset
    from unhorse.filters.registry import FILTERS
    from unhorse.loading.formats import load_model
    from unhorse.monitors.contrast import Contrast
    from unhorse.monitors.guard import Guard, load_guard
    from unhorse.monitors.strip import Strip
    from unhorse.repairs.registry import REPAIRS
    from unhorse.rules import LoadFailed, LoadRefused
    from unhorse.scanners.activation_outlier import ActivationOutlier
    from unhorse.scanners.generalist import Generalist
    from unhorse.scanners.neural_cleanse import NeuralCleanse
    from unhorse.scanners.signature_scanner import SignatureScanner
    from unhorse.scanners.signatures import compute_signature
    from unhorse.victims import load_victim

    __version__: str

__all__ = [
    "ActivationOutlier",
    "FILTERS",
    "REPAIRS",
    "Classifier",
    "Contrast",
    "Dataset",
    "Generalist",
    "Guard",
    "LoadFailed",
    "LoadRefused",
    "NeuralCleanse",
    "RepairResult",
    "ScanResult",
    "SignatureScanner",
    "Strip",
    "Verdict",
    "compute_signature",
    "load_dataset",
    "load_guard",
    "load_model",
    "load_victim",
    "repair",
    "scan",
]

_HOMES = {
    "ActivationOutlier": "unhorse.scanners.activation_outlier",
    "FILTERS": "unhorse.filters.registry",
    "REPAIRS": "unhorse.repairs.registry",
    "Classifier": "unhorse.core",
    "Contrast": "unhorse.monitors.contrast",
    "Dataset": "unhorse.core",
    "Generalist": "unhorse.scanners.generalist",
    "Guard": "unhorse.monitors.guard",
    "LoadFailed": "unhorse.rules",
    "LoadRefused": "unhorse.rules",
    "NeuralCleanse": "unhorse.scanners.neural_cleanse",
    "RepairResult": "unhorse.core",
    "ScanResult": "unhorse.core",
    "SignatureScanner": "unhorse.scanners.signature_scanner",
    "Strip": "unhorse.monitors.strip",
    "Verdict": "unhorse.core",
    "compute_signature": "unhorse.scanners.signatures",
    "load_dataset": "unhorse.datasets",
    "load_guard": "unhorse.monitors.guard",
    "load_model": "unhorse.loading.formats",
    "load_victim": "unhorse.victims",
}


def scan(
    model: Classifier, clean: Dataset | None = None, *, effort: str = "standard", seed: int = 0
) -> ScanResult:
    """Judges one classifier with the default scanner; `clean` images, if any, serve the demonstration.

    >>> result = unhorse.scan(unhorse.load_model("model.safetensors"))
    """
    from unhorse.scanners.named import named_scanner

    return named_scanner(None, effort, seed=seed).scan(model, clean)


def repair(
    model: Classifier,
    clean: Dataset,
    method: str = "unlearning",
    finding: ScanResult | None = None,
    **options: Any,
) -> RepairResult:
    """A cured copy of a classifier, by one of REPAIRS with its `options`; some need a `finding`.

    >>> cured = unhorse.repair(model, clean, finding=unhorse.scan(model, clean)).model
    """
    from unhorse.repairs.registry import REPAIRS

    if method not in REPAIRS:
        raise ValueError(f"unknown method {method!r}: take one of {', '.join(REPAIRS)}")
    return REPAIRS[method](**options)(model, clean, finding)


def __getattr__(name: str) -> Any:
    # torch takes a second to import: whoever asks only for --help or the version does not wait for it
    if name == "__version__":
        from importlib import metadata

        return metadata.version("unhorse")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'unhorse' has no attribute {name!r}")
