"""What a pickle would do if it were loaded, judged by the names in it: code, a model, or plain values."""

from __future__ import annotations

import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from unhorse.checks import pickle_names as known
from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_names import Danger
from unhorse.checks.pickle_values import LOAD_FROM_BYTES, UNRESOLVED, Global, Heap, Made, Reading, pairs_of

MAX_TEXTS, MAX_DEPTH = 2_000, 4
_SHOWN = 6
_OLD_TORCH, _PICKLES_OF_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", 5


def danger_of(name: Global, how: Iterable[str]) -> Danger:
    """How dangerous a pickle is that uses a name so: `how` holds "named", "new", "call" or "changed"."""
    module, last = NAME_MAPPING.get((name.module, name.name)) or (
        IMPORT_MAPPING.get(name.module, name.module),
        name.name,
    )
    uses = set(how)
    if name == UNRESOLVED or "changed" in uses:
        return Danger.HIGH
    if name == LOAD_FROM_BYTES:
        return Danger.HIGH if "call" in uses else Danger.MODEL  # called: of bytes that it puts together
    if last in known.PLAIN.get(module, ()):
        return Danger.PLAIN
    if last in known.VALUES.get(module, ()):
        return Danger.VALUE
    listed = last in known.CALLED.get(module, ()) or last.startswith("__pyx_unpickle_")
    if not listed and (_hidden(module, last) or last in known.INFAMOUS):
        return Danger.HIGH
    root = module.partition(".")[0]
    if root in known.STANDARD:
        return _of_the_library(module, last, uses)
    if root in known.HIGH_PACKAGES:
        return Danger.HIGH
    if root in known.MODELS:
        return _of_models(root, module, last, uses)
    return Danger.CALL if "call" in uses and _is_function(last) else Danger.UNKNOWN


def _hidden(module: str, name: str) -> bool:
    """Whether a name reaches through a module or an attribute with underscores, as no pickler writes it."""
    *outer, last = name.split(".")
    dunder = any(part.startswith("__") for part in (*outer, last)) or (
        module.startswith("__") and module not in ("__main__", "__mp_main__", "__builtin__")
    )
    packages = known.STANDARD | known.HIGH_PACKAGES | known.MODELS | known.INFAMOUS
    strict = module.partition(".")[0] in known.STRICT | known.STANDARD
    through = any(part in packages or (strict and part[:1].islower()) for part in outer)
    return dunder or through or not name or not module


def _is_function(name: str) -> bool:
    """Whether a name is spelled like a function's rather than like a class'."""
    return name.rpartition(".")[2].lstrip("_")[:1].islower()


def _of_the_library(module: str, name: str, uses: set[str]) -> Danger:
    """Of a module of Python's own: all that is on no list of values is high."""
    if module == "builtins" and re.fullmatch(r"[A-Z]\w+(Error|Exception|Warning|Interrupt|Exit)", name):
        return Danger.VALUE
    called = uses & {"call", "new"}
    if not called and (name in known.NAMED.get(module, ()) or (module, name) == ("builtins", "getattr")):
        return Danger.VALUE
    if (module, name) == ("functools", "partial"):
        return Danger.MODEL  # harmless until it is called, which counts as a call of something computed
    return Danger.HIGH


def _of_models(root: str, module: str, name: str, uses: set[str]) -> Danger:
    first = name.partition(".")[0]
    named = not uses & {"call", "new"}
    if named and module == "torch._C._nn":
        return Danger.MODEL  # functions such as gelu, kept as attributes
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        prefix = ".".join(parts[:length])
        high = known.HIGH_IN_MODELS.get(prefix, ())
        if high is None or (length == len(parts) and first in high):
            return Danger.HIGH
    if "call" not in uses or name in known.CALLED.get(module, ()) or name.startswith("__pyx_unpickle_"):
        return Danger.MODEL
    if root in known.STRICT:
        made = f"{module}.".startswith(known.MADE) and not _is_function(name)
        return Danger.MODEL if made else Danger.HIGH
    return Danger.CALL if _is_function(name) else Danger.MODEL


@dataclass(frozen=True)
class Contents:
    """What the pickles of a file name, and how dangerous each name is; `reading` is of the first of them."""

    dangers: dict[Global, Danger]
    reading: Reading
    called: frozenset[Global] = frozenset()

    @property
    def worst(self) -> Danger:
        """Of all names; HIGH where the pickle calls what it computed itself."""
        return Danger.HIGH if self.reading.indirect else max(self.dangers.values(), default=Danger.PLAIN)

    def of(self, danger: Danger) -> list[Global]:
        """The names that are this dangerous, in order."""
        return sorted(name for name, found in self.dangers.items() if found is danger)

    def said(self, danger: Danger) -> str:
        """These names in words: "calls os.system and names ctypes.CDLL", at most six of them."""
        names = self.of(danger)
        called = [_shown(name) for name in names if name in self.called]
        named = [_shown(name) for name in names if name not in self.called]
        if danger is Danger.HIGH and self.reading.indirect and not names:
            return "calls what it computed itself"
        parts = [f"{verb} {_listed(found)}" for verb, found in (("calls", called), ("names", named)) if found]
        return " and ".join(parts)

    def named(self, name: Global) -> str:
        """One name in words: "calls os.system"."""
        return f"{'calls' if name in self.called else 'names'} {_shown(name)}"

    def everything(self) -> str:
        """All names in words, the most dangerous first."""
        names = sorted(self.dangers, key=lambda name: (-self.dangers[name], name))
        return self.named(names[0]) if names else "asks its reader for more than a pickle holds"

    def listed(self, danger: Danger) -> str:
        """These names, at most six of them."""
        return _listed([_shown(name) for name in self.of(danger)])

    def modules(self) -> list[Global]:
        """The classes of the pickled networks in the file, the outermost first: they have _parameters."""
        return [made.callee for made in _walk(self.reading.root) if _is_network(made)]  # type: ignore[misc]


def contents(reading: Reading, *, texts: bool = True) -> Contents:
    """What a followed pickle and, unless `texts` is false, the pickles in its texts name."""
    uses = {name: set(how) for name, how in reading.uses.items()}
    if texts:
        for inner in (*_inner(reading, 0), *_loaded(reading, 0)):
            for name, how in inner.uses.items():
                uses.setdefault(name, set()).update(how)
            reading.indirect += inner.indirect
    dangers = {name: danger_of(name, how) for name, how in uses.items()}
    called = frozenset(name for name, how in uses.items() if how & {"call", "new", "changed"})
    return Contents(dangers, reading, called)


def _inner(reading: Reading, depth: int) -> Iterator[Reading]:
    """The pickles in the bytes and long texts of a pickle that name anything, and those in them again."""
    for text in reading.texts[:MAX_TEXTS]:
        if depth >= MAX_DEPTH or not re.match(rb"[\x80(cI\x8c\x95XVUS}\]]", text[:1]):
            continue
        inner = follow(text)
        # what happens to begin like a pickle calls nothing that is a name
        acts = any(how - {"named"} for how in inner.uses.values())
        if acts and all(_is_name(name) for name in inner.uses):
            yield inner
            yield from _inner(inner, depth + 1)


def _loaded(reading: Reading, depth: int) -> Iterator[Reading]:
    """The pickles of the old torch files that a pickle holds as bytes, one for each tensor."""
    for data in reading.loaded:
        if depth >= MAX_DEPTH or not data.startswith(_OLD_TORCH):
            yield Reading(uses={LOAD_FROM_BYTES: {"call"}})
            continue
        end = 0
        for _ in range(_PICKLES_OF_OLD_TORCH):
            inner = follow(data, end)
            end = inner.end
            yield inner
            yield from _loaded(inner, depth + 1)


def _is_name(name: Global) -> bool:
    return name == UNRESOLVED or bool(
        re.fullmatch(r"[\w.]+", name.module) and re.fullmatch(r"[\w.]+", name.name)
    )


def _walk(root: object) -> Iterator[Made]:
    """The objects of a pickle from the outside in, each once; not what lies within a network."""
    waiting, seen = [root], set[int]()
    while waiting and len(seen) < 10_000:
        value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, tuple):
            waiting += value
        elif isinstance(value, Heap | Made):
            if isinstance(value, Made):
                yield value
                if _is_network(value):
                    continue
                waiting += [value.arguments, value.state]
            waiting += [*value.items, *(inner for _, inner in value.pairs)]


def _is_network(made: Made) -> bool:
    keys = pairs_of(made.state).keys()
    return isinstance(made.callee, Global) and {"_parameters", "_modules"} <= keys


def _shown(name: Global) -> str:
    if name == UNRESOLVED:
        return "a name that it puts together out of sight"
    return "".join(letter if letter.isprintable() else "?" for letter in str(name)[:200])


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
