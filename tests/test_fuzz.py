"""Damaged files end in one of the known ways; the whole run is `scripts/fuzz --ci`, this is a share of it."""

from __future__ import annotations

import io
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unhorse.checks.inspection import check_task
from unhorse.rules import LoadRefused
from unhorse.sandbox.confinement import Limits

TESTS = Path(__file__).parent
FUZZ = runpy.run_path(str(TESTS.parent / "scripts" / "fuzz"))
MUTANTS = runpy.run_path(str(TESTS / "fuzz_tasks.py"))
SEEDS = sorted(path.name for path in FUZZ["SEEDS"].iterdir())
ROUNDS = 40
REFUSED = {"text.pkl": "LD201", "arrays.joblib": "LD201", "objects.npy": "LD201", "tiny.mlmodel": "LD235"}
"""Seeds of formats that are looked into and not opened, and by which rule."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    running = FUZZ["Bench"]()
    yield running
    running.close()


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Any]:
    """Starts a bench whose static check has a fault."""
    started: list[Any] = []

    def start(check: str, cpu_seconds: int = 60) -> Any:
        path = tmp_path / "planted.py"
        path.write_text(
            "import runpy\nfrom unhorse.checks import inspection\n"
            f"def check_task(files, options):\n    {check}\n"
            f"inspection.check_task = check_task\nTASKS = runpy.run_path({str(FUZZ['TASKS'])!r})['TASKS']\n"
        )
        started.append(FUZZ["Bench"](path, Limits(cpu_seconds=cpu_seconds, wall_seconds=60)))
        return started[-1]

    yield start
    for running in started:
        running.close()


def outcomes(documents: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for document in documents:
        total.update(document["outcomes"])
    return total


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_is_a_file_that_passes_the_checks(name):
    if name.endswith(".h5") or name.endswith(".keras"):
        pytest.importorskip("h5py", reason="Keras keeps its weights in HDF5")
    content = io.BytesIO((FUZZ["SEEDS"] / name).read_bytes())
    if name in REFUSED:
        with pytest.raises(LoadRefused) as refusal:
            check_task([content], {})
        assert refusal.value.rule == REFUSED[name]
        return
    document, _ = check_task([content], {})
    assert document["format"] != "UNKNOWN"


@pytest.mark.parametrize("name", SEEDS)
def test_a_mutant_is_the_same_each_time_and_mostly_another_file(name):
    seed = (FUZZ["SEEDS"] / name).read_bytes()
    mutants = [MUTANTS["mutant"](name, seed, number) for number in range(20)]
    assert mutants == [MUTANTS["mutant"](name, seed, number) for number in range(20)]
    assert sum(mutant != seed for mutant in mutants) >= 18
    assert len(set(mutants)) >= 15


@pytest.mark.parametrize("name", SEEDS)
def test_a_damaged_file_ends_in_a_known_way(name, bench):
    documents = list(bench.check(name, 10**6, ROUNDS))
    assert [document["broken"] for document in documents] == [[]]
    found = outcomes(documents)
    assert found.total() == ROUNDS
    assert "broken" not in found
    assert len(found) >= 2
    assert found["accepted"] < ROUNDS


def test_an_error_that_nobody_expected_is_reported_with_the_name_of_the_mutant(planted):
    faulty = planted("if files[0].getvalue()[-1] % 3 == 0: raise ZeroDivisionError('planted')")
    (document,) = faulty.check("tiny.onnx", 0, 40)
    assert 0 < document["outcomes"]["broken"] < 40
    assert document["broken"][0].startswith("tiny.onnx:")
    assert "ZeroDivisionError: planted (planted.py:4)" in document["broken"][0]


def test_a_mutant_that_never_ends_is_stopped_and_the_others_go_on(planted):
    faulty = planted("while options == {} and len(files[0].getvalue()) < 700: pass", cpu_seconds=1)
    documents = list(faulty.check("tiny.onnx", 0, 25))
    assert outcomes(documents).total() == 25
    assert outcomes(documents)["stopped: CPU time"] > 0
    assert any("CPU time" in line and line.startswith("tiny.onnx:") for line in documents[0]["broken"])


def test_a_crash_is_contained_and_counted(planted):
    faulty = planted("import os; os.abort()")
    documents = list(faulty.check("tiny.onnx", 0, 40))
    assert outcomes(documents) == {"stopped: crash": 40}


def test_a_run_goes_on_where_it_was(tmp_path):
    tally = FUZZ["Tally"](tmp_path)
    tally.add("check 0", [{"outcomes": {"LD203": 1000}, "broken": []}])
    resumed = FUZZ["Tally"](tmp_path)
    FUZZ["fuzz"](1020, 0, resumed, 1)
    assert sum(resumed.state["outcomes"].values()) == 1020
    assert resumed.state["done"] == {"check 0": 1, "check 1000": 1}
    assert FUZZ["Tally"](tmp_path).state == resumed.state


@pytest.mark.slow  # scripts/fuzz --ci opens 3,000
@pytest.mark.parametrize("name", ["tiny.pt", "tiny.torchscript"])
def test_a_damaged_file_is_opened_whole_in_a_known_way(name, loader):
    found: Counter[str] = Counter()
    for number in range(12):
        with (FUZZ["SEEDS"] / name).open("rb") as seed:
            parcel = loader.run("load_one", [seed], {"name": name, "number": 10**6 + number})
        assert parcel.document["broken"] == []
        found.update(parcel.document["outcomes"])
    assert found.total() == 12
    assert found["accepted"] < 12


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A heavy server that has not imported Keras and ONNX Runtime, which would take longer than the test."""
    from unhorse.sandbox.server import Server

    path = tmp_path_factory.mktemp("loader") / "tasks.py"
    path.write_text(
        f"import runpy\nTASKS = runpy.run_path({str(FUZZ['TASKS'])!r}, run_name='plain')['TASKS']\n"
    )
    running = Server(heavy=True, arguments=["--tasks", str(path)])
    yield running
    running.close()
