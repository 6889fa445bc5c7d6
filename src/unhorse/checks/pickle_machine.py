"""Follows a pickle opcode by opcode, as an unpickler would, with names in the place of what they stand for.

Nothing is imported or called: on the stack stands `Global` for a name and `Made` for what a call gives.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any

from unhorse.checks import pickle_opcodes as opcodes
from unhorse.checks.pickle_values import (
    LOAD_FROM_BYTES,
    RECONSTRUCTORS,
    UNRESOLVED,
    Array,
    Global,
    Heap,
    Made,
    Reading,
    array_of,
    bytes_of,
    resolved,
)

_BEGINNINGS = [letter for code in b"\x80(cI\x8c\x95XVUS}]P" for letter in (bytes([code]), chr(code))]
_MARK = object()
"""Where a list of arguments begins."""


def follow(pickled: bytes, start: int = 0, *, arrays: bool = False, depth: int = 0) -> Reading:
    """What the pickle that begins at `start` names, makes and ends with; never raises for what it holds.

    With `arrays` it is read as joblib reads it, which writes arrays between the opcodes.
    """
    stream = io.BytesIO(pickled)
    stream.seek(start)
    machine = _Machine(Reading(), stream, arrays=arrays and depth < opcodes.MAX_NESTED, depth=depth)
    reading = machine.reading
    try:
        for count, (opcode, argument, place) in enumerate(opcodes.operations(stream)):
            if count >= opcodes.MAX_OPCODES:
                reading.problem = f"it has more than {opcodes.MAX_OPCODES} operations"
                break
            if opcode.name == "PROTO" and place != start:
                reading.odd = "it names its protocol twice"
            machine.apply(opcode, argument)
            if opcode.name == "STOP":
                break
    except EOFError as error:
        reading.cut, reading.problem = True, str(error)
    except opcodes.READ_ERRORS as error:
        reading.problem = (str(error).splitlines() or [type(error).__name__])[0][:200]
        reading.cut = opcodes.ran_out(reading.problem)
    reading.end = stream.tell()
    return reading


class _Machine:
    """The stack and the memo of an unpickler."""

    def __init__(self, reading: Reading, stream: io.BytesIO, *, arrays: bool, depth: int) -> None:
        self.reading, self.stream, self.arrays, self.depth = reading, stream, arrays, depth
        self.stack: list[object] = []
        self.marks = 0
        self.memo: dict[int, object] = {}

    def apply(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Does to the stack what an unpickler does; ValueError where it could not."""
        name = opcode.name
        self.reading.opcodes.add(name)
        if (action := _ACTIONS.get(name)) is not None:
            action(self, argument)
        elif name.endswith(("UNICODE", "UNICODE8", "STRING", "BYTES", "BYTES8", "BYTEARRAY8")):
            self.push(argument)
            if len(argument) > 8 and argument[:1] in _BEGINNINGS:
                self.keep(argument)
        elif opcode.stack_before or len(opcode.stack_after) != 1:
            raise ValueError(f"it uses {name}, which needs what a file does not have")
        else:
            self.push(argument if isinstance(argument, int | float) else _CONSTANTS.get(name))
        if (
            len(self.memo) > opcodes.MAX_MEMO
            or self.marks > opcodes.MAX_STACK
            or len(self.stack) > 10 * opcodes.MAX_STACK
        ):
            raise ValueError("it is deeper than any model")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def keep(self, text: object) -> None:
        """Remembers bytes and texts that begin like a pickle or an archive, which they may be."""
        if len(self.reading.texts) < 10_000:
            raw = text.encode("latin-1", "replace") if isinstance(text, str) else bytes(text)  # type: ignore[call-overload]
            self.reading.texts.append(raw)

    def pop(self) -> object:
        if not self.stack:
            raise ValueError("the stack is empty")
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a list is open where a value belongs")
        return value

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def mark(self, _: object = None) -> None:
        self.marks += 1
        self.stack.append(_MARK)

    def marked(self) -> list[object]:
        """What stands above the last mark, which goes with it."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                self.marks -= 1
                return found
        raise ValueError("a list ends that never began")

    # --- names and calls ------------------------------------------------------------------------------

    def import_name(self, argument: str) -> None:
        module, _, name = argument.partition("\n")
        self.push(self.reading.use(Global(module, name), "named"))

    def import_from_stack(self, _: object) -> None:
        name, module = self.pop(), self.pop()
        known = isinstance(module, str) and isinstance(name, str)
        self.push(self.reading.use(Global(str(module), str(name)) if known else UNRESOLVED, "named"))

    def import_extension(self, _: object) -> None:
        self.push(self.reading.use(UNRESOLVED, "named"))

    def call(self, callee: object, arguments: object, how: str = "call") -> None:
        """Pushes what the call would give, and notes what is called."""
        items = arguments if isinstance(arguments, tuple) else ()
        if (name := resolved(callee, items)) is not None:
            self.push(self.reading.use(name, "named"))
            return
        if isinstance(callee, Global) and callee in RECONSTRUCTORS:
            self.reading.use(callee, "call")
            if len(items) > 1 and isinstance(items[1], Global):
                self.reading.use(items[1], "call")  # the base, whose __init__ is called
            callee, how = (items[0] if items else None), "new"
            arguments = items[1:]
        if callee == LOAD_FROM_BYTES and len(items) == 1 and (inner := bytes_of(items[0])) is not None:
            self.reading.loaded.append(inner)
        elif isinstance(callee, Global):
            self.reading.use(callee, how)
        else:
            self.reading.indirect += 1
        self.push(Made(callee, arguments, how))

    def reduce(self, _: object) -> None:
        arguments = self.pop()
        self.call(self.pop(), arguments)

    def new(self, _: object) -> None:
        arguments = self.pop()
        self.call(self.pop(), arguments, "new")

    def new_with_keywords(self, _: object) -> None:
        keywords, arguments = self.pop(), self.pop()
        self.call(self.pop(), (*arguments, keywords) if isinstance(arguments, tuple) else arguments, "new")

    def instance(self, argument: str) -> None:
        module, _, name = argument.partition("\n")
        self.call(Global(module, name), tuple(self.marked()))

    def make_object(self, _: object) -> None:
        callee, *arguments = self.marked() or [None]
        self.call(callee, tuple(arguments))

    def build(self, _: object) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Made):
            self.reading.use(target if isinstance(target, Global) else UNRESOLVED, "changed")
            return
        target.state, target.built = state, True
        if self.arrays and isinstance(target.callee, Global) and target.callee.name == "NumpyArrayWrapper":
            self.skip(array_of(state))

    def skip(self, array: Array | None) -> None:
        """Goes over an array that joblib writes between two opcodes."""
        if array is None:
            return
        if array.objects:
            data, place = self.stream.getvalue(), self.stream.tell()
            inner = follow(data, place, arrays=True, depth=self.depth + 1)
            self.reading.take_over(inner)
            self.stream.seek(inner.end)
            return
        if array.padded:
            self.stream.read(int.from_bytes(self.stream.read(1), "little"))
        self.stream.seek(array.length, io.SEEK_CUR)

    def persist(self, argument: object) -> None:
        key = argument if argument is not None else self.pop()
        self.reading.persistent.append(key)
        self.push(Made(UNRESOLVED, key, "persistent"))

    # --- containers -----------------------------------------------------------------------------------

    def append(self, values: list[object]) -> None:
        target = self.top()
        if isinstance(target, Heap | Made):
            target.items += values
        else:
            self.reading.use(target if isinstance(target, Global) else UNRESOLVED, "changed")

    def pair(self, values: list[object]) -> None:
        target = self.top()
        if len(values) % 2:
            raise ValueError("a key has no value")
        if isinstance(target, Heap | Made):
            target.pairs += zip(values[::2], values[1::2], strict=True)
        else:
            self.reading.use(target if isinstance(target, Global) else UNRESOLVED, "changed")

    def set_item(self, _: object) -> None:
        value = self.pop()
        self.pair([self.pop(), value])

    def dictionary(self, _: object) -> None:
        values = self.marked()
        self.push(Heap("dict"))
        self.pair(values)

    def pop_any(self, _: object) -> None:
        if not self.stack:
            raise ValueError("the stack is empty")
        self.marks -= self.stack.pop() is _MARK

    def drop(self, _: object) -> None:
        self.marked()

    def several(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    # --- memo -----------------------------------------------------------------------------------------

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def stop(self, _: object) -> None:
        self.reading.root = self.pop()


_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}
Action = Callable[[_Machine, Any], None]
_ACTIONS: dict[str, Action] = {
    "MARK": _Machine.mark,
    "GLOBAL": _Machine.import_name,
    "STACK_GLOBAL": _Machine.import_from_stack,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.import_extension),
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "INST": _Machine.instance,
    "OBJ": _Machine.make_object,
    "BUILD": _Machine.build,
    **dict.fromkeys(("PERSID", "BINPERSID"), _Machine.persist),
    "EMPTY_LIST": lambda machine, _: machine.push(Heap("list")),
    "EMPTY_DICT": lambda machine, _: machine.push(Heap("dict")),
    "EMPTY_SET": lambda machine, _: machine.push(Heap("set")),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "LIST": lambda machine, _: machine.push(Heap("list", machine.marked())),
    "FROZENSET": lambda machine, _: machine.push(Heap("set", machine.marked())),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "DICT": _Machine.dictionary,
    "TUPLE1": lambda machine, _: machine.several(1),
    "TUPLE2": lambda machine, _: machine.several(2),
    "TUPLE3": lambda machine, _: machine.several(3),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.append(machine.marked())),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.pair(machine.marked()),
    "POP": _Machine.pop_any,
    "POP_MARK": _Machine.drop,
    "DUP": lambda machine, _: machine.push(machine.top()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "STOP": _Machine.stop,
    "PROTO": lambda machine, argument: setattr(machine.reading, "protocol", argument),
    "FRAME": lambda machine, _: None,
    "READONLY_BUFFER": lambda machine, _: machine.top() and None,
}
