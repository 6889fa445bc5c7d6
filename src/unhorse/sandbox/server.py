"""Runs a task on hostile files in a restricted child; brings home a JSON document and a safetensors blob."""

from __future__ import annotations

import atexit
import json
import os
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any, BinaryIO, NamedTuple

from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import frames
from unhorse.sandbox.confinement import LimitExceeded, Limits

Progress = Callable[[str], None]

_KEPT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "HOME")
_SET = {
    **{"CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "torch", "HF_HUB_OFFLINE": "1"},
    "TORCHINDUCTOR_CACHE_DIR": "/",  # torch makes it on import; where it exists already nothing is written
    **{"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HDF5_USE_FILE_LOCKING": "FALSE"},
}
# large pages: half the time of a fork, and nothing where the system has none
_HEAVY = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_START_SECONDS, _END_SECONDS, _CLOSE_SECONDS = 120.0, 5.0, 0.5


class Parcel(NamedTuple):
    """What comes back: JSON, safetensors bytes (may be empty), the tier of the sandbox, seconds it took."""

    document: dict[str, Any]
    blob: bytes
    tier: str
    seconds: float


class NotStarted(Exception):
    """The server died before it forked a child for the request."""


class Server:
    """A warm process that forks restricted children; `heavy` ones have torch imported."""

    def __init__(self, *, heavy: bool, arguments: Sequence[str] = ()) -> None:
        self.socket, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        if places := environment.get("PYTHONPATH"):  # relative ones are so to the user's folder
            absolute = [os.path.abspath(place) for place in places.split(os.pathsep)]  # noqa: PTH100
            environment["PYTHONPATH"] = os.pathsep.join(absolute)
        command = [sys.executable, "-P", "-m", "unhorse.sandbox.worker", *arguments]
        with theirs:
            self.process = subprocess.Popen(
                command + ["--heavy"] * heavy,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",  # where it was started tells of the user
                env={
                    "PYTHONUSERBASE": site.getuserbase(),
                    **environment,
                    **_SET,
                    **(_HEAVY if heavy else {}),
                },
                start_new_session=True,  # Ctrl-C is for the parent, which then hangs up
            )

    def run(
        self,
        task: str,
        files: Sequence[BinaryIO],
        options: Mapping[str, Any],
        *,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        progress: Progress | None = None,
    ) -> Parcel:
        """As `run` below; NotStarted if this server is gone."""
        started = time.monotonic()
        with ExitStack() as opened:
            connection, theirs = (opened.enter_context(end) for end in socket.socketpair())
            connection.settimeout(_START_SECONDS)
            reading, writing = (
                opened.enter_context(os.fdopen(end, mode, buffering=0))
                for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
            )
            _widen(reading.fileno())
            request = {"task": task, "options": dict(options), "limits": asdict(limits)}
            try:
                socket.send_fds(self.socket, [b"c"], [theirs.fileno()])
                theirs.close()
                _send(connection, request, [writing.fileno(), *(file.fileno() for file in files)])
                writing.close()
                if not connection.recv(1):
                    raise NotStarted
            except OSError as error:
                raise NotStarted from error
            answer = _received(connection, reading.fileno(), limits, progress)
        return Parcel(answer.document, answer.blob, answer.tier, time.monotonic() - started)

    def close(self) -> None:
        """Ends the process and the children it has."""
        self.socket.close()
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # busy importing torch
            self.process.kill()
            self.process.wait()

    def forget(self) -> None:
        """In a process forked from the one that owns the server: leaves it alone."""
        self.socket.close()
        self.process.returncode = 0


def _widen(pipe: int) -> None:
    """Blobs are large: fewer and longer reads, where the system lets pipes grow."""
    import fcntl  # not on Windows

    grow = getattr(fcntl, "F_SETPIPE_SZ", None)
    if grow is not None:
        with suppress(OSError):  # past what this user's pipes may hold
            fcntl.fcntl(pipe, grow, 2**20)


def _send(connection: socket.socket, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    content = json.dumps(request).encode()
    socket.send_fds(connection, [frames.LENGTH.pack(len(content))], descriptors)
    connection.sendall(content)


def _received(
    connection: socket.socket, descriptor: int, limits: Limits, progress: Progress | None
) -> frames.Answer:
    try:
        return frames.receive(descriptor, limits, time.monotonic() + limits.wall_seconds, progress)
    except frames.Late:
        reason = f"opening the file took longer than {limits.wall_seconds:g} seconds"
        raise LimitExceeded("wall time", reason) from None
    except frames.Ended:
        raise _cause(connection, limits) from None


def _cause(connection: socket.socket, limits: Limits) -> LimitExceeded:
    """Why a child ended without an answer, from what the server saw of its end."""
    connection.settimeout(_END_SECONDS)
    try:
        report = json.loads(connection.recv(4096) or b"null")
    except OSError:
        report = None
    if report is None:
        return LimitExceeded("crash", "the restricted process hung up without an answer")
    code, cpu = report["code"], report["cpu"]
    if code == -signal.SIGXCPU or (code < 0 and cpu >= 0.9 * limits.cpu_seconds):
        return LimitExceeded("CPU time", f"opening the file took {limits.cpu_seconds} seconds of CPU time")
    if code == -signal.SIGKILL:
        return LimitExceeded("memory", "the system killed the restricted process, as when memory runs out")
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return LimitExceeded("crash", f"the restricted process {ended} while it opened the file")


_servers: dict[bool, Server] = {}
_lock = threading.Lock()


def run(
    task: str,
    files: Sequence[BinaryIO],
    options: Mapping[str, Any],
    *,
    heavy: bool,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> Parcel:
    """Runs one of tasks.TASKS on open files (at most 240) in a fresh restricted child of a warm server.

    The child sees each file from its start, for reading only. `options` is JSON; "threads" sets torch's
    threads. `progress` is called with lines that a hostile child wrote. Raises LoadRefused and LoadFailed as
    the child raised them, LimitExceeded where it crashed or used too much.
    """
    if not hasattr(os, "fork"):
        reason = "this format is opened only in a confined process, which this system does not offer"
        raise LoadRefused("LD201", reason, "convert the file to safetensors on Linux, or use WSL")
    if len(files) > frames.MAX_FILES:
        reason = f"{len(files)} files are more than the {frames.MAX_FILES} that one model may consist of"
        raise LoadRefused("LD208", reason, "save the weights in fewer files")
    for _ in range(2):
        server = _server(heavy)
        try:
            return server.run(task, files, options, limits=limits, progress=progress)
        except NotStarted:
            _discard(heavy, server)
    flag = " --heavy" if heavy else ""
    remedy = f"run `python -m unhorse.sandbox.worker{flag}` to see why"
    raise LoadFailed("the process that opens files does not start", remedy)


def warm(*, heavy: bool) -> None:
    """Starts the server that `run` would start, without waiting for it."""
    if hasattr(os, "fork"):
        _server(heavy)


def close_servers() -> None:
    """Ends the servers of this process; the next request starts them again."""
    with _lock:
        servers = list(_servers.values())
        _servers.clear()
    for server in servers:
        server.close()


def _server(heavy: bool) -> Server:
    with _lock:
        if heavy not in _servers:
            _servers[heavy] = Server(heavy=heavy)
        return _servers[heavy]


def _discard(heavy: bool, server: Server) -> None:
    """Another thread may have replaced it already."""
    with _lock:
        if _servers.get(heavy) is server:
            del _servers[heavy]
    server.close()


def _forget_servers() -> None:
    """A forked process starts servers of its own."""
    global _lock
    _lock = threading.Lock()
    for server in _servers.values():
        server.forget()
    _servers.clear()


atexit.register(close_servers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_servers)
