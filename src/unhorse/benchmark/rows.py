"""Rows: measured and published numbers, their files, and how one number is printed."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from unhorse.metrics import t_interval

Option = bool | int | float | str | None
Identity = tuple[str | int, ...]

ACCURACIES = {"accuracy", "clean_accuracy", "trojan_accuracy", "cross_accuracy", "noise_accuracy"}
FINDINGS = {"finding_rate", "infected_rate", "target_found", "success_rate", "other_success_rate"}
FILTERED = {"clean_drop", "recovery_drop", "recovery_accuracy"}
RATES = ACCURACIES | FINDINGS | FILTERED | {"fpr", "fnr"}
RATES_AT = ("fpr_at_", "fnr_at_", "tpr_at_")
NOT_OF_THE_KEY = {"value", "ci95", "commit", "dirty", "versions", "device", "seconds"}
LEADING = ("dataset", "method", "options")
CLOSING = ("attack", "metric")
FURTHER = ("architecture", "population", "trained_on", "split", "mode")


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


# --- printing -----------------------------------------------------------------------------------------------


def printed(metric: str, value: float, *, sign: str = "") -> str:
    """Rates in %, AUROCs with three decimals, anything else (seconds, ratios, norms) with three digits."""
    if metric in RATES or metric.startswith(RATES_AT):
        return f"{100 * value:{sign}z.2f}"
    return f"{value:{sign}z.3f}" if metric == "auroc" else f"{value:{sign}.3g}"


def measured(metric: str, values: Sequence[float], rows: Iterable[Row]) -> str:
    """The mean of one value per seed with its t interval; the interval of a row that stands alone instead;
    † where one of `rows` came from uncommitted code.
    """
    rows = list(rows)
    mean, half_width = t_interval(values)
    text = printed(metric, mean)
    if len(values) > 1:
        text += f" ± {printed(metric, half_width)}"
    elif len(rows) == 1 and rows[0].ci95 is not None:
        text += " [" + ", ".join(printed(metric, end) for end in rows[0].ci95) + "]"
    return text + (" †" if any(row.dirty for row in rows) else "")


def spanned(counts: Collection[int]) -> str:
    """ "3", or "1 to 3" where counts differ; nothing where there are none."""
    ends = [min(counts), max(counts)] if counts else []
    return " to ".join(str(end) for end in dict.fromkeys(ends))


def in_order(options: Mapping[Any, Any]) -> tuple[object, ...]:
    """What options are sorted by: their names, numbers by value and before words."""

    def place(value: object) -> tuple[bool, float, str]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return False, value, ""
        return True, 0.0, str(value)

    return tuple((name, place(value)) for name, value in sorted(options.items()))
