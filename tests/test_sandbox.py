"""Hostile code that already runs gets nothing out of the restricted process, and its end is named."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from unhorse.rules import LoadFailed
from unhorse.sandbox import landlock, seccomp
from unhorse.sandbox.confinement import LimitExceeded, Limits, Tier, readable_paths
from unhorse.sandbox.server import Server

PAYLOADS = Path(__file__).with_name("sandbox_payloads.py")
X86_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"
pytestmark = pytest.mark.skipif(not X86_LINUX, reason="the payloads are written for Linux on x86_64")
SMALL = Limits(memory=96 * 2**20, cpu_seconds=1, wall_seconds=5, document=2**20, blob=2**20)

REFUSED = (
    *("write_file", "append_to_file", "truncate_file", "delete_file", "rename_file", "link_symbolically"),
    *("link_hard", "make_folder", "make_pipe", "change_mode", "change_times", "write_temporary_file"),
    *("write_given_file", "read_secret", "read_passwords", "list_home", "list_root", "load_library"),
    *("read_parent_environment", "read_parent_memory", "read_server_environment", "connect"),
    *("send_datagram", "listen", "connect_locally", "fork", "fork_bomb", "run_shell", "run_program"),
    *("become_program", "run_from_memory", "kill_parent", "kill_server", "kill_all", "trace_server"),
    *("read_server_memory", "raise_limit", "outlive_parent", "new_namespace", "mount", "become_nobody"),
)
LIMITED = {
    **dict.fromkeys(("hoard_memory", "hoard_mapped_memory", "start_threads"), "memory"),
    **{"spin": "CPU time", "sleep": "wall time"},
    **dict.fromkeys(("overflow_stack", "segfault", "abort", "exit_silently", "break_off_blob"), "crash"),
    **dict.fromkeys(("answer_garbage", "claim_giant_document", "claim_giant_blob", "nest_deeply"), "answer"),
    **dict.fromkeys(("answer_no_object", "answer_not_a_number", "report_without_end"), "answer"),
    **dict.fromkeys(("fail_without_a_word", "refuse_by_unknown_rule", "announce_another_tier"), "answer"),
    **dict.fromkeys(("answer_large_document", "answer_large_blob"), "answer"),
}


class Outside(NamedTuple):
    """What the payloads aim at: files, two ports, a local socket."""

    options: dict[str, Any]
    doors: list[socket.socket]

    def is_untouched(self) -> bool:
        folder, file = Path(self.options["folder"]), Path(self.options["file"])
        facts = file.stat()
        assert list(folder.iterdir()) == []
        assert not Path("/dev/shm/unhorse-marker").exists()
        assert (file.read_text(), facts.st_mode & 0o777, facts.st_mtime > 1) == ("secret", 0o600, True)
        for door in self.doors:
            with pytest.raises(BlockingIOError):
                door.recv(1) if door.type == socket.SOCK_DGRAM else door.accept()
        return True


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    home = tmp_path_factory.mktemp("home")
    (home / "empty").mkdir()
    (home / "secret").write_text("secret")
    (home / "secret").chmod(0o600)
    zlib = next(Path(path) for path in sys.path if path.endswith("lib-dynload")) / "_struct"
    shutil.copy(next(zlib.parent.glob("_struct*.so")), home / "library.so")
    door, mailbox, local = socket.create_server(("127.0.0.1", 0)), _mailbox(), socket.socket(socket.AF_UNIX)
    local.bind(str(home / "local"))
    local.listen()
    options = {
        **{"home": str(home), "folder": str(home / "empty"), "file": str(home / "secret")},
        **{"library": str(home / "library.so"), "local": str(home / "local"), "parent": os.getpid()},
        **{"port": door.getsockname()[1], "datagram_port": mailbox.getsockname()[1]},
    }
    with door, mailbox, local:
        for listener in (door, mailbox, local):
            listener.setblocking(False)
        yield Outside(options, [door, mailbox, local])


def _mailbox() -> socket.socket:
    mailbox = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mailbox.bind(("127.0.0.1", 0))
    return mailbox


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server(heavy=False, arguments=["--tasks", str(PAYLOADS)])
    yield running
    running.close()


@pytest.mark.parametrize("payload", REFUSED)
def test_what_hostile_code_does_to_others_is_refused_and_has_no_effect(payload, server, outside):
    with Path(outside.options["file"]).open("rb") as stream, pytest.raises(LoadFailed) as failure:
        server.run(payload, [stream], outside.options, limits=SMALL)
    assert not isinstance(failure.value, LimitExceeded), failure.value
    assert any(
        word in failure.value.reason for word in ("Permission", "OSError", "Errno 9", "not allowed")
    ), failure.value
    assert outside.is_untouched()
    assert server.process.poll() is None


@pytest.mark.parametrize("payload", LIMITED)
def test_what_takes_too_much_or_lies_is_stopped_and_named(payload, server, outside):
    started = time.monotonic()
    limits = Limits(**{**SMALL.__dict__, "wall_seconds": 0.3 if payload == "sleep" else 5})
    with pytest.raises(LimitExceeded) as failure:
        server.run(payload, [], outside.options, limits=limits)
    assert (failure.value.rule, failure.value.limit) == ("LD231", LIMITED[payload])
    assert time.monotonic() - started < 10
    assert outside.is_untouched()
    assert server.process.poll() is None


def test_system_calls_outside_the_list_are_refused_or_do_not_exist(server, outside):
    with pytest.raises(LoadFailed, match=r"worked: \[\]"):
        server.run("forge_interrupts", [], outside.options, limits=SMALL)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("open_many", "Too many open files"),
        ("recurse", "RecursionError"),
        ("leave", "SystemExit: bye"),
        ("answer_nonsense", "TypeError"),
    ],
)
def test_an_error_inside_comes_out_as_a_failure_with_its_first_line(payload, reason, server, outside):
    with pytest.raises(LoadFailed, match=reason):
        server.run(payload, [], outside.options, limits=SMALL)


def test_no_child_is_left_when_all_are_done(server, outside):
    with pytest.raises(LimitExceeded):
        server.run("sleep", [], outside.options, limits=Limits(wall_seconds=0.1))
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    deadline = time.monotonic() + 5
    while children.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children.read_text() == ""


# weaker kernels


@pytest.fixture
def weakened(tmp_path: Path) -> Iterator[Any]:
    """Starts a server whose sandbox lacks something."""
    started: list[Server] = []

    def start(statement: str) -> Server:
        path = tmp_path / f"weaker{len(started)}.py"
        opening = "import runpy\nfrom unhorse.sandbox import landlock, seccomp\n"
        path.write_text(f"{opening}{statement}\nTASKS = runpy.run_path({str(PAYLOADS)!r})['TASKS']\n")
        started.append(Server(heavy=False, arguments=["--tasks", str(path)]))
        return started[-1]

    yield start
    for server in started:
        server.close()


WITHOUT = {
    Tier.CALLS: ("landlock.version = lambda: 0", ("write_file", "append_to_file", "connect", "fork")),
    Tier.FILES: ("seccomp.filter_calls = lambda: False", ("write_file", "read_secret", "connect")),
    Tier.LIMITS: ("landlock.version = lambda: 0; seccomp.filter_calls = lambda: False", ()),
}


@pytest.mark.parametrize("tier", WITHOUT)
def test_a_weaker_tier_is_named_and_still_refuses_what_it_can(tier, weakened, outside):
    statement, payloads = WITHOUT[tier]
    server = weakened(statement)
    assert server.run("do_nothing", [], {}).tier == tier
    for payload in payloads:
        with pytest.raises(LoadFailed, match=r"Errno 1\b|Errno 13"):
            server.run(payload, [], outside.options, limits=SMALL)
    with pytest.raises(LimitExceeded):
        server.run("hoard_memory", [], outside.options, limits=SMALL)
    assert outside.is_untouched()


@pytest.mark.parametrize("version", [1, 3, 4, 6])
def test_older_versions_of_landlock_confine_too(version, weakened, outside):
    if landlock.version() < version:
        pytest.skip(f"the kernel has version {landlock.version()} of Landlock")
    server = weakened(f"landlock.version = lambda: {version}; seccomp.filter_calls = lambda: False")
    payloads = ["write_file", "read_secret", "list_home", *(["connect"] if version >= 4 else [])]
    for payload in payloads:
        with pytest.raises(LoadFailed, match="Permission denied"):
            server.run(payload, [], outside.options, limits=SMALL)
    assert outside.is_untouched()


def test_home_is_not_among_what_may_be_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "me"))
    for path in ("people", "people/me", "people/me/packages"):
        monkeypatch.syspath_prepend(tmp_path / path)
    monkeypatch.syspath_prepend("relative")
    readable = readable_paths()
    assert str(tmp_path / "people/me/packages") in readable
    assert not {"/", "relative", str(tmp_path / "people"), str(tmp_path / "people/me")} & set(readable)


# the filter of both machines, interpreted

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
THREAD = 0x3D0F00  # what pthread_create passes to clone
CALLS = [  # x86_64, aarch64, arguments, answer
    (0, 63, (), ALLOW),
    (9, 222, (), ALLOW),
    (56, 220, (THREAD,), ALLOW),
    (56, 220, (17,), EPERM),
    (56, 220, (THREAD | 0x20000000,), EPERM),
    (435, 435, (), ENOSYS),
    (62, 129, (77, 9), ALLOW),
    (62, 129, (78, 9), EPERM),
    (62, 129, (0xFFFFFFFF, 9), EPERM),
    (234, 131, (77, 1, 6), ALLOW),
    (234, 131, (1, 1, 6), EPERM),
    (257, 56, (0, 0, 0o2000000), ALLOW),
    (257, 56, (0, 0, 1), EPERM),
    (257, 56, (0, 0, 0x40), EPERM),
    (157, 167, (15,), ALLOW),
    (157, 167, (4,), EPERM),
    (302, 261, (0, 7, 0, 5), ALLOW),
    (302, 261, (0, 7, 5, 0), EPERM),
    (302, 261, (0, 7, 5 << 32, 0), EPERM),
    (72, 25, (3, 3), ALLOW),
    (72, 25, (3, 8), EPERM),
    (41, 198, (), EPERM),
    (59, 221, (), EPERM),
    (101, 117, (), EPERM),
    (9999, 9999, (), EPERM),
    (1 << 30, 1 << 30, (), EPERM),
]


def answer_of(program: list[tuple[int, int, int, int]], data: bytes) -> int:
    accumulator, line = 0, 0
    while True:
        code, then, otherwise, value = program[line]
        line += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x15:
            line += then if accumulator == value else otherwise
        else:
            return value


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_answers_each_call_as_listed(machine):
    program = seccomp._program(machine, 77)
    for call in CALLS:
        number = call[list(ARCHITECTURES).index(machine)]
        arguments = (*call[2], *[0] * 6)[:6]
        data = struct.pack("<IIQ6Q", number, ARCHITECTURES[machine], 0, *arguments)
        assert answer_of(program, data) == call[3], call
        foreign = struct.pack("<IIQ6Q", number, 0x40000003, 0, *arguments)
        assert answer_of(program, foreign) == KILL
