"""The demonstration, repeated on victims that it has never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unhorse.core import ScanResult, Verdict
from unhorse.demo import ATTACK, LEFT, PASSED, RECIPE, guard_victim, repair_victim, run_demo
from unhorse.models.classifier import load_classifier
from unhorse.scanners.activation_outlier import EFFORTS
from unhorse.victims import VictimSpec, save_victim, train_victim
from unhorse.zoo import Member, ZooSpec, build, members

pytestmark = pytest.mark.slow
SPEC = Path(__file__).parents[1] / "benchmarks" / "specs" / "zoo-digits.toml"
FOUND = (Verdict.INFECTED, Verdict.SUSPICIOUS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Member, ScanResult]]:
    """30 benign and 30 infected digits victims of the held-back split, scanned as the demonstration does."""
    spec = ZooSpec.read(SPEC)
    spec = spec.model_copy(
        update={"groups": tuple(group for group in spec.groups if group.split == "held-back")}
    )
    folder = tmp_path_factory.mktemp("digits")
    build(spec, folder, workers=2)
    register = members(folder, "held-back")
    return [(member, EFFORTS["deep"].scan(load_classifier(member.folder))) for member in register]


@pytest.mark.timeout(1800)
def test_the_population_is_30_benign_and_30_infected_victims(results):
    assert [member.trojaned for member, _ in results].count(True) == 30
    assert [member.trojaned for member, _ in results].count(False) == 30


@pytest.mark.timeout(1800)
def test_27_of_30_infected_digits_victims_are_flagged_with_their_target(results):
    infected = [(member, result) for member, result in results if member.trojaned]
    right = [
        result for member, result in infected if result.verdict in FOUND and result.target == member.target
    ]
    assert len(right) >= 27


@pytest.mark.timeout(1800)
def test_at_most_3_of_30_benign_digits_victims_are_flagged(results):
    alarms = [result for member, result in results if not member.trojaned and result.verdict in FOUND]
    assert len(alarms) <= 3


def test_the_demonstration_finds_its_trojan_and_writes_the_page(tmp_path, capsys):
    assert run_demo(tmp_path / "demo", seed=0, command=("unhorse", "demo")) == 0
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "INFECTED" in page or "SUSPICIOUS" in page
    out = capsys.readouterr()
    assert out.out.strip() == str(tmp_path / "demo" / "report.html")
    assert "found" in out.err and "NOT" not in out.err
    document = json.loads((tmp_path / "demo" / "report.json").read_text())
    (guard,), (repaired,) = document["guards"], document["repairs"]
    measures = {name: found and found["value"] for name, found in guard["measures"].items()}
    assert measures["trojan_accuracy_before"] > 0.95
    assert measures["trojan_accuracy"] < 0.05 and measures["trojan_passed"] < 0.05
    assert measures["clean_drop"] < 0.03 and measures["recovery_drop"] < 0.1
    assert "GUARDED" in page
    changes = repaired["measures"]
    assert changes["trojan_accuracy"]["before"]["value"] > 0.95 > LEFT
    assert changes["trojan_accuracy"]["after"]["value"] <= LEFT
    assert changes["clean_accuracy"]["drop"]["value"] < 0.03
    assert changes["recovery_accuracy"]["after"]["value"] > 0.85
    assert repaired["after"]["verdict"] == "NO SIGN FOUND"
    assert "Entropy under blending" in page and "STRIP (Gao et al., ACSAC 2019) would stop" in page
    assert "repaired by unlearning: Trojan accuracy 100.0%" in out.err
    assert load_classifier(tmp_path / "demo" / "repaired").num_classes == 10


@pytest.mark.timeout(600)
def test_the_demonstrations_repair_removes_triggers_of_other_seeds(tmp_path):
    left, drops = [], []
    for seed in range(1, 6):
        model, attack, card = train_victim(VictimSpec(recipe=RECIPE, attack=ATTACK, seed=seed))
        victim = save_victim(tmp_path / f"victim-{seed}", model, attack, card)
        changes = repair_victim(victim, tmp_path / f"repaired-{seed}", seed=seed).measures
        left.append(changes["trojan_accuracy"].after.value)
        drops.append(changes["clean_accuracy"].drop.value)
    assert max(left) <= LEFT
    assert sum(drops) / len(drops) < 0.03


@pytest.mark.timeout(600)
def test_the_demonstrations_guard_stops_triggers_of_other_seeds(tmp_path):
    passed, drops = [], []
    for seed in range(1, 6):
        model, attack, card = train_victim(VictimSpec(recipe=RECIPE, attack=ATTACK, seed=seed))
        victim = save_victim(tmp_path / f"victim-{seed}", model, attack, card)
        measures = guard_victim(victim, tmp_path / f"guard-{seed}", seed=seed).measures
        passed.append(measures["trojan_passed"].value)
        drops.append(measures["clean_drop"].value)
    assert max(passed) <= PASSED
    assert sum(drops) / len(drops) < 0.03
