"""A learned scanner over models on disk: it loads what it learns from, and says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from unhorse import jobs
from unhorse.benchmark.model_scores import Measurement, Options
from unhorse.benchmark.populations import task_of
from unhorse.benchmark.scanners import METHODS, make
from unhorse.benchmark.signatures import signature_of
from unhorse.benchmark.trials import chosen_device
from unhorse.models.classifier import load_classifier
from unhorse.zoo import Member

TOGETHER = 64
"""Models in memory at once while they are scored."""


class Refused(Exception):
    """The method cannot judge these models (another shape, another number of classes): no row, but a line."""


class FittedScanner:
    """One learned method, fitted on the models that `fit` names and never shown any other before `scores`."""

    def __init__(self, method: str, options: Options, seed: int) -> None:
        self.method, self.options, self.seed = method, options, seed
        self.learns_from = METHODS[method].learns_from
        self.scanner = make(method, dict(options), seed)
        self._tasks: set[tuple[str, ...]] = set()

    def fit(self, models: Sequence[Member]) -> FittedScanner:
        """Refused where the models differ in their task and the method cannot learn from all of them."""
        self._tasks = {task_of(member.folder) for member in models}
        trojaned = [member.trojaned for member in models]
        heard = {"progress": _spoken(self.method, self.seed)}
        try:
            if self.learns_from == "signatures":
                self.scanner.device = str(chosen_device())
                self.scanner.fit(self._read(models), trojaned, [member.target for member in models], **heard)
            elif self.learns_from == "models":
                self.scanner.fit(self._read(models), trojaned, **heard)
            else:
                groups = [task_of(member.folder) for member in models]
                self.scanner.fit(self._read(models), trojaned, groups)
        except ValueError as error:
            if len(self._tasks) == 1:
                raise
            raise Refused(f"it cannot be fitted on models of {len(self._tasks)} tasks: {error}") from error
        return self

    def scores(self, models: Sequence[Member]) -> list[float]:
        """A score per model; Refused where they are of a task that was not fitted and it cannot read them."""
        found: list[float] = []
        try:
            for start in range(0, len(models), TOGETHER):
                read = self._read(models[start : start + TOGETHER])
                found += torch.as_tensor(self.scanner.scores(read)).tolist()
        except ValueError as error:
            if {task_of(member.folder) for member in models} <= self._tasks:
                raise
            raise Refused(str(error)) from error
        if len(found) != len(models) or not torch.tensor(found).isfinite().all():
            raise RuntimeError(
                f"{self.method} gave {len(found)} scores of {len(models)} models, or not finite"
            )
        return found

    @property
    def threshold(self) -> float:
        """Where "trojaned" begins; 0.5 for probabilities without a threshold of their own."""
        return float(getattr(self.scanner, "threshold_", 0.5))

    def _read(self, models: Sequence[Member]) -> list[Any]:
        return [self._read_one(member.folder) for member in models]

    def _read_one(self, folder: Path) -> Any:
        if self.learns_from == "signatures":
            return signature_of(folder, self.scanner.preset)
        if self.learns_from == "models":
            return load_classifier(folder).to(chosen_device())
        return Measurement(folder, self.method, self.options, self.seed).read()["features"]


def _spoken(method: str, seed: int, interval: float = 60.0) -> Callable[[int, int, float], None]:
    """Says how far a fit is, now and then."""
    spoken = time.monotonic()

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= interval:
            spoken = time.monotonic()
            jobs.say(f"{method}, seed {seed}: {done}/{total} of the fit, loss {loss:.4f}")

    return progress
