"""Mutants of model files, and what the restricted processes of scripts/fuzz do with them."""

from __future__ import annotations

import collections
import io
import random
import re
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from unhorse.checks.sniff import sniff
from unhorse.rules import LoadFailed, LoadRefused

NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**64 - 1,
)
WORDS = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"null", b"[]", b"{}", b"true", b'"\\ud800"')


def mutant(name: str, seed: bytes, number: int) -> bytes:
    """A damaged copy of a seed, always the same for the same name and number."""
    rng = random.Random(f"{name}:{number}")
    if seed.startswith(b"PK") and rng.random() < 0.8:
        return _remade_archive(seed, rng)
    if name.endswith(".safetensors") and rng.random() < 0.7:
        length = int.from_bytes(seed[:8], "little")
        header = _damaged(seed[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + seed[8 + length :]
    return _damaged(seed, rng)


def _damaged(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        content = rng.choice(DAMAGES)(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    place = rng.randrange(len(content) + 1)
    number = (rng.choice(NUMBERS) % 256**width).to_bytes(width, rng.choice(("little", "big")))
    return content[:place] + number + content[place + width :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _remove(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + content[place + rng.randrange(1, 32) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    start, place = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)
    piece = content[start : start + rng.randrange(1, 64)]
    return content[:place] + piece * rng.choice((1, 1, 1, 50)) + content[place:]


def _replace_word(content: bytes, rng: random.Random) -> bytes:
    """A number or a quoted word becomes another."""
    found = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"]{0,40}"', content))
    if not found:
        return _flip(content, rng)
    start, end = rng.choice(found).span()
    word = rng.choice((*WORDS, content[slice(*rng.choice(found).span())]))
    return content[:start] + word + content[end:]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _overwrite, _overwrite, _cut, _remove, _repeat, _replace_word, _replace_word),
)


def _remade_archive(seed: bytes, rng: random.Random) -> bytes:
    """A consistent archive with a damaged member, so that what is inside is reached."""
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = rng.randrange(len(members))
    name, content = members[index]
    choice = rng.random()
    if choice < 0.8:
        members[index] = (name, _damaged(content, rng))
    elif choice < 0.87:
        del members[index]
    elif choice < 0.94:
        members[index] = (_damaged(name.encode(), rng).decode("utf-8", "replace") or "x", content)
    else:
        members.insert(rng.randrange(len(members)), (name + rng.choice(("", "x", "/../x")), content))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members:
            if name not in archive.namelist():
                archive.writestr(zipfile.ZipInfo(name.replace("\0", "0")), content)
    return made.getvalue() if rng.random() < 0.9 else _damaged(made.getvalue(), rng)


# In the restricted processes


def check_many(files: list[BinaryIO], options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Checks many mutants of one seed: how often each outcome, and which broke the rules."""
    from unhorse.checks.inspection import check_task
    from unhorse.checks.onnx_outline import external_names

    seed, outcomes, broken = files[0].read(), collections.Counter[str](), []
    for number in range(options["first"], options["first"] + options["count"]):
        if number % 20 == 0:
            options["progress"](str(number))
        changed = io.BytesIO(mutant(options["name"], seed, number))

        def look(changed: BinaryIO = changed) -> None:
            external_names(changed)  # which the parent asks of every ONNX file
            check_task([changed], {})

        outcome, trace = _outcome(look)
        outcomes[outcome] += 1
        if trace:
            broken.append(f"{options['name']}:{number} {trace}")
    return {"outcomes": dict(outcomes), "broken": broken[:20]}, b""


def load_one(files: list[BinaryIO], options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Checks, reads and traces one mutant, as opening a file does."""
    from unhorse.checks.inspection import check
    from unhorse.loading.reading import read_task

    changed = io.BytesIO(mutant(options["name"], files[0].read(), options["number"]))

    def load() -> None:
        kind = sniff(changed)
        check(changed, kind, {})
        read_task([changed], {"format": str(kind), "names": [options["name"]]})

    outcome, trace = _outcome(load)
    name = f"{options['name']}:{options['number']}"
    return {"outcomes": {outcome: 1}, "broken": [f"{name} {trace}"] if trace else []}, b""


def _outcome(act: Callable[[], object]) -> tuple[str, str]:
    """How it ended, and for what must not happen where it did."""
    try:
        act()
    except LoadRefused as refusal:
        return refusal.rule, ""
    except LoadFailed as failure:
        return failure.rule, ""
    except MemoryError:
        raise
    except Exception as error:  # what nobody expected is what this program looks for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "broken",
            f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})",
        )
    return "accepted", ""


def _import_readers() -> None:
    """Before forking: each child would need seconds for them."""
    import h5py
    import keras
    import onnx2fx
    import onnxruntime
    import torch.export.pt2_archive

    from unhorse.checks import inspection
    from unhorse.loading import reading

    assert all((h5py, keras, onnx2fx, onnxruntime, torch.export.pt2_archive, inspection, reading))


TASKS = {"check_many": check_many, "load_one": load_one}
if "torch" in sys.modules and __name__ == "<run_path>" and "--heavy" in sys.argv:
    _import_readers()
