"""Landlock: from here on a process reads the given folders and reaches no other file and no TCP port."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterable

_CREATE, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every machine
_ASK_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
# how many rights over files each version of the interface knows
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_FILE_RIGHTS, _TCP, _SCOPES = 16, 0b11, 0b11


def version() -> int:
    """The version of the interface that the kernel offers; 0: none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(_CREATE, None, 0, _ASK_VERSION))


def confine(readable: Iterable[str]) -> bool:
    """Confines this thread and those it starts; False where the kernel has no Landlock.

    "No new privileges" must be set. It cannot be taken back. From version 4 on TCP ports are out of reach,
    from version 6 on signals to others and abstract sockets too.
    """
    known = version()
    if not known:
        return False
    rights = (1 << _FILE_RIGHTS.get(known, _ALL_FILE_RIGHTS)) - 1
    words = (rights, *((_TCP,) if known >= 4 else ()), *((_SCOPES,) if known >= 6 else ()))
    attributes = struct.pack(f"={len(words)}Q", *words)
    libc = _libc()
    ruleset = libc.syscall(_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable:
            _allow_reading(libc, ruleset, path)
        return libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allow_reading(libc: ctypes.CDLL, ruleset: int, path: str) -> None:
    try:
        place = os.open(path, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
    except OSError:  # absent here: nothing to allow
        return
    try:
        is_folder = stat.S_ISDIR(os.fstat(place).st_mode)
        rule = struct.pack("=Qi", _READ_FILE | (_READ_FOLDER if is_folder else 0), place)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(place)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
