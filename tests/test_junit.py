"""JUnit: build servers see a suite per file, and failures only where something was found."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from test_report import DAMAGED, FAILED, infected, inspected, refused, scanned
from unhorse.core import Verdict
from unhorse.findings import findings_of
from unhorse.junit import to_junit
from unhorse.report import Report
from unhorse.rules import Finding, Severity


def suites(*models) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(to_junit(Report(models, created="2026-01-31T12:00:00"))))


def counts(suite: ElementTree.Element) -> tuple[int, ...]:
    return tuple(int(suite.get(name, "-1")) for name in ("tests", "failures", "errors", "skipped"))


def test_each_file_has_a_suite_with_its_counts():
    models = (
        infected(),
        scanned(),
        scanned(Verdict.UNDECIDED, reason="one class"),
        FAILED,
        inspected(),
        refused(),
        refused("LD201"),
        DAMAGED,
    )
    found = suites(*models)
    assert [counts(suite) for suite in found] == [
        (3, 2, 0, 0),
        (1, 0, 0, 0),
        (1, 0, 1, 0),
        (1, 0, 1, 0),
        (1, 0, 0, 1),
        (2, 1, 0, 1),
        (1, 0, 1, 0),
        (1, 0, 1, 0),
    ]
    top = ElementTree.fromstring(to_junit(Report(models)))
    assert counts(top) == tuple(sum(column) for column in zip(*map(counts, found), strict=True))
    assert found[0].get("time") == "1.500" and found[0].get("timestamp") == "2026-01-31T12:00:00"


def test_a_failure_says_what_to_do():
    (suite,) = suites(infected())
    scan, trigger, _ = suite
    assert (scan.get("name"), scan.get("classname")) == ("scan", "model.safetensors")
    assert trigger.get("name") == "BD101 class 1" and len(scan) == 1
    failure = trigger.find("failure")
    assert failure.get("type") == "BD101" and "75.0%" in failure.get("message")
    assert (
        "severity high, confidence high" in failure.text
        and "unhorse repair model.safetensors" in failure.text
    )


def test_findings_below_medium_are_output_and_no_case():
    (suite,) = suites(inspected(assumptions=("MD301 input size assumed 8x8: pass --size",)))
    assert counts(suite) == (1, 0, 0, 1)
    assert "MD301 low: input size assumed 8x8" in suite.findtext("testcase/system-out")


def test_a_suppressed_finding_is_skipped_with_its_reason():
    (finding,) = findings_of(refused())
    (suite,) = suites(refused(findings=(replace(finding, suppressed="known (until 2030-01-01)"),)))
    assert counts(suite) == (2, 0, 0, 2)
    assert suite[1].find("skipped").get("message") == "suppressed: known (until 2030-01-01)"


def test_text_of_a_file_cannot_break_the_document():
    evil = ']]></failure><script>&\x00\x0b\x1b[2J\ufffe\ud800"' + "x" * 1_000_000
    finding = Finding("LD205", evil, evil, Severity.HIGH, where=evil)
    text = to_junit(Report((inspected(path=evil, findings=(finding,)), replace(FAILED, error=evil))))
    top = ElementTree.fromstring(text.encode())
    assert {element.tag for element in top.iter()} <= {
        *("testsuites", "testsuite", "testcase", "failure", "error", "skipped", "system-out")
    }
    assert len(text) < 40_000 and "]]></failure><script>&" in top[0][1].find("failure").get("message")


def test_an_empty_report_has_no_suite():
    assert suites() == []
