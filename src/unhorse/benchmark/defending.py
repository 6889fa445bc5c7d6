"""Tables of defences: a spec names victims, methods and metrics; its trials become rows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from unhorse.benchmark.defence_trials import DefenceTrial
from unhorse.benchmark.tables import Row
from unhorse.benchmark.trials import run_trials
from unhorse.benchmark.victim_trials import VictimArm, VictimsSpec, VictimTrial
from unhorse.filters.registry import NETWORK_FILTERS
from unhorse.metrics import wilson_interval
from unhorse.victims import Spec, load_victim

OF_THE_MONITOR = {"fpr", "fnr", "auroc"}
COUNTED = {"finding_rate", "target_found"}
OF_BENIGN_VICTIMS = {"clean_accuracy", "clean_drop", "fpr"}


class MethodSpec(Spec):
    """A defence and its options, or "none" (the victim itself), or a "synthesis-..."
    analysis; `sweep` tries every combination of its values. `images` limits the clean images, `seeds` the
    seeds of the table.
    """

    name: str
    seeds: tuple[int, ...] | None = None
    images: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    def applies_to(self, victim: VictimTrial) -> bool:
        if self.name == "none" or victim.seed not in (self.seeds or (victim.seed,)):
            return False
        return victim.arm.attack is not None or not self.name.startswith("synthesis-")

    def settings(self) -> Iterator[tuple[int | None, dict[str, Any]]]:
        for values in product(*self.sweep.values()):
            options = self.options | dict(zip(self.sweep, values, strict=True))
            images = options.pop("images", self.images)
            yield images, options


class DefencesSpec(Spec):
    """One table; `victims` is a victims spec, its path relative to this one, `only` some of its attacks."""

    table: str
    victims: str = "victims-mnist.toml"
    seeds: tuple[int, ...] = (0, 1, 2)
    modes: tuple[str, ...] = ("single-target",)
    only: tuple[str, ...] = ()
    metrics: tuple[str, ...]
    methods: tuple[MethodSpec, ...]

    def takes(self, arm: VictimArm) -> bool:
        return arm.mode in {None, *self.modes} and (not self.only or arm.attack_name in self.only)


def defence_rows(spec: DefencesSpec, victims: Path, work: Path, *, workers: int = 1) -> list[Row]:
    """Trains the victims that are missing below `work`, fits the filters that are missing, and returns the
    rows of the table. Tables over the same victims share what they have in common.
    """
    cast = VictimsSpec.read(victims)
    place, results = work / cast.name, work / f"{cast.name}-trials"
    arms = [arm for arm in cast.victims if spec.takes(arm)]
    if not arms:
        raise ValueError(f"{victims} has no victim of {spec.modes}, {spec.only}: see its [[victims]]")
    trained = [VictimTrial(cast, arm, seed, place) for seed in cast.seeds or spec.seeds for arm in arms]
    undefended = run_trials(trained, results, workers=workers)
    fits = [
        DefenceTrial(
            victim, method.name, _options(cast, method.name, options), images or cast.clean_images, results
        )
        for victim in trained
        for method in spec.methods
        if method.applies_to(victim)
        for images, options in method.settings()
    ]
    outcomes = run_trials(fits, results, workers=workers)
    rows: list[Row] = []
    for victim, outcome in zip(trained, undefended, strict=True):
        rows += _victim_rows(spec, victim, outcome)
    for trial, outcome in zip(fits, outcomes, strict=True):
        rows += _method_rows(spec, trial, outcome)
    return [*(row for row in rows if row.metric not in COUNTED), *_counted(rows)]


def _options(cast: VictimsSpec, method: str, options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    known = cast.filters if method in NETWORK_FILTERS else {}
    return tuple(sorted((known | cast.options_of.get(method, {}) | options).items()))


def _shared(spec: DefencesSpec, victim: VictimTrial, outcome: dict[str, Any]) -> dict[str, Any]:
    return {
        "table": spec.table,
        "dataset": victim.spec.dataset,
        "architecture": victim.spec.architecture,
        "attack": victim.arm.attack_name,
        "mode": victim.arm.mode,
        "seed": victim.seed,
        "seconds": round(outcome["seconds"], 2),
        **outcome["provenance"],
    }


def _victim_rows(spec: DefencesSpec, victim: VictimTrial, outcome: dict[str, Any]) -> Iterator[Row]:
    """Rows of the undefended victim, if asked for, and of chance."""
    shared = _shared(spec, victim, outcome)
    label = dict(victim.arm.label)
    if any(method.name == "none" for method in spec.methods):
        for split, found in outcome["splits"].items():
            for metric in [name for name in spec.metrics if name in found]:
                yield Row(**shared, split=split, method="none", options=label, metric=metric, **found[metric])
    clean = outcome["splits"]["d-test"]["clean_accuracy"]
    guess = 1 / load_victim(victim.folder).model.num_classes
    chance = dict.fromkeys(("clean_accuracy", "trojan_accuracy", "fnr"), guess) | {
        "clean_drop": clean["value"] - guess,
        "recovery_drop": clean["value"] - guess,
        "fpr": 1 - guess,
        "auroc": 0.5,
    }
    benign = victim.arm.attack is None
    for metric in [name for name in spec.metrics if name in chance]:
        if not benign or metric in OF_BENIGN_VICTIMS:
            numbers = {"value": chance[metric], "ci95": None, "n": clean["n"]}
            yield Row(**shared, split="d-test", method="chance", options=label, metric=metric, **numbers)


def _method_rows(spec: DefencesSpec, trial: DefenceTrial, outcome: dict[str, Any]) -> Iterator[Row]:
    shared = _shared(spec, trial.victim, outcome)
    options = dict(trial.options) | trial.victim.arm.label
    if trial.images is not None:
        options["images"] = trial.images
    for metric in [name for name in spec.metrics if name in outcome["measured"]]:
        method = f"{trial.method}-contrast" if metric in OF_THE_MONITOR else trial.method
        numbers = outcome["measured"][metric]
        yield Row(**shared, split="d-test", method=method, options=options, metric=metric, **numbers)


def _counted(rows: list[Row]) -> Iterator[Row]:
    """Verdicts on one victim per seed, 0 or 1, as one share of the victims with its interval."""
    cells: dict[object, list[Row]] = {}
    for row in rows:
        if row.metric in COUNTED:
            cells.setdefault(row.cell, []).append(row)
    for several in cells.values():
        n, hits = len(several), round(sum(row.value for row in several))
        yield several[0].model_copy(
            update={
                "value": hits / n,
                "ci95": wilson_interval(hits, n),
                "n": n,
                "dirty": any(row.dirty for row in several),
                "seconds": round(sum(row.seconds for row in several), 2),
            }
        )
