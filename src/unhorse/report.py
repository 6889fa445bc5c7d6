"""Scan results for people and machines: a self-contained HTML page, JSON, a terminal table, an exit code."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as TerminalTable
from rich.text import Text

from unhorse.core import ImageGrid, ScanResult, Verdict
from unhorse.exhibits import PICTURE_BYTES, axis, bins, class_name, contact_sheet, evidence, points, tallest
from unhorse.guard_report import POLICIES, GuardedModel, guard_json, guard_terminal
from unhorse.repair_report import RepairedModel, repair_json, repair_terminal
from unhorse.wording import (
    FAILED,
    MEANING,
    ORDER,
    PROSE_LENGTH,
    REMEDY,
    SEVERITY,
    STYLES,
    Severity,
    finite,
    number,
    percent,
    plain,
)

SCHEMA = "unhorse-report-1"
PAGE_BYTES = 3_000_000


@dataclass(frozen=True)
class ScannedModel:
    """One model file: what it is, what was assumed, and its scan result or the error that prevented one.

    `sha256` is of the file or of its weights; `error_rule` names the broken rule, for programs.
    """

    path: str
    sha256: str = ""
    architecture: str = ""
    image_shape: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    result: ScanResult | None = None
    error: str = ""
    error_rule: str = ""
    seconds: float = math.nan

    @property
    def verdict(self) -> str:
        """The verdict's word; FAILED where there is an error or no result."""
        return FAILED if self.error or self.result is None else str(self.result.verdict)

    @property
    def severity(self) -> Severity:
        return SEVERITY.get(self.verdict, Severity.NONE)

    @property
    def reason(self) -> str:
        if self.error or self.result is None:
            return self.error or "The scan ended without a result."
        return self.result.reason

    @property
    def remedy(self) -> str:
        return REMEDY[self.verdict]

    def class_name(self, index: int | None) -> str | None:
        """The name of class `index`, its number where the model names none, or None."""
        return None if index is None else class_name(self.class_names, index)


@dataclass(frozen=True)
class Report:
    """All models, guards and repairs of one command (argv); `environment`: versions, device, seed ...;
    `created`: ISO 8601.
    """

    models: tuple[ScannedModel, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    created: str = ""
    guards: tuple[GuardedModel, ...] = ()
    repairs: tuple[RepairedModel, ...] = ()


def exit_code(report: Report, fail_on: str = Severity.MEDIUM) -> int:
    """1 a finding at or above `fail_on`, else 2 a model FAILED or UNDECIDED, 3 no models, 0 otherwise."""
    if fail_on not in tuple(Severity):
        raise ValueError(f"fail_on is {fail_on!r}: use one of {', '.join(Severity)}")
    loud = {"high": {"high"}, "medium": {"high", "medium"}, "none": set()}[fail_on]
    if not report.models:
        return 3
    if any(model.severity in loud for model in report.models):
        return 1
    return 2 if any(model.verdict in (FAILED, Verdict.UNDECIDED) for model in report.models) else 0


def save(report: Report, *, html: Path | None = None, json: Path | None = None) -> None:
    """Write the page and the JSON; a reader sees the old file or the whole new one, never a part."""
    if html is not None:
        _replace(Path(html), to_html(report))
    if json is not None:
        _replace(Path(json), dumps(report))


def dumps(report: Report) -> str:
    """The JSON text of a report: ASCII only, so that no terminal acts on a name in it."""
    return json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# --- JSON ---------------------------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, object]:
    """The report as finite JSON (NaN and infinities become null), as report.schema.json describes it."""
    counts = Counter(model.verdict for model in report.models)
    document: dict[str, object] = {
        "schema": SCHEMA,
        "created": report.created,
        "command": list(report.command),
        "environment": finite(report.environment),
        "summary": {verdict: counts[verdict] for verdict in ORDER},
        "models": [_model_json(model) for model in report.models],
    }
    guards, repairs = [guard_json(guard) for guard in report.guards], [*map(repair_json, report.repairs)]
    return document | ({"guards": guards} if guards else {}) | ({"repairs": repairs} if repairs else {})


def _model_json(model: ScannedModel) -> dict[str, object]:
    result = model.result or ScanResult(Verdict.UNDECIDED, "")
    reference = result.reference
    content = {
        "path": model.path,
        "sha256": model.sha256,
        "verdict": model.verdict,
        "severity": model.severity,
        "reason": plain(model.reason, PROSE_LENGTH),
        "remedy": model.remedy,
        "error_rule": model.error_rule,
        "architecture": plain(model.architecture),
        "image_shape": model.image_shape,
        "class_names": [plain(name) for name in model.class_names],
        "assumptions": [plain(text, PROSE_LENGTH) for text in model.assumptions],
        "scanner": result.scanner,
        "score": result.score,
        "threshold": result.threshold,
        "p_value": result.p_value,
        "class_scores": result.class_scores,
        "reached": result.reached,
        "target": None
        if result.target is None
        else {"index": result.target, "name": model.class_name(result.target)},
        "triggers": [
            {
                "target": target,
                "name": model.class_name(target),
                "flip_rate": trigger.flip_rate,
                "mask_share": float(trigger.mask.float().mean()),
            }
            for target, trigger in sorted(result.triggers.items())
        ],
        "reference": None
        if reference is None
        else {"name": plain(reference.name), "n": len(reference.scores)},
        "facts": result.facts,
        "warnings": [plain(text, PROSE_LENGTH) for text in result.warnings],
        "seconds": model.seconds,
    }
    document = finite(content)
    assert isinstance(document, dict)
    return document


# --- the page -----------------------------------------------------------------------------------------------


def to_html(report: Report) -> str:
    """One page without scripts or outside references, under 3 MB, if need be with fewer details."""
    models = sorted(report.models, key=lambda model: ORDER.index(model.verdict))
    page = ""
    for detailed in (len(models), 32, 8, 2, 1):
        page = _render(report, models, detailed)
        if len(page.encode()) < PAGE_BYTES:
            break
    return page


def _render(report: Report, models: Sequence[ScannedModel], detailed: int) -> str:
    shown = [
        (model, evidence(model.result, model.class_names) if model.result else ())
        for model in models[:detailed]
    ]
    drawn = [exhibits for _, exhibits in shown] + [guard.exhibits for guard in report.guards]
    drawn += [repaired.exhibits for repaired in report.repairs]
    grids = sum(isinstance(exhibit, ImageGrid) for exhibits in drawn for exhibit in exhibits)
    budget = PICTURE_BYTES // max(1, grids)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(prose=_prose, number=number, percent=percent, plain=plain)
    return environment.get_template("report.html").render(
        report=report,
        models=models,
        evidence=shown,
        meaning=MEANING,
        policies=POLICIES,
        command=shlex.join(report.command),
        counts=Counter(model.verdict for model in models),
        kind=lambda exhibit: type(exhibit).__name__,
        contact_sheet=lambda grid: contact_sheet(grid, budget),
        axis=axis,
        tallest=tallest,
        bins=bins,
        points=points,
    )


def _prose(text: object) -> str:
    return Markup.escape(plain(text, PROSE_LENGTH))


# --- the terminal -------------------------------------------------------------------------------------------


def to_terminal(report: Report) -> RenderableType:
    """A rich table with one row per model; below it what each model's owner should know and do."""
    others = [*map(guard_terminal, report.guards), *map(repair_terminal, report.repairs)]
    if others and not report.models:
        return Group(*others)
    table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for column in ("score / threshold", "p", "target", "flips", "seconds"):
        table.add_column(column, justify="left" if column == "target" else "right", overflow="fold")
    for model in report.models:
        table.add_row(*_terminal_row(model))
    return Group(table, *(part for model in report.models for part in _terminal_notes(model)), *others)


def _terminal_row(model: ScannedModel) -> list[Text]:
    result = model.result or ScanResult(Verdict.UNDECIDED, "")
    trigger = None if result.target is None else result.triggers.get(result.target)
    cells = [
        f"{number(result.score)} / {number(result.threshold)}",
        number(result.p_value),
        plain(model.class_name(result.target) or "–", 24),
        percent(trigger.flip_rate if trigger else None),
        "–" if not math.isfinite(model.seconds) else f"{model.seconds:.1f}",
    ]
    return [
        Text(plain(model.path)),
        Text(model.verdict, STYLES.get(model.verdict, "bold magenta")),
        *map(Text, cells),
    ]


def _terminal_notes(model: ScannedModel) -> tuple[Text, TerminalTable]:
    warnings = model.result.warnings if model.result else ()
    rule = f" [{model.error_rule}]" if model.error_rule else ""
    lines = [("reason", model.reason + rule)] if model.reason else []
    lines += [("assumed", text) for text in model.assumptions] + [("warning", text) for text in warnings]
    notes = TerminalTable.grid(padding=(0, 0, 0, 2), pad_edge=True)
    for word, text in [*lines, ("to do", model.remedy)]:
        notes.add_row(Text(word, "dim"), Text(plain(text, PROSE_LENGTH)))
    return Text(plain(model.path), "bold"), notes
