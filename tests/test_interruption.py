"""What a command leaves when it is ended early, or cannot write where it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unhorse import jobs
from unhorse.cli import run

VICTIMS = Path(__file__).parent / "victims"
CLI = [sys.executable, "-m", "unhorse.cli"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path / "cache"))


def report_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_leaves_a_partial_report(number, workers, tmp_path):
    """The second model would take hours: only a report that names it as not judged can be written."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\n"
        "from unhorse import survey\n"
        "from unhorse.cli import main\n"
        "scan = survey._Scan.__call__\n"
        "def call(self):\n"
        "    found = scan(self)\n"
        "    print('judged', flush=True)\n"
        "    time.sleep(3600 if 'infected' in str(self.path) else 0)\n"
        "    return found\n"
        "survey._Scan.__call__ = call\n"
        "main()\n",
        encoding="utf-8",
    )
    output = tmp_path / "report.json"
    arguments = ["scan", str(VICTIMS / "benign"), str(VICTIMS / "infected"), "--effort", "quick"]
    command = [sys.executable, str(slow), *arguments, "--json", str(output), "--jobs", workers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if workers == "2":  # a worker imports the module afresh, so the model is made slow by what it computes
        command = [*CLI, *arguments[:-1], "deep", "--json", str(output), "--jobs", workers]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        wanted = "judged" if workers == "1" else "about"
        for line in process.stdout:
            if wanted in line:
                break
        time.sleep(0.3)
        process.send_signal(number)
        text, _ = process.communicate(timeout=60)
    report = report_of(output)
    assert process.returncode == 130, text
    assert report["interrupted"] and report["incomplete"]
    assert [Path(model["path"]).name for model in report["models"]] == ["benign", "infected"]
    last = report["models"][-1]
    assert last["verdict"] == "FAILED" and "interrupted" in last["reason"]


def test_a_signal_before_the_first_model_leaves_a_report_too(tmp_path, monkeypatch):
    def interrupted(models):
        raise KeyboardInterrupt

    monkeypatch.setattr("unhorse.model_files.prepare", interrupted)
    output = tmp_path / "report.json"
    assert run(["scan", str(VICTIMS / "benign"), "--json", str(output)]) == 130
    assert report_of(output)["interrupted"]


@pytest.mark.parametrize("flag", ["--json", "--html", "--sarif", "--junit", "--cyclonedx"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("unhorse.inspection.inspect_models", lambda *given, **more: pytest.fail("it worked"))
    occupied = tmp_path / "file"
    occupied.write_text("", encoding="utf-8")
    assert run(["inspect", str(VICTIMS / "benign"), flag, str(occupied / "report")]) == 4
    assert f"choose another place for {flag}" in capsys.readouterr().err
    assert run(["inspect", str(VICTIMS / "benign"), flag, str(tmp_path)]) == 4


def test_a_report_that_fails_at_the_end_costs_neither_the_exit_code_nor_the_others(
    tmp_path, monkeypatch, capsys
):
    page, output = tmp_path / "pages" / "report.html", tmp_path / "report.json"

    def full(self, content, **more):
        if self.name.startswith(".report.html"):
            raise OSError(28, "No space left on device")
        return writes(self, content, **more)

    writes = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    code = run(["inspect", str(VICTIMS / "benign"), "--html", str(page), "--json", str(output)])
    assert code == 0
    assert "report.html is not written (No space left on device)" in capsys.readouterr().err
    assert report_of(output)["models"] and not page.exists()


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_verdict(tmp_path, monkeypatch, capsys):
    occupied = tmp_path / "file"
    occupied.write_text("", encoding="utf-8")
    monkeypatch.setenv("UNHORSE_CACHE", str(occupied / "cache"))
    output = tmp_path / "report.json"
    assert run(["scan", str(VICTIMS / "infected"), "--effort", "quick", "--json", str(output)]) == 1
    report = report_of(output)
    assert report["models"][0]["verdict"] == "INFECTED"
    assert "cannot be written" in report["warnings"][0] and "UNHORSE_CACHE" in report["warnings"][0]


def test_a_fault_of_ours_names_our_file_and_blames_no_model(tmp_path, monkeypatch):
    def broken(*given, **named):
        raise FileNotFoundError(2, "No such file or directory", "generalist.json")

    monkeypatch.setattr("unhorse.survey.make_scanner", broken)
    output = tmp_path / "report.json"
    assert run(["scan", str(VICTIMS / "benign"), "--json", str(output), "--no-cache"]) == 2
    reason = report_of(output)["models"][0]["reason"]
    assert "generalist.json" in reason and "not of the model" in reason and "survey.py:" in reason


def test_a_worker_that_died_is_no_fault_of_ours():
    words = jobs.internal_error("the scan", jobs.WorkerDied("its worker process died"))
    assert words == "the scan broke off: its worker process died"
