"""What torch.save wrote before PyTorch 1.6: five pickles one after the other, then the tensors' bytes."""

from __future__ import annotations

import io
import pickletools
from typing import BinaryIO

from unhorse.checks import pickles
from unhorse.checks.expectations import Facts
from unhorse.rules import LoadFailed

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_VERSION = b"\x80\x02M\xe9\x03."
_MAX_PICKLES = 64 * 2**20


def check_old_torch(stream: BinaryIO) -> Facts:
    """The facts of such a file; LD205 where a pickle names what no state dict needs, LoadFailed if it is cut.

    Only the fourth pickle, the state dict, may name anything. What follows the fifth is left to the reader.
    """
    stream.seek(0)
    head = stream.read(_MAX_PICKLES)
    if not head.startswith(MAGIC + _VERSION):
        raise pickles.refused("the file opens like one of PyTorch's and goes on otherwise", "the header")
    start, named = len(MAGIC + _VERSION), set()
    for where in ("the system's description", "the state dict", "the list of storages"):
        pickled = _pickle_at(head, start, where)
        allowed = pickles.is_plain if where == "the state dict" else _nothing
        named |= pickles.check_pickle(pickled, allowed, where=where)
        start += len(pickled)
    storages = sorted(name for _, name in named if name.endswith("Storage"))
    return Facts(producer="torch.save before 1.6", extra={"storages": ", ".join(storages)})


def _nothing(module: str, name: str) -> bool:
    return False


def _pickle_at(head: bytes, start: int, where: str) -> bytes:
    """The bytes of the pickle that begins there."""
    reader = io.BytesIO(head)
    reader.seek(start)
    try:
        for count, _ in enumerate(pickletools.genops(reader)):
            if count > pickles.MAX_OPCODES:
                raise pickles.refused("the pickle in the file is too long", where)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise LoadFailed(f"{where} is damaged ({str(error)[:100]})") from error
    return head[start : reader.tell()]
