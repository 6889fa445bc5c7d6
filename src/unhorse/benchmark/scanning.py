"""Tables of model scanners: a population is built, every method scores its held-back models, and truth meets
scores here.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from unhorse.benchmark.signatures import population_signatures
from unhorse.benchmark.tables import Row
from unhorse.benchmark.trials import provenance, run_trials
from unhorse.metrics import (
    accuracy_at_threshold,
    auroc,
    auroc_interval,
    paired_auroc_difference,
    tpr_at_fpr,
    wilson_interval,
)
from unhorse.models.classifier import load_classifier
from unhorse.scanners.activation_outlier import EFFORTS, ActivationOutlier
from unhorse.scanners.signature_scanner import SignatureScanner
from unhorse.victims import Spec
from unhorse.zoo import Member, ZooSpec, build, members


class MethodSpec(Spec):
    """A method and its options; a learned one runs once per entry of `maps`. Fewer `epochs` than the paper's
    are a deviation.
    """

    name: str
    maps: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class ScanningSpec(Spec):
    """One table over one population; `population` is a zoo spec, its path relative to this spec."""

    table: str
    dataset: str
    population: str
    trained_on: str = "patch"
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[MethodSpec, ...]


@dataclass(frozen=True)
class Trial:
    """One method with one seed over the held-back models: the unit that is resumed."""

    population: Path
    method: str
    options: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        text = json.dumps([self.method, self.options, self.seed])
        return f"{self.method}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def __call__(self) -> dict[str, Any]:
        started, origin = time.monotonic(), provenance()
        outcome = self._outliers() if self.method == ActivationOutlier.name else self._learned()
        return outcome | {"seconds": time.monotonic() - started, "provenance": origin}

    def _outliers(self) -> dict[str, Any]:
        options = dict(self.options)
        scanner = replace(EFFORTS[options.pop("effort", "standard")], seed=self.seed, **options)
        register = members(self.population, "held-back")
        results = [scanner.scan(load_classifier(member.folder)) for member in register]
        for member, result in zip(register, results, strict=True):
            if result.score is None:  # neither a hit nor a miss: leaving it out would flatter the method
                raise RuntimeError(f"{member.folder} is {result.verdict}: {result.reason}")
        return {
            "scores": [result.score for result in results],
            "verdicts": [str(result.verdict) for result in results],
            "targets": [result.target for result in results],
            "threshold": scanner.threshold,
        }

    def _learned(self) -> dict[str, Any]:
        kind = self.method.removeprefix("signature-")
        scanner = SignatureScanner(kind=kind, seed=self.seed, **dict(self.options))
        register, signatures = population_signatures(self.population, "fit", scanner.preset)
        scanner.fit(
            signatures, [member.trojaned for member in register], [member.target for member in register]
        )
        _, held_back = population_signatures(self.population, "held-back", scanner.preset)
        return {"scores": scanner.scores(held_back).tolist(), "threshold": scanner.threshold_}


def scanning_rows(spec: ScanningSpec, place: Path, work: Path, *, workers: int = 1) -> list[Row]:
    """Builds the population (its spec lies in folder `place`) below `work`, runs what is not yet run, and
    returns the rows.
    """
    zoo = ZooSpec.read(place / spec.population)
    population = work / zoo.name
    build(zoo, population, workers=workers)
    trials = sorted(_trials(spec, population), key=lambda trial: trial.seed)  # a whole table per seed
    for preset in sorted(
        {dict(trial.options)["preset"] for trial in trials if "preset" in dict(trial.options)}
    ):
        for split in ("fit", "held-back"):
            population_signatures(population, split, preset, workers=workers)
    run_trials(trials, work / spec.table, workers=workers)
    return list(_rows(spec, zoo, trials, work / spec.table))


def _trials(spec: ScanningSpec, population: Path) -> Iterator[Trial]:
    for method in spec.methods:
        for maps in method.maps or (None,):
            options = method.options | ({} if maps is None else {"maps": maps})
            for seed in method.seeds or spec.seeds:
                yield Trial(population, method.name, tuple(sorted(options.items())), seed)


def _rows(spec: ScanningSpec, zoo: ZooSpec, trials: Sequence[Trial], folder: Path) -> Iterator[Row]:
    register = members(trials[0].population, "held-back")
    kinds = {group.name: group.attack for group in zoo.groups if group.split == "held-back"}
    done = {trial: json.loads((folder / trial.name).read_text(encoding="utf-8")) for trial in trials}
    for trial, outcome in done.items():
        shared = {
            "table": spec.table,
            "dataset": spec.dataset,
            "architecture": zoo.architecture,
            "population": zoo.identity(),
            "trained_on": spec.trained_on if trial.method.startswith("signature") else None,
            "split": "held-back",
            "method": trial.method,
            "options": dict(trial.options),
            "seed": trial.seed,
            "seconds": round(outcome["seconds"], 2),
            **outcome["provenance"],
        }
        yield from _trial_rows(shared, outcome, register, kinds)
        if twin := _fp32_twin(trial, done):
            shared["options"] = dict(trial.options) | {"against": "fp32"}
            yield from _difference_rows(shared, outcome, done[twin], register, kinds)


def _trial_rows(
    shared: dict[str, Any], outcome: dict[str, Any], register: Sequence[Member], kinds: dict[str, Any]
) -> Iterator[Row]:
    scores, threshold = torch.tensor(outcome["scores"], dtype=torch.float64), outcome["threshold"]
    for group, attack in kinds.items():
        picked, positive = _against_benign(register, group)
        chosen, labels, mode = scores[picked], positive[picked], _mode(attack)
        row = {**shared, "attack": _attack_name(group, attack), "mode": mode}
        if group == "benign":
            flagged = int((chosen >= threshold).sum())
            n = len(chosen)
            yield Row(**row, metric="fpr", value=flagged / n, ci95=wilson_interval(flagged, n), n=n)
            yield from _verdict_rows(row, outcome, register, group)
            each = shared["seconds"] / len(register)
            yield Row(**row, metric="seconds_per_model", value=each, n=len(register))
            continue
        n = len(chosen)
        interval = auroc_interval(chosen, labels)
        yield Row(**row, metric="auroc", value=auroc(chosen, labels), ci95=interval, n=n)
        yield Row(**row, metric="tpr_at_fpr01", value=tpr_at_fpr(chosen, labels, 0.01), n=n)
        yield Row(**row, metric="accuracy", value=accuracy_at_threshold(chosen, labels, threshold), n=n)
        yield from _verdict_rows(row, outcome, register, group)


def _verdict_rows(
    row: dict[str, Any], outcome: dict[str, Any], register: Sequence[Member], group: str
) -> Iterator[Row]:
    """The share of a group's models that the whole scan reports (INFECTED, and INFECTED or SUSPICIOUS)."""
    if "verdicts" not in outcome:
        return
    verdicts = [v for v, member in zip(outcome["verdicts"], register, strict=True) if member.group == group]
    n = len(verdicts)
    for metric, words in (("infected_rate", {"INFECTED"}), ("finding_rate", {"INFECTED", "SUSPICIOUS"})):
        count = sum(verdict in words for verdict in verdicts)
        yield Row(**row, metric=metric, value=count / n, ci95=wilson_interval(count, n), n=n)
    known = [
        (found, member.target)
        for found, member in zip(outcome["targets"], register, strict=True)
        if member.group == group and member.target is not None
    ]
    if known:
        hits = sum(found == target for found, target in known)
        interval = wilson_interval(hits, len(known))
        yield Row(**row, metric="target_found", value=hits / len(known), ci95=interval, n=len(known))


def _difference_rows(
    shared: dict[str, Any],
    outcome: dict[str, Any],
    twin: dict[str, Any],
    register: Sequence[Member],
    kinds: dict[str, Any],
) -> Iterator[Row]:
    ours, theirs = torch.tensor(outcome["scores"]), torch.tensor(twin["scores"])
    for group, attack in kinds.items():
        if group == "benign":
            continue
        picked, positive = _against_benign(register, group)
        found = paired_auroc_difference(ours[picked], theirs[picked], positive[picked])
        row = {**shared, "attack": _attack_name(group, attack), "mode": _mode(attack)}
        interval = (found.low, found.high)
        yield Row(
            **row, metric="auroc_difference", value=found.difference, ci95=interval, n=int(picked.sum())
        )


def _fp32_twin(trial: Trial, done: dict[Trial, dict[str, Any]]) -> Trial | None:
    if dict(trial.options).get("precision") != "bf16":
        return None
    options = tuple(sorted((dict(trial.options) | {"precision": "fp32"}).items()))
    twin = Trial(trial.population, trial.method, options, trial.seed)
    return twin if twin in done else None


def _against_benign(register: Sequence[Member], group: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(which models are benign or of this group, which are of this group)."""
    positive = torch.tensor([member.group == group for member in register])
    benign = torch.tensor([member.group == "benign" for member in register])
    return positive | benign, positive


def _attack_name(group: str, attack: Any) -> str:
    if attack is None:
        return "benign"
    return "placebo" if attack.mode == "placebo" else attack.kind


def _mode(attack: Any) -> str | None:
    return None if attack is None or attack.mode == "placebo" else attack.mode
