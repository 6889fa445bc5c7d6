"""The process that forks a restricted child for each file: `python -m unhorse.sandbox.worker`.

It is started by sandbox/server.py with a socket as its standard input. Over it comes one connection per
request; the request itself is read by the child, before it restricts itself. The connection then tells the
parent that the child started, and how it ended; when the parent closes it, the child is killed. This process
never touches a hostile byte.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NoReturn

from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import frames
from unhorse.sandbox.confinement import Limits, readable_paths, restrict
from unhorse.sandbox.tasks import LIGHT, TASKS, Task

STARTED = b"S"
_ORPHAN_CHECK_MS = 2000
# what Python and the loader have read already, and tells of the user's folders
_USED = ("PYTHONPATH", "PYTHONUSERBASE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# libraries import these if they are there, which takes time, wants a cache to write to, or breaks
_UNWANTED = ("matplotlib", "torchvision", "tensorflow", "jax")


def main() -> None:
    """Serves until the parent closes its end or dies."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--heavy", action="store_true", help="import torch before the first request")
    arguments.add_argument("--tasks", help="a Python file whose TASKS are offered too (for tests)")
    given = arguments.parse_args()
    readable = readable_paths()
    os.environ["HOME"] = "/nonexistent"  # what libraries look for at home would be there but out of reach
    for name in _USED:
        os.environ.pop(name, None)
    offered = _preload(given.heavy)
    if given.tasks:
        offered |= runpy.run_path(given.tasks)["TASKS"]
    gc.collect()
    gc.freeze()
    _Nursery(socket.socket(fileno=os.dup(0)), offered, readable).serve()


def _preload(heavy: bool) -> dict[str, Task]:
    if heavy:
        import tempfile

        import torch

        sys.modules.update(dict.fromkeys(_UNWANTED))  # type: ignore[arg-type]
        tempfile.tempdir = "/"  # Keras looks for a writable folder as it is imported, and this is none
        # no operation here: its threads would not survive the fork, and the children would wait for them
        torch.set_num_threads(1)
    return {name: pkgutil.resolve_name(place) for name, place in TASKS.items() if heavy or name in LIGHT}


class _Nursery:
    """The children and the connections on which their ends are reported."""

    def __init__(self, requests: socket.socket, tasks: Mapping[str, Task], readable: Iterable[str]) -> None:
        self.requests, self.tasks, self.readable = requests, tasks, tuple(readable)
        self.children: dict[int, socket.socket | None] = {}  # None: killed, not yet reaped
        self.events = select.poll()
        self.parent = os.getppid()

    def serve(self) -> None:
        ended, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        ended.setblocking(False)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for watched in (self.requests, ended):
            self.events.register(watched, select.POLLIN)
        while os.getppid() == self.parent:
            descriptors = {descriptor for descriptor, _ in self.events.poll(_ORPHAN_CHECK_MS)}
            for child, connection in list(self.children.items()):
                if connection and connection.fileno() in descriptors:
                    self.dismiss(child, connection)
            if ended.fileno() in descriptors:
                ended.recv(4096)
                self.reap()
            # last: a new connection may take the number of one that has just been closed
            if self.requests.fileno() in descriptors and not self.accept():
                break
        for child in self.children:
            kill_group(child)

    def accept(self) -> bool:
        """Forks a child for a new connection; False when the parent has closed its end."""
        data, descriptors, _, _ = socket.recv_fds(self.requests, 1, 1)
        if not data:
            return False
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            child = os.fork()
            if child == 0:
                _live(connection, self.tasks, self.readable)
            self.children[child] = connection
            self.events.register(
                connection, 0
            )  # only that the parent hung up: requests are the child's to read
            self.tell(connection, STARTED)
        return True

    def reap(self) -> None:
        while self.children:
            child, status, usage = os.wait4(-1, os.WNOHANG)
            if not child:
                return
            connection = self.children.pop(child)
            if connection:
                cpu = usage.ru_utime + usage.ru_stime
                report = {"code": os.waitstatus_to_exitcode(status), "cpu": cpu}
                self.tell(connection, json.dumps(report).encode())
                self.hang_up(connection)

    def dismiss(self, child: int, connection: socket.socket) -> None:
        """Kills a child that nobody listens to any more; its end is reaped later."""
        self.hang_up(connection)
        self.children[child] = None
        kill_group(child)

    def hang_up(self, connection: socket.socket) -> None:
        self.events.unregister(connection)
        connection.close()

    def tell(self, connection: socket.socket, message: bytes) -> None:
        try:
            connection.send(message, socket.MSG_DONTWAIT)
        except OSError:  # it hung up: the next round kills the child
            return


def kill_group(child: int) -> None:
    for kill in (os.killpg, os.kill):  # a child that has just been forked leads no group yet
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)


def _live(connection: socket.socket, tasks: Mapping[str, Task], readable: Iterable[str]) -> NoReturn:
    """The life of a child; whatever happens, it never returns into the server."""
    server = os.getppid()
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        request, (answer, *files) = _receive(connection)
        connection.detach()
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        files = [_reopened(descriptor) for descriptor in files]
        limits = Limits(**request["limits"])
        tier = restrict(limits, keep={0, 1, 2, answer, *files}, readable=readable)
        if os.getppid() == server:  # or else it died before it could take this process along
            frames.send(answer, frames.TIER, tier.encode())
            request["options"]["tier"] = str(tier)
            _answer(answer, tasks, request, [os.fdopen(descriptor, "rb") for descriptor in files])
        os._exit(0)
    finally:
        os._exit(1)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The request and its file descriptors: first the one for the answer, then the files."""
    data, descriptors, _, _ = socket.recv_fds(connection, frames.LENGTH.size, frames.MAX_FILES + 1)
    (length,) = frames.LENGTH.unpack(data)
    received = io.BytesIO()
    while received.tell() < length and (chunk := connection.recv(2**20)):
        received.write(chunk)
    return json.loads(received.getvalue()), descriptors


def _reopened(descriptor: int) -> int:
    """The same file for reading only, from its start, with a position of its own where the system can."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    except OSError:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor


def _answer(
    answer: int, tasks: Mapping[str, Task], request: Mapping[str, Any], files: list[BinaryIO]
) -> None:
    options = {**request["options"], "progress": functools.partial(frames.send_progress, answer)}
    try:
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(options.get("threads", 1))
        document, blob = tasks[request["task"]](files, options)
        said = json.dumps(document, allow_nan=False).encode()
    except BaseException as error:  # whatever a hostile file raises is an answer
        frames.send_json(answer, frames.FAILURE, _failure(error))
        return
    frames.send(answer, frames.DOCUMENT, said)
    frames.send(answer, frames.BLOB, blob)


def _failure(error: BaseException) -> dict[str, dict[str, str]]:
    if isinstance(error, LoadRefused):
        return {"refused": {"rule": error.rule, "reason": error.reason, "remedy": error.remedy}}
    if isinstance(error, LoadFailed):
        return {"failed": {"reason": error.reason, "remedy": error.remedy}}
    if isinstance(error, MemoryError) or any(word in str(error) for word in frames.MEMORY_WORDS):
        return {"memory": {}}
    line = (str(error).splitlines() or [""])[0][:200]
    return {"failed": {"reason": f"{type(error).__name__}: {line}", "remedy": "download or export it again"}}


if __name__ == "__main__":
    main()
