"""What a report says of a model file: as JSON, and as rows and notes in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as TerminalTable
from rich.text import Text

from unhorse.findings import findings_of, fingerprint
from unhorse.rulebook import RULES
from unhorse.rules import Finding
from unhorse.scanned_model import FileCounts, ScannedModel
from unhorse.wording import NOT_SCANNED, PROSE_LENGTH, STYLES, finite, number, percent, plain

if TYPE_CHECKING:
    from unhorse.core import ScanResult

SHOWN = 50
"""Findings of one model that the page and the terminal show; the JSON has all."""
TONES = {"high": "bold red", "medium": "bold yellow", "low": "cyan", "none": "dim"}


def model_json(model: ScannedModel) -> dict[str, object]:
    """A model as report.schema.json describes it; numbers that JSON cannot carry are null."""
    content = {
        "path": model.path,
        "key": plain(model.key),
        "sha256": model.sha256,
        "size": model.size,
        "format": plain(model.format),
        "opened": plain(model.opened, PROSE_LENGTH),
        "verdict": model.verdict,
        "severity": model.severity,
        "reason": plain(model.reason, PROSE_LENGTH),
        "remedy": model.remedy,
        "error_rule": model.error_rule,
        "findings": [finding_json(model, finding) for finding in findings_of(model)],
        "architecture": plain(model.architecture),
        "image_shape": model.image_shape,
        "class_names": [plain(name) for name in model.class_names],
        "assumptions": [plain(text, PROSE_LENGTH) for text in model.assumptions],
        **_result_json(model, model.result),
        "seconds": model.seconds,
    }
    document = finite(content)
    assert isinstance(document, dict)
    return document


def finding_json(model: ScannedModel, finding: Finding) -> dict[str, object]:
    """A finding; its fingerprint is what a baseline remembers."""
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "confidence": finding.confidence,
        "message": plain(finding.message, PROSE_LENGTH),
        "where": plain(finding.where),
        "remedy": plain(finding.remedy, PROSE_LENGTH),
        "suppressed": plain(finding.suppressed, PROSE_LENGTH),
        "fingerprint": fingerprint(model, finding),
    }


def _result_json(model: ScannedModel, result: ScanResult | None) -> dict[str, object]:
    if result is None:
        lists: dict[str, object] = {"class_scores": (), "reached": (), "triggers": (), "warnings": ()}
        nothing = dict.fromkeys(("score", "threshold", "p_value", "target", "reference"))
        return {"scanner": "", "facts": {}, **lists, **nothing}
    reference = result.reference
    return {
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
    }


def counts_json(files: FileCounts, models: Sequence[ScannedModel]) -> dict[str, object]:
    """How many files were seen, and of each kind: the other numbers add up to `seen`."""
    opened, unopened = _opened(models)
    return {
        "seen": files.seen,
        "models": opened,
        "not_scanned": unopened,
        "parts": files.parts,
        "archives": files.archives,
        "harmless": sum(files.harmless.values()),
        "links": len(files.links),
        "excluded": files.excluded,
        "harmless_kinds": {plain(word): count for word, count in sorted(files.harmless.items())},
        "linked": [{"path": path, "leads_to": target} for path, target in files.links],
    }


def _opened(models: Sequence[ScannedModel]) -> tuple[int, int]:
    """How many files were opened, and how many were not; a file may have several networks."""
    opened = {model.path for model in models if not model.error}
    return len(opened), len({model.path for model in models} - opened)


def counts_words(files: FileCounts, models: Sequence[ScannedModel]) -> str:
    """The same in a line: "14 files: 3 models, 1 NOT SCANNED, 10 harmless (4 images, 6 text)"."""
    opened, unopened = _opened(models)
    kinds = ", ".join(
        f"{count} {plain(word)}{'s' * (count > 1 and word in ('image', 'table'))}"
        for word, count in sorted(files.harmless.items())
    )
    parts = [
        (opened, "model" if opened == 1 else "models"),
        (unopened, NOT_SCANNED),
        (files.parts, "part of a model" if files.parts == 1 else "parts of models"),
        (files.archives, "archive" if files.archives == 1 else "archives"),
        (sum(files.harmless.values()), f"harmless ({kinds})"),
        (len(files.links), "link to another of them" if len(files.links) == 1 else "links to others of them"),
        (files.excluded, "excluded"),
    ]
    said = ", ".join(f"{count} {word}" for count, word in parts if count)
    return f"{files.seen} file{'' if files.seen == 1 else 's'}{': ' if said else ''}{said}"


# --- the terminal -------------------------------------------------------------------------------------------


def counts_terminal(files: FileCounts, models: Sequence[ScannedModel]) -> RenderableType:
    """The counts in a line, and the links by name."""
    lines = [Text(f"link: {plain(path)} leads to {plain(target)}") for path, target in files.links[:SHOWN]]
    return Group(*lines, Text(counts_words(files, models), "bold"))


def models_terminal(models: Sequence[ScannedModel]) -> RenderableType:
    """A table with one row per model; below it what each model's owner should know and do. Of many files
    that were not looked at the first are shown.
    """
    unknown = [model for model in models if model.error_rule == "LD232"]
    if len(unknown) > SHOWN:
        left_out = {id(model) for model in unknown[SHOWN:]}
        words = f"and {len(left_out)} more files {NOT_SCANNED} [LD232]: see --json"
        return Group(
            models_terminal([model for model in models if id(model) not in left_out]), Text(words, "bold")
        )
    inspected = bool(models) and all(model.inspected for model in models)
    table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    columns = ("format", "MB", "SHA-256") if inspected else ("score / threshold", "p", "target", "flips")
    for column in (*columns, "seconds"):
        left = column in ("target", "format", "SHA-256")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for model in models:
        verdict = Text(model.verdict, STYLES.get(model.verdict, "bold magenta"))
        cells = _facts(model) if inspected else _scores(model)
        seconds = "–" if not math.isfinite(model.seconds) else f"{model.seconds:.1f}"
        table.add_row(Text(plain(model.name)), verdict, *map(Text, (*cells, seconds)))
    return Group(table, *(part for model in models for part in _notes(model)))


def _facts(model: ScannedModel) -> tuple[str, ...]:
    return plain(model.format or "–", 24), number(model.size / 1e6), plain(model.sha256[:12] or "–")


def _scores(model: ScannedModel) -> tuple[str, ...]:
    result = model.result
    if result is None:
        return "– / –", "–", "–", "–"
    trigger = None if result.target is None else result.triggers.get(result.target)
    return (
        f"{number(result.score)} / {number(result.threshold)}",
        number(result.p_value),
        plain(model.class_name(result.target) or "–", 24),
        percent(trigger.flip_rate if trigger else None),
    )


def _notes(model: ScannedModel) -> tuple[Text, TerminalTable]:
    rule = f" [{model.error_rule}]" if model.error_rule else ""
    told = model.error_rule in RULES  # by the finding, with its remedy
    lines = [("reason", model.reason + rule)] if model.reason and not told else []
    lines += [("opened", model.opened)] if model.opened else []
    lines += [("assumed", text) for text in model.assumptions]
    lines += [("warning", text) for text in (model.result.warnings if model.result else ())]
    notes = TerminalTable.grid(padding=(0, 0, 0, 2), pad_edge=True)
    for word, text in lines:
        notes.add_row(Text(word, "dim"), Text(plain(text, PROSE_LENGTH)))
    findings = findings_of(model)
    for finding in findings[:SHOWN]:
        for word, cell in _finding_rows(finding, "" if told else model.reason):
            notes.add_row(Text(word, "dim"), cell)
    if len(findings) > SHOWN:
        notes.add_row(Text("", "dim"), Text(f"and {len(findings) - SHOWN} more findings: see --json"))
    notes.add_row(Text("to do", "dim"), Text(plain(model.remedy, PROSE_LENGTH)))
    return Text(plain(model.name), "bold"), notes


def _finding_rows(finding: Finding, above: str) -> list[tuple[str, Text]]:
    """The finding and its remedy; `above` is what the reader has just read."""
    head = Text(f"{finding.rule} {finding.severity}", TONES[finding.severity])
    head.append(f", confidence {finding.confidence}: ", "dim")
    message = plain(finding.message, PROSE_LENGTH)
    head.append("as above" if above and message in plain(above, PROSE_LENGTH) else message, "default")
    if finding.suppressed:
        suppressed = f"suppressed: {plain(finding.suppressed, PROSE_LENGTH)}"
        return [("finding", head), ("", Text(suppressed, "dim"))]
    return [("finding", head), ("", Text(plain(finding.remedy, PROSE_LENGTH)))]
