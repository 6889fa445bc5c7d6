"""The command line: exit codes, what is written where, and no stack trace for anything a user may give."""

from __future__ import annotations

import json
import shutil
import tomllib
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

import unhorse.survey
from conftest import TARGET, small_victim
from unhorse.cli import app, run
from unhorse.cli.populations import AttackName
from unhorse.models.classifier import save_classifier
from unhorse.sandbox.confinement import Tier
from unhorse.victims import MADE, load_victim

SCAN = ("scan", "--effort", "quick")
ZOO = """
name = "tiny"
data = { source = "digits", images = 128, test_images = 100 }
options = { widths = [4, 8], hidden = 16 }
recipe = { epochs = 1, batch_size = 64, learning_rate = 1e-2 }
acceptance = { clean_margin = 1.0, trojan = 0.0, attempts = 1, median_of = 1 }
groups = [
    { name = "benign", split = "fit", count = 3 },
    { name = "patch", split = "fit", count = 3, attack = { kind = "badnet", rate = 0.5 } },
]
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path_factory.mktemp("cache")))


def scanned(*arguments: object, tmp_path: Path) -> tuple[int, list[dict]]:
    """The exit code of a scan and the models of its JSON."""
    path = tmp_path / "out.json"
    code = run([*SCAN, *map(str, arguments), "--json", str(path)])
    return code, json.loads(path.read_text())["models"]


# --- exit codes of a scan -----------------------------------------------------------------------------------


def test_a_benign_model_exits_0(victims, tmp_path):
    code, (model,) = scanned(victims / "benign", tmp_path=tmp_path)
    assert (code, model["verdict"]) == (0, "NO SIGN FOUND")


def test_a_finding_exits_1_and_writes_the_evidence(victims, tmp_path, capsys):
    page = tmp_path / "out.html"
    code, models = scanned(victims, "--html", page, tmp_path=tmp_path)
    assert code == 1
    verdicts = {Path(model["path"]).name: model["verdict"] for model in models}
    assert verdicts == {"infected": "INFECTED", "benign": "NO SIGN FOUND"}
    target = next(model for model in models if model["verdict"] == "INFECTED")["target"]
    assert target["index"] == TARGET if isinstance(target, dict) else target == TARGET
    html = page.read_text()
    assert "INFECTED" in html and "class 3" in html and "<script" not in html
    out = capsys.readouterr()
    assert "INFECTED" in out.out and "about" in out.err and str(page) in out.err


def test_fail_on_says_what_counts(victims, tmp_path):
    assert scanned(victims / "infected", "--fail-on", "none", tmp_path=tmp_path)[0] == 0
    assert scanned(victims / "infected", "--fail-on", "high", tmp_path=tmp_path)[0] == 1


def text_file(path: Path) -> Path:
    path.write_text("not a model at all\n" * 20)
    return path


def truncated(path: Path) -> Path:
    source = save_classifier(small_victim(), path.with_name("whole")) / "model.safetensors"
    path.write_bytes(source.read_bytes()[:-1000])
    return path


def not_a_number(path: Path) -> Path:
    model = small_victim()
    with torch.no_grad():
        model.network.head[1].weight[0, 0] = torch.nan
    return save_classifier(model, path.with_suffix(""))


def unknown(path: Path) -> Path:
    save_file({"odd.weight": torch.rand(7, 11), "odder.bias": torch.rand(13)}, path)
    return path


@pytest.mark.parametrize(
    ("make", "said", "expected"),
    [
        (text_file, "not a model file", 2),
        (truncated, "safetensors", 2),
        (not_a_number, "NaN", 1),  # a finding of medium severity, LD207
        (unknown, "--arch", 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_loaded_fails_with_a_remedy(make, said, expected, tmp_path, capsys):
    code, (model,) = scanned(make(tmp_path / "model.safetensors"), tmp_path=tmp_path)
    assert (code, model["verdict"]) == (expected, "FAILED")
    assert said.lower() in json.dumps(model).lower()
    out = capsys.readouterr()
    assert "FAILED" in out.out and "Traceback" not in out.out + out.err
    assert "NO SIGN" not in out.out


def test_a_missing_file_exits_4_with_a_remedy(tmp_path, capsys):
    assert run([*SCAN, str(tmp_path / "model.safetensors")]) == 4
    assert "no such file" in (said := capsys.readouterr().err) and "check the path" in said


def test_wrong_classes_fail_with_a_remedy(victims, tmp_path):
    code, (model,) = scanned(victims / "benign", "--classes", 7, tmp_path=tmp_path)
    assert (code, model["verdict"]) == (2, "FAILED")
    assert "6 classes, not 7" in json.dumps(model) and "--classes" in json.dumps(model)


def test_a_constant_model_is_undecided_and_exits_2(tmp_path):
    model = small_victim()
    with torch.no_grad():
        model.network.head[-1].weight.zero_()
    code, (found,) = scanned(save_classifier(model, tmp_path / "m"), tmp_path=tmp_path)
    assert (code, found["verdict"]) == (2, "UNDECIDED")
    assert "constant" in json.dumps(found)


def test_a_finding_counts_more_than_a_failure(victims, tmp_path):
    bad = text_file(tmp_path / "bad.pt")
    code, models = scanned(bad, victims / "infected", tmp_path=tmp_path)
    assert code == 1 and [model["verdict"] for model in models] == ["FAILED", "INFECTED"]


def test_an_empty_folder_exits_3(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert scanned(tmp_path / "empty", tmp_path=tmp_path) == (3, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "m.pt", "--bogus"],
        ["scan", "m.pt", "--effort", "heroic"],
        ["scan", "m.pt", "--classes", "ten"],
        ["nonsense"],
        ["scanner", "fit", "somewhere"],
        ["benchmark"],
        ["simulate", "sorcery", "-o", "v"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_4(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 4
    out = capsys.readouterr()
    assert (out.out + out.err).strip() and "Traceback" not in out.out + out.err


def test_an_interrupted_command_exits_130(victims, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unhorse.survey, "scan_models", interrupt)
    assert run([*SCAN, str(victims)]) == 130
    assert "call again" in capsys.readouterr().err


# --- options of a scan --------------------------------------------------------------------------------------


def test_bare_weights_are_scanned_with_what_the_flags_say(victims, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(load_file(victims / "infected" / "model.safetensors"), weights)
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\nd\ne\nf\n")
    flags = ("--arch", "small-cnn", "--size", 16, 16, "--channels", 1, "--labels", labels, "--classes", 6)
    code, (model,) = scanned(weights, *flags, tmp_path=tmp_path)
    assert (code, model["verdict"]) == (1, "INFECTED")
    assert '"d"' in json.dumps(model)  # the name of class 3
    assert any("normalisation" in line for line in model["assumptions"])


def test_numbers_per_channel_follow_one_flag():
    _, bound, *_ = app.parse_args(
        ["scan", "net.pt", "--mean", "0.4", "0.5", "0.6", "--std", "0.2", "--seed", "3"],
        exit_on_error=False,
        print_error=False,
    )
    options = bound.arguments["options"]
    assert (options.mean, options.std, bound.arguments["seed"]) == ((0.4, 0.5, 0.6), (0.2,), 3)
    assert bound.arguments["paths"] == (Path("net.pt"),)


def test_few_reference_models_give_a_p_value_and_a_warning(victims, tmp_path):
    for index in range(2):
        shutil.copytree(victims / "benign", tmp_path / "mine" / str(index))
    code, (model,) = scanned(victims / "benign", "--reference", tmp_path / "mine", tmp_path=tmp_path)
    assert code == 0
    assert model["p_value"] == 1.0
    assert "2 benign references" in json.dumps(model["warnings"])


def test_nineteen_reference_models_decide(victims, tmp_path):
    for index in range(19):
        shutil.copytree(victims / "benign", tmp_path / "mine" / str(index))
    fast = ("--scanner", "activation-outlier")
    code, (model,) = scanned(victims / "infected", *fast, "--reference", tmp_path / "mine", tmp_path=tmp_path)
    assert (code, model["verdict"], model["p_value"]) == (1, "INFECTED", 1 / 20)
    assert "references" not in json.dumps(model["warnings"])


# --- the other commands -------------------------------------------------------------------------------------


def test_simulate_writes_a_victim_that_can_be_judged_again(tmp_path, capsys):
    assert run(["simulate", "badnet", "-o", str(tmp_path / "v"), "--epochs", "1", "--target", "5"]) == 0
    victim = load_victim(tmp_path / "v")
    assert victim.card["trojaned"] and victim.attack is not None
    assert victim.card["attack"]["target"] == 5
    assert "clean_accuracy" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_simulate_none_writes_a_benign_victim(tmp_path):
    assert run(["simulate", "none", "-o", str(tmp_path / "v"), "--epochs", "1"]) == 0
    victim = load_victim(tmp_path / "v")
    assert victim.attack is None and not victim.card["trojaned"]


def test_simulate_knows_every_attack_by_name():
    assert set(get_args(AttackName)) == {"none", *MADE}


def test_a_population_is_built_a_scanner_fitted_and_used(tmp_path, capsys):
    tomllib.loads(ZOO)
    (tmp_path / "zoo.toml").write_text(ZOO)
    zoo, scanner = tmp_path / "zoo", tmp_path / "scanner"
    assert run(["zoo", "build", str(tmp_path / "zoo.toml"), "-o", str(zoo), "--jobs", "1"]) == 0
    assert "accepted 6" in capsys.readouterr().out
    assert run(["scanner", "fit", str(zoo), "-o", str(scanner), "--epochs", "2"]) == 0
    assert "6 models, 3 of them trojaned" in capsys.readouterr().err
    assert json.loads((scanner / "scanner.json").read_text())["kind"] == "set"
    code, models = scanned(zoo / "fit" / "benign-0000", "--scanner", scanner, tmp_path=tmp_path)
    assert code in (0, 1) and models[0]["scanner"] == "signature-set"
    assert 0 <= models[0]["score"] <= 1


@pytest.mark.parametrize("flags", [("--scanner", "none"), ("--reference", "none"), ("--channels", "1")])
def test_flags_that_cannot_be_meant_are_usage_errors(flags, victims, capsys):
    assert run(["scan", str(victims / "benign"), *flags]) == 4
    assert "error: " in capsys.readouterr().err


def test_rendering_writes_the_tables(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    assert run(["benchmark", "--render", "--results", str(tmp_path)]) == 0
    assert "No rows yet" in (tmp_path / "README.md").read_text()


def test_doctor_names_the_versions(capsys):
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in out and "threads: " in out


def test_doctor_says_how_files_are_confined_and_which_extras_are_there(tmp_path, monkeypatch, capsys):
    def version(library, known=metadata.version):
        if library == "keras":
            raise metadata.PackageNotFoundError(library)
        return known(library)

    monkeypatch.setattr(metadata, "version", version)
    assert run(["doctor", "--json", str(tmp_path / "here.json")]) == 0
    found = json.loads((tmp_path / "here.json").read_text())
    assert found["sandbox"] in list(Tier) and f"sandbox: {found['sandbox']}" in capsys.readouterr().out
    assert found["extra keras"] == "lacks keras; for Keras files: pip install keras h5py"
    assert found["extra onnx"].startswith(f"onnx {version('onnx')}, onnxruntime ")


def test_help_lists_the_commands(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("scan", "scanner", "guard", "zoo", "simulate", "benchmark", "demo", "doctor"):
        assert f" {command} " in out
    assert "3 nothing scannable" in out


def test_the_version_is_that_of_the_package(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == unhorse.survey.metadata.version("unhorse")
