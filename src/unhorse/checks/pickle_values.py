"""What the machine that follows pickles puts on its stack: names, calls and containers, none of them real."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Global(NamedTuple):
    """A name that a pickle imports."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


UNRESOLVED = Global("?", "?")
"""A name that the texts of the pickle do not say, such as an extension code."""


LOAD_FROM_BYTES = Global("torch.storage", "_load_from_bytes")
"""With it a pickle holds a tensor: an old torch file as bytes."""
RECONSTRUCTORS = {
    Global(module, name)
    for module in ("copyreg", "copy_reg")
    for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
}


@dataclass(eq=False)
class Made:
    """What calling `callee` with `arguments` gives; `how`: "call", "new" (no __init__) or "persistent".

    BUILD gives it a `state`, other opcodes append `items` or set `pairs`.
    """

    callee: object
    arguments: object
    how: str = "call"
    state: object = None
    built: bool = False
    items: list[object] = field(default_factory=list)
    pairs: list[tuple[object, object]] = field(default_factory=list)


@dataclass(eq=False)
class Heap:
    """A list, dictionary or set of the pickle: `items`, or `pairs` for a dictionary."""

    kind: str
    items: list[object] = field(default_factory=list)
    pairs: list[tuple[object, object]] = field(default_factory=list)


@dataclass
class Reading:
    """What a pickle names and does; `uses` tells how each name is used: "named", "new", "call", "changed".

    `problem` says why it could not be followed to its end, `cut` whether it merely ends too early, `odd` what
    no pickler writes. `indirect` counts calls of what the pickle itself computed; `texts` are its bytes and
    long texts, which may be pickles again, `loaded` those that it has torch load, `persistent`
    what it asks its reader for.
    """

    uses: dict[Global, set[str]] = field(default_factory=dict)
    opcodes: set[str] = field(default_factory=set)
    root: object = None
    end: int = 0
    protocol: int = 0
    problem: str = ""
    cut: bool = False
    odd: str = ""
    indirect: int = 0
    texts: list[bytes] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    persistent: list[object] = field(default_factory=list)

    def use(self, name: Global, how: str) -> Global:
        """Notes a use of a name, and gives the name back."""
        self.uses.setdefault(name, set()).add(how)
        return name

    def take_over(self, other: Reading) -> None:
        """Adds what another pickle in the same file names and does."""
        for name, how in other.uses.items():
            self.uses.setdefault(name, set()).update(how)
        self.opcodes |= other.opcodes
        self.indirect += other.indirect
        self.texts += other.texts
        self.loaded += other.loaded
        self.persistent += other.persistent
        self.odd = self.odd or other.odd


def resolved(callee: object, arguments: tuple[object, ...]) -> Global | None:
    """The name that a look-up by texts gives: getattr(module.Outer, "Inner"), or one of NumPy's."""
    if not isinstance(callee, Global) or len(arguments) != 2:
        return None
    first, second = arguments
    if isinstance(first, Made) and first.how != "persistent":
        first = first.callee  # a method of an object, by the class of the object
    if (
        callee.module in ("builtins", "__builtin__")
        and callee.name == "getattr"
        and isinstance(first, Global)
        and isinstance(second, str)
    ):
        return Global(first.module, f"{first.name}.{second}")
    if callee.name == "_ufunc_reconstruct" and isinstance(first, str) and isinstance(second, str):
        return Global(first, second)
    return None


def bytes_of(value: object) -> bytes | None:
    """The bytes of the pickle, also where an old protocol writes them as an encoded text."""
    if isinstance(value, Made) and isinstance(value.arguments, tuple) and len(value.arguments) == 2:
        text, encoding = value.arguments
        if value.callee == Global("_codecs", "encode") and encoding == "latin1" and isinstance(text, str):
            return text.encode("latin-1", "replace")
    return bytes(value) if isinstance(value, bytes | bytearray) else None


def pairs_of(value: object) -> dict[object, object]:
    """The entries of a dictionary of the pickle whose keys are texts; none of anything else."""
    if not isinstance(value, Heap | Made):
        return {}
    return {key: inner for key, inner in value.pairs if isinstance(key, str)}


class Array(NamedTuple):
    """What joblib writes between two opcodes: so many bytes, behind padding or not, or a pickle."""

    length: int
    padded: bool
    objects: bool = False


def array_of(state: object) -> Array | None:
    """The array that follows in the stream by joblib's own record; None where the record says nothing."""
    said = pairs_of(state)
    kind, shape = said.get("dtype"), said.get("shape")
    code = kind.arguments[0] if isinstance(kind, Made) and isinstance(kind.arguments, tuple) else ""
    if not isinstance(code, str) or not isinstance(shape, tuple):
        return None
    letter, digits = code.lstrip("<>|=")[:1], code.lstrip("<>|=")[1:]
    if letter == "O":
        return Array(0, False, objects=True)
    if not digits.isdecimal() or len(digits) > 6:
        return None
    length = int(digits) * (4 if letter == "U" else 1)
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**40:
            raise ValueError("an array has a size that is no count")
        length *= size
    return Array(min(length, 2**40), said.get("numpy_array_alignment_bytes") is not None)
