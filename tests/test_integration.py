"""The Action, the hooks, the image and the commands in the documentation use flags that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from test_report import infected, refused
from unhorse.cli import app
from unhorse.report import Report, dumps
from unhorse.rulebook import RULES

yaml = pytest.importorskip("yaml", reason="PyYAML reads the Action and the hooks")
ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "integration.md").read_text(encoding="utf-8")
WORDS = {"HEIGHT": "32", "WIDTH": "32", "MEAN": "0.5", "STD": "0.25", "NAME": "resnet18", "RULE": "LD205"}


def parsed(command: str) -> dict:
    """The arguments of an `unhorse` command line; fails where the command or a flag does not exist."""
    first, *tokens = shlex.split(command)
    assert first == "unhorse", command
    _, bound, unused, *_ = app.parse_known_args([WORDS.get(token, token) for token in tokens])
    assert not unused, f"{unused} in {command}"
    return bound.arguments


def action() -> dict:
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def script(name: str) -> str:
    (step,) = (step for step in action()["runs"]["steps"] if step.get("name") == name)
    return step["run"]


# --- commands -----------------------------------------------------------------------------------------------


def documented() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    inside = [line[line.index(" unhorse ") + 1 :] for line in lines if line.startswith("docker run")]
    scripts = re.findall(r"^    - (unhorse .*)$", DOCUMENT, re.MULTILINE)
    return [line for line in lines if line.startswith("unhorse ")] + inside + scripts


def remedies() -> list[str]:
    commands = (rule.remedy.partition(", ")[0] for rule in RULES.values())
    return [command for command in commands if command.startswith("unhorse ")]


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_is_one(command):
    assert parsed(command)["paths"]


@pytest.mark.parametrize("command", remedies())
def test_a_remedy_is_a_command(command):
    assert parsed(command)


def test_there_are_commands_to_test():
    assert len(documented()) >= 8 and len(remedies()) >= 5


@pytest.mark.parametrize("command", ["unhorse inspekt a.pt", "unhorse inspect a.pt --sarff x"])
def test_a_command_that_does_not_exist_is_noticed(command):
    with pytest.raises(CycloptsError, match="nknown"):
        assert parsed(command)["paths"]


# --- hooks --------------------------------------------------------------------------------------------------


def test_hooks_call_commands_that_exist_and_take_no_flag_from_a_file_name():
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert [hook["id"] for hook in hooks] == ["unhorse-inspect", "unhorse-scan"]
    for hook in hooks:
        names = ["--config=evil.pt", "a.pt"]
        arguments = parsed(shlex.join([*shlex.split(hook["entry"]), *hook["args"], *names]))
        assert arguments["paths"] == tuple(map(Path, names)) and "config" not in arguments
        assert re.search(hook["files"], "models/net.safetensors") and re.search(hook["files"], "a b.pt2")
        assert not re.search(hook["files"], "script.pt.py")


# --- the Action ---------------------------------------------------------------------------------------------


def run_step(tmp_path: Path, code: int, **inputs: str) -> tuple[int, list[str], str]:
    """Runs the step with an `unhorse` that writes its arguments down: exit status, arguments, outputs."""
    fake = tmp_path / "unhorse" / "bin" / "unhorse"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/seen"\nexit {code}\n')
    fake.chmod(0o755)
    defaults = {name: str(value.get("default", "")) for name, value in action()["inputs"].items()}
    environment = {
        "PATH": os.environ["PATH"],
        "RUNNER_TEMP": str(tmp_path),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "COMMAND": defaults["command"],
        "PATHS": defaults["paths"],
        "FAIL_ON": defaults["fail-on"],
        "ARGUMENTS": defaults["args"],
        "REPORTS": defaults["reports"],
    }
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script("Run unhorse")],
        env=environment | inputs,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    seen, output = tmp_path / "seen", tmp_path / "output"
    lines = seen.read_text().splitlines() if seen.exists() else []
    return done.returncode, lines, output.read_text() if output.exists() else ""


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_action_keeps_the_exit_code_for_later(tmp_path, code):
    status, arguments, output = run_step(tmp_path, code)
    assert (status, output) == (0, f"exit-code={code}\n")
    assert parsed(shlex.join(["unhorse", *arguments]))["paths"] == (Path(),)


def test_inputs_of_the_action_are_never_code(tmp_path):
    paths = "a b.pt\n\n$(touch owned)\n--config=x\n`touch owned`; touch owned"
    status, arguments, _ = run_step(tmp_path, 0, PATHS=paths, ARGUMENTS="--jobs 2 $(touch owned)")
    assert status == 0 and not (tmp_path / "owned").exists()
    place = arguments.index("--")
    assert arguments[place + 1 :] == ["a b.pt", "$(touch owned)", "--config=x", "`touch owned`; touch owned"]
    assert arguments[:3] == ["inspect", "--fail-on", "high"] and "$(touch" in arguments[:place]


def test_another_command_is_refused(tmp_path):
    status, arguments, _ = run_step(tmp_path, 0, COMMAND="demo; touch owned")
    assert status == 4 and arguments == [] and not (tmp_path / "owned").exists()


def test_no_input_is_pasted_into_a_script_and_other_actions_are_pinned():
    steps = action()["runs"]["steps"]
    assert not [step for step in steps if "${{" in step.get("run", "")]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.search(r"@v\d+(\.\d+\.\d+)?$", name) for name in used)
    assert any(re.fullmatch(r"github/codeql-action/upload-sarif@v\d+\.\d+\.\d+", name) for name in used)


def test_inputs_that_steps_read_are_declared():
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    declared = set(action()["inputs"])
    assert set(re.findall(r"inputs\.([a-z-]+)", text)) == declared
    settings = DOCUMENT.split("## GitHub Actions")[1].split("## pre-commit")[0]
    assert {"paths", "command", "fail-on", "upload"} <= declared and "fail-on: high" in settings


def test_the_summary_of_the_job_escapes_names(tmp_path):
    evil = "<script>alert(1)</script>|`x`\n# owned"
    (tmp_path / "report.json").write_text(dumps(Report((infected(names=(evil,) * 3), refused()))))
    python = tmp_path / "unhorse" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "summary").touch()
    names = {"RUNNER_TEMP": str(tmp_path), "REPORTS": str(tmp_path)}
    environment = os.environ | names | {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    command = ["bash", "-eo", "pipefail", "-c", script("Write the summary of the job")]
    subprocess.run(command, env=environment, check=True)
    summary = (tmp_path / "summary").read_text()
    assert "1 INFECTED, 1 NOT SCANNED" in summary and "<td>LD205</td>" in summary
    assert "<script>" not in summary and "&lt;script&gt;" in summary and "\n# owned" not in summary


# --- the image ----------------------------------------------------------------------------------------------


def test_the_image_runs_as_nobody_special_and_copies_only_what_it_needs():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith(("#", " "))]
    assert ("FROM", "python:3.11-slim") in map(tuple, words)
    assert [rest for name, rest in words if name == "USER"] == ["unhorse"]
    assert [rest for name, rest in words if name == "ENTRYPOINT"] == ['["unhorse"]']
    copied = {item for name, rest in words if name == "COPY" for item in rest.split()[:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept and all((ROOT / item).exists() for item in copied)
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")
