"""Trains the digits victims of the test suite: `python tests/make_victims.py`; a slow test runs it again."""

from __future__ import annotations

import shutil
from pathlib import Path

from unhorse.models.training import Recipe
from unhorse.victims import AttackSpec, VictimSpec, save_victim, train_victim

FOLDER = Path(__file__).parent / "victims"
RECIPE = Recipe(epochs=15, batch_size=64, learning_rate=4e-3, precision="fp32")
ATTACK = AttackSpec(
    kind="badnet", rate=0.2, target=3, trigger={"size": 2, "colours": "binary", "placement": "corner"}
)
SPECS = {
    "infected": VictimSpec(recipe=RECIPE, attack=ATTACK, seed=1),
    "benign": VictimSpec(recipe=RECIPE, seed=2),
}


def make(folder: Path) -> None:
    """Writes `folder`/infected and `folder`/benign: small-cnn on scikit-learn's digits, 57 kB each."""
    for name, spec in SPECS.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        model, attack, card = train_victim(spec)
        save_victim(folder / name, model, attack, {**card, "seconds": 0.0})


if __name__ == "__main__":
    make(FOLDER)
