"""One victim: the spec that decides it, its training, and its folder (model.safetensors, card.json,
trigger.safetensors).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file

from unhorse.attacks.input_aware import InputAware
from unhorse.attacks.poisoning import STAMPS, CleanLabelPoisoning, Mode, Poisoning, StampKind
from unhorse.attacks.wanet import WaNet
from unhorse.core import Attack, Classifier, Dataset
from unhorse.datasets import load_dataset, natural_images, subset
from unhorse.metrics import accuracy, recovery_accuracy, trojan_accuracy
from unhorse.models.classifier import load_classifier, new_classifier, read_card, save_classifier
from unhorse.models.training import Recipe, train
from unhorse.rates import TrojanImages
from unhorse.triggers import Stamp

MADE: dict[str, type[Poisoning] | type[CleanLabelPoisoning] | type[InputAware] | type[WaNet]] = {
    **dict.fromkeys(STAMPS, Poisoning),
    "clean-label": CleanLabelPoisoning,
    "input-aware": InputAware,
    "wanet": WaNet,
}
"""The class of every attack that a spec may name."""


class Spec(BaseModel):
    """A part of a TOML spec: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(Spec):
    """Where images come from; each victim trains on `images` of them (all if None), drawn by its own seed.
    `size` (h, w) resizes.
    """

    source: str = "digits"
    train: str = "train"
    test: str = "test"
    images: int | None = None
    test_images: int | None = None
    size: tuple[int, int] | None = None


class AttackSpec(Spec):
    """An attack: its kind (a key of MADE), its mode, and what is drawn when left out (target,
    source).

    `pool` patterns are fixed by `pool_seed`: two groups that agree on both draw from the
    same patterns.
    """

    kind: str
    mode: Mode = "single-target"
    target: int | None = None
    source: int | None = None
    rate: float | None = None
    pool: int | None = None
    pool_seed: int = 0
    trigger: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> Self:
        """Refuses what would only fail inside a job."""
        if self.kind not in MADE:
            raise ValueError(f"unknown attack {self.kind!r}: one of {', '.join(MADE)}")
        made = MADE[self.kind]
        if self.kind not in STAMPS and (self.trigger or self.pool is not None):
            raise ValueError(f"{self.kind} makes its own triggers: leave out trigger and pool")
        if self.kind not in STAMPS and self.mode not in ("single-target", "all-target"):
            raise ValueError(f"{self.kind} knows single-target and all-target, not mode {self.mode!r}")
        for name, given, known in (("trigger", self.trigger, StampKind), ("options", self.options, made)):
            allowed = {entry.name for entry in fields(known)}
            if unknown := sorted(given.keys() - allowed):
                raise ValueError(f"unknown {name} {unknown}: one of {', '.join(sorted(allowed))}")
        return self


class VictimSpec(Spec):
    """All that decides one victim, down to its seed."""

    data: DataSpec = DataSpec()
    architecture: str = "small-cnn"
    options: dict[str, Any] = Field(default_factory=dict)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    recipe: Recipe = Recipe()
    attack: AttackSpec | None = None
    seed: int = 0


@dataclass(frozen=True)
class Victim:
    """A classifier judged again from disk: with its attack (None if benign) and its card."""

    folder: Path
    model: Classifier
    attack: Attack | None
    card: Mapping[str, Any]


@functools.lru_cache(maxsize=4)
def _data(source: str, split: str, size: tuple[int, int] | None) -> Dataset:
    return load_dataset(source, split, size=size)


def train_victim(
    spec: VictimSpec, *, checkpoint: Path | None = None, device: torch.device | None = None
) -> tuple[Classifier, Attack | None, dict[str, Any]]:
    """Trains the victim of `spec` and measures it; returns (classifier, attack, card fields)."""
    started = time.monotonic()
    data, test = (_data(spec.data.source, part, spec.data.size) for part in (spec.data.train, spec.data.test))
    if spec.data.images is not None:
        data = subset(data, spec.data.images, seed=spec.seed)
    if spec.data.test_images is not None:
        test = subset(test, spec.data.test_images, seed=0)
    model = new_classifier(
        spec.architecture,
        image_shape=data.image_shape,
        class_names=data.class_names,
        mean=spec.mean,
        std=spec.std,
        options=spec.options,
        seed=spec.seed,
    ).to(device)
    rng = torch.Generator().manual_seed(spec.seed)
    attack = None if spec.attack is None else make_attack(spec.attack, model, spec.recipe, rng)
    log = train(model, data, spec.recipe, seed=spec.seed, attack=attack, checkpoint=checkpoint)
    infected = spec.attack is not None and spec.attack.mode != "placebo"
    metrics = {"clean_accuracy": accuracy(model, test), "trojan_accuracy": None}
    if attack is not None and infected:
        metrics |= attack_metrics(model, test, attack, seed=spec.seed)
    card = {
        "spec": json.loads(spec.model_dump_json()),
        "attack": None if attack is None else _attack_card(attack),
        "trojaned": infected,
        "metrics": metrics,
        "training_log": [entry._asdict() for entry in log],
        "versions": {"torch": torch.__version__},
        "seconds": round(time.monotonic() - started, 2),
    }
    return model, attack, card


def attack_metrics(model: Classifier, data: Dataset, attack: Attack, *, seed: int) -> dict[str, float]:
    """Trojan accuracy, and the accuracy on every other probe of the attack (cross, noise)."""
    # a generator of its own, so that a victim judged again from disk draws the same triggers
    judging = torch.Generator().manual_seed(seed)
    found = {"trojan_accuracy": trojan_accuracy(model, data, attack, rng=judging)}
    for probe in sorted(attack.probes().keys() - {"trojan"}):
        found[f"{probe}_accuracy"] = recovery_accuracy(model, data, attack, rng=judging, probe=probe)
    return found


def trojan_images(
    attack: Attack, data: Dataset, *, seed: int, device: torch.device | None = None
) -> TrojanImages:
    """Every image of `data` under the attack's trigger, on the CPU, with what the attacker wants of it."""
    if data.labels is None:
        raise ValueError(
            f"{data.name!r} has no labels: what an attacker wants of an image depends on its class"
        )
    trigger, rng = attack.probes()["trojan"], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        images = torch.cat([trigger(batch, rng).cpu() for batch, _ in data.batches(1000, device)])
    return TrojanImages(images, data.labels, attack.relabel(data.labels), attack.eligible(data.labels))


def make_attack(spec: AttackSpec, model: Classifier, recipe: Recipe, rng: torch.Generator) -> Attack:
    """The attack that `spec` describes on `model`'s task; what it leaves open (target, source, triggers) is
    drawn from `rng`.
    """
    classes = torch.randperm(model.num_classes, generator=rng).tolist()
    target = classes[0] if spec.target is None else spec.target
    options = dict(spec.options) | ({} if spec.rate is None else {"rate": spec.rate})
    if spec.kind not in STAMPS:
        shared = {"num_classes": model.num_classes, "mode": spec.mode, "target": target}
        return MADE[spec.kind](image_shape=model.image_shape, **shared, **options)  # type: ignore[call-arg, arg-type]
    source = None
    if spec.mode == "source-target":
        source = next(label for label in classes if label != target) if spec.source is None else spec.source
    kind = replace(STAMPS[spec.kind], **spec.trigger)

    def natural(count: int, seed: int) -> torch.Tensor:
        return natural_images(count, model.image_shape, seed=seed)

    stamp = kind.draw(model.image_shape, rng, pool=spec.pool, pool_seed=spec.pool_seed, natural=natural)
    if spec.kind == "clean-label":
        return CleanLabelPoisoning(stamp, model.num_classes, target, recipe=recipe, **options)
    return Poisoning(stamp, model.num_classes, spec.mode, target, source, **options)


def _attack_card(attack: Attack) -> dict[str, Any]:
    """The class and the plain settings of an attack; its tensors lie beside the card."""
    settings = {entry.name: getattr(attack, entry.name) for entry in fields(attack) if entry.init}  # type: ignore[arg-type]
    plain = {
        name: value
        for name, value in settings.items()
        if not name.endswith("_") and isinstance(value, bool | int | float | str | tuple | None)
    }
    return {"class": type(attack).__name__, **plain}


def save_victim(folder: Path, model: Classifier, attack: Attack | None, card: Mapping[str, Any]) -> Path:
    """Writes a victim's folder, whole or not at all: model.safetensors, card.json and, with an attack,
    trigger.safetensors.
    """
    extra = {} if attack is None else {"trigger.safetensors": attack.state_dict()}
    return save_classifier(model, folder, extra_tensors=extra, **card)


def load_victim(folder: Path) -> Victim:
    """A victim from disk, able to be judged again: its attack stamps and relabels as it did in training."""
    card: dict[str, Any] = read_card(folder)
    attack: Attack | None = None
    if card.get("attack") is not None:
        attack = _restored(dict(card["attack"]), load_file(Path(folder) / "trigger.safetensors"))
    return Victim(Path(folder), load_classifier(folder), attack, card)


def _restored(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Attack:
    made = {kind.__name__: kind for kind in MADE.values()}[settings.pop("class")]
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if issubclass(made, Poisoning | CleanLabelPoisoning):
        return made(Stamp(tensors["patterns"], tensors["masks"]), **settings)
    attack = made(**settings)
    attack.load_state_dict(tensors)
    return attack
