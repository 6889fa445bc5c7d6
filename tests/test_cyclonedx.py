"""CycloneDX: the bill names each model with its hash, and what was found as vulnerabilities."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from test_report import DAMAGED, FAILED, infected, inspected, refused, scanned
from unhorse.core import Verdict
from unhorse.cyclonedx import to_cyclonedx
from unhorse.findings import findings_of
from unhorse.report import Report
from unhorse.rules import Finding, Severity

MIXED = (infected(), refused(), DAMAGED, FAILED, scanned(Verdict.UNDECIDED, reason="one class"), inspected())


def bill(*models) -> dict:
    report = Report(models, (), {"unhorse": "0.1.0"}, "2026-01-31T12:00:00+00:00")
    return json.loads(json.dumps(to_cyclonedx(report)))


def problems(document: dict) -> object:
    """What the validator of CycloneDX's own library says; None is nothing."""
    reason = "its package holds the schema of CycloneDX 1.6"
    validation = pytest.importorskip("cyclonedx.validation.json", reason=reason)
    pytest.importorskip("lark", reason="cyclonedx-python-lib[json-validation] is not installed")
    from cyclonedx.schema import SchemaVersion

    return validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))


@pytest.mark.parametrize("models", [(), MIXED])
def test_a_bill_follows_the_schema(models):
    assert problems(bill(*models)) is None


def test_the_schema_refuses_a_type_that_does_not_exist():
    wrong = bill(inspected())
    wrong["components"][0]["type"] = "brain"
    assert problems(wrong) is not None


def test_a_component_is_a_model_with_hash_card_and_verdict():
    model = replace(infected(), path="models/net.safetensors", assumptions=("MD301 input size assumed 8x8",))
    (component,) = bill(model)["components"]
    assert (component["type"], component["name"]) == ("machine-learning-model", "net.safetensors")
    assert component["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    card = component["modelCard"]
    assert card["modelParameters"] == {
        "task": "image-classification",
        "modelArchitecture": "VGG",
        "inputs": [{"format": "image, channels x height x width: 3 x 8 x 8"}],
        "outputs": [{"format": "3 classes"}],
    }
    assert card["considerations"]["technicalLimitations"] == ["MD301 input size assumed 8x8"]
    assert {"name": "unhorse:verdict", "value": "INFECTED"} in component["properties"]


def test_a_file_that_was_not_read_has_no_hash():
    assert "hashes" not in bill(FAILED)["components"][0]


def test_findings_are_vulnerabilities_of_their_component():
    found = bill(scanned(), infected())["vulnerabilities"]
    assert [entry["id"] for entry in found] == ["BD101", "BD102"]
    first = found[0]
    assert first["affects"] == [{"ref": "model-2"}] and first["ratings"][0]["severity"] == "high"
    assert "sends 75.0% of unseen" in first["detail"] and first["detail"].endswith("(class 1)")
    assert first["recommendation"].startswith("unhorse repair ") and "analysis" not in first
    assert {"url": "https://arxiv.org/abs/1708.06733"} in first["advisories"]


def test_a_suppressed_finding_is_an_accepted_one():
    (finding,) = findings_of(refused())
    document = bill(refused(findings=(replace(finding, suppressed="known"),)))
    assert document["vulnerabilities"][0]["analysis"] == {
        "state": "in_triage",
        "response": ["will_not_fix"],
        "detail": "suppressed: known",
    }
    assert problems(document) is None


def test_the_same_report_gives_the_same_bill_and_another_another_number():
    assert bill(*MIXED) == bill(*MIXED)
    assert bill(infected())["serialNumber"] != bill(refused())["serialNumber"]


def test_text_of_a_file_is_cut_and_without_control_characters():
    evil = "<script>\x1b[2J\u202e" + "x" * 1_000_000
    finding = Finding("LD205", evil, evil, Severity.HIGH, where=evil)
    document = bill(inspected(path=evil, format=evil, sha256=evil, architecture=evil, findings=(finding,)))
    text = json.dumps(document, ensure_ascii=False)
    assert len(text) < 20_000 and "\x1b" not in text and "\u202e" not in text and "hashes" not in text
    assert problems(document) is None
