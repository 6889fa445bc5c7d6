"""Writes a followed pickle again, at protocol 2, with nothing in it but what weights need.

torch.load(weights_only=True) reads no other protocol and knows no value beside the weights. What is left out
of a dictionary takes its key with it; elsewhere None stands in its place.
"""

from __future__ import annotations

import struct

from unhorse.checks.pickle_globals import danger_of
from unhorse.checks.pickle_names import Danger
from unhorse.checks.pickle_values import Global, Heap, Made
from unhorse.rules import LoadRefused

MAX_BYTES, MAX_DEPTH = 128 * 2**20, 150
_KEYS = (str, int, float, bool)


class LeftOut:
    """What a value beside the weights becomes."""


LEFT_OUT = LeftOut()


def write_plain(root: object) -> bytes:
    """The bytes of a pickle of protocol 2 with the plain part of a value; LD209 where there is none."""
    writer = _Writer()
    plain = _plain(root)
    if plain is LEFT_OUT:
        raise _refused("the file holds a value without tensors")
    writer.write(plain, 0)
    return b"\x80\x02" + bytes(writer.out) + b"."


def _plain(value: object) -> object:
    """The value, a dictionary or list in the place of a container that is no plain one, or LEFT_OUT."""
    if isinstance(value, Global):
        return value if danger_of(value, ("named",)) is Danger.PLAIN else LEFT_OUT
    if isinstance(value, Made) and value.how != "persistent":
        callee = value.callee
        if isinstance(callee, Global) and danger_of(callee, ("call",)) is Danger.PLAIN:
            return value
        if value.pairs or (isinstance(callee, Global) and callee.name == "defaultdict"):
            return Heap("dict", pairs=value.pairs)
        return Heap("list", items=value.items) if value.items else LEFT_OUT
    return value


class _Writer:
    """The bytes so far, and where each container that was written can be fetched again."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.memo: dict[int, int] = {}
        self.kept: list[object] = []  # so that no identity is given to a second object

    def write(self, value: object, depth: int) -> None:
        if depth > MAX_DEPTH or len(self.out) > MAX_BYTES:
            raise _refused("the file is nested deeper, or holds more, than any state dict")
        if (known := self.memo.get(id(value))) is not None and isinstance(value, tuple | Heap | Made):
            self.out += b"j" + struct.pack("<I", known)
        elif isinstance(value, str):
            raw = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(raw)) + raw
        elif isinstance(value, bytes | bytearray):
            self.out += b"c_codecs\nencode\n("
            self.write(bytes(value).decode("latin-1"), depth)
            self.out += b"X\6\0\0\0latin1tR"
        elif isinstance(value, Global):
            self.out += f"c{value.module}\n{value.name}\n".encode()
        elif isinstance(value, tuple):
            self.out += b"("
            self.all(value, depth)
            self.out += b"t"
            self.remember(value)
        elif isinstance(value, Heap):
            self.heap(value, depth)
        elif isinstance(value, Made):
            self.made(value, depth)
        else:
            self.number(value)

    def number(self, value: object) -> None:
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, int) and value.bit_length() < 2000:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(raw)]) + raw
        else:
            self.out += b"N"

    def remember(self, value: object) -> None:
        self.memo[id(value)] = len(self.memo)
        self.kept.append(value)
        self.out += b"r" + struct.pack("<I", self.memo[id(value)])

    def all(self, values: tuple[object, ...] | list[object], depth: int) -> None:
        for value in values:
            plain = _plain(value)
            self.write(None if plain is LEFT_OUT else plain, depth + 1)

    def heap(self, value: Heap, depth: int) -> None:
        self.out += {"list": b"]", "dict": b"}", "set": b"]"}[value.kind]
        self.remember(value)
        if value.items:
            self.out += b"("
            self.all(value.items, depth)
            self.out += b"e"
        self.pairs(value.pairs, depth)

    def pairs(self, pairs: list[tuple[object, object]], depth: int) -> None:
        if not pairs:
            return
        self.out += b"("
        for key, inner in pairs:
            plain = _plain(inner)
            if isinstance(key, _KEYS) and plain is not LEFT_OUT:
                self.write(key, depth + 1)
                self.write(plain, depth + 1)
        self.out += b"u"

    def made(self, value: Made, depth: int) -> None:
        if value.how == "persistent":
            self.write(value.arguments, depth + 1)
            self.out += b"Q"
            return
        self.write(value.callee, depth + 1)
        arguments = value.arguments if isinstance(value.arguments, tuple) else ()
        self.out += b"("
        self.all(arguments, depth)
        self.out += b"t" + (b"\x81" if value.how == "new" else b"R")
        self.remember(value)
        self.pairs(value.pairs, depth)


def _refused(what: str) -> LoadRefused:
    return LoadRefused("LD209", what, "save model.state_dict() alone, with safetensors or torch.save")
