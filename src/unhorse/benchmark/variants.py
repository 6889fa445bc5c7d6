"""Changed copies of victims, judged in their place: fine-tuned, pruned, or with their classes in another
order.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from unhorse import jobs
from unhorse.benchmark.clean_images import clean_and_test
from unhorse.benchmark.trials import chosen_device
from unhorse.core import Classifier
from unhorse.metrics import accuracy, evaluation
from unhorse.models.classifier import read_card
from unhorse.repairs.fine_tuning import FineTuning
from unhorse.victims import DataSpec, Spec, attack_metrics, load_victim, save_victim
from unhorse.zoo import Member

ALLOWED = {"fine-tuned": {"images", "epochs", "learning_rate"}, "pruned": {"share"}, "permuted": set()}
OF_THE_MODEL = {
    *("format", "architecture", "image_shape", "class_names", "mean", "std", "assumptions", "weights_hash")
}
PROBES = 8


class VariantSpec(Spec):
    """How copies differ from the victims: fine-tuned on clean `images` of the test split that they were not
    measured on, pruned of the smallest `share` of each layer's weights, or with classes permuted.
    """

    kind: Literal["fine-tuned", "pruned", "permuted"]
    images: int = Field(default=500, ge=20)
    epochs: int = Field(default=5, ge=1)
    learning_rate: float = 0.01
    share: float = Field(default=0.3, gt=0, lt=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> VariantSpec:
        allowed = ALLOWED[self.kind] | {"kind", "seed"}
        if foreign := sorted(self.model_fields_set - allowed):
            raise ValueError(
                f"variant {self.kind} has no {foreign[0]}: it takes {', '.join(sorted(allowed))}"
            )
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The kind, the seed, and the options of this kind."""
        return {name: getattr(self, name) for name in sorted({"kind", "seed"} | ALLOWED[self.kind])}

    @property
    def name(self) -> str:
        """The kind, and a hash of the options: the end of a folder's name."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        return f"{self.kind}-{digest.hexdigest()[:8]}"


@dataclass(frozen=True)
class _Change:
    """One copy to make: its folder is renamed into place, so it is there whole or not at all."""

    source: Path
    folder: Path
    variant: VariantSpec

    def __call__(self) -> None:
        victim = load_victim(self.source)
        card = {name: value for name, value in victim.card.items() if name not in OF_THE_MODEL}
        card["variant"] = {**self.variant.settings, "of": victim.card["weights_hash"]}
        seed = int.from_bytes(
            hashlib.sha256(f"{self.variant.seed}/{self.source.name}".encode()).digest()[:4], "big"
        )
        if self.variant.kind == "permuted":
            order = torch.randperm(victim.model.num_classes, generator=torch.Generator().manual_seed(seed))
            card["attack"] = _renumbered(card["attack"], order.tolist())
            save_victim(self.folder, permuted(victim.model, order.tolist()), None, card)
            return
        data = DataSpec.model_validate(card["spec"]["data"])
        clean, test = clean_and_test(data, self.variant.images if self.variant.kind == "fine-tuned" else 0)
        model = victim.model.to(chosen_device())
        if self.variant.kind == "fine-tuned":
            tuning = FineTuning(
                epochs=self.variant.epochs, learning_rate=self.variant.learning_rate, seed=seed // 2
            )
            model = tuning(model, clean).model
        else:
            model = magnitude_pruned(model, self.variant.share)
        metrics: dict[str, Any] = {"clean_accuracy": accuracy(model, test), "trojan_accuracy": None}
        if victim.attack is not None and card["trojaned"]:
            metrics |= attack_metrics(model, test, victim.attack, seed=card["spec"]["seed"])
        save_victim(self.folder, model, victim.attack, {**card, "metrics": metrics})


def make_variants(
    originals: Sequence[Member], folder: Path, variant: VariantSpec, *, workers: int = 1
) -> tuple[Member, ...]:
    """The copies of these victims in `folder`, those that are missing made now; killed and called again, it
    goes on.
    """
    places = {member: folder / member.folder.parent.name / member.folder.name for member in originals}
    todo = [
        _Change(member.folder, place, variant)
        for member, place in places.items()
        if not (place / "card.json").exists()
    ]
    failures = [
        outcome
        for outcome in jobs.track(folder.name, jobs.run(jobs.call, todo, workers=workers), len(todo))
        if outcome.error is not None
    ]
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(todo)} copies failed, call again to go on; first "
            f"{failures[0].item.source}: {failures[0].error!r}"
        )
    return tuple(_member(member, place) for member, place in places.items())


def _member(original: Member, place: Path) -> Member:
    attack: Any = read_card(place).get("attack") or {}
    return replace(original, folder=place, target=None if original.target is None else attack["target"])


# --- changes ------------------------------------------------------------------------------------------------


def magnitude_pruned(model: Classifier, share: float) -> Classifier:
    """A copy whose smallest `share` of weights by magnitude is 0, in each convolution and linear layer."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for module in pruned.network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                sizes = module.weight.abs().flatten()
                smallest = sizes.argsort(stable=True)[: round(share * len(sizes))]
                module.weight.view(-1)[smallest] = 0
    return pruned


def permuted(model: Classifier, order: Sequence[int]) -> Classifier:
    """A copy whose class i is class `order[i]` of the original, by the rows of its last layer and the names.

    ValueError where no layer of a row per class is the last one.
    """
    images = torch.rand(PROBES, *model.image_shape, generator=torch.Generator().manual_seed(0))
    with evaluation(model):
        wanted = model(images)[:, list(order)]
    names = [
        name
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == model.num_classes
    ]
    for name in reversed(names):
        changed = copy.deepcopy(model)
        layer = changed.network.get_submodule(name)
        with torch.no_grad():
            for values in layer.parameters():
                values.copy_(values[list(order)].clone())
        with evaluation(changed):
            found = changed(images)
        if torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
            changed.class_names = tuple(model.class_names[label] for label in order)
            return changed
    raise ValueError(
        f"{model.architecture.get('name')} has no last layer with a row per class to permute: leave this "
        "population out of the variant"
    )


def _renumbered(attack: Mapping[str, Any] | None, order: Sequence[int]) -> dict[str, Any] | None:
    if attack is None:
        return None
    new = {name: attack[name] for name in ("target", "source") if attack.get(name) is not None}
    return {**attack, **{name: order.index(label) for name, label in new.items()}}
