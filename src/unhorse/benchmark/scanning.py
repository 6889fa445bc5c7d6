"""Tables of model scanners: populations are built, what a spec asks for is run where it was not yet run, and
truth meets scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unhorse.benchmark.model_scores import measure_models
from unhorse.benchmark.populations import Cast
from unhorse.benchmark.rows import Row
from unhorse.benchmark.scanners import METHODS, make
from unhorse.benchmark.scanning_specs import MethodSpec, ScanningSpec
from unhorse.benchmark.scanning_table import ScanningTable
from unhorse.benchmark.scanning_trials import Trial
from unhorse.benchmark.signatures import describe_models
from unhorse.benchmark.trials import run_trials
from unhorse.zoo import Member

__all__ = ["MethodSpec", "ScanningSpec", "Trial", "scanning_rows"]


def scanning_rows(spec: ScanningSpec, place: Path, work: Path, *, workers: int = 1) -> list[Row]:
    """Builds the populations (their specs lie in folder `place`) below `work`, runs what is not yet run, and
    returns the rows. What a method cannot judge gets a line and no row.
    """
    cast, folder = Cast(place, work), work / spec.table
    parts = (*spec.fitted_parts, *spec.judged_parts)
    cast.build([part.population for part in parts], workers)
    table = ScanningTable(spec, cast, workers)
    runs = table.runs()
    trials = sorted((run.trial for run in runs), key=lambda trial: trial.seed)  # a whole table per seed
    missing = [trial for trial in trials if not (folder / trial.name).exists()]
    measure_models((one for trial in missing for one in trial.measurements()), workers=workers)
    for preset, models in _signatures(missing).items():
        describe_models(models, preset, workers=workers)
    outcomes = run_trials(trials, folder, workers=workers)
    done = {trial.name: outcome for trial, outcome in zip(trials, outcomes, strict=True)}
    rows = list(table.rows(runs, done))
    if twice := [key for key, count in Counter(row.key for row in rows).items() if count > 1]:
        raise ValueError(f"{spec.table}: two rows of {twice[0]}: judge populations of different names")
    return rows


def _signatures(trials: Sequence[Trial]) -> dict[str, list[Member]]:
    """The models whose signatures are needed, by preset."""
    found: dict[str, list[Member]] = {}
    for trial in trials:
        if METHODS[trial.method].learns_from == "signatures":
            preset = make(trial.method, dict(trial.options)).preset
            found.setdefault(preset, []).extend(trial.models)
    return found
