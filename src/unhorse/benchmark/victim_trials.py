"""The victims of a table: trained once into folders, and measured undefended."""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.core import Dataset
from unhorse.datasets import load_dataset, split_dataset
from unhorse.metrics import accuracy, wilson_interval
from unhorse.models.training import Recipe
from unhorse.victims import (
    AttackSpec,
    DataSpec,
    Spec,
    Victim,
    VictimSpec,
    attack_metrics,
    load_victim,
    save_victim,
    train_victim,
)


class VictimArm(Spec):
    """One kind of victim; `recipe` overrides the shared one's fields, `label` goes into the rows' options."""

    attack: AttackSpec | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    label: dict[str, Any] = Field(default_factory=dict)

    @property
    def attack_name(self) -> str:
        return "benign" if self.attack is None else self.attack.kind

    @property
    def mode(self) -> str | None:
        return None if self.attack is None else self.attack.mode


class VictimsSpec(Spec):
    """The victims of a table: data, architecture, schedule, attacks, and the defences' options on that data
    (`filters` for those that are networks, and by method `options_of`).

    The test split is divided by each seed into D_val (`clean_share`, what a defender has) and D_test; a
    defence gets `clean_images` of D_val, or all. `seeds` replaces those of the tables.
    """

    name: str
    dataset: str
    architecture: str
    options: dict[str, Any] = Field(default_factory=dict)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    data: DataSpec
    recipe: Recipe
    clean_share: float = 0.7
    clean_images: int | None = None
    seeds: tuple[int, ...] | None = None
    filters: dict[str, Any] = Field(default_factory=dict)
    options_of: dict[str, dict[str, Any]] = Field(default_factory=dict)
    victims: tuple[VictimArm, ...]

    @staticmethod
    def read(path: Path) -> VictimsSpec:
        return VictimsSpec.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))

    def victim(self, arm: VictimArm, seed: int) -> VictimSpec:
        return VictimSpec(
            data=self.data,
            architecture=self.architecture,
            options=self.options,
            mean=self.mean,
            std=self.std,
            recipe={**asdict(self.recipe), **arm.recipe},  # type: ignore[arg-type]
            attack=arm.attack,
            seed=seed,
        )


def hashed(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _whole_test(data: DataSpec) -> Dataset:
    return load_dataset(data.source, data.test, size=data.size)


def clean_and_test(spec: VictimsSpec, seed: int) -> tuple[Dataset, Dataset]:
    """(D_val, D_test): seeded parts of the test split."""
    shares = (spec.clean_share, 1 - spec.clean_share)
    clean, test = split_dataset(_whole_test(spec.data), shares, seed=seed)
    return clean, test


@dataclass(frozen=True)
class VictimTrial:
    """Trains one victim into its folder, and measures it on the whole test split and on D_test."""

    spec: VictimsSpec
    arm: VictimArm
    seed: int
    place: Path

    @property
    def folder(self) -> Path:
        words = [self.arm.attack_name, self.arm.mode, *self.arm.label.values(), self.seed]
        said = "-".join(str(word) for word in words if word is not None)
        return self.place / f"{said}-{hashed(self._victim.model_dump(mode='json'))}"

    @property
    def name(self) -> str:
        return f"victim-{self.folder.name}-{hashed(self.spec.clean_share)}.json"

    @property
    def _victim(self) -> VictimSpec:
        return self.spec.victim(self.arm, self.seed)

    def __call__(self) -> dict[str, Any]:
        started, origin = time.monotonic(), provenance()
        if not self.folder.exists():
            self.place.mkdir(parents=True, exist_ok=True)
            checkpoint = self.place / f".{self.folder.name}.training"
            save_victim(
                self.folder, *train_victim(self._victim, checkpoint=checkpoint, device=chosen_device())
            )
        victim = load_victim(self.folder)
        victim.model.to(chosen_device())
        parts = {"test": _whole_test(self.spec.data), "d-test": clean_and_test(self.spec, self.seed)[1]}
        found = {split: _undefended(victim, data, self.seed) for split, data in parts.items()}
        return {"splits": found, "seconds": time.monotonic() - started, "provenance": origin}


def _undefended(victim: Victim, data: Dataset, seed: int) -> dict[str, Any]:
    found = {"clean_accuracy": _rate(accuracy(victim.model, data), len(data))}
    if victim.attack is None:
        return found
    assert data.labels is not None
    eligible = int(victim.attack.eligible(data.labels).sum())
    for metric, value in attack_metrics(victim.model, data, victim.attack, seed=seed).items():
        found[metric] = _rate(value, eligible if metric == "trojan_accuracy" else len(data))
    return found


def _rate(value: float, n: int) -> dict[str, Any]:
    return {"value": value, "ci95": wilson_interval(round(value * n), n), "n": n}
