"""Pickles read opcode by opcode, never run: which globals they name, and whether they stay within limits."""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable

from picklescan.scanner import scan_pickle_bytes

from unhorse.rules import LoadRefused

MAX_OPCODES = 1_000_000
MAX_STACK = 10_000
MAX_MEMO = 300_000

PICKLE_REMEDY = "export the weights with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"

# What torch.save and torch.jit.save write. Absent on purpose: STACK_GLOBAL, INST, OBJ, NEWOBJ_EX, EXT1-4 and
# PERSID, with which a name or a call is put together out of sight of a reader of opcodes.
_OPCODES = {
    *("PROTO", "STOP", "MARK", "POP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
}
_DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
}
_STORAGES = {
    f"{kind}Storage"
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
_PLAIN = {
    *(("torch", name) for name in {"Size", "device", "Tensor"} | _DTYPES | _STORAGES),
    *(("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
    *(("torch.storage", name) for name in ("TypedStorage", "UntypedStorage")),
    *(("collections", name) for name in ("OrderedDict", "Counter")),
    ("torch.nn.parameter", "Parameter"),
}
_SCRIPT_BUILDERS = {
    *("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"),
}

Allowed = Callable[[str, str], bool]


def is_plain(module: str, name: str) -> bool:
    """Whether a global is one that a state dict needs: tensors, storages, types and plain containers."""
    return (module, name) in _PLAIN


def is_scripted(module: str, name: str) -> bool:
    """Whether a global is one that TorchScript needs: plain ones and the classes in its own code."""
    own = module == "__torch__" or module.startswith("__torch__.")
    return own or is_plain(module, name) or (module == "torch.jit._pickle" and name in _SCRIPT_BUILDERS)


def check_pickle(
    pickled: bytes, allowed: Allowed = is_plain, *, where: str = "data.pkl"
) -> set[tuple[str, str]]:
    """The globals that a pickle names, all of them `allowed`; LD205 otherwise, or beyond our limits."""
    names = _globals(pickled, where)
    for module, name in sorted(names):
        if not allowed(module, name):
            raise refused(f"the pickle in the file calls {module}.{name}", where)
    # a second reader with a list of its own: what only one of the two finds is refused as well
    second = scan_pickle_bytes(io.BytesIO(pickled), where, strict=True)
    if second.scan_err or any(not allowed(found.module, found.name) for found in second.globals):
        raise refused("the pickle in the file cannot be read in only one way", where)
    return names


def _globals(pickled: bytes, where: str) -> set[tuple[str, str]]:
    names: set[tuple[str, str]] = set()
    stack = _Stack()
    try:
        for count, (opcode, argument, place) in enumerate(pickletools.genops(pickled)):
            if count >= MAX_OPCODES:
                raise refused(f"the pickle has more than {MAX_OPCODES} operations", where)
            if opcode.name not in _OPCODES:
                raise refused(f"the pickle uses {opcode.name}, which torch.save never does", where)
            if opcode.name == "GLOBAL" and isinstance(argument, str):
                module, _, name = argument.partition(" ")
                names.add((module, name))
            if opcode.name == "PROTO" and (argument != 2 or place != 0):
                raise refused("the pickle is not of protocol 2, which torch.save writes", where)
            stack.apply(opcode)
            if opcode.name == "STOP" and place != len(pickled) - 1:
                raise LoadRefused("LD213", f"bytes follow the end of the pickle {where}", PICKLE_REMEDY)
    except LoadRefused:
        raise
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise refused(f"the pickle in the file cannot be read ({_first_line(error)})", where) from error
    return names


class _Stack:
    """How deep an unpickler's stack and memo would be, without the values."""

    def __init__(self) -> None:
        self.depths = [0]  # one for each open mark
        self.memo = 0

    def apply(self, opcode: pickletools.OpcodeInfo) -> None:
        before = opcode.stack_before
        if opcode.name == "MARK":
            self.depths.append(0)
        elif pickletools.markobject in before:
            below = before.index(pickletools.markobject)
            if len(self.depths) < 2:
                raise ValueError("a list ends that never began")
            self.depths.pop()
            self.depths[-1] += len(opcode.stack_after) - below
        elif not (opcode.name == "POP" and self.depths[-1] == 0):
            self.depths[-1] += len(opcode.stack_after) - len(before)
            if self.depths[-1] < 0 or (before and self.depths[-1] < len(opcode.stack_after)):
                raise ValueError("the stack is empty")
        else:
            raise ValueError("the stack is empty")
        self.memo += opcode.name in ("BINPUT", "LONG_BINPUT")
        if self.memo > MAX_MEMO or len(self.depths) > MAX_STACK or self.depths[-1] > 10 * MAX_STACK:
            raise ValueError("it is deeper than any model")


def refused(what: str, where: str) -> LoadRefused:
    """The refusal of a pickle: LD205, with the member it stands in."""
    return LoadRefused("LD205", f"{what} ({where})" if where != "data.pkl" else what, PICKLE_REMEDY)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
