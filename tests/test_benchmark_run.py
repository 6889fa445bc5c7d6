"""A benchmark spec becomes rows once: what is done is not done again, and the rows are what tables read."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unhorse.benchmark.run import run_spec
from unhorse.benchmark.scanning import ScanningSpec, Trial
from unhorse.benchmark.tables import render_to
from unhorse.metrics import auroc
from unhorse.zoo import members

ZOO = """
name = "tiny"
data = { source = "digits", images = 600, test_images = 64 }
options = { widths = [4, 8], hidden = 16 }
recipe = { epochs = 2, batch_size = 32, learning_rate = 1e-2 }
acceptance = { clean_margin = 1.0, trojan = 0.0, attempts = 1, median_of = 1 }
groups = [
    { name = "benign", split = "fit", count = 2 },
    { name = "patch", split = "fit", count = 2, attack = { kind = "badnet", rate = 0.5 } },
    { name = "benign", split = "held-back", count = 2 },
    { name = "patch", split = "held-back", count = 2, attack = { kind = "badnet", rate = 0.5 } },
    { name = "placebo", split = "held-back", count = 2, attack = { kind = "badnet", mode = "placebo" } },
]
"""
SPEC = """
table = "ours-tiny"
dataset = "digits"
population = "zoo.toml"
trained_on = "badnet"
seeds = [0]
methods = [
    { name = "activation-outlier", seeds = [0, 1], options = { effort = "quick", steps = 4 } },
    { name = "signature-set", maps = ["max", "both"], options = { preset = "pixels", epochs = 2 } },
]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the spec above was run once."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "zoo.toml").write_text(ZOO)
    (folder / "spec.toml").write_text(SPEC)
    run(folder)
    return folder


def run(folder: Path) -> list[dict]:
    run_spec(folder / "spec.toml", folder / "work", folder / "results")
    return stored(folder)


def stored(folder: Path) -> list[dict]:
    lines = (folder / "results" / "ours-tiny.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place, tmp_path / "copy"))


def of(rows: list[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_rows_say_what_they_are_rows_of(place):
    rows = stored(place)
    assert {row["table"] for row in rows} == {"ours-tiny"}
    assert {(row["dataset"], row["architecture"], row["split"]) for row in rows} == {
        ("digits", "small-cnn", "held-back")
    }
    for method, fitted_on in (("activation-outlier", None), ("signature-set", "badnet")):
        assert {row["trained_on"] for row in of(rows, method=method)} == {fitted_on}
    assert all(row["commit"] and row["versions"]["torch"] and row["device"] for row in rows)


def test_every_method_seed_and_direction_has_its_rows(place):
    rows = of(stored(place), metric="auroc", attack="badnet")
    found = {(row["method"], row["seed"], row["options"].get("maps")) for row in rows}
    assert found == {
        ("activation-outlier", 0, None),
        ("activation-outlier", 1, None),
        ("signature-set", 0, "max"),
        ("signature-set", 0, "both"),
    }
    assert all(row["mode"] == "single-target" and row["n"] == 4 for row in rows)


def test_each_kind_is_measured_by_what_can_be_said_of_it(place):
    rows = of(stored(place), method="activation-outlier", seed=0)
    verdicts = {"infected_rate", "finding_rate"}
    ranks = {"auroc", "tpr_at_fpr01", "accuracy"}
    assert {row["metric"] for row in of(rows, attack="badnet")} == ranks | verdicts | {"target_found"}
    assert {row["metric"] for row in of(rows, attack="placebo")} == ranks | verdicts
    assert {row["metric"] for row in of(rows, attack="benign")} == verdicts | {"fpr", "seconds_per_model"}
    assert {row["mode"] for row in of(rows, attack="placebo") + of(rows, attack="benign")} == {None}


def test_rates_are_fractions_with_intervals_around_them(place):
    for row in stored(place):
        assert math.isfinite(row["value"])
        if row["metric"] != "seconds_per_model":
            assert 0 <= row["value"] <= 1
        if row["ci95"] is not None:
            assert row["ci95"][0] - 1e-9 <= row["value"] <= row["ci95"][1] + 1e-9


def test_truth_meets_the_scores_that_the_trial_left(place):
    trial = next(
        json.loads(path.read_text()) for path in trials(place) if "activation-outlier-0" in path.name
    )
    register = members(place / "work" / "tiny", "held-back")
    picked = torch.tensor([member.group in ("benign", "patch") for member in register])
    truth = torch.tensor([member.group == "patch" for member in register])
    scores = torch.tensor(trial["scores"], dtype=torch.float64)
    (row,) = of(stored(place), method="activation-outlier", seed=0, metric="auroc", attack="badnet")
    assert row["value"] == pytest.approx(auroc(scores[picked], truth[picked]))


def trials(folder: Path) -> list[Path]:
    return sorted((folder / "work" / "ours-tiny").glob("[!.]*.json"))


def test_what_is_done_is_not_done_again(copy, monkeypatch):
    before = {path.name: path.read_bytes() for path in trials(copy)}
    assert len(before) == 4
    (copy / "results" / "ours-tiny.jsonl").unlink()
    monkeypatch.setattr(Trial, "__call__", lambda self: pytest.fail("a finished trial ran again"))
    rows = run(copy)
    assert {path.name: path.read_bytes() for path in trials(copy)} == before
    assert len(of(rows, metric="auroc")) == 8


def test_what_is_missing_is_done(copy):
    lost = next(path for path in trials(copy) if "activation-outlier-1" in path.name)
    scores = json.loads(lost.read_text())["scores"]
    lost.unlink()
    run(copy)
    assert json.loads(lost.read_text())["scores"] == pytest.approx(scores)


def test_a_trial_that_fails_keeps_what_the_others_did(copy, monkeypatch):
    for path in trials(copy):
        path.unlink()
    whole = Trial.__call__

    def fail_once(self: Trial) -> dict:
        if self.method == "signature-set":
            raise RuntimeError("out of luck")
        return whole(self)

    monkeypatch.setattr(Trial, "__call__", fail_once)
    with pytest.raises(RuntimeError, match="call again to go on"):
        run(copy)
    assert [path.name[:20] for path in trials(copy)] == ["activation-outlier-0"]


def test_a_model_that_cannot_be_judged_is_an_error_and_not_left_out(copy):
    lost = next(path for path in trials(copy) if "activation-outlier-1" in path.name)
    lost.unlink()
    weights = copy / "work" / "tiny" / "held-back" / "benign-0000" / "model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(RuntimeError, match="benign-0000 is UNDECIDED"):
        run(copy)
    assert not lost.exists()


def test_tables_are_rendered_from_the_rows(place):
    render_to(place)
    assert "[ours-tiny](tables/ours-tiny.md)" in (place / "README.md").read_text()
    text = (place / "tables" / "ours-tiny.md").read_text()
    assert "activation-outlier" in text and "signature-set" in text


def test_a_spec_with_a_mistake_is_refused():
    with pytest.raises(ValueError, match="populaton"):
        ScanningSpec.model_validate({"table": "t", "dataset": "d", "populaton": "p", "methods": []})
