"""What a process gives up before it opens a hostile file, and what it may use after that."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import sysconfig
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

from unhorse.rules import LoadFailed
from unhorse.sandbox import landlock, seccomp

MIB, GIB = 2**20, 2**30


class Tier(StrEnum):
    """How far a process is confined: files and ports (Landlock), system calls (seccomp), resources."""

    FULL = "landlock+seccomp+limits"
    CALLS = "seccomp+limits"
    FILES = "landlock+limits"
    LIMITS = "limits"

    @property
    def has_landlock(self) -> bool:
        return self in (Tier.FULL, Tier.FILES)


@dataclass(frozen=True)
class Limits:
    """What one file may cost: bytes beyond what the process starts with, seconds, bytes of the answer."""

    memory: int = 4 * GIB
    cpu_seconds: int = 120
    wall_seconds: float = 180.0
    open_files: int = 64
    document: int = 4 * MIB
    blob: int = 4 * GIB


class LimitExceeded(LoadFailed):
    """The restricted process crashed or ran into a `limit`: memory, CPU time, wall time, answer or crash."""

    rule = "LD231"

    def __init__(self, limit: str, reason: str) -> None:
        super().__init__(reason, "do not use this file; ask its publisher for safetensors")
        self.limit = limit


# code and address space beyond data: shared libraries imported late, arenas of threads
_MAPPED = 768 * MIB
_NO_NEW_PRIVILEGES, _DUMPABLE, _PARENT_DEATH = 38, 4, 1
_SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"),
    *("/usr/share/zoneinfo", "/dev/null", "/dev/urandom"),
    *("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
)


def readable_paths() -> tuple[str, ...]:
    """Where Python, its packages and shared libraries lie; never a folder that holds the user's home."""
    home = Path.home()
    named = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    prefixes = (str(Path(prefix) / "lib") for prefix in (sys.base_prefix, sys.prefix))
    folders = dict.fromkeys((*named, *prefixes, *sys.path))
    found = [path for path in folders if Path(path).is_absolute() and not home.is_relative_to(path)]
    return (*found, *_SYSTEM)


def restrict(limits: Limits, *, keep: Collection[int], readable: Iterable[str]) -> Tier:
    """Confines the calling process for good; it must have one thread and must not be the user's own process.

    `keep` are the file descriptors that stay open. The weakest tier is that of systems without Landlock and
    seccomp: there only memory, time and the size of written files are limited.
    """
    _close_all_but(keep)
    if sys.platform == "linux":
        _die_with_parent()
        _prctl(_NO_NEW_PRIVILEGES, 1)
        _prctl(_DUMPABLE, 0)
    _limit(limits, max(keep) + 1)  # before Landlock: it asks /proc how much is held
    files = landlock.confine(readable)
    calls = seccomp.filter_calls()
    if not calls:
        _forbid_processes()
    return {
        (True, True): Tier.FULL,
        (False, True): Tier.CALLS,
        (True, False): Tier.FILES,
        (False, False): Tier.LIMITS,
    }[files, calls]


def _close_all_but(keep: Collection[int]) -> None:
    edges = [-1, *sorted(keep), os.sysconf("SC_OPEN_MAX")]
    for low, high in pairwise(edges):
        if low + 1 < high:  # an empty range is not empty to every version of Python
            os.closerange(low + 1, high)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} was refused")


def _die_with_parent() -> None:
    _prctl(_PARENT_DEATH, signal.SIGKILL)


def _limit(limits: Limits, taken: int) -> None:
    import resource

    space, data = _held()
    ceilings = {
        resource.RLIMIT_AS: space + limits.memory + _MAPPED,
        resource.RLIMIT_DATA: data + limits.memory,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: taken + limits.open_files,
        resource.RLIMIT_CORE: 0,
    }
    for kind, ceiling in ceilings.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            ceiling = min(ceiling, hard)
        # the signal at the limit of CPU time says why a process ended; a second later it is killed
        last = ceiling + 1 if kind == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY else ceiling
        try:
            resource.setrlimit(kind, (ceiling, last))
        except (ValueError, OSError):
            if sys.platform == "linux":  # macOS has no limit of memory that holds
                raise


def _held() -> tuple[int, int]:
    """Bytes of address space and of data that the process holds already; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0, 0
    size = os.sysconf("SC_PAGE_SIZE")
    return int(pages[0]) * size, int(pages[5]) * size


def _forbid_processes() -> None:
    """Without seccomp: no process more for this user, and on Linux no thread more either."""
    import resource

    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
