"""Trials: the resumable units of a benchmark. Each leaves one JSON file, named for a hash of its inputs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from unhorse import jobs


class Trial(Protocol):
    """One measurement; `name` is its result's file name."""

    @property
    def name(self) -> str: ...

    def __call__(self) -> dict[str, Any]: ...


def run_trials(trials: Sequence[Trial], folder: Path, *, workers: int = 1) -> list[dict[str, Any]]:
    """The results of all trials, those already in `folder` read from there; RuntimeError names one that
    failed.
    """
    todo = [trial for trial in trials if not (folder / trial.name).exists()]
    for outcome in jobs.track(folder.name, jobs.run(jobs.call, todo, workers=workers), len(todo)):
        if outcome.error is not None:
            raise RuntimeError(f"{outcome.item.name} failed, call again to go on: {outcome.error!r}")
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{outcome.item.name}.{os.getpid()}"
        draft.write_text(json.dumps(outcome.value), encoding="utf-8")
        draft.replace(folder / outcome.item.name)
        jobs.say(f"{outcome.item.name}: done")
    return [json.loads((folder / trial.name).read_text(encoding="utf-8")) for trial in trials]


def chosen_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def provenance() -> dict[str, Any]:
    """Commit, versions and device; dirty when what decides a number (code, specs, pins) is not committed."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    changed = git(
        "status", "--porcelain", "--", "src", "benchmarks/specs", "pyproject.toml", "constraints.txt"
    )
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changed),
        "versions": {"unhorse": metadata.version("unhorse"), "torch": torch.__version__},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu ({platform.machine()}, {os.cpu_count()} cores)",
    }
