"""Scan results for people and machines: a self-contained HTML page, JSON, a terminal table, an exit code."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.text import Text

from unhorse.cyclonedx import to_cyclonedx
from unhorse.findings import counted, findings_of, incomplete, worst
from unhorse.guard_report import POLICIES, GuardedModel, guard_json, guard_terminal
from unhorse.junit import to_junit
from unhorse.repair_report import RepairedModel, repair_json, repair_terminal
from unhorse.rulebook import RULES
from unhorse.rules import Severity
from unhorse.sarif import to_sarif
from unhorse.scan_report import (
    SHOWN,
    counts_json,
    counts_terminal,
    counts_words,
    model_json,
    models_terminal,
)
from unhorse.scanned_model import FileCounts, ScannedModel
from unhorse.wording import MEANING, ORDER, PROSE_LENGTH, finite, number, percent, plain

__all__ = ["Report", "ScannedModel", "dumps", "exit_code", "save", "to_html", "to_json", "to_terminal"]

SCHEMA = "unhorse-report-3"
PAGE_BYTES = 3_000_000
DETAILED = 400
"""Of more models than that the page details the most serious only."""


@dataclass(frozen=True)
class Report:
    """All models, guards and repairs of one command (argv); `environment`: versions, device, seed ...;
    `created`: ISO 8601; `warnings` concern no single model; `interrupted`: a signal ended the command early;
    `files`: what was seen beside the models.
    """

    models: tuple[ScannedModel, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    created: str = ""
    guards: tuple[GuardedModel, ...] = ()
    repairs: tuple[RepairedModel, ...] = ()
    warnings: tuple[str, ...] = ()
    interrupted: bool = False
    files: FileCounts | None = None


def exit_code(report: Report, fail_on: str = Severity.MEDIUM) -> int:
    """130 interrupted, 1 a finding at or above `fail_on` that is not suppressed, else 2 a model not judged or
    not opened, 3 no models, 0 otherwise.
    """
    if fail_on not in tuple(Severity):
        raise ValueError(f"fail_on is {fail_on!r}: use one of {', '.join(Severity)}")
    if report.interrupted:
        return 130
    if not report.models:
        return 3
    least = Severity(fail_on).rank or 1 + Severity.HIGH.rank
    if any(finding.severity.rank >= least for model in report.models for finding in counted(model)):
        return 1
    return 2 if any(map(incomplete, report.models)) else 0


def save(
    report: Report,
    *,
    html: Path | None = None,
    json: Path | None = None,
    sarif: Path | None = None,
    junit: Path | None = None,
    cyclonedx: Path | None = None,
) -> None:
    """Write the files asked for; a reader sees the old file or the whole new one, never a part.

    OSError, after all others are written, names the files that could not be.
    """
    writers: tuple[tuple[Path | None, Callable[[Report], str]], ...] = (
        (html, to_html),
        (json, dumps),
        (sarif, lambda report: _text(to_sarif(report))),
        (junit, to_junit),
        (cyclonedx, lambda report: _text(to_cyclonedx(report))),
    )
    problems = []
    for path, write in writers:
        if path is None:
            continue
        try:
            _replace(Path(path), write(report))
        except OSError as error:
            problems.append(f"{path} is not written ({error.strerror or error})")
    if problems:
        raise OSError("; ".join(problems))


def dumps(report: Report) -> str:
    """The JSON text of a report: ASCII only, so that no terminal acts on a name in it."""
    return _text(to_json(report))


def _text(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


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
        "incomplete": report.interrupted or any(map(incomplete, report.models)),
        "interrupted": report.interrupted,
        "warnings": [plain(text, PROSE_LENGTH) for text in report.warnings],
        "models": [*map(model_json, report.models)],
    }
    if report.files is not None:
        document["files"] = counts_json(report.files, report.models)
    guards, repairs = [guard_json(guard) for guard in report.guards], [*map(repair_json, report.repairs)]
    return document | ({"guards": guards} if guards else {}) | ({"repairs": repairs} if repairs else {})


# --- the page -----------------------------------------------------------------------------------------------


def to_html(report: Report) -> str:
    """One page without scripts or outside references, under 3 MB, if need be with fewer details."""
    models = sorted(report.models, key=_gravity)
    page = ""
    most = len(models) if len(models) <= DETAILED else 32
    for detailed in (most, *(fewer for fewer in (32, 8, 2, 1) if fewer < most)):
        page = _render(report, models, detailed)
        if len(page.encode()) < PAGE_BYTES:
            break
    return page


def _gravity(model: ScannedModel) -> tuple[int, int]:
    """The worst finding first, then the worst verdict."""
    return -worst(model).rank, ORDER.index(model.verdict)


def _render(report: Report, models: Sequence[ScannedModel], detailed: int) -> str:
    import jinja2

    from unhorse import exhibits as drawing
    from unhorse.core import ImageGrid

    shown = [
        (model, drawing.evidence(model.result, model.class_names) if model.result else ())
        for model in models[:detailed]
    ]
    drawn = [exhibits for _, exhibits in shown] + [guard.exhibits for guard in report.guards]
    drawn += [repaired.exhibits for repaired in report.repairs]
    grids = sum(isinstance(exhibit, ImageGrid) for exhibits in drawn for exhibit in exhibits)
    budget = drawing.PICTURE_BYTES // max(1, grids)
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
        inspected=bool(models) and all(model.inspected for model in models),
        findings_of=findings_of,
        worst=worst,
        most=SHOWN,
        titles={rule.id: rule.title for rule in RULES.values()},
        meaning=MEANING,
        policies=POLICIES,
        command=shlex.join(report.command),
        files="" if report.files is None else counts_words(report.files, report.models),
        counts=Counter(model.verdict for model in models),
        kind=lambda exhibit: type(exhibit).__name__,
        contact_sheet=lambda grid: drawing.contact_sheet(grid, budget),
        axis=drawing.axis,
        tallest=drawing.tallest,
        bins=drawing.bins,
        points=drawing.points,
    )


def _prose(text: object) -> str:
    return Markup.escape(plain(text, PROSE_LENGTH))


# --- the terminal -------------------------------------------------------------------------------------------


def to_terminal(report: Report) -> RenderableType:
    """A table of the models and what to do about each; below it the guards, the repairs and the warnings."""
    others = [*map(guard_terminal, report.guards), *map(repair_terminal, report.repairs)]
    warnings = [Text(f"warning: {plain(text, PROSE_LENGTH)}", "yellow") for text in report.warnings]
    models = [] if others and not report.models else [models_terminal(report.models)]
    files = [] if report.files is None else [counts_terminal(report.files, report.models)]
    return Group(*models, *files, *others, *warnings)
