"""JUnit XML: one suite per model file, as build servers show test results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from unhorse.findings import counted, findings_of, incomplete
from unhorse.rulebook import RULES
from unhorse.rules import Finding, Severity
from unhorse.scan_report import counts_json, counts_words
from unhorse.scanned_model import FileCounts, ScannedModel
from unhorse.wording import NOT_SCANNED, PROSE_LENGTH, plain

if TYPE_CHECKING:
    from unhorse.report import Report


def to_junit(report: Report) -> str:
    """The report as XML: a failure for each finding of medium severity or more, an error for what was not
    judged, skipped for what was only looked at or is suppressed.
    """
    top = ElementTree.Element("testsuites", name="unhorse")
    if report.files is not None:
        top.append(_files(report.files, report.models))
    for model in report.models:
        top.append(_suite(model, report.created))
    for count in ("tests", "failures", "errors", "skipped"):
        top.set(count, str(sum(int(suite.get(count, "0")) for suite in top)))
    ElementTree.indent(top)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(top, encoding="unicode")}\n'


def _files(files: FileCounts, models: Sequence[ScannedModel]) -> ElementTree.Element:
    """How many files were seen, and of each kind, as a suite without cases."""
    suite = ElementTree.Element("testsuite", name="files")
    for count in ("tests", "failures", "errors", "skipped"):
        suite.set(count, "0")
    properties = ElementTree.SubElement(suite, "properties")
    for name, number in counts_json(files, models).items():
        if isinstance(number, int):
            ElementTree.SubElement(properties, "property", name=name, value=str(number))
    ElementTree.SubElement(suite, "system-out").text = counts_words(files, models)
    return suite


def _suite(model: ScannedModel, created: str) -> ElementTree.Element:
    path = plain(model.name, PROSE_LENGTH) or "model"
    cases = [_verdict(model, path)]
    for finding in findings_of(model):
        if finding.severity.rank >= Severity.MEDIUM.rank:
            cases.append(_case(finding, path))
    seconds = f"{model.seconds:.3f}" if math.isfinite(model.seconds) else "0"
    cases[0].set("time", seconds)
    suite = ElementTree.Element("testsuite", name=path, tests=str(len(cases)), time=seconds)
    for tag, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(count, str(sum(case.find(tag) is not None for case in cases)))
    if created:
        suite.set("timestamp", plain(created, 40))
    suite.extend(cases)
    return suite


def _verdict(model: ScannedModel, path: str) -> ElementTree.Element:
    """The case that says how far the model was judged; findings below medium are its output."""
    case = ElementTree.Element("testcase", classname=path, name="inspect" if model.inspected else "scan")
    reason = plain(model.reason, PROSE_LENGTH)
    failed = any(finding.severity.rank >= Severity.MEDIUM.rank for finding in counted(model))
    if incomplete(model) and not failed:
        ElementTree.SubElement(case, "error", message=reason or model.verdict, type=model.verdict)
    elif model.verdict == NOT_SCANNED:
        ElementTree.SubElement(case, "skipped", message="NOT SCANNED: the file was looked at, not run")
    lines = [f"verdict: {model.verdict}", f"SHA-256: {plain(model.sha256) or 'not read'}"]
    lines += [
        f"{finding.rule} {finding.severity}: {plain(finding.message, PROSE_LENGTH)}"
        for finding in counted(model)
        if finding.severity.rank < Severity.MEDIUM.rank
    ]
    ElementTree.SubElement(case, "system-out").text = "\n".join(lines)
    return case


def _case(finding: Finding, path: str) -> ElementTree.Element:
    where = f" {plain(finding.where)}" if finding.where else ""
    case = ElementTree.Element("testcase", classname=path, name=f"{finding.rule}{where}", time="0")
    message = plain(finding.message, PROSE_LENGTH)
    if finding.suppressed:
        reason = f"suppressed: {plain(finding.suppressed, PROSE_LENGTH)}"
        ElementTree.SubElement(case, "skipped", message=reason)
        return case
    failure = ElementTree.SubElement(case, "failure", message=message, type=finding.rule)
    title = RULES[finding.rule].title if finding.rule in RULES else finding.rule
    failure.text = (
        f"{title}\n{message}\nseverity {finding.severity}, confidence {finding.confidence}\n"
        f"What to do: {plain(finding.remedy, PROSE_LENGTH)}"
    )
    return case
