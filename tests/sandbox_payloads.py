"""What hostile code tries once it runs in the restricted process; test_sandbox.py offers these as tasks.

A payload that gets what it wants leaves something outside for the test to find, or returns {"got": ...}.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

Options = dict[str, Any]
Result = tuple[dict[str, Any], bytes]
TASKS: dict[str, Callable[[list[BinaryIO], Options], Result]] = {}
LIBC = ctypes.CDLL(None, use_errno=True)


def payload(function: Callable[[Options], object]) -> Callable[[Options], object]:
    def task(files: list[BinaryIO], options: Options) -> Result:
        return {"got": repr(function(options))[:200]}, b""

    TASKS[function.__name__] = task
    return function


def native(name: str, *arguments: object) -> int:
    """A C function; OSError where it says -1."""
    result = getattr(LIBC, name)(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


@payload
def do_nothing(options: Options) -> object:
    return None


# files


@payload
def write_file(options: Options) -> object:
    return Path(options["folder"], "marker").write_text("here")


@payload
def append_to_file(options: Options) -> object:
    with Path(options["file"]).open("a") as stream:
        return stream.write("more")


@payload
def truncate_file(options: Options) -> object:
    return os.truncate(options["file"], 0)


@payload
def delete_file(options: Options) -> object:
    return Path(options["file"]).unlink()


@payload
def rename_file(options: Options) -> object:
    return Path(options["file"]).rename(Path(options["folder"], "renamed"))


@payload
def link_symbolically(options: Options) -> object:
    return Path(options["folder"], "link").symlink_to("/")


@payload
def link_hard(options: Options) -> object:
    return Path(options["folder"], "link").hardlink_to(options["file"])


@payload
def make_folder(options: Options) -> object:
    return Path(options["folder"], "made").mkdir()


@payload
def make_pipe(options: Options) -> object:
    return os.mkfifo(Path(options["folder"], "pipe"))


@payload
def change_mode(options: Options) -> object:
    return Path(options["file"]).chmod(0o777)


@payload
def change_times(options: Options) -> object:
    return os.utime(options["file"], (0, 0))


@payload
def write_temporary_file(options: Options) -> object:
    return Path("/dev/shm/unhorse-marker").write_text("here")


@payload
def write_given_file(options: Options) -> object:
    for descriptor in range(3, 20):
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return os.write(descriptor, b"overwritten")
        except OSError as error:
            last = error
    raise last


@payload
def read_secret(options: Options) -> object:
    return Path(options["file"]).read_text()


@payload
def read_passwords(options: Options) -> object:
    return Path("/etc/passwd").read_text()


@payload
def list_home(options: Options) -> object:
    return list(Path(options["home"]).iterdir())


@payload
def list_root(options: Options) -> object:
    return list(Path("/").iterdir())


@payload
def read_parent_environment(options: Options) -> object:
    return Path(f"/proc/{options['parent']}/environ").read_bytes()


@payload
def read_parent_memory(options: Options) -> object:
    return Path(f"/proc/{options['parent']}/mem").open("rb")


@payload
def read_server_environment(options: Options) -> object:
    return Path(f"/proc/{os.getppid()}/environ").read_bytes()


@payload
def load_library(options: Options) -> object:
    return ctypes.CDLL(options["library"])


# other machines and processes


@payload
def connect(options: Options) -> object:
    return socket.create_connection(("127.0.0.1", options["port"]), timeout=1)


@payload
def send_datagram(options: Options) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        return sender.sendto(b"secret", ("127.0.0.1", options["datagram_port"]))


@payload
def listen(options: Options) -> object:
    return socket.create_server(("127.0.0.1", 0))


@payload
def connect_locally(options: Options) -> object:
    with socket.socket(socket.AF_UNIX) as sender:
        return sender.connect(options["local"])


@payload
def fork(options: Options) -> object:
    child = os.fork()
    if child == 0:
        os._exit(0)
    return child


@payload
def fork_bomb(options: Options) -> object:
    for _ in range(50):  # bounded: if it were not refused, the tests must not take the machine along
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
    return "forked"


@payload
def run_shell(options: Options) -> object:
    status = os.system(f"touch {options['folder']}/marker")
    if status != 0:
        raise OSError(errno.EPERM, "no shell")
    return status


@payload
def run_program(options: Options) -> object:
    return subprocess.run(["/bin/true"], check=False)


@payload
def become_program(options: Options) -> object:
    return os.execv("/bin/sh", ["sh", "-c", f"touch {options['folder']}/marker"])


@payload
def run_from_memory(options: Options) -> object:
    return os.execve(os.memfd_create("program"), ["program"], {})


@payload
def kill_parent(options: Options) -> object:
    return os.kill(options["parent"], signal.SIGTERM)


@payload
def kill_server(options: Options) -> object:
    return os.kill(os.getppid(), signal.SIGKILL)


@payload
def kill_all(options: Options) -> object:
    return os.kill(-1, 0)  # whether it may: if it were not refused, the tests must not end everything


@payload
def trace_server(options: Options) -> object:
    return native("ptrace", 16, os.getppid(), 0, 0)


@payload
def read_server_memory(options: Options) -> object:
    there = (ctypes.c_size_t * 2)(id(LIBC), 8)
    return native("process_vm_readv", os.getppid(), there, 1, there, 1, 0)


# rights


@payload
def raise_limit(options: Options) -> object:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "raised"


@payload
def outlive_parent(options: Options) -> object:
    return native("prctl", 1, 0, 0, 0, 0)


@payload
def new_namespace(options: Options) -> object:
    return native("unshare", 0x10000000)


@payload
def mount(options: Options) -> object:
    return native("mount", b"none", options["folder"].encode(), b"tmpfs", 0, None)


@payload
def become_nobody(options: Options) -> object:
    return os.setuid(65534)


@payload
def forge_interrupts(options: Options) -> object:
    """Calls by their numbers on x86_64: each must be refused or not exist."""
    calls = {
        **{"memfd_create": 319, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "keyctl": 250},
        **{"io_uring_setup": 425, "init_module": 175, "kexec_load": 246, "reboot": 169, "clone3": 435},
        **{"vfork": 58, "open_by_handle_at": 304, "pidfd_open": 434, "pidfd_send_signal": 424},
        **{"process_madvise": 440, "add_key": 248, "shmget": 29, "msgget": 68, "mq_open": 240, "tkill": 200},
        **{"rt_sigqueueinfo": 129, "setsid": 112, "chroot": 161, "pivot_root": 155, "swapon": 167},
        **{"quotactl": 179, "acct": 163, "ioperm": 173, "iopl": 172, "fanotify_init": 300, "socketpair": 53},
        **{"seccomp": 317, "personality": 135, "setpriority": 141, "sched_setaffinity": 203, "tomorrow": 999},
    }
    zero = ctypes.c_long(0)
    worked = [name for name, number in calls.items() if LIBC.syscall(number, zero, zero, zero, zero) != -1]
    raise OSError(errno.EPERM, f"worked: {worked}")


# too much


@payload
def hoard_memory(options: Options) -> object:
    hoard = []
    while True:
        hoard.append(bytearray(2**24))


@payload
def hoard_mapped_memory(options: Options) -> object:
    hoard = []
    while True:
        hoard.append(mmap.mmap(-1, 2**26))


@payload
def spin(options: Options) -> object:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass


@payload
def sleep(options: Options) -> object:
    return time.sleep(1000)


@payload
def open_many(options: Options) -> object:
    return [os.dup(0) for _ in range(100_000)]


@payload
def start_threads(options: Options) -> object:
    threads = [threading.Thread(target=time.sleep, args=(1000,), daemon=True) for _ in range(1000)]
    for thread in threads:
        thread.start()
    return len(threads)


@payload
def overflow_stack(options: Options) -> object:
    sys.setrecursionlimit(10**9)
    visit = ctypes.CFUNCTYPE(None)(lambda: visit())
    return visit()


@payload
def segfault(options: Options) -> object:
    return ctypes.string_at(0)


@payload
def abort(options: Options) -> object:
    return os.abort()


@payload
def exit_silently(options: Options) -> object:
    os._exit(0)


@payload
def leave(options: Options) -> object:
    sys.exit("bye")


@payload
def recurse(options: Options) -> object:
    return recurse(options)


# answers that lie


def answer_pipe() -> int:
    for number in range(3, 20):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                return number
    raise OSError(errno.EBADF, "there is no pipe for the answer")


def frame(kind: bytes, length: int, content: bytes) -> None:
    os.write(answer_pipe(), kind + length.to_bytes(8, "little") + content)


@payload
def answer_garbage(options: Options) -> object:
    return os.write(answer_pipe(), bytes(range(256)) * 16)


@payload
def claim_giant_document(options: Options) -> object:
    return frame(b"D", 2**62, b"{")


@payload
def claim_giant_blob(options: Options) -> object:
    frame(b"D", 2, b"{}")
    return frame(b"B", 2**40, b"")


@payload
def break_off_blob(options: Options) -> object:
    frame(b"D", 2, b"{}")
    frame(b"B", 1000, b"short")
    os._exit(0)


@payload
def nest_deeply(options: Options) -> object:
    content = b'{"a":' + b"[" * 100_000
    return frame(b"D", len(content), content)


@payload
def answer_no_object(options: Options) -> object:
    return frame(b"D", 4, b"[1] ")


@payload
def answer_not_a_number(options: Options) -> object:
    return frame(b"D", 10, b'{"a": NaN}')


@payload
def report_without_end(options: Options) -> object:
    while True:
        options["progress"]("x" * 5000)


@payload
def fail_without_a_word(options: Options) -> object:
    return frame(b"E", 2, b"{}")


@payload
def refuse_by_unknown_rule(options: Options) -> object:
    content = b'{"refused": {"rule": "LD2\\u001b[31m", "reason": "", "remedy": ""}}'
    return frame(b"E", len(content), content)


@payload
def announce_another_tier(options: Options) -> object:
    return frame(b"T", 6, b"limits")


def answer_large_document(files: list[BinaryIO], options: Options) -> Result:
    return {"text": "x" * 2**22}, b""


def answer_large_blob(files: list[BinaryIO], options: Options) -> Result:
    return {}, bytes(2**22)


def answer_nonsense(files: list[BinaryIO], options: Options) -> Result:
    return 7  # type: ignore[return-value]


TASKS |= {task.__name__: task for task in (answer_large_document, answer_large_blob, answer_nonsense)}
