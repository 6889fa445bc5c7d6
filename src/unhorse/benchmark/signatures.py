"""The signatures of a whole population, computed once per model and preset, in worker processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unhorse import jobs
from unhorse.benchmark.trials import chosen_device
from unhorse.core import Signature
from unhorse.models.classifier import load_classifier
from unhorse.scanners.signatures import compute_signature
from unhorse.zoo import Member, members

CACHE, STACKED = "signatures", 64
"""The folder beside a population, and how many models one job takes to an accelerator."""


@dataclass(frozen=True)
class _Describe:
    """Signatures of models of one population, left in its cache: nothing goes through a pipe."""

    folders: tuple[Path, ...]
    preset: str

    def __call__(self) -> None:
        if len(self.folders) == 1:
            signature_of(self.folders[0], self.preset)
            return
        from unhorse.scanners.stacked_signatures import stacked_signatures

        models = [load_classifier(folder) for folder in self.folders]
        cache = self.folders[0].parent.parent / CACHE
        stacked_signatures(models, self.preset, device=chosen_device(), cache=cache)


def signature_of(folder: Path, preset: str) -> Signature:
    """The signature of the model in `folder`, both directions, from the cache beside its population."""
    cache = folder.parent.parent / CACHE
    return compute_signature(load_classifier(folder).to(chosen_device()), preset, cache=cache)


def describe_models(models: Iterable[Member], preset: str, *, workers: int = 1) -> None:
    """Leaves the signatures of these models in the caches beside their populations; an accelerator takes
    many at once.
    """
    together = 1 if chosen_device().type == "cpu" else STACKED
    todo = [
        _Describe(tuple(folders[start : start + together]), preset)
        for folders in _by_population(models)
        for start in range(0, len(folders), together)
    ]
    for outcome in jobs.track(f"signatures {preset}", jobs.run(jobs.call, todo, workers=workers), len(todo)):
        if outcome.error is not None:
            raise RuntimeError(f"no signature of {outcome.item.folders[0]}: {outcome.error!r}")


def _by_population(models: Iterable[Member]) -> list[list[Path]]:
    found: dict[Path, dict[Path, None]] = {}
    for member in models:
        found.setdefault(member.folder.parent.parent, {})[member.folder] = None
    return [list(folders) for folders in found.values()]


def population_signatures(
    population: Path, split: str, preset: str, *, workers: int = 1
) -> tuple[list[Member], list[Signature]]:
    """(register, signatures) of one split, in the register's order; both directions, cached beside the
    population.
    """
    register = members(population, split)
    describe_models(register, preset, workers=workers)
    return register, [signature_of(member.folder, preset) for member in register]
