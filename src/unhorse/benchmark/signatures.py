"""The signatures of a whole population, computed once per model and preset, in worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unhorse import jobs
from unhorse.core import Signature
from unhorse.models.classifier import load_classifier
from unhorse.scanners.signatures import compute_signature
from unhorse.zoo import Member, members


@dataclass(frozen=True)
class _Describe:
    """One model's signature, left in the cache and sent back."""

    folder: Path
    preset: str
    cache: Path

    def __call__(self) -> Signature:
        return compute_signature(load_classifier(self.folder), self.preset, cache=self.cache)


def population_signatures(
    population: Path, split: str, preset: str, *, workers: int = 1
) -> tuple[list[Member], list[Signature]]:
    """(register, signatures) of one split, in the register's order; both directions, cached beside the
    population.
    """
    register = members(population, split)
    todo = [_Describe(member.folder, preset, Path(population) / "signatures") for member in register]
    found: dict[Path, Signature] = {}
    for outcome in jobs.track(
        f"signatures {split} {preset}", jobs.run(jobs.call, todo, workers=workers), len(todo)
    ):
        if outcome.error is not None:
            raise RuntimeError(f"no signature of {outcome.item.folder}: {outcome.error!r}")
        found[outcome.item.folder] = outcome.value
    return register, [found[member.folder] for member in register]
