"""What a report says of a repair: the verdicts before and after, and what was measured of both models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as TerminalTable
from rich.text import Text

from unhorse.guard_report import NOT_MEASURED, Estimate
from unhorse.wording import NOT_SCANNED, PROSE_LENGTH, STYLES, class_name, finite, percent, plain

if TYPE_CHECKING:
    from unhorse.core import Exhibit, ScanResult, Table

MEASURES = {
    "clean_accuracy": "clean accuracy",
    "agreement": "same class as before",
    "reversed_trigger": "reversed trigger",
    "trojan_accuracy": "Trojan accuracy",
    "recovery_accuracy": "recovery accuracy",
}
"""Names and words of what is measured, on images that the repair never saw."""


class Change(NamedTuple):
    """A share before and after the repair, and the drop from one to the other on the same images."""

    before: Estimate | None
    after: Estimate
    drop: Estimate | None


@dataclass(frozen=True)
class RepairedModel:
    """A classifier and its cured copy. `measures` holds what was measured, by the names in MEASURES.

    `before` and `after` are the scans of the two by the same scanner; `sha256` is of the model as it was,
    `repaired_sha256` of the weights of the cured one; `target` is the class of the reversed trigger.
    """

    path: str
    folder: str = ""
    sha256: str = ""
    repaired_sha256: str = ""
    architecture: str = ""
    image_shape: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    method: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    before: ScanResult | None = None
    after: ScanResult | None = None
    target: int | None = None
    trigger_found_by: str = ""
    repaired_on: int = 0
    held_out: int = 0
    clean_images: str = ""
    trojan_images: str = ""
    measures: Mapping[str, Change] = field(default_factory=dict)
    exhibits: tuple[Exhibit, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = float("nan")

    @property
    def verdicts(self) -> tuple[str, str]:
        """The verdict before and the one after."""
        first, second = (
            NOT_SCANNED if scan is None else str(scan.verdict) for scan in (self.before, self.after)
        )
        return first, second

    def class_name(self, index: int) -> str:
        """The name of class `index`, its number where the model names none."""
        return class_name(self.class_names, index)

    def table(self) -> Table:
        """Before and after in rows, with 95 % intervals; what was not measured says so."""
        from unhorse.core import Table

        note = (
            f"Measured on {self.held_out:,} clean images that neither repair nor scans saw. The reversed "
            "trigger is the one found before the repair; its share is of images of other classes."
        )
        columns = ("", "before", "after", "drop", "images")
        return Table("Before and after the repair", columns, tuple(self.rows()), note)

    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table."""
        rows: list[tuple[str, ...]] = [("verdict", *self.verdicts, "", "")]
        for name, words in MEASURES.items():
            found = self.measures.get(name)
            if found is None:
                rows.append((words, NOT_MEASURED, NOT_MEASURED, "", ""))
                continue
            before, after, drop = ("" if estimate is None else str(estimate) for estimate in found)
            rows.append((words, before, after, drop, f"{found.after.n:,}"))
        return rows


def repair_json(repaired: RepairedModel) -> dict[str, object]:
    """A repair as report.schema.json describes it; null is what was not measured."""
    content = finite(
        {
            "path": repaired.path,
            "repaired": repaired.folder,
            "sha256": repaired.sha256,
            "repaired_sha256": repaired.repaired_sha256,
            "architecture": plain(repaired.architecture),
            "image_shape": repaired.image_shape,
            "class_names": [plain(name) for name in repaired.class_names],
            "assumptions": [plain(text, PROSE_LENGTH) for text in repaired.assumptions],
            "method": {"name": repaired.method, "options": repaired.options},
            "before": _scan_json(repaired, repaired.before),
            "after": _scan_json(repaired, repaired.after),
            "target": _target_json(repaired, repaired.target),
            "trigger_found_by": repaired.trigger_found_by,
            "repaired_on": repaired.repaired_on,
            "held_out": repaired.held_out,
            "clean_images": plain(repaired.clean_images),
            "trojan_images": plain(repaired.trojan_images),
            "measures": {name: _change_json(repaired.measures.get(name)) for name in MEASURES},
            "facts": repaired.facts,
            "warnings": [plain(text, PROSE_LENGTH) for text in repaired.warnings],
            "seconds": repaired.seconds,
        }
    )
    assert isinstance(content, dict)
    return content


def _target_json(repaired: RepairedModel, target: int | None) -> dict[str, object] | None:
    return None if target is None else {"index": target, "name": repaired.class_name(target)}


def _scan_json(repaired: RepairedModel, scan: ScanResult | None) -> dict[str, object] | None:
    if scan is None:
        return None
    return {
        "scanner": scan.scanner,
        "verdict": scan.verdict,
        "reason": plain(scan.reason, PROSE_LENGTH),
        "score": scan.score,
        "threshold": scan.threshold,
        "target": _target_json(repaired, scan.target),
        "class_scores": scan.class_scores,
    }


def _change_json(change: Change | None) -> dict[str, object] | None:
    if change is None:
        return None
    parts = change._asdict().items()
    return {name: None if estimate is None else estimate._asdict() for name, estimate in parts}


def repair_terminal(repaired: RepairedModel) -> RenderableType:
    """A rich table of before and after, and below it how the model was repaired."""
    table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(("", "before", "after", "drop")):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for words, before, after, drop, _ in repaired.rows():
        cells = (words, before.partition(" [")[0], after, drop)  # they fit into 80 columns
        table.add_row(
            *(Text(cell, STYLES.get(cell, "dim" if cell == NOT_MEASURED else "")) for cell in cells)
        )
    notes = TerminalTable.grid(padding=(0, 0, 0, 2), pad_edge=True)
    for word, text in _notes(repaired):
        notes.add_row(Text(word, "dim"), Text(plain(text, PROSE_LENGTH)))
    return Group(Text(plain(repaired.path), "bold"), table, notes)


def _notes(repaired: RepairedModel) -> list[tuple[str, str]]:
    lines = [("method", f"{repaired.method}, on {repaired.repaired_on:,} clean images")]
    lines.append(("measured", f"on {repaired.held_out:,} clean images that it never saw"))
    if repaired.target is not None:
        lines.append(
            (
                "trigger",
                f"towards {repaired.class_name(repaired.target)}, found by {repaired.trigger_found_by}",
            )
        )
    for word, scan in (("before", repaired.before), ("after", repaired.after)):
        lines += [(word, scan.reason)] if scan is not None and scan.reason else []
    if repaired.folder:
        lines.append(("written", repaired.folder))
    return lines + [("warning", text) for text in repaired.warnings]


def summary(repaired: RepairedModel) -> str:
    """One line: what the repair did to the attack, and what it cost."""
    parts = []
    for name, words in (("trojan_accuracy", "Trojan accuracy"), ("reversed_trigger", "reversed trigger")):
        change = repaired.measures.get(name)
        if change is not None and change.before is not None:
            parts.append(f"{words} {percent(change.before.value)} -> {percent(change.after.value)}")
    cost = repaired.measures.get("clean_accuracy")
    if cost is not None and cost.drop is not None:
        parts.append(f"clean drop {cost.drop}")
    return f"repaired by {repaired.method}: " + ", ".join(parts)
