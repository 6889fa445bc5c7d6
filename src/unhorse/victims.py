"""One victim: the spec that decides it, its training, and its folder (model.safetensors, card.json,
trigger.safetensors).
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file

from unhorse.attacks.modes import Mode
from unhorse.attacks.poisoning import STAMPS, CleanLabelPoisoning, Poisoning, StampKind
from unhorse.attacks.registry import MADE, attack_card, restored_attack
from unhorse.attacks.stacked_poisoning import kind_of, part_of
from unhorse.core import Attack, Classifier, Dataset
from unhorse.datasets import load_dataset, natural_images, of_classes, subset
from unhorse.metrics import accuracy, recovery_accuracy, trojan_accuracy
from unhorse.models.classifier import load_classifier, new_classifier, read_card, save_classifier
from unhorse.models.stacked_training import train_stack
from unhorse.models.stacking import obstacle
from unhorse.models.training import EpochLog, Recipe, train
from unhorse.rates import TrojanImages
from unhorse.triggers import Stamp


class Spec(BaseModel):
    """A part of a TOML spec: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(Spec):
    """Where images come from; each victim trains on at most `images` of them (all if None), drawn by its
    own seed. `size` (h, w) resizes; where `classes` are named (None: all), they alone count, numbered anew.
    """

    source: str = "digits"
    train: str = "train"
    test: str = "test"
    images: int | None = None
    test_images: int | None = None
    size: tuple[int, int] | None = None
    classes: tuple[int, ...] | None = Field(default=None, min_length=2)


class AttackSpec(Spec):
    """An attack: its kind (a key of MADE), its mode, and what is drawn when left out (target, source).

    `pool` patterns are fixed by `pool_seed`: two groups that agree on both draw from the same patterns.
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
        if self.mode not in made.modes:
            raise ValueError(f"{self.kind} knows {', '.join(made.modes)}, not mode {self.mode!r}")
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
def _data(
    source: str, split: str, size: tuple[int, int] | None, classes: tuple[int, ...] | None = None
) -> Dataset:
    data = load_dataset(source, split, size=size)
    return data if classes is None else of_classes(data, classes)


def train_victim(
    spec: VictimSpec, *, checkpoint: Path | None = None, device: torch.device | None = None
) -> tuple[Classifier, Attack | None, dict[str, Any]]:
    """Trains the victim of `spec` and measures it; returns (classifier, attack, card fields)."""
    started = time.monotonic()
    data, test = _train_and_test(spec.data)
    data = _at_most(data, spec.data.images, spec.seed)
    model, attack = _untrained(spec, data, device)
    log = train(model, data, spec.recipe, seed=spec.seed, attack=attack, checkpoint=checkpoint)
    return model, attack, _card(spec, model, attack, test, log) | {"seconds": _since(started)}


def can_stack(specs: Sequence[VictimSpec]) -> bool:
    """Whether `train_victims` takes these specs; `why_not_stacked` says why not."""
    return not why_not_stacked(specs)


def why_not_stacked(specs: Sequence[VictimSpec]) -> str:
    """What keeps these victims from being trained at once; empty if nothing does."""
    if not specs:
        return "there is no spec"
    for spec in specs:
        alike = spec.model_copy(update={"seed": specs[0].seed, "attack": specs[0].attack})
        if alike != specs[0]:
            return "the specs differ in more than seed and attack"
        if spec.attack is not None and spec.attack.kind == "input-aware":
            return "input-aware trains networks of its own beside each victim"
    data, _ = _train_and_test(specs[0].data)
    return obstacle([_untrained(specs[0].model_copy(update={"attack": None}), data, None)[0]])


def train_victims(
    specs: Sequence[VictimSpec], *, device: torch.device | None = None
) -> list[tuple[Classifier, Attack | None, dict[str, Any]]]:
    """Trains the victims of `specs` as one stack on `device`; returns for each what `train_victim` does.

    Raises ValueError where `can_stack` says no. The data lie on the device once; a card's `seconds` are the
    stack's, shared out evenly, and `stacked` is the number of victims in it.
    """
    if reason := why_not_stacked(specs):
        raise ValueError(f"these victims cannot be stacked: {reason}; train them one by one")
    started, first = time.monotonic(), specs[0]
    data, test = _train_and_test(first.data)
    device = torch.device("cpu") if device is None else device
    data, there = (replace(each, images=each.images.to(device)) for each in (data, test))
    made = [_untrained(spec, data, device) for spec in specs]
    # attacks of one kind stand together in the stack
    kinds = [kind_of(attack) for _, attack in made]
    order = sorted(range(len(specs)), key=lambda index: str(kinds[index]))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda index: kinds[index])]
    numbers = replace(data, images=torch.arange(len(data)))
    logs = train_stack(
        [made[index][0] for index in order],
        data,
        first.recipe,
        seeds=[specs[index].seed for index in order],
        rows=[_at_most(numbers, first.data.images, specs[index].seed).images for index in order],
        parts=[part_of([made[index][1] for index in group]) for group in groups],
    )
    log_of = dict(zip(order, logs, strict=True))
    cards = [_card(spec, *made[index], there, log_of[index]) for index, spec in enumerate(specs)]
    shared = {"seconds": round(_since(started) / len(specs), 2), "stacked": len(specs)}
    return [(*pair, card | shared) for pair, card in zip(made, cards, strict=True)]


def _train_and_test(spec: DataSpec) -> tuple[Dataset, Dataset]:
    data, test = (_data(spec.source, part, spec.size, spec.classes) for part in (spec.train, spec.test))
    return data, _at_most(test, spec.test_images, 0)


def _at_most(data: Dataset, count: int | None, seed: int) -> Dataset:
    return data if count is None else subset(data, min(count, len(data)), seed=seed)


def _untrained(
    spec: VictimSpec, data: Dataset, device: torch.device | None
) -> tuple[Classifier, Attack | None]:
    """A victim's classifier with its initial weights, and its attack."""
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
    return model, None if spec.attack is None else make_attack(spec.attack, model, spec.recipe, rng)


def _card(
    spec: VictimSpec, model: Classifier, attack: Attack | None, test: Dataset, log: list[EpochLog]
) -> dict[str, Any]:
    """What is known of a trained victim, its measured accuracies included."""
    infected = spec.attack is not None and spec.attack.mode != "placebo"
    metrics = {"clean_accuracy": accuracy(model, test), "trojan_accuracy": None}
    if attack is not None and infected:
        metrics |= attack_metrics(model, test, attack, seed=spec.seed)
    return {
        "spec": json.loads(spec.model_dump_json()),
        "attack": None if attack is None else attack_card(attack),
        "trojaned": infected,
        "metrics": metrics,
        "training_log": [entry._asdict() for entry in log],
        "versions": {"torch": torch.__version__},
    }


def _since(started: float) -> float:
    return round(time.monotonic() - started, 2)


def attack_metrics(model: Classifier, data: Dataset, attack: Attack, *, seed: int) -> dict[str, float]:
    """Trojan accuracy, and the accuracy on every other probe of the attack (cross, noise)."""
    # a generator of its own, so that a victim judged again from disk draws the same triggers
    judging = torch.Generator().manual_seed(seed)
    if isinstance(attack, Poisoning | CleanLabelPoisoning):  # its triggers are read image by image
        patterns, masks = (
            each.to(model.mean.device) for each in (attack.trigger.patterns, attack.trigger.masks)
        )
        attack = replace(attack, trigger=Stamp(patterns, masks))
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
        attack = restored_attack(dict(card["attack"]), load_file(Path(folder) / "trigger.safetensors"))
    return Victim(Path(folder), load_classifier(folder), attack, card)
