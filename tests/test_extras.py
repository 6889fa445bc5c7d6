"""What to install is said by names that pip finds, and those are the extras of pyproject."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unhorse
from unhorse.extras import EXTRAS, install_line
from unhorse.rulebook import RULES

SOURCE = Path(unhorse.__file__).parent
PROJECT = SOURCE.parents[1] / "pyproject.toml"


def test_the_packages_of_an_extra_are_those_of_the_project():
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        extra: {re.split(r"[>=<]", package)[0] for package in packages} for extra, packages in extras.items()
    }
    pinned = {package for packages in extras.values() for package in packages if "==" in package}
    del named["dev"]
    assert {
        extra: {package.split("==")[0] for package in packages} for extra, packages in EXTRAS.items()
    } == named
    assert {package for packages in EXTRAS.values() for package in packages if "==" in package} == pinned


def test_nothing_asks_pip_for_an_extra_of_unhorse():
    asking = [
        str(path)
        for path in (*SOURCE.rglob("*.py"), *SOURCE.rglob("*.toml"))
        if re.search(r"pip install ['\"]?unhorse", path.read_text(encoding="utf-8"))
    ]
    assert asking == []
    assert install_line("keras") == "pip install keras h5py"
    assert RULES["LD224"].remedy == install_line("onnx", "keras", "hf")


@pytest.mark.parametrize(
    ("seed", "hidden", "extra"),
    [("tiny.onnx", "onnx2fx", "onnx"), ("tiny.keras", "keras", "keras"), ("tiny.h5", "h5py", "keras")],
)
def test_an_absent_library_is_named_with_the_packages_to_install(seed: str, hidden: str, extra: str):
    path = Path(__file__).with_name("seeds") / seed
    code = f"""
import sys
sys.modules[{hidden!r}] = None
from unhorse.checks.inspection import check
from unhorse.checks.sniff import sniff
from unhorse.loading.reading import read_task
from unhorse.rules import LoadRefused
with open({str(path)!r}, "rb") as stream:
    try:
        read_task([stream], {{"format": sniff(stream), "names": ["m"]}})
    except LoadRefused as refusal:
        print(refusal.rule, refusal.remedy, {hidden!r} in refusal.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"LD224 {install_line(extra)} True", done.stderr
