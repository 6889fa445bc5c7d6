"""SARIF 2.1.0: the findings as code-scanning services read them (OASIS, 2020)."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes

from unhorse.findings import findings_of, fingerprint, incomplete
from unhorse.rulebook import RULES
from unhorse.rules import Confidence, Finding, Rule, Severity
from unhorse.scan_report import counts_json
from unhorse.scanned_model import ScannedModel
from unhorse.wording import PROSE_LENGTH, plain

if TYPE_CHECKING:
    from unhorse.report import Report

SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {Severity.HIGH: "error", Severity.MEDIUM: "warning", Severity.LOW: "note", Severity.NONE: "none"}
SCORES = {Severity.HIGH: 8.5, Severity.MEDIUM: 5.5, Severity.LOW: 2.5, Severity.NONE: 0.0}
"""On the scale of CVSS, which code-scanning services sort by."""
CERTAINTY = {Confidence.HIGH: 1.0, Confidence.MEDIUM: 0.7, Confidence.LOW: 0.4}
PATH_LENGTH = 4096
# in a message [text](address) is a link and {0} a placeholder: an attacker's text may be neither
_INERT = str.maketrans("[]{}", "()()")


def to_sarif(report: Report, root: Path | None = None) -> dict[str, object]:
    """The log of one run; paths are relative to `root`, the working folder if left out."""
    root = Path.cwd() if root is None else root
    uris = [artifact_uri(model.path, root) for model in report.models]
    artifacts = {uri: _artifact(model, uri) for uri, model in zip(uris, report.models, strict=True)}
    index = {uri: place for place, uri in enumerate(artifacts)}
    locations = [_location(uri, index[uri]) for uri in uris]
    found = [
        (model, finding, location)
        for model, location in zip(report.models, locations, strict=True)
        for finding in findings_of(model)
    ]
    used = sorted({finding.rule for _, finding, _ in found if finding.rule in RULES})
    places = {rule: place for place, rule in enumerate(used)}
    driver: dict[str, object] = {"name": "unhorse", "rules": [_rule(RULES[rule]) for rule in used]}
    version = report.environment.get("unhorse")
    if isinstance(version, str) and version:
        driver["version"] = version
    run: dict[str, object] = {
        "tool": {"driver": driver},
        "invocations": [_invocation(report, locations)],
        "artifacts": list(artifacts.values()),
        "results": [_result(model, finding, location, places) for model, finding, location in found],
    }
    if report.files is not None:
        run["properties"] = {"files": counts_json(report.files, report.models)}
    return {"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}


def artifact_uri(path: str, root: Path) -> str:
    """A path as a URI: relative where it lies below `root`, with every unusual byte encoded."""
    whole = os.path.normpath(os.path.join(root, path[:PATH_LENGTH]))  # noqa: PTH118 - Path drops nothing else
    relative = os.path.relpath(whole, root)
    inside = relative != ".." and not relative.startswith(f"..{os.sep}")
    encoded = quote_from_bytes(os.fsencode(relative if inside else whole).replace(b"\\", b"/"), safe="/")
    return encoded if inside else f"file://{encoded}"


def _rule(rule: Rule) -> dict[str, object]:
    sources = "\n".join(f"- {reference}" for reference in rule.references)
    advice = f"**What to do:** {rule.remedy}"
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.title.replace(".", " ").split() if word.isalnum()),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {
            "text": f"{rule.why}\n\nWhat to do: {rule.remedy}",
            "markdown": "\n\n".join((f"**{rule.title}**", rule.why, advice, sources)).rstrip(),
        },
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {
            "tags": ["security", "machine-learning"],
            "security-severity": str(SCORES[rule.severity]),
        },
    }


def _artifact(model: ScannedModel, uri: str) -> dict[str, object]:
    artifact: dict[str, object] = {"location": _location(uri), "roles": ["analysisTarget"]}
    if model.sha256:
        artifact["hashes"] = {"sha-256": plain(model.sha256)}
    return artifact | ({"length": model.size} if model.size else {})


def _location(uri: str, place: int | None = None) -> dict[str, object]:
    found: dict[str, object] = {"uri": uri}
    if not uri.startswith("file:"):
        found["uriBaseId"] = "%SRCROOT%"
    return found | ({} if place is None else {"index": place})


def _result(
    model: ScannedModel, finding: Finding, artifact: Mapping[str, object], places: Mapping[str, int]
) -> dict[str, object]:
    """One finding. A model has no lines: the class, member or tensor is a logical location."""
    location: dict[str, object] = {"physicalLocation": {"artifactLocation": artifact}}
    if finding.where or model.key:
        location["logicalLocations"] = [_logical(model, finding)]
    mark = fingerprint(model, finding)
    result: dict[str, object] = {
        "ruleId": finding.rule,
        "level": LEVELS[finding.severity],
        "kind": "informational" if finding.severity is Severity.NONE else "fail",
        "message": {"text": _message(finding)},
        "locations": [location],
        "partialFingerprints": {"primaryLocationLineHash": f"{mark[:32]}:1", "unhorseFinding/v1": mark},
        "rank": 10 * SCORES[finding.severity] * CERTAINTY[finding.confidence],
        "properties": {
            "severity": finding.severity,
            "confidence": finding.confidence,
            "remedy": plain(finding.remedy, PROSE_LENGTH),
        },
    }
    if finding.rule in places:
        result["ruleIndex"] = places[finding.rule]
    if finding.suppressed:
        justification = plain(finding.suppressed, PROSE_LENGTH)
        result["suppressions"] = [{"kind": "external", "justification": justification}]
    return result


def _logical(model: ScannedModel, finding: Finding) -> dict[str, object]:
    """The place within a model; for a class its name too, and of several networks in a file which it is."""
    number = finding.where.removeprefix("class ")
    named = number != finding.where and number.isdecimal() and len(number) < 10
    name = model.class_name(int(number)) if named else finding.where
    whole = ": ".join(filter(None, (model.key, finding.where)))
    return {"name": plain(name or model.key), "fullyQualifiedName": plain(whole)}


def _message(finding: Finding) -> str:
    words = plain(finding.message, PROSE_LENGTH) or finding.rule
    return f"{words} What to do: {plain(finding.remedy, PROSE_LENGTH)}".translate(_INERT)


def _invocation(report: Report, locations: Sequence[Mapping[str, object]]) -> dict[str, object]:
    notes = []
    for model, artifact in zip(report.models, locations, strict=True):
        if incomplete(model):
            text = plain(model.reason, PROSE_LENGTH) or "The model was not judged."
            text = f"{plain(model.key)}: {text}" if model.key else text
            location = {"physicalLocation": {"artifactLocation": artifact}}
            notes.append(
                {"level": "error", "message": {"text": text.translate(_INERT)}, "locations": [location]}
            )
    for text in report.warnings:
        words = plain(text, PROSE_LENGTH).translate(_INERT)
        notes.append({"level": "warning", "message": {"text": words}})
    invocation: dict[str, object] = {
        "executionSuccessful": not any(map(incomplete, report.models)),
        "toolExecutionNotifications": notes,
    }
    if report.command:
        invocation["commandLine"] = plain(shlex.join(report.command), PROSE_LENGTH)
    created = utc(report.created)
    return invocation | ({"endTimeUtc": created} if created else {})


def utc(created: str) -> str:
    """An ISO 8601 time in UTC to the second; empty where it is none."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return ""
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
