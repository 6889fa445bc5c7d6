"""The trials behind tables of defences: one is fitted on clean images of a victim, and truth meets its
answers here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unhorse.benchmark.findings import finding_of
from unhorse.benchmark.synthesis import HELD_OUT, measure_synthesis
from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.benchmark.victim_trials import VictimTrial, clean_and_test, hashed
from unhorse.core import Attack, Dataset
from unhorse.datasets import subset
from unhorse.filters.februus import Februus
from unhorse.filters.registry import FILTERS
from unhorse.monitors.calibration import conformal_threshold
from unhorse.monitors.contrast import Contrast
from unhorse.monitors.rates import contrast_rates
from unhorse.monitors.registry import MONITORS
from unhorse.rates import Rate, rate_of, repair_rates
from unhorse.repairs.registry import NEEDS_FINDING, REPAIRS
from unhorse.scanners.neural_cleanse import NEURAL_CLEANSE
from unhorse.victims import Victim, load_victim, trojan_images

FALSE_ALARMS = {"fnr_at_fpr01": 0.01, "fnr_at_fpr05": 0.05, "fnr_at_fpr10": 0.10}
JUDGED = 2000
"""How many clean and how many Trojan images a monitor is asked about (Gao et al., ACSAC 2019: M_s)."""
Measured = dict[str, Any]


@dataclass(frozen=True)
class DefenceTrial:
    """Fits one defence on clean images of one victim, and measures it on D_test."""

    victim: VictimTrial
    method: str
    options: tuple[tuple[str, Any], ...]
    images: int | None
    results: Path

    @property
    def name(self) -> str:
        said = f"{self.method}-{self.victim.folder.name}"
        return f"{said}-{hashed(self.options, self.images, self.victim.spec.clean_share)}.json"

    def __call__(self) -> dict[str, Any]:
        started, origin = time.monotonic(), provenance()
        seed = self.victim.seed
        victim = load_victim(self.victim.folder)
        victim.model.to(chosen_device())
        clean, test = clean_and_test(self.victim.spec, seed)
        if self.images is not None:
            clean = subset(clean, self.images, seed=seed)
        self.results.mkdir(parents=True, exist_ok=True)
        case = Case(victim, clean, test, seed, dict(self.options), self.results / f".{self.name}.fitting")
        return {
            "measured": measured(self.method, case),
            "seconds": time.monotonic() - started,
            "provenance": origin,
        }


@dataclass(frozen=True)
class Case:
    """A victim, what its defender has and what is kept from him, and the options of the defence."""

    victim: Victim
    clean: Dataset
    test: Dataset
    seed: int
    options: Mapping[str, Any]
    checkpoint: Path

    @property
    def seeded(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.options}


def measured(method: str, case: Case) -> Measured:
    """The metrics of one defence, by the family that its name belongs to."""
    if method.startswith("synthesis-"):
        return _synthesis(method.removeprefix("synthesis-"), case)
    if method in NEURAL_CLEANSE:
        return _cleanse(method, case)
    if method in REPAIRS:
        return _repair(method, case)
    if method in MONITORS:
        return _monitor(method, case)
    return _filter(method, case)


def _filter(method: str, case: Case) -> Measured:
    fitted: Any = FILTERS[method](**case.seeded)
    kept = {}
    if isinstance(fitted, Februus):  # its network knows the images alone: victims of one split share it
        kept = {"completion_cache": case.checkpoint.parent / "completion"}
    fitted.fit(case.victim.model, case.clean, checkpoint=case.checkpoint, **kept)
    monitor = Contrast(fitted).fit(case.victim.model, case.clean)
    return measure(monitor, case.test, case.victim.attack, seed=case.seed)


def measure(monitor: Contrast, test: Dataset, attack: Attack | None, *, seed: int) -> Measured:
    """The metrics of Do et al. (ECCV 2022), Sec. 5.2, of a fitted filter on D_test: clean drop, Trojan
    accuracy, recovery drop, and the rates of the monitor with the hard rule.
    """
    trojaned = None
    if attack is not None:
        trojaned = trojan_images(attack, test, seed=seed, device=monitor.model.mean.device)
    rates = contrast_rates(monitor, test, trojaned)
    return _said(
        {
            "clean_drop": rates.clean_drop,
            "trojan_accuracy": rates.trojan_accuracy,
            "recovery_drop": rates.recovery_drop,
            "fpr": rates.fpr_hard,
            "fnr": rates.fnr_hard,
            "auroc": rates.auroc,
        }
    )


def _repair(method: str, case: Case) -> Measured:
    """The same metrics of a repaired copy. A repair that needs a finding gets that of Neural Cleanse."""
    model, attack = case.victim.model, case.victim.attack
    finding = (
        finding_of(case.victim.model, case.clean, case.checkpoint.parent, seed=case.seed)
        if method in NEEDS_FINDING
        else None
    )
    made: Any = REPAIRS[method](**case.seeded)
    repaired = made(model, case.clean, finding, checkpoint=case.checkpoint).model
    trojaned = None
    if attack is not None:
        trojaned = trojan_images(attack, case.test, seed=case.seed, device=model.mean.device)
    return _said(repair_rates(model, repaired, case.test, trojaned))


def _monitor(method: str, case: Case) -> Measured:
    """How many Trojan images do not alarm, with the threshold set on clean images for several rates of false
    alarms; the images that fit the monitor are half of them. A benign victim has nothing to measure.
    """
    model, attack = case.victim.model, case.victim.attack
    if attack is None:
        return {}
    order = torch.randperm(len(case.clean), generator=torch.Generator().manual_seed(case.seed))
    fitting, calibration = (case.clean[half] for half in order.chunk(2))
    monitor: Any = MONITORS[method](**case.seeded)
    monitor.fit(
        model,
        fitting,
        finding_of(case.victim.model, case.clean, case.checkpoint.parent, seed=case.seed)
        if method == "neurons"
        else None,
    )
    clean = subset(case.test, min(JUDGED, len(case.test)), seed=case.seed)
    trojaned = trojan_images(attack, clean, seed=case.seed, device=model.mean.device)
    quiet = monitor.score(clean.images).cpu()
    loud = monitor.score(trojaned.images[trojaned.counted()]).cpu()
    found: dict[str, Rate | None] = {}
    known = monitor.score(subset(calibration, min(JUDGED, len(calibration)), seed=case.seed).images).tolist()
    for metric, rate in FALSE_ALARMS.items():
        threshold = conformal_threshold(known, rate)
        found[metric] = rate_of(loud <= threshold)
        found[metric.replace("fnr_at_", "fpr_at_")] = rate_of(quiet > threshold)
    return _said(found)


def _cleanse(method: str, case: Case) -> Measured:
    """The anomaly index, whether the model is flagged (0 or 1), and whether for its target class."""
    scanner = replace(NEURAL_CLEANSE[method], **case.seeded)
    result = scanner.scan(case.victim.model, case.clean)
    if result.score is None:  # neither a hit nor a miss: leaving it out would flatter the method
        raise RuntimeError(f"{case.victim.folder} is {result.verdict}: {result.reason}")
    flagged = result.score > scanner.threshold
    found = {"anomaly_index": result.score, "finding_rate": float(flagged)}
    card = case.victim.card.get("attack")
    if card is not None and card.get("mode") == "single-target":
        found["target_found"] = float(flagged and result.target == card["target"])
    return {metric: {"value": value, "ci95": None, "n": 1} for metric, value in found.items()}


def _synthesis(variant: str, case: Case) -> Measured:
    assert case.victim.attack is not None
    target = int(case.victim.attack.relabel(torch.zeros(1, dtype=torch.long)))
    found = measure_synthesis(
        case.victim.model,
        case.test,
        target,
        variant=variant,  # type: ignore[arg-type]
        seed=case.seed,
        **case.options,
    )
    return {metric: {"value": value, "ci95": None, "n": HELD_OUT} for metric, value in found.items()}


def _said(found: Mapping[str, Rate | None]) -> Measured:
    return {
        metric: {"value": rate.value, "ci95": (rate.low, rate.high), "n": rate.n}
        for metric, rate in found.items()
        if rate is not None
    }
