"""Whether bytes are a pickle: no magic is needed for one, any opcode that pushes something may come first."""

from __future__ import annotations

import re
from typing import BinaryIO

from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_values import UNRESOLVED, Reading

MAX_LOOKED_AT, MAX_PICKLES = 64 * 2**20, 100
_MAGIC = re.compile(rb"\x80[\0-\6]")
# what pushes something on an empty stack
_FIRST = frozenset(b"(]})\x8fNIJKLMGFSTUVXBCPc\x88\x89\x8a\x8b\x8c\x8d\x8e\x95\x96\x82\x83\x84\x80")
_MANY_OPCODES = 16


def is_pickle(stream: BinaryIO, head: bytes) -> bool:
    """Whether a stream begins with a pickle, whole, cut off, or broken behind a call that it makes."""
    if _MAGIC.match(head):
        return True
    if not head or head[0] not in _FIRST:
        return False
    if follow(head).problem and not follow(head).cut and not _acts(follow(head)):
        return False  # most files of other kinds, by their first bytes
    stream.seek(0)
    return _is_whole_pickle(stream.read(MAX_LOOKED_AT))


def _is_whole_pickle(data: bytes) -> bool:
    """Whether these bytes are pickles to their end; without a name in it, a text could begin like one."""
    start = 0
    for _ in range(MAX_PICKLES):
        reading = follow(data, start)
        if _acts(reading) or (_named(reading) and not reading.problem):
            return True
        if reading.cut:
            return _named(reading) or len(reading.opcodes) > _MANY_OPCODES
        if reading.problem:
            return False
        start = reading.end
        if not data[start:].strip(b" \r\n\t\0"):
            return True
    return True


def _named(reading: Reading) -> bool:
    """Whether it names something, by names that Python could import."""
    names = [name for name in reading.uses if name != UNRESOLVED]
    plausible = all(re.fullmatch(r"[A-Za-z_][\w.]*", part) for name in names for part in name)
    return bool(reading.uses) and plausible


def _acts(reading: Reading) -> bool:
    """Whether it calls what it names."""
    return _named(reading) and any(how - {"named"} for how in reading.uses.values())
