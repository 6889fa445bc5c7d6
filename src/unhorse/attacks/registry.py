"""The attacks by the names of specs, and how one is written on a victim's card and made again from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from unhorse.attacks.input_aware import InputAware
from unhorse.attacks.poisoning import STAMPS, CleanLabelPoisoning, Poisoning
from unhorse.attacks.wanet import WaNet
from unhorse.core import Attack
from unhorse.triggers import Stamp

MADE: dict[str, type[Poisoning] | type[CleanLabelPoisoning] | type[InputAware] | type[WaNet]] = {
    **dict.fromkeys(STAMPS, Poisoning),
    "clean-label": CleanLabelPoisoning,
    "input-aware": InputAware,
    "wanet": WaNet,
}
"""The class of every attack that a spec may name."""


def attack_card(attack: Attack) -> dict[str, Any]:
    """The class and the plain settings of an attack; its tensors lie beside the card."""
    settings = {entry.name: getattr(attack, entry.name) for entry in fields(attack) if entry.init}  # type: ignore[arg-type]
    plain = {
        name: value
        for name, value in settings.items()
        if not name.endswith("_") and isinstance(value, bool | int | float | str | tuple | None)
    }
    return {"class": type(attack).__name__, **plain}


def restored_attack(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Attack:
    """The attack of a card, with the tensors that lay beside it."""
    made = {kind.__name__: kind for kind in MADE.values()}[card["class"]]
    settings = {name: value for name, value in card.items() if name != "class"}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if issubclass(made, Poisoning | CleanLabelPoisoning):
        return made(Stamp(tensors["patterns"], tensors["masks"]), **settings)
    attack = made(**settings)
    attack.load_state_dict(tensors)
    return attack
