"""SARIF: what code-scanning services read is valid, stable, and cannot be steered by a model file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from test_report import DAMAGED, FAILED, infected, inspected, refused, scanned
from unhorse.core import Verdict
from unhorse.findings import findings_of, fingerprint
from unhorse.report import Report
from unhorse.rules import Finding, Severity
from unhorse.sarif import artifact_uri, to_sarif

EVIL = "<script>[click](https://evil.example) {0}\x1b[2J\u202e\x00"
MIXED = (infected(), refused(), DAMAGED, FAILED, scanned(), scanned(Verdict.UNDECIDED, reason="one class"))


def log(*models, **changes) -> dict:
    report = Report(
        models, ("unhorse", "inspect", "a b.pt"), {"unhorse": "0.1.0"}, "2026-01-31T12:00:00+01:00"
    )
    return json.loads(json.dumps(to_sarif(replace(report, **changes), Path("/work/there"))))


def run_of(*models, **changes) -> dict:
    (run,) = log(*models, **changes)["runs"]
    return run


@pytest.mark.parametrize(
    "models",
    [
        (),
        MIXED,
        (inspected(),),
        (
            inspected(
                path=EVIL,
                findings=(Finding("LD205", EVIL, "ask", Severity.HIGH, where=EVIL, suppressed=EVIL),),
            ),
        ),
        (inspected(path="/elsewhere/x\udcff.pt", assumptions=("MD303 softmax cut off",)),),
    ],
)
def test_a_log_follows_the_schema(models):
    schema = pytest.importorskip("pydantic_sarif.model", reason="its package holds the schema of SARIF 2.1.0")
    parsed = schema.StaticAnalysisResultsFormatSarifVersion210JsonSchema.model_validate(log(*models))
    assert len(parsed.runs[0].results) == sum(len(findings_of(model)) for model in models)


def test_the_schema_refuses_a_level_that_does_not_exist():
    schema = pytest.importorskip("pydantic_sarif.model", reason="its package holds the schema of SARIF 2.1.0")
    wrong = log(refused())
    wrong["runs"][0]["results"][0]["level"] = "terrible"
    with pytest.raises(ValueError, match="level"):
        schema.StaticAnalysisResultsFormatSarifVersion210JsonSchema.model_validate(wrong)


def test_a_result_states_rule_level_place_and_fingerprint():
    model = infected()
    run = run_of(model)
    first, second = run["results"]
    assert (first["ruleId"], first["level"], second["ruleId"]) == ("BD101", "error", "BD102")
    (location,) = first["locations"]
    assert location["physicalLocation"]["artifactLocation"] == {
        "uri": "model.safetensors",
        "uriBaseId": "%SRCROOT%",
        "index": 0,
    }
    assert location["logicalLocations"] == [{"name": "dog", "fullyQualifiedName": "class 1"}]
    assert "region" not in location["physicalLocation"]
    mark = fingerprint(model, findings_of(model)[0])
    assert first["partialFingerprints"]["unhorseFinding/v1"] == mark
    assert first["properties"]["confidence"] == "high" and first["rank"] == 85
    assert run["tool"]["driver"]["rules"][first["ruleIndex"]]["id"] == "BD101"


@pytest.mark.parametrize(
    ("severity", "level", "kind"),
    [
        ("high", "error", "fail"),
        ("medium", "warning", "fail"),
        ("low", "note", "fail"),
        ("none", "none", "informational"),
    ],
)
def test_levels_follow_severity(severity, level, kind):
    (result,) = run_of(inspected(findings=(Finding("LD213", "m", "r", Severity(severity)),)))["results"]
    assert (result["level"], result["kind"]) == (level, kind)


def test_rules_bring_help():
    (rule,) = run_of(refused())["tool"]["driver"]["rules"]
    assert rule["id"] == "LD205" and rule["defaultConfiguration"] == {"level": "error"}
    assert (
        rule["help"]["markdown"].startswith("**The pickle calls")
        and "CVE-2025-32434" in rule["help"]["markdown"]
    )
    assert float(rule["properties"]["security-severity"]) == 8.5 and re.fullmatch(r"[A-Za-z]+", rule["name"])


def test_the_invocation_succeeds_only_if_everything_was_judged():
    (good,) = run_of(infected(), scanned())["invocations"]
    (bad,) = run_of(infected(), DAMAGED, warnings=("an entry expired",))["invocations"]
    assert good["executionSuccessful"] and not good["toolExecutionNotifications"]
    assert not bad["executionSuccessful"]
    assert [note["level"] for note in bad["toolExecutionNotifications"]] == ["error", "warning"]
    assert bad["commandLine"] == "unhorse inspect 'a b.pt'" and bad["endTimeUtc"] == "2026-01-31T11:00:00Z"


def test_a_suppressed_finding_stays_with_its_reason():
    (finding,) = findings_of(refused())
    (result,) = run_of(refused(findings=(replace(finding, suppressed="accepted"),)))["results"]
    assert result["suppressions"] == [{"kind": "external", "justification": "accepted"}]
    assert "suppressions" not in run_of(refused())["results"][0]


def test_artifacts_carry_hash_and_length():
    (artifact,) = run_of(inspected())["artifacts"]
    assert artifact["hashes"] == {"sha-256": "cd" * 32} and artifact["length"] == 4096


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("models/a b.pt", "models/a%20b.pt"),
        ("./a.pt", "a.pt"),
        ("/work/there/deep/a.pt", "deep/a.pt"),
        ("../a.pt", "file:///work/a.pt"),
        ("x:y?#<é>.pt", "x%3Ay%3F%23%3C%C3%A9%3E.pt"),
        ("a\udcff\n.pt", "a%FF%0A.pt"),
        ("..hidden/a.pt", "..hidden/a.pt"),
        ("", "."),
    ],
)
def test_paths_become_relative_encoded_uris(path, uri):
    assert artifact_uri(path, Path("/work/there")) == uri


def test_a_file_that_was_given_twice_is_one_artifact():
    run = run_of(refused(), replace(refused(), path="./evil.pt"), inspected())
    assert [artifact["location"]["uri"] for artifact in run["artifacts"]] == ["evil.pt", "net.onnx"]
    places = [
        result["locations"][0]["physicalLocation"]["artifactLocation"]["index"] for result in run["results"]
    ]
    assert places == [0, 0]


def test_a_path_of_a_megabyte_is_cut():
    assert len(artifact_uri("é" * 1_000_000, Path("/work"))) < 7 * 4096


def test_text_of_a_file_is_neither_link_nor_placeholder_nor_control_character():
    finding = Finding("LD205", EVIL, "ask", Severity.HIGH, where=EVIL, suppressed=EVIL)
    run = run_of(inspected(path=EVIL, findings=(finding,)), replace(FAILED, error=EVIL), warnings=(EVIL,))
    messages = [result["message"]["text"] for result in run["results"]]
    messages += [note["message"]["text"] for note in run["invocations"][0]["toolExecutionNotifications"]]
    assert len(messages) == 4 and all("click" in text for text in messages)
    assert not any(re.search(r"[\[\]{}]", text) for text in messages)
    assert not re.search("[\x00\x1b\u202e]", "".join(strings(run)))
    place = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert unquote_to_bytes(place).decode() == EVIL.replace("//", "/")


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []
