"""The findings of a model: those that its file gave, and those that follow from its scan and assumptions."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from unhorse.rulebook import RULES
from unhorse.rules import Confidence, Finding, Severity
from unhorse.scanned_model import ScannedModel
from unhorse.wording import FAILED, number, percent

if TYPE_CHECKING:
    from unhorse.core import ScanResult

ALPHA, ENOUGH = 0.05, 19
"""A reference group of ENOUGH models decides by its p-value, as metrics.judge does; fewer leave it to the
threshold."""
_ASSUMED = re.compile(r"(MD3\d\d|LD22[56]|LD23[67])\s+(.*)", re.DOTALL)
REMARKS = {"LD225", "LD226", "LD236", "LD237"}
"""Findings of a file that was opened all the same."""
_SUBJECT = re.compile(r"(.{1,60}?) (?:assumed|absent|cut off)")


def findings_of(model: ScannedModel) -> tuple[Finding, ...]:
    """All findings of a model, the gravest first: attached ones stand for what would be derived again."""
    attached = {(finding.rule, finding.where) for finding in model.findings}
    named = {finding.rule for finding in model.findings}
    derived = [
        finding
        for finding in (*_judged(model), *_assumed(model))
        if (finding.rule, finding.where) not in attached
    ]
    derived += [finding for finding in _unopened(model) if finding.rule not in named]
    return tuple(sorted((*model.findings, *derived), key=lambda finding: -finding.severity.rank))


def counted(model: ScannedModel) -> list[Finding]:
    """The findings that nobody suppressed."""
    return [finding for finding in findings_of(model) if not finding.suppressed]


def worst(model: ScannedModel) -> Severity:
    """The severity of the gravest finding that counts."""
    found = (finding.severity for finding in counted(model))
    return max(found, key=lambda severity: severity.rank, default=Severity.NONE)


def incomplete(model: ScannedModel) -> bool:
    """Whether the model was not judged or not opened, and nobody said that this does not matter."""
    noted = set() if model.error else REMARKS
    return any(
        finding.rule in ("BD103", "BD104")
        or (finding.rule.startswith("LD") and finding.rule not in noted and model.result is None)
        for finding in counted(model)
    )


def fingerprint(model: ScannedModel, finding: Finding) -> str:
    """The same for the same finding in the same file, wherever the file lies and whatever the words."""
    parts = (model.sha256 or model.path, finding.rule, finding.where, *filter(None, (model.key,)))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "backslashreplace")).hexdigest()


def quoted(path: str) -> str:
    """A path as a shell takes it, never as a flag."""
    return shlex.quote(f"./{path}" if path.startswith("-") else path)


def remedy_of(rule: str, model: ScannedModel) -> str:
    """The remedy of a rule for a model, as a command that opens it as it was opened."""
    return RULES[rule].remedy.replace("PATH", _named(model))


def _named(model: ScannedModel) -> str:
    """The path of a model and the flags that open it, as a shell takes them."""
    key = f"--key {shlex.quote(model.key)}" if model.key else ""
    return " ".join(filter(None, (quoted(model.path), key, model.flags)))


# --- from the scan ------------------------------------------------------------------------------------------


def _judged(model: ScannedModel) -> Iterator[Finding]:
    result = model.result
    if result is None or model.error:
        return
    if model.verdict == "UNDECIDED":
        yield _finding(model, "BD103", model.reason or "the scanner gave no reason", Confidence.HIGH)
    if model.verdict not in ("INFECTED", "SUSPICIOUS"):
        return
    infected = model.verdict == "INFECTED"
    demonstrated = infected or (bool(result.triggers) and not _past(result))
    if demonstrated:
        for target in sorted(result.triggers) or (result.target,):
            yield _demonstrated(model, result, target)
    if _past(result) or not demonstrated:
        yield _past_threshold(model, result)


def _past(result: ScanResult) -> bool:
    if result.p_value is not None and result.reference and len(result.reference.scores) >= ENOUGH:
        return result.p_value <= ALPHA
    return None not in (result.score, result.threshold) and result.score >= result.threshold  # type: ignore[operator]


def _demonstrated(model: ScannedModel, result: ScanResult, target: int | None) -> Finding:
    trigger = None if target is None else result.triggers.get(target)
    share = "" if trigger is None else f"{percent(trigger.flip_rate)} of unseen "
    name = model.class_name(target)
    words = f"class {name}" + ("" if name in (None, str(target)) else f" (no. {target})")
    message = f"A trigger found from the model sends {share}inputs to {words if name else 'one class'}."
    confidence = Confidence.HIGH if model.verdict == "INFECTED" else Confidence.MEDIUM
    return _finding(model, "BD101", message, confidence, where="" if target is None else f"class {target}")


def _past_threshold(model: ScannedModel, result: ScanResult) -> Finding:
    against = "no reference group"
    if result.reference and result.p_value is not None:
        against = f"p = {number(result.p_value)} against {len(result.reference.scores)} benign models"
    message = (
        f"The score {number(result.score)} is past its threshold {number(result.threshold)} ({against})."
    )
    # a shipped threshold may fit no network like this one; benign models of its kind make a score mean more
    grades = (Confidence.LOW, Confidence.MEDIUM, Confidence.HIGH)
    confidence = grades[(model.verdict == "INFECTED") + (result.reference is not None)]
    where = "" if result.target is None else f"class {result.target}"
    path = _named(model)
    if result.scanner == "neural-cleanse":
        remedy = f"unhorse scan {path} --scanner neural-cleanse --clean IMAGES --effort deep"
    else:
        remedy = remedy_of("BD102", model)
    return _finding(model, "BD102", message, confidence, where=where, remedy=remedy)


# --- from the file ------------------------------------------------------------------------------------------


def _unopened(model: ScannedModel) -> Iterator[Finding]:
    if not model.error and model.verdict != FAILED:
        return
    rule = model.error_rule if model.error_rule in RULES else "BD104"
    message = model.reason.removeprefix(f"{rule} ")
    confidence = Confidence.LOW if rule == "LD231" else Confidence.HIGH
    yield _finding(model, rule, message, confidence)


def _assumed(model: ScannedModel) -> Iterator[Finding]:
    for text in model.assumptions:
        found = _ASSUMED.match(text)
        if found is None or found[1] not in RULES:
            continue
        subject = _SUBJECT.match(found[2])
        where = subject[1] if subject else ""
        if found[1] == "MD306":
            where = found[2].partition(":")[0][:60]
        path, remedy = _named(model), remedy_of(found[1], model)
        if found[1] == "MD301" and "size" in where:
            remedy = f"unhorse scan {path} --size HEIGHT WIDTH"
        elif found[1] == "MD301" and "layout" in where:
            remedy = f"unhorse scan {path} --size HEIGHT WIDTH --channels CHANNELS"
        elif found[1] == "MD301" and "batch" in where:
            remedy = "Nothing to do: its answers were compared one image at a time."
        elif found[1] == "MD301":
            remedy = f"unhorse scan {path} --mean MEAN --std STD"
        yield _finding(model, found[1], found[2], Confidence.HIGH, where=where, remedy=remedy)


def _finding(
    model: ScannedModel,
    rule: str,
    message: str,
    confidence: Confidence,
    *,
    where: str = "",
    remedy: str | None = None,
) -> Finding:
    behaviour = rule in ("BD101", "BD102")
    severity: Severity = model.severity if behaviour else RULES[rule].severity
    return Finding(rule, message, remedy or remedy_of(rule, model), severity, confidence, where)
