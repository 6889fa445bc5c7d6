"""Jobs in processes: each has its outcome, whatever happens to the others."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from unhorse import jobs


class Stubborn(Exception):
    """An error that cannot be pickled and read again."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)


def square(number: int) -> int:
    """The square, late for small numbers; 3 and 4 are errors."""
    time.sleep(0.02 * (5 - number))
    if number == 3:
        raise ValueError("three is refused")
    if number == 4:
        raise Stubborn("four is refused", "take five")
    return number * number


def nothing() -> None:
    """What the workers of these tests do at their start: importing torch takes them seconds."""


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    monkeypatch.setattr(jobs, "_single_thread", nothing)


def die_once(marker: Path, number: int) -> int:
    if number == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def always_die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_has_its_outcome_and_an_exception_is_one(workers):
    outcomes = {outcome.item: outcome for outcome in jobs.run(square, range(1, 6), workers=workers)}
    values = {item: outcome.value for item, outcome in outcomes.items() if outcome.error is None}
    assert values == {1: 1, 2: 4, 5: 25}
    assert repr(outcomes[3].error) == "ValueError('three is refused')"
    assert "four is refused" in str(outcomes[4].error)  # an error that cannot travel takes none with it


def test_a_killed_worker_loses_no_job_and_its_own_is_run_again(tmp_path):
    marker = tmp_path / "died"
    outcomes = list(jobs.run(partial(die_once, marker), range(6), workers=2))
    assert marker.exists()
    assert sorted(outcome.value for outcome in outcomes) == [0, 1, 4, 9, 16, 25]
    assert all(outcome.error is None for outcome in outcomes)


def test_a_job_that_always_kills_its_worker_is_given_up_and_the_others_finish():
    outcomes = {outcome.item: outcome for outcome in jobs.run(always_die, [1, 2], workers=2, attempts=2)}
    assert outcomes[1].value == 1
    assert "worker process died" in str(outcomes[2].error)


def test_outcomes_come_one_by_one():
    done = []
    for outcome in jobs.run(lambda number: done.append(number), [1, 2, 3]):
        assert done[-1] == outcome.item
        break
    assert done == [1]


def test_progress_says_how_far_it_is_and_when_it_ends(capsys, monkeypatch):
    now = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with jobs.progress("victims", 4) as step:
        step()
        step()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "victims: 1/4, 2.0 a minute, ETA 0:01:30"
    assert second == "victims: 2/4, 2.0 a minute, ETA 0:01:00"


def test_progress_is_quiet_between_intervals_but_for_the_last_step(capsys):
    assert list(jobs.track("steps", range(50), 50)) == list(range(50))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("steps: 50/50") and line.endswith("ETA 0:00:00")
