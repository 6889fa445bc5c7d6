"""The card beside a file of weights or in it, which says what network it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from unhorse.core import Classifier
from unhorse.models.classifier import CARD_FILE, WEIGHTS_FILE, classifier_from_card, weights_hash
from unhorse.rules import LoadRefused


class Weights(NamedTuple):
    """The checked tensors of a file and the text beside them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def described(file: Path, weights: Weights) -> Classifier | None:
    """The classifier of the card beside the file or in its metadata; None where there is neither."""
    beside = file.with_name(CARD_FILE)
    try:
        if beside.is_file():
            model = _from_card(
                json.loads(beside.read_text(encoding="utf-8")), weights, required=file.name == WEIGHTS_FILE
            )
            if model is not None:
                return model
        if "unhorse" in weights.metadata:
            return _from_card(json.loads(weights.metadata["unhorse"]), weights, required=True)
    except (OSError, ValueError, RecursionError) as error:
        reason = f"the card of {file.name} is not usable ({(str(error).splitlines() or [''])[0][:200]})"
        raise LoadRefused("LD212", reason, "remove the card and name the architecture with --arch") from error
    return None


def _from_card(card: object, weights: Weights, *, required: bool) -> Classifier | None:
    """A card beside a file of another name counts only if it describes exactly these weights."""
    if not isinstance(card, dict) or "architecture" not in card:
        return None
    if required:
        return classifier_from_card(card, weights.tensors)
    try:
        model = classifier_from_card(card, weights.tensors)
    except ValueError:
        return None
    return model if weights_hash(model) == card.get("weights_hash") else None
