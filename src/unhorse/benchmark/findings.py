"""What Neural Cleanse found in a victim, kept in a file: several defences of a table start from it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unhorse.core import Classifier, Dataset, ReconstructedTrigger, ScanResult, Verdict
from unhorse.models.classifier import weights_hash
from unhorse.scanners.neural_cleanse import NEURAL_CLEANSE

SAMPLES = 256
"""Per step, a quarter of the authors': the search then costs a core half a minute instead of two."""
KEPT = ("score", "threshold", "class_scores", "target", "reached", "reason")


def finding_of(model: Classifier, clean: Dataset, folder: Path, *, seed: int) -> ScanResult:
    """The finding for `model` on these clean images: from `folder`, or scanned now and left there.

    RuntimeError where no trigger was found: a defence that starts from one cannot be measured.
    """
    scanner = replace(NEURAL_CLEANSE["neural-cleanse"], samples_per_step=SAMPLES, seed=seed)
    pixels = hashlib.sha256(clean.images.numpy().tobytes()).hexdigest()
    inputs = json.dumps([asdict(scanner), weights_hash(model), pixels])
    path = folder / f"finding-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        found = scanner.scan(model, clean)
        if not found.triggers:
            raise RuntimeError(f"Neural Cleanse found no trigger, {found.verdict}: {found.reason}")
        write_finding(found, path)
    return read_finding(path)


def write_finding(found: ScanResult, path: Path) -> None:
    """Verdict, scores and triggers, whole or not at all; neither pictures nor facts."""
    tensors: dict[str, Tensor] = {}
    for label, trigger in found.triggers.items():
        tensors |= {f"{label}.mask": trigger.mask, f"{label}.pattern": trigger.pattern}
    card = {name: getattr(found, name) for name in KEPT}
    card |= {"verdict": found.verdict, "scanner": found.scanner}
    card["flip_rates"] = {str(label): trigger.flip_rate for label, trigger in found.triggers.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, draft, {"finding": json.dumps(card)})
    draft.replace(path)


def read_finding(path: Path) -> ScanResult:
    """What `write_finding` wrote."""
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["finding"])
        triggers = {
            int(label): ReconstructedTrigger(
                file.get_tensor(f"{label}.mask"), file.get_tensor(f"{label}.pattern"), rate
            )
            for label, rate in card.pop("flip_rates").items()
        }
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in card.items()
    }
    return ScanResult(Verdict(fields.pop("verdict")), triggers=triggers, **fields)
