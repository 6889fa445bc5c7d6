"""A scan looks at every network of a file, and each report names it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import Tensor

import unhorse.report
from conftest import small_victim
from unhorse import survey
from unhorse.cli import run
from unhorse.core import Classifier, ScanResult, Verdict
from unhorse.cyclonedx import to_cyclonedx
from unhorse.findings import findings_of, fingerprint
from unhorse.junit import to_junit
from unhorse.report import dumps, exit_code
from unhorse.sarif import to_sarif
from unhorse.survey import Request, scan_models

SCHEMA = json.loads(Path(unhorse.report.__file__).with_suffix(".schema.json").read_text())


class ByBias:
    """A scanner that takes a network for infected whose first bias is 1."""

    scans = 0

    def scan(self, model: Classifier, clean: object = None) -> ScanResult:
        ByBias.scans += 1
        first = dict(model.network.named_parameters())["features.0.bias"][0]
        infected = float(first.detach()) == 1
        verdict = Verdict.INFECTED if infected else Verdict.NO_SIGN_FOUND
        return ScanResult(verdict, "by bias", score=float(infected), threshold=0.5, target=0)


@pytest.fixture(autouse=True)
def _scanner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ByBias.scans = 0
    monkeypatch.setattr(survey, "make_scanner", lambda request, device: ByBias())
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path / "cache"))


def weights(bias: float) -> dict[str, Tensor]:
    state = small_victim().network.state_dict()
    return {**state, "features.0.bias": torch.full_like(state["features.0.bias"], bias)}


@pytest.fixture
def both(tmp_path: Path) -> Path:
    path = tmp_path / "timm.pth.tar"
    torch.save({"epoch": 3, "state_dict": weights(0), "state_dict_ema": weights(1)}, path)
    return path


def scanned(path: Path, **request: object) -> unhorse.report.Report:
    return scan_models([path], Request(cached=False, **request), command=("unhorse", "scan"))  # type: ignore[arg-type]


def test_the_worst_of_two_networks_counts_and_both_are_named(both: Path) -> None:
    report = scanned(both)
    assert [(model.key, model.verdict) for model in report.models] == [
        ("state_dict", "NO SIGN FOUND"),
        ("state_dict_ema", "INFECTED"),
    ]
    assert exit_code(report) == 1
    assert {model.sha256 for model in report.models} != {""} and report.models[0].size == both.stat().st_size


def test_a_key_scans_one_of_them(both: Path) -> None:
    (model,) = scanned(both, loading={"key": "state_dict"}).models
    assert (model.key, model.verdict) == ("state_dict", "NO SIGN FOUND")


def test_equal_copies_are_scanned_once(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(0), "state_dict_ema": weights(0)}, tmp_path / "m.pth")
    (model,) = scanned(tmp_path / "m.pth").models
    assert model.key == "" and ByBias.scans == 1


def test_a_network_that_does_not_open_is_not_passed_over(tmp_path: Path) -> None:
    other = {"blocks.0.secret.weight": torch.ones(5, 5, 3), "blocks.1.secret.weight": torch.ones(5, 5, 3)}
    torch.save({"state_dict": weights(0), "state_dict_ema": other}, tmp_path / "m.pth")
    report = scanned(tmp_path / "m.pth")
    assert [(model.key, model.error_rule) for model in report.models] == [
        ("state_dict", ""),
        ("state_dict_ema", "LD210"),
    ]
    assert exit_code(report) == 2


def test_the_cache_keeps_all_networks_of_a_file_and_each_key_apart(both: Path) -> None:
    first = scan_models([both], Request())
    again = scan_models([both], Request())
    assert ByBias.scans == 2
    assert [model.key for model in again.models] == [model.key for model in first.models]
    (one,) = scan_models([both], Request(loading={"key": "state_dict_ema"})).models
    assert (one.verdict, ByBias.scans) == ("INFECTED", 3)


def test_every_report_tells_the_networks_apart(both: Path) -> None:
    report = scanned(both)
    document = json.loads(dumps(report))
    jsonschema.validate(document, SCHEMA)
    assert [model["key"] for model in document["models"]] == ["state_dict", "state_dict_ema"]
    marks = [finding["fingerprint"] for model in document["models"] for finding in model["findings"]]
    assert len(marks) == len(set(marks))
    page = unhorse.report.to_html(report)
    assert "timm.pth.tar [state_dict]" in page and "timm.pth.tar [state_dict_ema]" in page
    suites = [suite.get("name") for suite in ElementTree.fromstring(to_junit(report))]
    assert suites == [f"{both} [state_dict]", f"{both} [state_dict_ema]"]
    components = to_cyclonedx(report)["components"]
    assert [part["name"] for part in components] == [  # type: ignore[attr-defined]
        "timm.pth.tar [state_dict]",
        "timm.pth.tar [state_dict_ema]",
    ]
    (run,) = to_sarif(report)["runs"]  # type: ignore[misc]
    assert len(run["artifacts"]) == 1
    places = {
        result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] for result in run["results"]
    }
    assert any(place.startswith("state_dict_ema: class 0") for place in places)
    lines = [result["partialFingerprints"]["unhorseFinding/v1"] for result in run["results"]]
    assert len(lines) == len(set(lines))


def test_a_remedy_names_the_network(both: Path) -> None:
    for model in scanned(both).models:
        sizes = [finding for finding in findings_of(model) if finding.where == "input size"]
        assert f"--key {model.key} --size" in sizes[0].remedy
        assert len({fingerprint(model, finding) for finding in findings_of(model)}) == len(findings_of(model))


def test_convert_asks_which_network_and_takes_the_one_named(
    both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    convert = ["convert", str(both), "-o", str(out)]
    assert run(convert) == 4 and not out.exists()
    told = "".join(capsys.readouterr())
    assert "LD228" in told and "--key state_dict" in " ".join(told.split())
    assert run([*convert, "--key", "state_dict_ema"]) == 0 and out.exists()
