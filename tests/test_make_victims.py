"""The trained victims of this suite are what their script makes."""

import pytest

from make_victims import FOLDER, make
from unhorse.datasets import load_dataset
from unhorse.metrics import accuracy
from unhorse.victims import attack_metrics, load_victim


def test_the_trained_victims_are_small_and_do_what_their_cards_say(trained):
    digits = load_dataset("digits", "test")
    for name, victim in trained.items():
        assert (FOLDER / name / "model.safetensors").stat().st_size < 100_000
        assert accuracy(victim.model, digits) == pytest.approx(
            victim.card["metrics"]["clean_accuracy"], abs=5e-3
        )
    infected = trained["infected"]
    assert attack_metrics(infected.model, digits, infected.attack, seed=1)["trojan_accuracy"] > 0.98


@pytest.mark.slow
def test_the_script_makes_the_same_victims_again(tmp_path):
    make(tmp_path)
    for name in ("infected", "benign"):
        again, kept = (load_victim(folder / name).card["metrics"] for folder in (tmp_path, FOLDER))
        assert again["clean_accuracy"] == pytest.approx(kept["clean_accuracy"], abs=0.02)
