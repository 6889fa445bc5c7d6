"""The house keeps its shape: who imports whom, what is never imported, how fast help answers."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unhorse

SOURCE = Path(unhorse.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FOREIGN = {"torchvision", "timm", "torchmetrics"}

# files that belong to the unit of another file
PARTS = {
    **{"image_files": "datasets", "inputs": "metrics", "rates": "metrics", "victims": "zoo"},
    **{"populations": "zoo"},
    **{"exhibits": "report", "wording": "report", "guard_report": "report", "repair_report": "report"},
    **{"scanned_model": "report", "scan_report": "report", "findings": "report", "suppression": "report"},
    **{"sarif": "report", "junit": "report", "cyclonedx": "report", "rulebook": "rules"},
    **{"survey": "cli", "demo": "cli", "inspection": "cli", "model_files": "cli"},
    **{"survey_cache": "cli", "doubts": "cli", "descriptions": "cli"},
    "ray_jobs": "jobs",
}
DEFENCE = {"core", "triggers", "metrics", "models"}
ZOO = {"core", "datasets", "models", "attacks", "triggers", "metrics", "jobs"}
TABLE: dict[str, set[str]] = {
    "core": set(),
    "extras": set(),
    "jobs": {"extras"},
    "triggers": {"core"},
    "datasets": {"core", "extras"},
    "metrics": {"core"},
    "models": {"core"},
    "rules": set(),
    "checks": {"rules", "extras"},
    "sandbox": {"rules"},
    "loading": {"core", "models", "rules", "checks", "sandbox", "extras"},
    "attacks": {"core", "triggers", "models"},
    "scanners": DEFENCE,
    "filters": DEFENCE | {"extras"},
    "monitors": DEFENCE | {"filters"},
    "repairs": DEFENCE,
    "zoo": ZOO,
    "report": {"core", "rules"},
}
TABLE["benchmark"] = set(TABLE) - {"report"}
TABLE["cli"] = TABLE["__init__"] = {*TABLE, "__init__"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def unit_of(path: Path) -> str:
    name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return PARTS.get(name, name)


def modules_imported_by(path: Path) -> set[str]:
    """Every module named in an import statement of a file, wherever it stands, with its full name."""
    found: set[str] = set()
    package = ("unhorse", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "unhorse" else {module}
    return found


def unit_named(module: str) -> str:
    """The unit of a module of ours; a public name taken from the package itself is of its __init__."""
    name = module.split(".")[1] if "." in module else "__init__"
    there = (SOURCE / f"{name}.py").exists() or (SOURCE / name).is_dir()
    return PARTS.get(name, name) if there else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_what_its_unit_may(path):
    unit = unit_of(path)
    assert unit in TABLE, f"{unit} is not in the table of who may import whom: add it there first"
    ours = {module for module in modules_imported_by(path) if module.split(".")[0] == "unhorse"}
    strangers = {module for module in ours if unit_named(module) not in {unit, *TABLE[unit]}}
    assert not strangers


def test_nothing_of_ours_is_imported_by_a_computed_name():
    allowed = {"cli", "__init__"}  # they import late, so that help answers fast
    for path in FILES:
        names = {node.attr for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
        names |= {node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)}
        if unit_of(path) not in allowed:
            assert not names & {"import_module", "__import__"}, path


def test_no_module_asks_for_torchvision_or_a_library_that_needs_it():
    # asked for, not found: none of them is installed here, so sys.modules alone would always be free of them
    code = f"""
import importlib, pkgutil, sys
asked = set()
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FOREIGN!r}:
            asked.add(name)
sys.meta_path.insert(0, Watch())
import unhorse
for module in pkgutil.walk_packages(unhorse.__path__, "unhorse."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(sorted(asked | ({FOREIGN!r} & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_help_takes_hardly_longer_than_the_libraries_that_print_it():
    """On an idle machine of 2023 that is 0.2 s; torch alone would add more than one."""

    def seconds(*arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        return time.perf_counter() - started

    # a busy machine is given a few tries
    pairs = [
        (
            seconds("-m", "unhorse.cli", "--help"),
            seconds("-c", "import cyclopts.help, rich.markdown, rich.table"),
        )
        for _ in range(6)
    ]
    ours, theirs = (min(each) for each in zip(*pairs, strict=True))
    assert ours < 2 * theirs, pairs


def test_help_names_the_commands():
    done = subprocess.run([sys.executable, "-m", "unhorse.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "scan" in done.stdout


def test_help_does_not_import_torch():
    code = """
import sys
from unhorse.cli import main
sys.argv = ["unhorse", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("False")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_unpickles_no_code(path):
    readers = {
        f"{module}.{name}" for module in ("pickle", "joblib") for name in ("load", "loads", "Unpickler")
    }
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            assert isinstance(node.value, ast.Constant) and node.value.value is True
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in readers
            if ast.unparse(node.func) == "torch.load":
                assert "weights_only" in {keyword.arg for keyword in node.keywords}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in {"pickle", "joblib", "dill", "cloudpickle"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_can_be_read_in_one_sitting(path):
    limit = 380 if path.name == "core.py" else 300
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_every_public_name_can_be_imported():
    assert unhorse.__all__
    assert sorted(unhorse.__all__) == sorted(set(unhorse.__all__))
    for name in unhorse.__all__:
        assert getattr(unhorse, name) is not None, name
