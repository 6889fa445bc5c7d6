"""Rows and tables: measured numbers with their provenance, rendered beside the published ones."""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from unhorse.metrics import t_interval

Option = bool | int | float | str | None
Identity = tuple[str | int, ...]

ACCURACIES = {"accuracy", "clean_accuracy", "trojan_accuracy", "cross_accuracy", "noise_accuracy"}
FINDINGS = {"finding_rate", "infected_rate", "target_found"}
RATES = ACCURACIES | FINDINGS | {"clean_drop", "recovery_drop", "fpr", "fnr", "tpr_at_fpr01"}
NOT_OF_THE_KEY = {"value", "ci95", "commit", "dirty", "versions", "device", "seconds"}
LEADING = ("dataset", "method", "options")
CLOSING = ("attack", "metric")
FURTHER = ("architecture", "population", "trained_on", "split", "mode")
PREAMBLE = """# Results

Rendered from `results/*.jsonl` and `published/*.csv` by `unhorse benchmark --render`; edits here are lost.
Rates are in %, their differences in percentage points. ± is the 95 % t interval over seeds; a number measured
with one seed has the 95 % interval over its n items in brackets. † marks numbers from uncommitted code.
"""


class Row(BaseModel):
    """One measured number and all that is needed to measure it again; rates are fractions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    table: str
    dataset: str
    architecture: str
    population: str | None = None
    trained_on: str | None = None
    split: str | None = None
    method: str
    options: dict[str, Option] = Field(default_factory=dict)
    attack: str
    mode: str | None = None
    seed: int
    metric: str
    value: float
    ci95: tuple[float, float] | None = None
    n: int
    commit: str
    dirty: bool
    versions: dict[str, str]
    device: str
    seconds: float

    @field_validator("options")
    @classmethod
    def _sorted(cls, options: dict[str, Option]) -> dict[str, Option]:
        return dict(sorted(options.items()))

    @property
    def key(self) -> Identity:
        """What was measured: rows with one key are repetitions, of which the newest counts."""
        return self._identity(name for name in Row.model_fields if name not in NOT_OF_THE_KEY)

    @property
    def cell(self) -> Identity:
        """The key without the seed and n: rows of one cell are averaged."""
        return self._identity((*LEADING, *FURTHER, *CLOSING))

    def _identity(self, names: Iterable[str]) -> Identity:
        values = (getattr(self, name) for name in names)
        return tuple(json.dumps(value, sort_keys=True) for value in values)


class Published(NamedTuple):
    """One published number; options that it does not state match any of ours, and so does an empty mode."""

    table: str
    dataset: str
    method: str
    options: dict[str, Option]
    attack: str
    mode: str
    metric: str
    value: float
    source: str

    def answers(self, row: Row) -> bool:
        ours = (row.table, row.dataset, row.method, row.attack, row.metric)
        return (
            ours == (self.table, self.dataset, self.method, self.attack, self.metric)
            and self.mode in {"", row.mode}
            and self.options.items() <= row.options.items()
        )


# --- files --------------------------------------------------------------------------------------------------


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds one JSON line per row to `path`, on disk when this returns; what is there stays as it is."""
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            lines = "\n" + lines  # a writer was killed in mid-line
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows that count: per key the newest measured with committed code, else the newest."""
    counting: dict[Identity, Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = Row.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "the line"
            raise ValueError(
                f"{path}:{number}: {where}: {fault['msg']}; remove that line and measure again"
            ) from error
        known = counting.pop(row.key, None)
        counting[row.key] = known if known is not None and row.dirty and not known.dirty else row
    return list(counting.values())


def read_published(path: Path) -> list[Published]:
    """The published numbers of one table, from the columns that `Published` names."""
    with path.open(newline="") as file:
        return [
            Published(**{**line, "options": json.loads(line["options"]), "value": float(line["value"])})
            for line in csv.DictReader(file)
        ]


# --- rendering ----------------------------------------------------------------------------------------------


def render_to(path: Path) -> None:
    """Writes `path`, such as benchmarks/README.md, from the folders results and published beside it."""
    scratch = path.with_suffix(".partial")
    scratch.write_text(render(path.parent / "results", path.parent / "published"), encoding="utf-8")
    scratch.replace(path)


def render(results: Path, published: Path) -> str:
    """Markdown with one section per table that has rows in `results`, published numbers beside ours."""
    rows = [row for path in sorted(results.glob("*.jsonl")) for row in read_rows(path)]
    references = [cell for path in sorted(published.glob("*.csv")) for cell in read_published(path)]
    tables = sorted({row.table for row in rows})
    sections = [
        _section(
            name,
            [row for row in rows if row.table == name],
            [cell for cell in references if cell.table == name],
        )
        for name in tables
    ]
    return "\n".join([PREAMBLE, *(sections or ["No rows yet.\n"])])


def _section(name: str, rows: Sequence[Row], published: Sequence[Published]) -> str:
    """One table: our cells, and published ones that we lack on the data sets that we have."""
    constant = {field: {getattr(row, field) for row in rows} for field in FURTHER}
    varying = [field for field in FURTHER if len(constant[field]) > 1]
    cells: dict[Identity, list[Row]] = defaultdict(list)
    for row in rows:
        # Runs of different size with one seed are two measurements, not two seeds.
        twice = any(row.n != other.n and row.seed == other.seed for other in rows if row.cell == other.cell)
        cells[(*row.cell, row.n if twice else 0)].append(row)
    answered = [cell for cell in published if any(cell.answers(row) for row in rows)]
    lines = [_measured_line(group, varying, published) for group in cells.values()]
    datasets = {row.dataset for row in rows}
    lines += [
        _published_line(cell, varying)
        for cell in published
        if cell not in answered and cell.dataset in datasets
    ]
    columns = [*LEADING, *varying, *CLOSING, "ours", "seeds", "n", "published", "difference"]
    table = [
        columns,
        ["---"] * len(columns),
        *(line.cells for line in sorted(lines, key=lambda line: line.order)),
    ]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in table)
    return f"## {name}\n\n{markdown}\n\n{_caption(rows, published, constant)}\n"


class _Line(NamedTuple):
    order: tuple[object, ...]
    cells: list[str]


def _measured_line(rows: Sequence[Row], varying: Sequence[str], published: Sequence[Published]) -> _Line:
    first = rows[0]
    mean, half_width = t_interval([row.value for row in rows])
    ours = _printed(first.metric, mean)
    if len(rows) > 1:
        ours += f" ± {_printed(first.metric, half_width)}"
    elif first.ci95 is not None:
        ours += " [" + ", ".join(_printed(first.metric, end) for end in first.ci95) + "]"
    if any(row.dirty for row in rows):
        ours += " †"
    reference = next((cell for cell in published if cell.answers(first)), None)
    theirs, difference = "", ""
    if reference is not None:
        theirs = _printed(first.metric, reference.value)
        difference = _printed(first.metric, mean - reference.value, sign="+")
    counts = sorted({row.n for row in rows})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    extra = [getattr(first, field) or "" for field in varying]
    return _line(first, extra, [ours, str(len(rows)), n, theirs, difference])


def _published_line(cell: Published, varying: Sequence[str]) -> _Line:
    extra = [cell.mode if field == "mode" else "" for field in varying]
    return _line(cell, extra, ["", "", "", _printed(cell.metric, cell.value), ""])


def _line(cell: Row | Published, extra: list[str], numbers: list[str]) -> _Line:
    options = ", ".join(f"{name}={value}" for name, value in sorted(cell.options.items()))
    order = (cell.dataset, cell.method, options, *extra, cell.attack != "benign", cell.attack, cell.metric)
    return _Line(order, [cell.dataset, cell.method, options, *extra, cell.attack, cell.metric, *numbers])


def _caption(
    rows: Sequence[Row], published: Sequence[Published], constant: dict[str, set[str | None]]
) -> str:
    facts = [
        f"{field} {value}"
        for field, values in constant.items()
        if len(values) == 1
        for value in values
        if value
    ]
    facts.append("commit " + ", ".join(sorted({row.commit[:10] for row in rows})))
    facts.append("device " + ", ".join(sorted({row.device for row in rows})))
    versions = sorted({f"{name} {version}" for row in rows for name, version in row.versions.items()})
    facts.append(", ".join(versions))
    sources = sorted({cell.source for cell in published})
    return "; ".join(facts) + "." + (f" Published: {'; '.join(sources)}." if sources else "")


def _printed(metric: str, value: float, *, sign: str = "") -> str:
    if metric in RATES:
        return f"{100 * value:{sign}.2f}"
    return f"{value:{sign}.3f}" if metric == "auroc" else f"{value:{sign}.3g}"
