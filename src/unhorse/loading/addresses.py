"""What to say of a path that is none: nothing is there, or it is an address on a network."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from unhorse.loading import archived


def missing(path: Path) -> ValueError | None:
    """What to say of a path that leads to nothing, or that is an address; None where there is a file."""
    said = path.as_posix()
    scheme, colon, rest = said.partition(":/")
    if colon and scheme.isalnum() and len(scheme) > 1 and not os.path.lexists(path):
        return ValueError(_address(scheme, rest.lstrip("/")))
    if os.path.lexists(path) or archived.divided(path) is not None:
        return None
    if re.fullmatch(r"(hf:|hub:)?[\w-][\w.-]*/[\w.-]+", said) and not path.parent.exists():
        name = said.partition(":")[2] or said
        return ValueError(
            f"no such file: {path}. unhorse reads local files only; if this is a model of a hub, fetch it "
            f"first: huggingface-cli download {name} --local-dir {name.rpartition('/')[2]}"
        )
    return ValueError(f"no such file: {path}: check the path")


def _address(scheme: str, rest: str) -> str:
    """The command that downloads from an address, which unhorse itself never does."""
    whole = f"{scheme}://{rest}"
    name = rest.rstrip("/").rpartition("/")[2] or "model"
    if scheme in ("hf", "hub"):
        command = f"huggingface-cli download {rest} --local-dir {name}"
    elif scheme in ("s3", "gs"):
        command = f"{'aws s3' if scheme == 's3' else 'gsutil'} cp {shlex.quote(whole)} ."
    elif rest.startswith("huggingface.co/") and rest.count("/") == 2:
        command = f"huggingface-cli download {rest.partition('/')[2]} --local-dir {name}"
    else:
        command = f"curl -LO {shlex.quote(whole)}"
    return f"{whole} is no local file, and unhorse downloads no model: {command}"
