"""Benchmark specs become rows: what a spec asks for is run where it was not yet run, and appended."""

from __future__ import annotations

import tomllib
from pathlib import Path

from unhorse.benchmark.defending import DefencesSpec, defence_rows
from unhorse.benchmark.scanning import ScanningSpec, scanning_rows
from unhorse.benchmark.tables import Row, append_rows


def run_spec(
    path: Path, work: Path, results: Path, *, victims: Path | None = None, workers: int = 1
) -> list[Row]:
    """Runs the spec at `path`, with all that it builds below `work`, and appends rows to
    results/<table>.jsonl.

    A spec with a `population`, or with models to `judge`, is a table of model scanners, any other one of
    defences; `victims` puts another victims spec in the place of the one that it names.
    """
    text = tomllib.loads(path.read_text(encoding="utf-8"))
    table: ScanningSpec | DefencesSpec
    if "population" in text or "judge" in text:
        if victims is not None:
            raise ValueError(f"{path} is a table over a population: --victims belongs to tables of defences")
        table = ScanningSpec.model_validate(text)
        rows = scanning_rows(table, path.parent, work, workers=workers)
    else:
        table = DefencesSpec.model_validate(text)
        rows = defence_rows(table, victims or path.parent / table.victims, work, workers=workers)
    append_rows(results / f"{table.table}.jsonl", rows)
    return rows
