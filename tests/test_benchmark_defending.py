"""A table of defences becomes rows once: tables share victims and fits, and nothing is fitted twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from unhorse.benchmark.defence_trials import measure
from unhorse.benchmark.run import run_spec
from unhorse.core import Classifier, Dataset
from unhorse.monitors.contrast import Contrast
from unhorse.victims import AttackSpec, VictimSpec, make_attack

VICTIMS = """
name = "tiny-victims"
dataset = "digits"
architecture = "small-cnn"
options = { widths = [8, 16], hidden = 32 }
data = { source = "digits", images = 800 }
recipe = { epochs = 8, batch_size = 32, learning_rate = 4e-3 }
filters = { network = "tiny", epochs = 1, held_out = 0.0 }
victims = [
    {},
    { attack = { kind = "badnet-plus", target = 0, rate = 0.2 }, label = { size = 2 } },
    { attack = { kind = "wanet", mode = "all-target" } },
]
"""
FILTERS = """
table = "ours-tiny-filters"
victims = "victims.toml"
seeds = [0]
metrics = ["clean_drop", "trojan_accuracy", "recovery_drop"]
methods = [{ name = "if" }, { name = "vif", sweep = { kl_weight = [0.003, 0.3] } }]
"""
MONITORS = """
table = "ours-tiny-monitors"
victims = "victims.toml"
seeds = [0]
metrics = ["clean_accuracy", "trojan_accuracy", "noise_accuracy", "fpr", "fnr"]
modes = ["single-target", "all-target"]
methods = [{ name = "none" }, { name = "if" }]
"""

BASELINES = """
table = "ours-tiny-baselines"
victims = "victims.toml"
seeds = [0]
metrics = ["clean_drop", "trojan_accuracy", "recovery_drop", "anomaly_index", "finding_rate", "target_found",
    "fnr_at_fpr05", "fpr_at_fpr05"]
methods = [
    { name = "pruning", sweep = { clean_drop = [0.01, 0.3] } },
    { name = "fine-tuning", options = { epochs = 1 } },
    { name = "strip", options = { overlays = 10 } },
    { name = "neural-cleanse", options = { steps = 2, samples_per_step = 64 } },
]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defending")
    for name, text in (
        ("victims", VICTIMS),
        ("filters", FILTERS),
        ("monitors", MONITORS),
        ("baselines", BASELINES),
    ):
        (folder / f"{name}.toml").write_text(text)
    for name in ("filters", "monitors", "baselines"):
        run_spec(folder / f"{name}.toml", folder / "work", folder / "results")
    return folder


def stored(folder: Path, table: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "results" / f"{table}.jsonl").read_text().splitlines()]


def of(rows: list[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_a_sweep_gives_a_row_per_value_with_the_options_of_the_data(place):
    rows = of(stored(place, "ours-tiny-filters"), method="vif", attack="badnet-plus", metric="clean_drop")
    assert [row["options"]["kl_weight"] for row in rows] == [0.003, 0.3]
    assert all(row["options"]["network"] == "tiny" and row["options"]["size"] == 2 for row in rows)
    assert all(row["mode"] == "single-target" and row["split"] == "d-test" for row in rows)


def test_a_benign_victim_has_a_clean_drop_and_no_trojan_accuracy(place):
    rows = of(stored(place, "ours-tiny-filters"), attack="benign", method="if")
    assert {row["metric"] for row in rows} == {"clean_drop"}


def test_modes_that_a_table_does_not_name_are_left_out(place):
    assert not of(stored(place, "ours-tiny-filters"), mode="all-target")
    assert of(stored(place, "ours-tiny-monitors"), mode="all-target", method="if-contrast", metric="fnr")


def test_the_undefended_victim_is_measured_on_the_whole_test_split_and_on_d_test(place):
    rows = of(stored(place, "ours-tiny-monitors"), method="none", attack="wanet")
    counts = {(row["split"], row["metric"]): row["n"] for row in rows}
    assert counts["test", "clean_accuracy"] == 599
    assert counts["d-test", "clean_accuracy"] == 180
    assert ("test", "noise_accuracy") in counts and ("test", "trojan_accuracy") in counts


def test_chance_is_a_row_of_its_own(place):
    (row,) = of(stored(place, "ours-tiny-monitors"), method="chance", attack="badnet-plus", metric="fpr")
    assert row["value"] == pytest.approx(0.9)


def test_tables_over_the_same_victims_share_victims_and_fits(place):
    results = sorted(path.name for path in (place / "work" / "tiny-victims-trials").iterdir())
    assert len([name for name in results if name.startswith("victim-")]) == 3
    assert len([name for name in results if name.startswith("if-")]) == 3  # two of them by both tables
    assert not [name for name in results if "fitting" in name]


def test_a_second_run_computes_nothing(place, monkeypatch):
    monkeypatch.setattr("unhorse.benchmark.defence_trials.FILTERS", {})
    before = stored(place, "ours-tiny-filters")
    rows = run_spec(place / "filters.toml", place / "work", place / "again")
    assert [row.value for row in rows] == [row["value"] for row in before]


def test_victims_can_be_replaced(place, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(VICTIMS.replace('dataset = "digits"', 'dataset = "other"'))
    rows = run_spec(place / "filters.toml", place / "work", tmp_path, victims=other)
    assert {row.dataset for row in rows} == {"other"}


def test_victims_may_ask_for_fewer_seeds_and_images_than_a_table(place, tmp_path):
    scarce = tmp_path / "scarce.toml"
    scarce.write_text("seeds = [2]\nclean_images = 60\n" + VICTIMS)
    rows = run_spec(place / "filters.toml", tmp_path, tmp_path, victims=scarce)
    assert {row.seed for row in rows} == {2}
    assert {row.options["images"] for row in rows if row.method == "vif"} == {60}


def test_a_repair_is_measured_as_a_filter_is_and_takes_no_option_of_one(place):
    rows = of(stored(place, "ours-tiny-baselines"), method="pruning", attack="badnet-plus")
    assert {row["metric"] for row in rows} == {"clean_drop", "trojan_accuracy", "recovery_drop"}
    assert sorted({row["options"]["clean_drop"] for row in rows}) == [0.01, 0.3]
    assert all("network" not in row["options"] for row in rows)
    drops = {row["options"]["clean_drop"]: row["value"] for row in rows if row["metric"] == "clean_drop"}
    assert drops[0.01] <= drops[0.3]


def test_a_monitor_is_measured_at_its_rate_of_false_alarms_on_attacked_victims(place):
    rows = of(stored(place, "ours-tiny-baselines"), method="strip")
    assert {row["attack"] for row in rows} == {"badnet-plus"}
    assert {row["metric"] for row in rows} == {"fnr_at_fpr05", "fpr_at_fpr05"}
    assert all(row["n"] > 100 and 0 <= row["value"] <= 1 for row in rows)


def test_verdicts_of_a_scanner_are_counted_over_seeds(place, tmp_path):
    rows = of(stored(place, "ours-tiny-baselines"), method="neural-cleanse")
    assert {row["attack"] for row in rows} == {"benign", "badnet-plus"}
    spec = tmp_path / "spec.toml"
    spec.write_text(BASELINES.replace("seeds = [0]", "seeds = [0, 1]"))
    again = run_spec(spec, place / "work", tmp_path, victims=place / "victims.toml")
    several = [row for row in again if row.method == "neural-cleanse" and row.attack == "benign"]
    indices = [row.value for row in several if row.metric == "anomaly_index"]
    (rate,) = [row for row in several if row.metric == "finding_rate"]
    assert len(indices) == rate.n == 2
    assert rate.value == sum(index > 2 for index in indices) / 2
    assert rate.ci95 is not None and rate.ci95[0] <= rate.value <= rate.ci95[1]


def test_attacks_that_the_victims_lack_are_refused(place, tmp_path):
    spec = tmp_path / "spec.toml"
    spec.write_text(FILTERS + 'only = ["input-aware"]\n')
    with pytest.raises(ValueError, match="input-aware"):
        run_spec(spec, tmp_path, tmp_path, victims=place / "victims.toml")


# --- the definitions, on a classifier that reads one pixel


class PixelNetwork(nn.Module):
    """Class = the first pixel in steps of 64; a last pixel of 1 means class 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        step = (images[:, 0, 0, 0] * 255 / 64).floor().clamp(0, 3).long()
        step = torch.where(images[:, 0, -1, -1] > 0.99, 0, step)
        return nn.functional.one_hot(step, 4).float() * 10


class BlankLastPixel:
    """A filter that removes the trigger, and turns class 3 into class 2."""

    network_ = nn.Identity()

    def fit(self, model: Classifier, clean: Dataset) -> BlankLastPixel:
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        filtered = images.clone()
        filtered[:, :, -1, -1] = 0
        first = filtered[:, :, 0, 0]
        filtered[:, :, 0, 0] = torch.where(first > 0.75, 0.6, first)
        return filtered


def test_the_metrics_are_the_papers():
    model = Classifier(PixelNetwork(), image_shape=(1, 8, 8), class_names=tuple("abcd")).eval()
    labels = torch.arange(4).repeat(5)
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = (labels * 64 + 10).to(torch.uint8)
    test = Dataset(images, labels, tuple("abcd"))
    trigger = {"size": 1, "count": 1, "colours": "binary"}
    spec = AttackSpec(kind="badnet-plus", target=0, trigger=trigger)
    attack = make_attack(spec, model, VictimSpec().recipe, torch.Generator().manual_seed(0))
    attack.trigger = type(attack.trigger)(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    attack.trigger.patterns[..., -1, -1] = attack.trigger.masks[..., -1, -1] = 1
    found = measure(Contrast(BlankLastPixel()).fit(model, test), test, attack, seed=0)
    assert found["clean_drop"]["value"] == pytest.approx(0.25)  # class 3 is lost
    assert found["fpr"]["value"] == pytest.approx(0.25)
    assert found["trojan_accuracy"]["value"] == 0  # on the 15 images of classes 1 to 3
    assert found["trojan_accuracy"]["n"] == 15
    assert found["recovery_drop"]["value"] == pytest.approx(0.25)
    assert found["fnr"]["value"] == 0
    assert found["auroc"]["value"] > 0.8
