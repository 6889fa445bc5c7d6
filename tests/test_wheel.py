"""What users install: wheel and source archive, in an environment with the core dependencies and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
VICTIMS = ROOT / "tests" / "victims"
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def packaged_files(folder: Path) -> set[str]:
    """Every file of the package that is not compiled, as paths below src."""
    found = (path for path in (folder / "src").rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder / "src"))
        for path in found
        if "__pycache__" not in path.parts and not path.parent.name.endswith(".egg-info")
    }


def build(kind: str, source: Path, output: Path) -> Path:
    """What a front end such as pip builds from a folder: "build_wheel" or "build_sdist"."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(output)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


def needed(requirements: list[str]) -> set[str]:
    """The names of the installed distributions that the requirements ask for, all the way down."""
    names: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name in names:
            continue
        names.add(name)
        for text in metadata.requires(name) or ():
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in extras):
                further.marker = None
                waiting.append(further)
    return names


def link(names: set[str], site: Path) -> None:
    """Puts the files of distributions into a site-packages folder, without copying them where that can be."""
    for name in names:
        distribution = metadata.distribution(name)
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if file.parts[0] == ".." or "__pycache__" in file.parts or not source.is_file():
                continue
            place = site / file
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, place)
            except FileExistsError:
                continue
            except OSError:  # another file system
                shutil.copy2(source, place)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The source archive of this checkout, and the wheel that is built from that archive alone."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, checkout)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", checkout / "src", ignore=unwanted)
    sdist = build("build_sdist", checkout, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {"sdist": unpacked, "wheel": build("build_wheel", unpacked, folder)}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The bin folder of an environment that holds the wheel, its core dependencies and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with (ROOT / "pyproject.toml").open("rb") as file:
        link(needed(tomllib.load(file)["project"]["dependencies"]), site)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-index", "--no-compile", str(built["wheel"])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture
def unhorse(installed, tmp_path):
    """Runs the installed command in a folder outside the checkout; gives exit code and output."""

    def run(*arguments: str) -> tuple[int, str]:
        environment = {"PATH": os.defpath, "HOME": str(tmp_path), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [installed / "unhorse", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    shutil.copytree(VICTIMS, tmp_path / "models")
    return run


def test_wheel_and_source_archive_hold_every_file_of_the_package(built):
    wanted = packaged_files(ROOT)
    assert packaged_files(built["sdist"]) == wanted
    with zipfile.ZipFile(built["wheel"]) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted


def test_an_environment_without_extras_has_none(installed):
    extras = "onnx keras pyarrow pytest"
    code = f"import importlib.util as u; print([n for n in '{extras}'.split() if u.find_spec(n)])"
    done = subprocess.run([installed / "python", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_declared_dependency_is_imported():
    """matplotlib was declared for a year and imported by nothing."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    with (ROOT / "pyproject.toml").open("rb") as file:
        names = {Requirement(each).name for each in tomllib.load(file)["project"]["dependencies"]}
    modules = {"pillow": "PIL", "scikit-learn": "sklearn"}
    for name in names:
        module = modules.get(name, name)
        assert f"import {module}" in text or f"from {module}" in text, f"nothing imports {name}"


def test_the_installed_command_tells_its_version(unhorse, installed):
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert unhorse("--version") == (0, f"{version}\n")
    code = "import unhorse; print(unhorse.__version__)"
    done = subprocess.run([installed / "python", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == version


def test_the_installed_command_scans(unhorse):
    code, output = unhorse("scan", "models/infected", "models/benign", "--effort", "quick")
    assert code == 1 and "INFECTED" in output and "NO SIGN FOUND" in output, output


def test_the_installed_command_inspects_and_converts(unhorse, tmp_path):
    code, output = unhorse("convert", "models/benign", "-o", "copy.safetensors")
    assert code == 0, output
    code, output = unhorse("inspect", "copy.safetensors")
    assert code == 0 and "copy.safetensors" in output, output


def test_the_installed_command_opens_a_foreign_file_in_the_sandbox(unhorse, installed, tmp_path):
    code = (
        "import torch; from safetensors.torch import load_file; "
        "torch.save(load_file('models/benign/model.safetensors'), 'weights.pth')"
    )
    subprocess.run([installed / "python", "-c", code], cwd=tmp_path, check=True)
    code, output = unhorse("convert", "weights.pth", "-o", "copy.safetensors")
    assert code == 0 and "sandbox" in output, output


def test_the_installed_command_explains_and_helps(unhorse):
    assert unhorse("explain", "LD205")[0] == 0
    assert unhorse("demo", "--help")[0] == 0
