"""Which files of a Hugging Face folder hold its weights, and which only look as if they did."""

from __future__ import annotations

import json
import re
from pathlib import Path

from unhorse.rules import LoadFailed, LoadRefused

CONFIGURATION = (
    *("config.json", "preprocessor_config.json", "model.safetensors.index.json"),
    "pytorch_model.bin.index.json",
)
_MAX_INDEX = 8 * 2**20
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_KINDS = (("model", "safetensors"), ("pytorch_model", "bin"))

Sets = tuple[tuple[str, ...], ...]


def weights(folder: Path) -> tuple[Sets, tuple[str, ...]]:
    """The sets of weight files, that of safetensors first, and the shards that belong to none.

    Where an index names the shards it decides. LD202 for a shard that it names and the folder lacks.
    """
    present = {entry.name for entry in folder.iterdir()}
    shards = sorted(name for name in present if _SHARD.fullmatch(name))
    sets: list[tuple[str, ...]] = []
    for stem, suffix in _KINDS:
        if f"{stem}.{suffix}" in present:
            sets.append((f"{stem}.{suffix}",))
        elif f"{stem}.{suffix}.index.json" in present:
            sets.append(_named(folder / f"{stem}.{suffix}.index.json", present))
        else:
            sets.append(tuple(name for name in shards if re.match(rf"{stem}-.*\.{suffix}$", name)))
    if not any(sets):  # under another name, for instance a variant: model.fp16.safetensors
        sets = [(name,) for name in sorted(present) if name.endswith(".safetensors")]
    used = {name for names in sets for name in names}
    return tuple(names for names in sets if names), tuple(name for name in shards if name not in used)


def _named(index: Path, present: set[str]) -> tuple[str, ...]:
    """The files that an index names; what it says beside that is checked in the restricted process."""
    try:
        if not index.resolve().is_file() or index.stat().st_size > _MAX_INDEX:
            raise ValueError("it is no file of a few megabytes")
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        absent = [name for name in names if name not in present]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadFailed(f"{index.name} is no index of weights ({type(error).__name__})") from error
    if absent or not names:
        what = f"{index.name} names {str(absent[0])[:100]!r}" if absent else f"{index.name} names no file"
        raise LoadRefused(
            "LD202", f"{what}, which the folder lacks" if absent else what, "download the whole folder"
        )
    return tuple(names)
