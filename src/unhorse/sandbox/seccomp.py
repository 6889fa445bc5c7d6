"""The system calls that a restricted process may make; every other one answers "not permitted" (seccomp-BPF).

An allow-list: what a kernel learns tomorrow is refused today. Computing, reading what is open or readable,
and threads are all that is left; nothing that makes a process, talks to one, writes or names a file, or
changes rights.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Collection

# name, number on x86_64, number on aarch64; -1: the machine does not have it
_ALLOWED = """
read 0 63, write 1 64, close 3 57, lseek 8 62, pread64 17 67, readv 19 65, writev 20 66, preadv 295 69,
stat 4 -1, lstat 6 -1, fstat 5 80, newfstatat 262 79, statx 332 291, fstatfs 138 44, fadvise64 221 223,
access 21 -1, faccessat 269 48, faccessat2 439 439, getdents 78 -1, getdents64 217 61, getcwd 79 17,
readlink 89 -1, readlinkat 267 78, dup 32 23, dup3 292 24,
mmap 9 222, mprotect 10 226, munmap 11 215, brk 12 214, mremap 25 216, madvise 28 233, mincore 27 232,
get_mempolicy 239 236, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
sigaltstack 131 132, restart_syscall 219 128, poll 7 -1, ppoll 271 73, select 23 -1, pselect6 270 72,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -1, times 100 153, getrusage 98 165, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120, getcpu 309 168, getpid 39 172, gettid 186 178,
getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, futex 202 98,
set_robust_list 273 99, rseq 334 293, membarrier 324 283, uname 63 160, sysinfo 99 179, getrlimit 97 163,
getrandom 318 278, exit 60 93, exit_group 231 94
"""
# programs fall back to something older, or do without, when these do not exist
_ABSENT = "clone3 435 435, openat2 437 437, flock 73 32"
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _AND, _EQUALS, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_PERMISSION, _NO_CALL = _REFUSE | errno.EPERM, _REFUSE | 38  # ENOSYS of Linux

_THREAD, _NAMESPACES = 0x10000, 0x7E020080
_WRITING = 0x3 | 0x40 | 0x200  # O_ACCMODE, O_CREAT, O_TRUNC
_FCNTL = (0, 1, 2, 3, 4, 5, 1030)  # duplicate, flags, read locks: not the owner of signals
_IOCTL = (0x5401, 0x541B, 0x5413, 0x5450, 0x5451)  # terminal? how many bytes? window size, close on exec
_PRCTL = (15, 16, 3, 0x53564D41)  # names of threads and of memory
_SET_SECCOMP, _FILTER = 22, 2

Instruction = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def filter_calls() -> bool:
    """Installs the filter for this thread and those it starts; False where the machine or kernel has none.

    "No new privileges" must be set. It cannot be taken back.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES or struct.calcsize("P") != 8:
        return False
    code = b"".join(struct.pack("<HBBI", *line) for line in _program(machine, os.getpid()))
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0


def _program(machine: str, pid: int) -> list[Instruction]:
    column, architecture = _MACHINES[machine]
    lines: list[Instruction] = [(_LOAD, 0, 0, 4), (_EQUALS, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    lines += [(_LOAD, 0, 0, 0)]
    for name, rule in _conditions(column, pid).items():
        lines += [(_EQUALS, 0, len(rule), _number(name, column)), *rule]
    for table, answer in ((_ABSENT, _NO_CALL), (_ALLOWED, _ALLOW)):
        for number in numbers(table, column).values():
            lines += [(_EQUALS, 0, 1, number), (_RETURN, 0, 0, answer)]
    return [*lines, (_RETURN, 0, 0, _PERMISSION)]


def numbers(table: str, column: int) -> dict[str, int]:
    """Name to number for one machine."""
    rows = [row.split() for row in table.replace("\n", " ").split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-1"}


_CONDITIONAL = """
clone 56 220, kill 62 129, tgkill 234 131, prctl 157 167, ioctl 16 29, fcntl 72 25, openat 257 56, open 2 -1,
prlimit64 302 261
"""


def _number(name: str, column: int) -> int:
    return numbers(_CONDITIONAL, column)[name]


def _conditions(column: int, pid: int) -> dict[str, list[Instruction]]:
    """What the arguments of some calls must be: threads only, signals to itself only, reading only."""
    rules = {
        "clone": _argument(0, {_THREAD}, mask=_THREAD | _NAMESPACES),
        "kill": _argument(0, {pid}),
        "tgkill": _argument(0, {pid}),
        "prctl": _argument(0, _PRCTL),
        "ioctl": _argument(1, _IOCTL),
        "fcntl": _argument(1, _FCNTL),
        "openat": _argument(2, {0}, mask=_WRITING),
        "open": _argument(1, {0}, mask=_WRITING),
        # asking for limits, with no new ones: both halves of the pointer are 0
        "prlimit64": [
            *((_LOAD, 0, 0, 16 + 8 * 2 + 4), (_EQUALS, 1, 0, 0), (_RETURN, 0, 0, _PERMISSION)),
            *_argument(2, {0}),
        ],
    }
    present = numbers(_CONDITIONAL, column)
    return {name: rule for name, rule in rules.items() if name in present}


def _argument(index: int, values: Collection[int], mask: int | None = None) -> list[Instruction]:
    """Allows the call if the low half of an argument, under a mask, is one of the values."""
    lines: list[Instruction] = [(_LOAD, 0, 0, 16 + 8 * index)]
    if mask is not None:
        lines.append((_AND, 0, 0, mask))
    for value in values:
        lines += [(_EQUALS, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*lines, (_RETURN, 0, 0, _PERMISSION)]
