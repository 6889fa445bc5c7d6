"""What a report says of a guard: how it was fitted and calibrated, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as TerminalTable
from rich.text import Text

from unhorse.wording import PROSE_LENGTH, finite, number, percent, plain

if TYPE_CHECKING:
    from unhorse.core import Exhibit, Table

NOT_MEASURED = "not measured"
POLICIES = {
    "observe": "every image gets the label of the bare classifier, an alarm is only recorded",
    "hold": "an image that alarms gets no label and waits for a person",
    "replace": "an image that alarms gets the label of the filtered image",
}
CLEAN_MEASURES = {
    "clean_accuracy": "clean accuracy, unguarded",
    "clean_drop": "clean drop, if every image is filtered",
    "fpr": "clean images that alarm",
    "fpr_hard": "clean images of another class once filtered",
}
TROJAN_MEASURES = {
    "trojan_accuracy_before": "Trojan accuracy, unguarded",
    "trojan_accuracy": "Trojan accuracy, if every image is filtered",
    "trojan_passed": "Trojan images that pass: wanted class, no alarm",
    "fnr": "Trojan images that do not alarm",
    "fnr_hard": "Trojan images of the same class once filtered",
    "recovery_accuracy": "recovery: Trojan images of the right class once filtered",
    "recovery_drop": "recovery drop: clean accuracy less recovery",
    "auroc": "AUROC of the score, Trojan against clean images",
}
MEASURES = CLEAN_MEASURES | TROJAN_MEASURES
"""Names and words of what is measured, as in Do et al. (ECCV 2022)."""


class Estimate(NamedTuple):
    """A share, or a difference of two, measured on `n` images, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{percent(self.value)} {self.interval}"

    @property
    def interval(self) -> str:
        return f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class GuardedModel:
    """A classifier behind a guard. `measures` holds what was measured, by the names in MEASURES.

    `fpr` is the false-positive rate that was asked for, None for the hard rule (the class changes);
    `calibration` is the rate found on the clean images that set the threshold, which no filter was fitted on.
    """

    path: str
    folder: str = ""
    sha256: str = ""
    architecture: str = ""
    image_shape: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    filter: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    policy: str = "hold"
    threshold: float = 0.0
    fpr: float | None = None
    calibration: Estimate | None = None
    fitted_on: int | None = None
    clean_images: str = ""
    trojan_images: str = ""
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    exhibits: tuple[Exhibit, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = float("nan")

    @property
    def rule(self) -> str:
        """When the alarm is raised, in words."""
        if self.fpr is None:
            return "filtering an image changes its class"
        return f"the score is above {number(self.threshold)}, set for {percent(self.fpr)} of clean images"

    def table(self) -> Table:
        """The measures as rows; those that were not measured say so."""
        from unhorse.core import Table

        attacked = any(name in self.measures for name in TROJAN_MEASURES)
        rows = [self._row(name, words) for name, words in (MEASURES if attacked else CLEAN_MEASURES).items()]
        if not attacked:
            rows.append(("Trojan accuracy, alarms and recovery", NOT_MEASURED, "", ""))
        columns = ("", "share", "95 % interval", "images")
        return Table("What the guard costs and what it stops", columns, tuple(rows))

    def _row(self, name: str, words: str) -> tuple[str, ...]:
        found = self.measures.get(name)
        if found is None:
            return words, NOT_MEASURED, "", ""
        return words, percent(found.value), found.interval, f"{found.n:,}"


def guard_json(guard: GuardedModel) -> dict[str, object]:
    """A guard as report.schema.json describes it; null is what was not measured."""
    content = finite(
        {
            "path": guard.path,
            "guard": guard.folder,
            "sha256": guard.sha256,
            "architecture": plain(guard.architecture),
            "image_shape": guard.image_shape,
            "class_names": [plain(name) for name in guard.class_names],
            "filter": {"name": guard.filter, "options": guard.options},
            "policy": guard.policy,
            "threshold": guard.threshold,
            "fpr": guard.fpr,
            "calibration": _estimate(guard.calibration),
            "fitted_on": guard.fitted_on,
            "clean_images": plain(guard.clean_images),
            "trojan_images": plain(guard.trojan_images),
            "measures": {name: _estimate(guard.measures.get(name)) for name in MEASURES},
            "warnings": [plain(text, PROSE_LENGTH) for text in guard.warnings],
            "seconds": guard.seconds,
        }
    )
    assert isinstance(content, dict)
    return content


def _estimate(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else estimate._asdict()


def guard_terminal(guard: GuardedModel) -> RenderableType:
    """A rich table of the measures, and below it how the guard decides."""
    found = guard.table()
    table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(found.columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in found.rows:
        table.add_row(*(Text(str(cell), "dim" if cell == NOT_MEASURED else "") for cell in row))
    lines = [("filter", guard.filter), ("alarm where", guard.rule), (guard.policy, POLICIES[guard.policy])]
    if guard.calibration is not None:
        lines.append(("calibrated", f"{guard.calibration} of {guard.calibration.n} clean images alarm"))
    lines += [("warning", text) for text in guard.warnings]
    notes = TerminalTable.grid(padding=(0, 0, 0, 2), pad_edge=True)
    for word, text in lines:
        notes.add_row(Text(word, "dim"), Text(plain(text, PROSE_LENGTH)))
    return Group(Text(plain(guard.folder or guard.path), "bold"), table, notes)
