"""`doctor`: what this installation has, and what that means for a scan."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unhorse.extras import install_line

PURPOSES = {
    "data": "parquet files, and data sets of a hub",
    "inpaint": "Februus with OpenCV's inpainting",
    "onnx": "ONNX files",
    "keras": "Keras files",
    "hf": "Hugging Face folders",
    "ray": "jobs on a Ray cluster",
}
SAMPLE = "sample.safetensors"


def doctor(
    *, json: Annotated[Path | None, Parameter(help="The same as JSON.", name=["--json"])] = None
) -> int:
    """Say what this installation has: versions, devices, threads, sandbox, extras."""
    from json import dumps

    from unhorse.survey import environment

    found = {**environment("auto"), "bf16 products": _bf16(), "sandbox": _sandbox()}
    found |= {f"extra {name}": _extra(name, needed) for name, needed in _extras().items()}
    for name, value in found.items():
        print(f"{name}: {value}")
    if json is not None:
        json.write_text(dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _bf16() -> str:
    import torch

    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported()
    else:
        has = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "yes" if has else "no: scans and trainings take fp32, and longer"


def _sandbox() -> str:
    """The tier that a file opened here would be confined to."""
    import tempfile

    import torch
    from safetensors.torch import save_file

    from unhorse.rules import LoadFailed, LoadRefused
    from unhorse.sandbox import server

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SAMPLE
        save_file({"weight": torch.zeros(1)}, path)
        try:
            with path.open("rb") as file:
                return server.run("check", [file], {"name": SAMPLE, "names": []}, heavy=False).tier
        except (LoadFailed, LoadRefused) as error:
            return f"none, so only safetensors files are opened ({error})"


def _extras() -> dict[str, list[str]]:
    """The libraries that each extra for users asks for."""
    from importlib import metadata

    needed: dict[str, list[str]] = defaultdict(list)
    for requirement in metadata.requires("unhorse") or []:
        asked = re.fullmatch(r"([\w.-]+).*extra == ['\"](\w+)['\"].*", requirement)
        if asked and asked[2] in PURPOSES:
            needed[asked[2]].append(asked[1])
    return needed


def _extra(name: str, needed: list[str]) -> str:
    from importlib import metadata

    present, absent = [], []
    for library in needed:
        try:
            present.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            absent.append(library)
    if absent:
        return f"lacks {', '.join(absent)}; for {PURPOSES[name]}: {install_line(name)}"
    return ", ".join(present)
