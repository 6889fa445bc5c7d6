"""CycloneDX 1.6 (ECMA-424): a machine-learning bill of materials, the findings as vulnerabilities."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import PurePath
from typing import TYPE_CHECKING

from unhorse.findings import findings_of
from unhorse.rulebook import RULES
from unhorse.rules import Finding, Severity
from unhorse.sarif import utc
from unhorse.scanned_model import ScannedModel
from unhorse.wording import PROSE_LENGTH, plain

if TYPE_CHECKING:
    from unhorse.report import Report

_HASH = re.compile(r"[0-9a-f]{64}")
_NAMESPACE = uuid.UUID("6c0b7e5c-3f0c-5d0f-9a53-1d1f3bb6b1d4")
_LEVELS = {Severity.HIGH: "high", Severity.MEDIUM: "medium", Severity.LOW: "low", Severity.NONE: "info"}


def to_cyclonedx(report: Report) -> dict[str, object]:
    """The bill: a component per model file, a vulnerability per finding. The same report, the same bill."""
    components = [_component(model, place) for place, model in enumerate(report.models)]
    found = [
        _vulnerability(finding, place, number)
        for place, model in enumerate(report.models)
        for number, finding in enumerate(findings_of(model))
    ]
    version = report.environment.get("unhorse")
    tool = {"type": "application", "name": "unhorse"}
    tool |= {"version": plain(version)} if isinstance(version, str) else {}
    metadata: dict[str, object] = {"tools": {"components": [tool]}}
    created = utc(report.created)
    metadata |= {"timestamp": created} if created else {}
    content = {"metadata": metadata, "components": components, "vulnerabilities": found}
    serial = uuid.uuid5(_NAMESPACE, json.dumps(content, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **content,
    }


def _reference(place: int) -> str:
    return f"model-{place + 1}"


def _component(model: ScannedModel, place: int) -> dict[str, object]:
    facts = {
        "path": plain(model.path, PROSE_LENGTH),
        "key": plain(model.key),
        "verdict": model.verdict,
        "format": plain(model.format),
        "opened": plain(model.opened, PROSE_LENGTH),
        "size": str(model.size or ""),
        "scanner": plain(model.result.scanner) if model.result else "",
    }
    component: dict[str, object] = {
        "type": "machine-learning-model",
        "bom-ref": _reference(place),
        "name": plain(PurePath(model.path).name + (f" [{model.key}]" if model.key else "")) or "model",
        "modelCard": _card(model),
        "properties": [{"name": f"unhorse:{name}", "value": value} for name, value in facts.items() if value],
    }
    if _HASH.fullmatch(model.sha256):
        component["hashes"] = [{"alg": "SHA-256", "content": model.sha256}]
    return component


def _card(model: ScannedModel) -> dict[str, object]:
    """What is known of the network: its task, architecture, input and classes, and what was only assumed."""
    parameters: dict[str, object] = {"task": "image-classification"}
    if model.architecture:
        parameters["modelArchitecture"] = plain(model.architecture)
    if model.image_shape:
        size = " x ".join(str(length) for length in model.image_shape)
        parameters["inputs"] = [{"format": f"image, channels x height x width: {size}"}]
    if model.class_names:
        parameters["outputs"] = [{"format": f"{len(model.class_names)} classes"}]
    card: dict[str, object] = {"modelParameters": parameters}
    limits = [plain(text, PROSE_LENGTH) for text in model.assumptions]
    return card | ({"considerations": {"technicalLimitations": limits}} if limits else {})


def _vulnerability(finding: Finding, place: int, number: int) -> dict[str, object]:
    rule = RULES.get(finding.rule)
    where = f" ({plain(finding.where)})" if finding.where else ""
    content: dict[str, object] = {
        "bom-ref": f"{_reference(place)}-finding-{number + 1}",
        "id": finding.rule,
        "source": {"name": "unhorse"},
        "ratings": [
            {"source": {"name": "unhorse"}, "severity": _LEVELS[finding.severity], "method": "other"}
        ],
        "description": rule.title if rule else finding.rule,
        "detail": f"{plain(finding.message, PROSE_LENGTH)}{where}",
        "recommendation": plain(finding.remedy, PROSE_LENGTH),
        "affects": [{"ref": _reference(place)}],
        "properties": [{"name": "unhorse:confidence", "value": finding.confidence}],
    }
    advisories = [text for text in (rule.references if rule else ()) if text.startswith("https://")]
    content |= {"advisories": [{"url": url} for url in advisories]} if advisories else {}
    if finding.suppressed:
        detail = f"suppressed: {plain(finding.suppressed, PROSE_LENGTH)}"
        content["analysis"] = {"state": "in_triage", "response": ["will_not_fix"], "detail": detail}
    return content
