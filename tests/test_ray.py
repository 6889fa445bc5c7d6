"""Jobs as tasks of Ray: the same outcomes as in processes here; what one engine began another finishes."""

import ast
import os
import signal
import socket
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

import unhorse
from test_zoo import hashes, spec
from unhorse import jobs
from unhorse.cli.options import EngineOptions
from unhorse.zoo import build, members

if find_spec("ray") is None:  # not importorskip: unhorse sets Ray's environment before it imports it
    pytest.skip("needs the extra unhorse[ray]", allow_module_level=True)
SOURCE = Path(unhorse.__file__).parent


class Stubborn(Exception):
    """An error that cannot be pickled and read again."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)


def square(number: int) -> int:
    if number == 3:
        raise ValueError("three is refused")
    if number == 4:
        raise Stubborn("four is refused", "take five")
    return number * number


def logged(folder: Path, number: int) -> int:
    """The square; 2 kills its worker the first time. Every start and every end is a line in a file."""
    with (folder / "started").open("a") as log:
        log.write(f"{number}\n")
    time.sleep(0.1)
    if number == 2 and (folder / "started").read_text().split().count("2") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder / "ended").open("a") as log:
        log.write(f"{number}\n")
    return number * number


def always_die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def surroundings(_: int) -> dict[str, object]:
    import torch

    names = ("CUDA_VISIBLE_DEVICES", "UNHORSE_CACHE")
    return {
        "folder": str(Path.cwd()),
        "threads": torch.get_num_threads(),
        **{name: os.environ.get(name) for name in names},
    }


def told(outcomes) -> dict[object, tuple[object, str]]:
    """What every item came to; that none came twice is part of it."""
    outcomes = list(outcomes)
    found = {outcome.item: (outcome.value, repr(outcome.error)) for outcome in outcomes}
    assert len(found) == len(outcomes)
    return found


@pytest.fixture(scope="module")
def on_ray():
    """A cluster of our own, of two workers, for all that follows; inside engine("local") jobs run here."""
    with jobs.engine("ray", address="local"):
        assert len(list(jobs.run(square, [1, 2], workers=2))) == 2
        yield


# --- without a cluster


def test_ray_is_imported_by_one_file_and_only_when_it_is_asked_for():
    importers = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.partition(".")[0] == "ray" for name in names):
                importers.add(path.name)
    assert importers == {"ray_jobs.py"}
    top = ast.parse((SOURCE / "jobs.py").read_text(encoding="utf-8")).body
    assert "ray_jobs" not in "".join(
        ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom)
    )


def test_a_missing_ray_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "unhorse.ray_jobs", raising=False)
    with pytest.raises(ValueError, match="pip install ray"), jobs.engine("ray"):
        pass


def test_an_address_where_no_cluster_answers_is_an_error_within_seconds():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        refusal = pytest.raises(ConnectionError, match=f"no Ray cluster answers at {address}")
        with refusal, jobs.engine("ray", address=address):
            pass
        assert time.monotonic() - started < 20  # Ray itself gives up after five minutes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "dask"}, "dask.*local or ray"),
        ({"name": "local", "address": "auto"}, "for Ray"),
        ({"name": "local", "gpus_per_job": 0.5}, "for Ray"),
        ({"name": "ray", "address": "nowhere"}, "'nowhere' is no address.*host:port"),
        ({"name": "ray", "gpus_per_job": 1.5}, "1.5 GPUs"),
        ({"name": "ray", "cpus_per_job": 0}, "0 CPUs"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, named):
    with pytest.raises(ValueError, match=named), jobs.engine(**settings):
        pass


def test_the_flags_ask_for_two_jobs_here_and_for_all_that_have_room_on_a_cluster(monkeypatch):
    opened = []

    def engine(name, **settings):
        opened.append((name, settings["address"], settings["gpus_per_job"]))
        return jobs.nullcontext()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(jobs, "engine", engine)
    asked = []
    for options in (
        EngineOptions(),
        EngineOptions(jobs=5),
        EngineOptions(engine="ray"),
        EngineOptions(engine="ray", address="auto", gpus_per_job=0.25),
        EngineOptions(engine="ray", address="auto", jobs=3),
    ):
        with options.open() as workers:
            asked.append(workers)
    assert asked == [2, 5, 2, 0, 3]
    assert opened[0] == ("local", None, 0.0)
    assert opened[3] == ("ray", "auto", 0.25)


def test_what_dies_is_sent_again_and_given_up_after_rounds_that_finish_nothing(monkeypatch, capsys):
    rounds = []

    def one_round(function, items, workers):
        rounds.append((list(items), workers))
        died = [item for item in items if item in (2, 4) and (item == 4 or len(rounds) < 3)]
        yield from (jobs.Outcome(item, function(item), None) for item in items if item not in died)
        return [jobs.Outcome(item, None, RuntimeError("killed")) for item in died]

    import unhorse.ray_jobs

    monkeypatch.setattr(unhorse.ray_jobs, "cluster", lambda address, **_: jobs.nullcontext(one_round))
    with jobs.engine("ray"):
        outcomes = jobs.run(square, [1, 2, 4], workers=1, attempts=2)
    assert told(outcomes) == {1: (1, "None"), 2: (4, "None"), 4: (None, "RuntimeError('killed')")}
    # 2 comes through in the third round; from then on nothing does
    assert [items for items, _ in rounds] == [[1, 2, 4], [2, 4], [2, 4], [4], [4]]
    assert {workers for _, workers in rounds} == {1}
    assert "2 of 3 jobs are started again; of the first, killed" in capsys.readouterr().err
    assert [outcome.value for outcome in jobs.run(square, [5, 6])] == [25, 36]
    assert len(rounds) == 5  # outside of the context they run here


# --- with one


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_outcomes_on_ray_are_those_of_processes_here():
    there = told(jobs.run(square, range(1, 7), workers=2))
    with jobs.engine("local"):
        here = told(jobs.run(square, range(1, 7), workers=2))
    assert there == here
    assert there[5] == (25, "None")
    assert there[3] == (None, "ValueError('three is refused')")
    assert there[4] == (None, "RuntimeError('Stubborn: four is refused')")


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_a_killed_worker_loses_no_job_and_doubles_none(tmp_path):
    outcomes = told(jobs.run(partial(logged, tmp_path), range(6), workers=2))
    assert outcomes == {number: (number * number, "None") for number in range(6)}
    assert sorted((tmp_path / "started").read_text().split()) == ["0", "1", "2", "2", "3", "4", "5"]
    assert sorted((tmp_path / "ended").read_text().split()) == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_a_job_that_always_kills_its_worker_is_given_up_and_the_others_finish(capsys):
    outcomes = told(jobs.run(always_die, [1, 2, 3], workers=2, attempts=2))
    assert (outcomes[1], outcomes[3]) == ((1, "None"), (3, "None"))
    assert "its worker process died" in outcomes[2][1]
    said = capsys.readouterr()
    assert "started again" in said.err
    assert said.out == ""  # what a program reads; Ray would write of the death there


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_a_job_works_in_our_folder_with_our_settings_its_threads_and_no_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNHORSE_CACHE", "elsewhere")
    (outcome,) = jobs.run(surroundings, [1], workers=1)
    expected = {
        "folder": str(tmp_path),
        "threads": 1,
        "CUDA_VISIBLE_DEVICES": "",
        "UNHORSE_CACHE": "elsewhere",
    }
    assert outcome.value == expected


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
def test_what_nobody_asks_for_any_more_is_cancelled(tmp_path):
    outcomes = jobs.run(partial(logged, tmp_path), [0] + [3] * 50, workers=2)
    next(outcomes)
    outcomes.close()
    time.sleep(1.0)
    started = (tmp_path / "started").read_text().split()
    time.sleep(1.0)
    assert (tmp_path / "started").read_text().split() == started
    assert len(started) < 40


@pytest.mark.slow
@pytest.mark.usefixtures("on_ray")
@pytest.mark.parametrize(("first", "second"), [("local", None), (None, "local")], ids=["to-ray", "from-ray"])
def test_a_population_begun_on_one_engine_is_finished_on_the_other_with_identical_weights(
    tmp_path, monkeypatch, first, second
):
    whole = spec().scaled(2)
    with jobs.engine("local"):
        build(whole, tmp_path / "undisturbed")

    def interrupted(label, items, total):
        for number, item in enumerate(items):
            if "victims" in label and number == 1:
                raise KeyboardInterrupt
            yield item

    def on(engine):
        return jobs.engine(engine) if engine else jobs.nullcontext()

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), on(first):
        patched.setattr(jobs, "track", interrupted)
        build(whole, tmp_path / "moved", workers=2)
    before = len(members(tmp_path / "moved"))
    assert 1 <= before < 8
    with on(second):
        counts = build(whole, tmp_path / "moved", workers=2)
    assert counts == {"accepted": 8, "rejected": 0, "trained_now": 8 - before}
    assert hashes(tmp_path / "moved") == hashes(tmp_path / "undisturbed")
