"""Files are opened in a child of a warm server: what comes back, how fast, and what is left afterwards."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import server as serving
from unhorse.sandbox.confinement import LimitExceeded, Limits
from unhorse.sandbox.server import Server, close_servers, run
from unhorse.sandbox.tasks import LIGHT, TASKS

TASK_FILE = Path(__file__).with_name("server_tasks.py")
ARGUMENTS = ["--tasks", str(TASK_FILE)]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no restricted processes")


@pytest.fixture(scope="module")
def light() -> Iterator[Server]:
    running = Server(heavy=False, arguments=ARGUMENTS)
    yield running
    running.close()


@pytest.fixture(scope="module")
def heavy() -> Iterator[Server]:
    running = Server(heavy=True, arguments=ARGUMENTS)
    yield running
    running.close()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`run` offers the tasks of the tests."""
    close_servers()
    monkeypatch.setattr(serving, "Server", functools.partial(Server, arguments=ARGUMENTS))
    yield
    close_servers()


def alive(process: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon(statement: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not statement() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(statement())


def test_what_a_task_returns_comes_home_with_the_tier(light, tmp_path):
    (tmp_path / "a").write_text("first")
    (tmp_path / "b").write_text("second")
    with (tmp_path / "a").open("rb") as first, (tmp_path / "b").open("rb") as second:
        parcel = light.run("read_all", [first, second], {"echo": ["ü", None, 1.5]})
    assert parcel.document["texts"] == ["first", "second"]
    assert parcel.document["echo"] == ["ü", None, 1.5]
    assert parcel.document["torch"] is False
    assert parcel.blob == b"blob"
    assert parcel.tier in ("landlock+seccomp+limits", "seccomp+limits", "landlock+limits", "limits")
    assert 0 < parcel.seconds < 60


def test_each_request_has_a_process_of_its_own_and_none_is_the_server(light):
    seen = [light.run("read_all", [], {}).document for _ in range(3)]
    assert len({document["process"] for document in seen}) == 3
    assert {document["server"] for document in seen} == {light.process.pid}


def test_a_file_is_read_from_its_start_and_the_caller_keeps_its_position(light, tmp_path):
    (tmp_path / "a").write_text("content")
    with (tmp_path / "a").open("r+b", buffering=0) as stream:
        stream.seek(3)
        assert light.run("read_all", [stream], {}).document["texts"] == ["content"]
        assert stream.tell() == 3


def test_progress_reaches_the_caller_line_by_line(light):
    lines: list[str] = []
    light.run("count_down", [], {}, progress=lines.append)
    assert lines == ["3 to go", "2 to go", "1 to go"]


def test_exceptions_keep_their_type_and_words(light):
    with pytest.raises(LoadRefused) as refused:
        light.run("refuse", [], {})
    assert (refused.value.rule, refused.value.reason) == ("LD205", "it calls os.system")
    assert refused.value.remedy == "do not use it"
    with pytest.raises(LoadFailed) as failed:
        light.run("fail", [], {})
    assert (failed.value.reason, failed.value.remedy) == ("it is cut off", "download it again")
    with pytest.raises(LoadFailed, match="KeyError") as broken:
        light.run("break_down", [], {})
    assert "\n" not in broken.value.reason


def test_what_a_child_prints_goes_nowhere(light, capfd):
    assert light.run("chatter", [], {}).document == {"answered": True}
    assert capfd.readouterr() == ("", "")


def test_a_large_blob_arrives_whole(light):
    blob = light.run("make_blob", [], {"size": 20 * 2**20}).blob
    assert len(blob) == 20 * 2**20
    assert blob[-256:] == bytes(range(256))


def test_a_folder_of_many_files_arrives_whole_and_more_are_refused(ours, tmp_path):
    with ExitStack() as opened:
        files = [opened.enter_context((tmp_path / str(number)).open("w+b")) for number in range(240)]
        for number, stream in enumerate(files):
            stream.write(str(number).encode())
            stream.flush()
        texts = run("read_all", files, {"imported": "sqlite3"}, heavy=False).document["texts"]
        assert texts == [str(number) for number in range(240)]
        with pytest.raises(LoadRefused, match="LD208 241 files"):
            run("read_all", [*files, files[0]], {}, heavy=False)


def test_a_server_has_one_thread_or_its_children_would_wait_for_lost_ones(heavy):
    heavy.run("read_all", [], {})
    assert len(list(Path(f"/proc/{heavy.process.pid}/task").iterdir())) == 1


def test_large_options_arrive_whole(light):
    text = "x" * 2**21
    assert light.run("read_all", [], {"echo": text}).document["echo"] == text


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="CPU time is looked up in /proc")
def test_a_light_server_answers_quickly_and_then_at_once():
    firsts: list[float] = []
    while len(firsts) < 4 and min(firsts, default=1) >= 0.4:  # a busy machine is given a few tries
        started = time.perf_counter()
        quick = Server(heavy=False, arguments=ARGUMENTS)
        quick.run("read_all", [], {})
        # on a busy machine most of the time is others'
        firsts.append(min(time.perf_counter() - started, _cpu_seconds(quick.process.pid)))
        laters = [quick.run("read_all", [], {}).seconds for _ in range(20)]
        quick.close()
    assert min(firsts) < 0.4, firsts
    assert min(laters) < 0.02, laters


def test_torch_computes_on_threads_in_a_restricted_child(heavy):
    parcels = [heavy.run("compute", [], {"threads": threads}) for threads in (1, 2)]
    assert [parcel.document["threads"] for parcel in parcels] == [1, 2]
    images = torch.arange(16 * 3 * 64 * 64, dtype=torch.float32).view(16, 3, 64, 64) / 1e5
    sums = 2 * torch.nn.functional.conv2d(images, torch.ones(8, 3, 3, 3)).sum((2, 3))
    for parcel in parcels:
        assert torch.allclose(load(parcel.blob)["sums"], sums, rtol=1e-4)


def test_a_heavy_server_that_is_warm_answers_at_once(heavy):
    heavy.run("read_all", [], {})
    seconds = [heavy.run("read_all", [], {}).seconds for _ in range(20)]
    assert min(seconds) < 0.06, seconds


def test_a_tensor_past_the_limit_of_memory_is_named_so_and_one_below_is_not(heavy):
    limits = Limits(memory=2**28)
    assert heavy.run("allocate_tensor", [], {"bytes": 2**27}, limits=limits).document == {"mean": 0.0}
    with pytest.raises(LimitExceeded) as failure:
        heavy.run("allocate_tensor", [], {"bytes": 2**29}, limits=limits)
    assert failure.value.limit == "memory"


def test_servers_start_when_asked_for_and_end_when_closed(ours):
    assert not serving._servers
    server = run("read_all", [], {}, heavy=False).document["server"]
    assert run("read_all", [], {}, heavy=False).document["server"] == server
    close_servers()
    assert not alive(server)
    assert run("read_all", [], {}, heavy=False).document["server"] != server


def test_a_server_that_died_is_replaced(ours):
    server = run("read_all", [], {}, heavy=False).document["server"]
    os.kill(server, signal.SIGKILL)
    assert run("read_all", [], {}, heavy=False).document["server"] != server
    assert soon(lambda: not alive(server))


def test_a_server_that_cannot_start_is_an_error_with_a_remedy(monkeypatch):
    close_servers()
    monkeypatch.setattr(serving, "Server", functools.partial(Server, arguments=["--tasks", "/nonexistent"]))
    with pytest.raises(LoadFailed, match="does not start.*unhorse.sandbox.worker"):
        run("read_all", [], {}, heavy=False)


def test_a_task_that_is_not_listed_is_not_run(light):
    with pytest.raises(LoadFailed, match="KeyError: 'os:system'"):
        light.run("os:system", [], {})


def test_tasks_are_functions_of_ours():
    homes = ("unhorse.checks.", "unhorse.loading.")
    assert all(place.startswith(homes) and place.count(":") == 1 for place in TASKS.values())
    assert set(TASKS) >= LIGHT


def test_many_threads_share_a_server(ours):
    with ThreadPoolExecutor(8) as pool:
        documents = list(
            pool.map(lambda echo: run("read_all", [], {"echo": echo}, heavy=False).document, range(40))
        )
    assert [document["echo"] for document in documents] == list(range(40))
    assert len({document["server"] for document in documents}) == 1


def test_a_thread_that_ends_takes_no_server_with_it(ours):
    found: list[int] = []
    thread = threading.Thread(
        target=lambda: found.append(run("read_all", [], {}, heavy=False).document["server"])
    )
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert run("read_all", [], {}, heavy=False).document["server"] == found[0]


def _server_of_this_process(answers: Any) -> None:
    answers.put(run("read_all", [], {}, heavy=False).document["server"])
    close_servers()


def test_a_forked_process_starts_a_server_of_its_own_and_spares_its_parents(ours):
    server = run("read_all", [], {}, heavy=False).document["server"]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    forked = context.Process(target=_server_of_this_process, args=(answers,))
    forked.start()
    assert answers.get() != server
    forked.join()
    assert forked.exitcode == 0
    assert run("read_all", [], {}, heavy=False).document["server"] == server
    answers.close()


def test_a_child_does_not_outlive_its_time(light):
    seen: list[str] = []
    with pytest.raises(LimitExceeded, match=r"longer than 0\.2 seconds") as failure:
        light.run("wait", [], {"seconds": 100}, limits=Limits(wall_seconds=0.2), progress=seen.append)
    assert failure.value.limit == "wall time"
    assert soon(lambda: not alive(int(seen[0])))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("end", ["kill", "return"])
def test_server_and_child_die_with_the_process_that_uses_them(end):
    code = f"""
import sys, threading, time
from unhorse.sandbox.server import Server
server = Server(heavy=False, arguments=["--tasks", {str(TASK_FILE)!r}])
arguments = ("wait", [], {{"seconds": 100}})
print(server.process.pid, flush=True)
report = {{"progress": lambda text: print(text, flush=True)}}
threading.Thread(target=server.run, args=arguments, kwargs=report, daemon=True).start()
time.sleep(100 if {end!r} == "kill" else 1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as user:
        assert user.stdout
        server, child = int(user.stdout.readline()), int(user.stdout.readline())
        assert alive(server)
        assert alive(child)
        if end == "kill":
            user.kill()
        user.wait()
    assert soon(lambda: not alive(server))
    assert soon(lambda: not alive(child))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked up in /proc")
@pytest.mark.parametrize("requests", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_parent_does_not_grow_and_leaks_no_file(requests, light):
    tasks = ("make_blob", "refuse", "break_down", "wait")
    options = {"size": 2**20, "seconds": 100}
    light.run("make_blob", [], options)
    before, files = _resident(), len(list(Path("/proc/self/fd").iterdir()))
    for number in range(requests):
        limits = Limits(wall_seconds=0.02 if number % 4 == 3 else 60)
        try:
            light.run(tasks[number % 4], [], options, limits=limits)
        except (LoadRefused, LoadFailed):
            assert number % 4 != 0
    assert _resident() - before < 50 * 2**20
    assert len(list(Path("/proc/self/fd").iterdir())) == files
