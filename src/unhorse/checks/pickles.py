"""Pickles read opcode by opcode, never run: refused for what they name, or for what they are."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable

from picklescan.scanner import scan_pickle_bytes

from unhorse.checks import pickle_names
from unhorse.checks.pickle_globals import Contents, contents
from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_names import Danger
from unhorse.checks.pickle_opcodes import MAX_OPCODES
from unhorse.checks.pickle_values import Global, Reading
from unhorse.rules import LoadFailed, LoadRefused

__all__ = ["MAX_OPCODES", "check_checkpoint", "check_pickle", "check_whole_pickle", "is_plain", "is_scripted"]

PICKLE_REMEDY = "export the weights with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
_MODULE_REMEDY = (
    "give the Python file that defines the network with --network FILE.py:NAME, or save model.state_dict()"
)
MAX_PICKLE_BYTES = 512 * 2**20

# What torch.jit.save writes, always at protocol 2
_SCRIPT_OPCODES = {
    *("PROTO", "STOP", "MARK", "POP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
}
# What no pickler of Python 3 writes into a file of torch.save, at any protocol
_STRANGE = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
_SCRIPT_BUILDERS = {
    *("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"),
}

Allowed = Callable[[str, str], bool]


def is_plain(module: str, name: str) -> bool:
    """Whether a global is one that a state dict needs: tensors, storages, types and plain containers."""
    return name in pickle_names.PLAIN.get(module, ())


def is_scripted(module: str, name: str) -> bool:
    """Whether a global is one that TorchScript needs: plain ones and the classes in its own code."""
    own = module == "__torch__" or module.startswith("__torch__.")
    return own or is_plain(module, name) or (module == "torch.jit._pickle" and name in _SCRIPT_BUILDERS)


def check_pickle(pickled: bytes, allowed: Allowed, *, where: str = "data.pkl") -> None:
    """Raises LD205 unless a pickle of TorchScript or of a .pt2 archive names only what is `allowed`."""
    reading = follow(pickled)
    for name in sorted(reading.uses):
        if not allowed(*name):
            raise refused(f"the pickle in the file {contents(reading).named(name)}", where)
    if strange := sorted(reading.opcodes - _SCRIPT_OPCODES):
        raise refused(f"the pickle uses {strange[0]}, which PyTorch does not write here", where)
    if reading.protocol != 2:
        raise refused("the pickle is not of protocol 2, which PyTorch writes here", where)
    _check_end(reading, pickled, where)
    _check_again(pickled, reading, where)


def check_checkpoint(
    pickled: bytes, *, where: str = "data.pkl", start: int = 0, last: bool = True
) -> Contents:
    """What a pickle of torch.save names, all of it needed by weights or a plain value beside them.

    LD205 where it names what runs code, LD240 where it calls a function on no list, LD209 where it holds
    objects of other classes, LD230 where it is cut off. With `last` nothing may follow it.
    """
    reading = follow(pickled, start)
    found = contents(reading)
    if found.worst is Danger.HIGH:
        raise refused(f"the pickle in the file {found.said(Danger.HIGH)}", where)
    if strange := sorted(reading.opcodes & _STRANGE):
        raise refused(f"the pickle uses {strange[0]}, which torch.save never does", where)
    if any(not _is_storage(key) for key in reading.persistent):
        raise refused("the pickle asks its reader for something else than the data of a tensor", where)
    if reading.odd:
        raise refused(f"the pickle in the file is not one of a pickler: {reading.odd}", where)
    _check_end(reading, pickled if last else None, where)
    _check_again(pickled[start : reading.end], reading, where)
    if found.worst is Danger.CALL:
        raise unknown_call(found, where)
    if found.worst > Danger.VALUE:
        raise _not_a_state_dict(found)
    return found


def check_whole_pickle(data: bytes, name: str, kind: str) -> None:
    """Raises for the pickles that fill a file: LD205, LD240, LD230, or LD201 for a harmless one.

    It is read twice where it is joblib's, whose arrays stand between the opcodes: as joblib and as Python do.
    """
    found = whole_contents(data)
    if found.worst is Danger.HIGH:
        raise refused(f"the pickle in {name} {found.said(Danger.HIGH)}")
    if found.worst is Danger.CALL:
        raise unknown_call(found, name)
    if found.reading.cut:
        raise LoadFailed(f"{name} is a pickle that is cut off ({found.reading.problem})")
    if found.reading.problem:
        raise LoadFailed(f"{name} is a damaged pickle ({found.reading.problem})")
    if modules := found.modules():
        what = f"{name} is a pickled network, {modules[0]}, which unhorse does not open"
        raise LoadRefused("LD201", f"{what}{_inside(found)}", _MODULE_REMEDY)
    raise LoadRefused(
        "LD201", f"{name} is {kind}, which unhorse does not open{_inside(found)}", PICKLE_REMEDY
    )


def whole_contents(data: bytes) -> Contents:
    """What all pickles of a file name, one behind the other; the reading is of the first."""
    first = follow(data)
    readings, end = [first], first.end
    while not readings[-1].problem and end < len(data) and len(readings) < 100:
        end += len(data[end : end + 4096]) - len(data[end : end + 4096].lstrip(b"\0 \r\n\t"))  # padding
        following = follow(data, end)
        if following.problem and not following.uses:
            break  # other bytes than a pickle: padding, or the data of the tensors
        readings.append(following)
        end = max(following.end, end + 1)
    if any(name.name == "NumpyArrayWrapper" for name in first.uses):
        joblib = follow(data, arrays=True)
        joblib.take_over(first)
        readings[0] = first = joblib
    for following in readings[1:]:
        first.take_over(following)
    return _with_second_opinion(data, contents(first))


def _with_second_opinion(data: bytes, found: Contents) -> Contents:
    """With what picklescan finds dangerous in the bytes and we do not know, or did not see at all."""
    logging.getLogger("picklescan").setLevel(logging.CRITICAL)
    second = scan_pickle_bytes(io.BytesIO(data), "", strict=False)
    dangers = dict(found.dangers)
    for seen in second.globals:
        name = Global(seen.module, seen.name)
        known = dangers.get(name, Danger.UNKNOWN if "unknown" not in name else Danger.PLAIN)
        if seen.safety.value == "dangerous" and known >= Danger.UNKNOWN:
            dangers[name] = Danger.HIGH
    return Contents(dangers, found.reading, found.called)


def left_out(found: Contents) -> tuple[str, ...]:
    """A note on the values beside the weights, which are left out; none where there are none."""
    if not found.of(Danger.VALUE):
        return ()
    return (f"LD236 values beside the weights left out: {found.listed(Danger.VALUE)}; the weights are read",)


def _check_end(reading: Reading, pickled: bytes | None, where: str) -> None:
    """Raises where a pickle does not end as it should; `pickled` is None where others may follow it."""
    if reading.cut:
        raise LoadFailed(f"the pickle in the file is cut off ({reading.problem})")
    if reading.problem and pickled is None:  # a file without checksums
        raise LoadFailed(f"{where} in the file is damaged ({reading.problem})")
    if reading.problem:
        raise refused(f"the pickle in the file cannot be read ({reading.problem})", where)
    if pickled is not None and reading.end != len(pickled):
        raise LoadRefused("LD213", f"bytes follow the end of the pickle {where}", PICKLE_REMEDY)


def _check_again(pickled: bytes, reading: Reading, where: str) -> None:
    """Raises where picklescan, a reader of other authors, sees a name that we did not."""
    logging.getLogger("picklescan").setLevel(logging.CRITICAL)
    second = scan_pickle_bytes(io.BytesIO(pickled), where, multiple_pickles=False, strict=True)
    if second.scan_err or any((found.module, found.name) not in reading.uses for found in second.globals):
        raise refused("the pickle in the file cannot be read in only one way", where)


def _is_storage(key: object) -> bool:
    return isinstance(key, tuple) and bool(key) and key[0] == "storage"


def _not_a_state_dict(found: Contents) -> LoadRefused:
    """The refusal of objects of other classes: LD209, with a pickled network named as such."""
    if modules := found.modules():
        what = f"the file holds a whole pickled network, {modules[0]}, not a state dict"
        return LoadRefused("LD209", f"{what}{_inside(found)}", _MODULE_REMEDY)
    what = f"the file holds more than tensors and plain values{_inside(found)}"
    return LoadRefused("LD209", what, PICKLE_REMEDY)


def _inside(found: Contents) -> str:
    """The classes of a pickle in words."""
    names = [found.listed(danger) for danger in (Danger.UNKNOWN, Danger.MODEL) if found.of(danger)]
    return f"; it names {', '.join(names)}" if names else ""


def refused(what: str, where: str = "data.pkl") -> LoadRefused:
    """The refusal of a pickle: LD205, with the member it stands in."""
    return LoadRefused("LD205", f"{what} ({where})" if where != "data.pkl" else what, PICKLE_REMEDY)


def unknown_call(found: Contents, where: str) -> LoadRefused:
    """The refusal of a pickle that calls a function on no list: LD240."""
    what = f"the pickle in {where} {found.said(Danger.CALL)}, which unhorse does not know"
    return LoadRefused("LD240", what, PICKLE_REMEDY)
