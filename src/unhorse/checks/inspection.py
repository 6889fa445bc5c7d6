"""What a model file is and says, found out without parsing its tensors or running any of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from unhorse.checks import weight_files
from unhorse.checks.carriers import check_carrier
from unhorse.checks.expectations import Facts
from unhorse.checks.exported_programs import check_exported_program
from unhorse.checks.huggingface import CONFIG, check_huggingface
from unhorse.checks.keras_files import check_keras_archive, check_keras_hdf5
from unhorse.checks.kinds import LOOKED_INTO
from unhorse.checks.old_torch_files import check_old_torch
from unhorse.checks.onnx_files import check_onnx
from unhorse.checks.sniff import Format, refusal, sniff
from unhorse.checks.torchscript_files import check_torchscript
from unhorse.rules import LoadFailed, LoadRefused

_CHECKS = {
    Format.SAFETENSORS: weight_files.safetensors_facts,
    Format.TORCH_ZIP: weight_files.torch_zip_facts,
    Format.TORCH_OLD: check_old_torch,
    Format.TORCHSCRIPT: check_torchscript,
    Format.PT2: check_exported_program,
    Format.KERAS_ZIP: check_keras_archive,
    Format.HDF5: check_keras_hdf5,
}
_READ_ERRORS = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, RecursionError),
    *(ArithmeticError, AssertionError, MemoryError),
)


def check(stream: BinaryIO, kind: Format, beside: Mapping[str, BinaryIO], name: str = "the file") -> Facts:
    """The facts of a file of a kind, whose neighbours `beside` are open under their names; or a refusal."""
    if reason := refusal(kind, name):
        raise reason
    if stream.seek(0, io.SEEK_END) > weight_files.MAX_FILE_BYTES:
        raise LoadRefused("LD208", f"{name} has more than 4 GiB", weight_files.EXPORT_REMEDY)
    stream.seek(0)
    try:
        if kind in LOOKED_INTO:
            check_carrier(stream, kind, name)
        facts = check_onnx(stream, beside) if kind is Format.ONNX else _CHECKS[kind](stream)
        if CONFIG in beside:
            for other, file in beside.items():
                if not other.endswith(".json"):
                    check(file, sniff(file), {}, other)
            facts = _together(facts, check_huggingface(beside))
        return facts
    except (LoadRefused, LoadFailed):
        raise
    except _READ_ERRORS as error:
        raise LoadFailed(f"{name} is damaged ({type(error).__name__}: {_first_line(error)})") from error
    finally:
        stream.seek(0)


def check_task(files: Sequence[BinaryIO], options: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Sniffs and checks the first of some files: ({"format": ..., "facts": ...}, no bytes).

    `options["names"]` are the names of the other files, which lie beside it; `options["name"]` is its own.
    """
    beside = dict(zip(options.get("names", ()), files[1:], strict=True))
    name = str(options.get("name", "the file"))
    kind = sniff(files[0])
    facts = check(files[0], kind, beside, name)
    return {"format": kind.name, "facts": facts.to_json()}, b""


def _together(weights: Facts, folder: Facts) -> Facts:
    """What the folder says, and beside it what the weights say of themselves."""
    extra = {**weights.extra, **folder.extra}
    return replace(folder, operators=weights.operators, extra=extra, notes=weights.notes)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
