"""What torch.save wrote before PyTorch 1.6: five pickles one after the other, then the tensors' bytes."""

from __future__ import annotations

import re
from typing import BinaryIO

from unhorse.checks import pickles
from unhorse.checks.expectations import Facts
from unhorse.checks.pickle_globals import contents
from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_values import Reading
from unhorse.rules import LoadFailed

MAGIC = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)
_NUMBER, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_MAX_PICKLES = 64 * 2**20
_PARTS = ("the magic number", "the version", "the system's description", "the state dict")


def check_old_torch(stream: BinaryIO) -> Facts:
    """The facts of such a file; LD205 where a pickle names what no state dict needs, LoadFailed if it is cut.

    Only the fourth pickle, the state dict, may name anything. What follows the fifth is left to the reader.
    """
    pickled = pickles_of(stream)
    storages = sorted(str(name) for name in pickled[3].uses if name.name.endswith("Storage"))
    notes = pickles.left_out(contents(pickled[3], texts=False))
    return Facts(producer="torch.save before 1.6", extra={"storages": ", ".join(storages)}, notes=notes)


def pickles_of(stream: BinaryIO) -> list[Reading]:
    """The five pickles of such a file, followed and checked."""
    stream.seek(0)
    head = stream.read(_MAX_PICKLES)
    readings: list[Reading] = []
    for where in (*_PARTS, "the list of storages"):
        start = readings[-1].end if readings else 0
        if where == "the state dict":
            reading = pickles.check_checkpoint(head, where=where, start=start, last=False).reading
        else:
            reading = follow(head, start)
            if reading.uses or reading.persistent:
                raise pickles.refused(f"{where} of the file {contents(reading).everything()}", where)
            if reading.problem:
                raise LoadFailed(f"{where} in the file is damaged ({reading.problem})")
        readings.append(reading)
    if (readings[0].root, readings[1].root) != (_NUMBER, _VERSION):
        raise pickles.refused("the file opens like one of PyTorch's and goes on otherwise", "the header")
    return readings
