"""What a method finds in one model alone, a small file each beside the population: no table, and no crash,
repeats it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unhorse import jobs
from unhorse.benchmark.clean_images import images_for
from unhorse.benchmark.scanners import METHODS, make
from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.core import Classifier, ScanResult
from unhorse.models.classifier import WEIGHTS_FILE, load_classifier, read_card
from unhorse.victims import DataSpec

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Measurement:
    """One model under one method: the unit that is kept, in a file named for the weights.

    `images` is the number of clean images that the method is given; without `whole` only the score is
    measured, and no verdict.
    """

    folder: Path
    method: str
    options: Options
    seed: int
    images: int | None = None
    whole: bool = True

    @property
    def path(self) -> Path:
        key = [self.options, self.seed, self.images, self.whole]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]
        place = self.folder.parent.parent / "scores" / f"{self.method}-{digest}"
        return place / f"{_weights_digest(self.folder / WEIGHTS_FILE)}.json"

    def read(self) -> dict[str, Any]:
        """What was found: score, verdict, target, reason (or features), seconds and provenance; measured now
        if need be.
        """
        path = self.path
        if not path.exists():
            self()
        return json.loads(path.read_text(encoding="utf-8"))

    def __call__(self) -> None:
        path, started = self.path, time.monotonic()
        model = load_classifier(self.folder).to(chosen_device())
        found = self._found(model)
        found |= {"seconds": time.monotonic() - started, "provenance": _provenance()}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(path)

    def _found(self, model: Classifier) -> dict[str, Any]:
        scanner = make(self.method, dict(self.options), self.seed)
        if METHODS[self.method].learns_from == "features":
            return {"features": scanner.features(model)}
        clean = None
        if METHODS[self.method].needs_images:
            data: Any = read_card(self.folder)["spec"]
            clean = images_for(model, DataSpec.model_validate(data["data"]), self.images or 0)
        if self.whole:
            return _judged(scanner.scan(model, clean))
        try:
            score = scanner.measure(model)
        except ValueError as error:  # how it says what scan() calls UNDECIDED
            return {"score": None, "reason": str(error)}
        if isinstance(score, ScanResult):
            return {name: value for name, value in _judged(score).items() if name in ("score", "reason")}
        return {"score": _number(float(score))}


def _judged(result: ScanResult) -> dict[str, Any]:
    found = {"verdict": str(result.verdict), "target": result.target, "reason": result.reason}
    return {"score": None if result.score is None else _number(result.score), **found}


def _number(score: float) -> float:
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}: a table needs numbers; check the model's weights")
    return score


def measure_models(todo: Iterable[Measurement], *, workers: int = 1) -> None:
    """Measures what is not yet on disk. Jobs that fail are named when the others are done."""
    missing = {one.path: one for one in todo if not one.path.exists()}
    by_method: dict[str, list[Measurement]] = {}
    for one in missing.values():
        by_method.setdefault(one.method, []).append(one)
    for method, several in by_method.items():
        failures = [
            outcome
            for outcome in jobs.track(
                f"{method}: models", jobs.run(jobs.call, several, workers=workers), len(several)
            )
            if outcome.error is not None
        ]
        if failures:
            raise RuntimeError(
                f"{method} failed on {len(failures)} of {len(several)} models, call again to go on; first "
                f"{failures[0].item.folder}: {failures[0].error!r}"
            )


@functools.cache
def _provenance() -> Mapping[str, Any]:
    """Once per process: what counts is the code that was loaded."""
    return provenance()


def _weights_digest(path: Path) -> str:
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=100_000)
def _digest(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
