"""What is measured and drawn of a model and its cured copy, on images that nothing else has seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unhorse.core import (
    Bars,
    Classifier,
    Dataset,
    Exhibit,
    ImageGrid,
    Images,
    Labels,
    ReconstructedTrigger,
    ScanResult,
)
from unhorse.exhibits import class_name, evidence
from unhorse.guard_report import Estimate
from unhorse.inputs import scaled
from unhorse.models.classifier import weights_hash
from unhorse.rates import TrojanImages, paired_drop, predictions, rate_of
from unhorse.repair_report import Change
from unhorse.repairs.reversed_triggers import reversed_triggers
from unhorse.victims import load_victim, trojan_images

SHOWN, BATCH = 10, 512


class Reversed(NamedTuple):
    """A reversed trigger, the class that it leads to, and the scanner that found it."""

    trigger: ReconstructedTrigger
    target: int
    scanner: str

    @staticmethod
    def of(finding: ScanResult, model: Classifier, method: str) -> Reversed | None:
        """That of the class which a finding accuses first; None where it has no trigger."""
        if not finding.triggers:
            return None
        target, trigger = next(iter(reversed_triggers(method, model, finding).items()))
        return Reversed(trigger, target, finding.scanner)


class Pair(NamedTuple):
    """A classifier and its cured copy."""

    model: Classifier
    cured: Classifier

    def classes(self, images: Tensor, trigger: ReconstructedTrigger | None = None) -> tuple[Labels, Labels]:
        """What the two make of images, under `trigger` if one is given; on the CPU."""
        stamped = (part if trigger is None else _stamped(part, trigger) for part in images.split(BATCH))
        answers = [(predictions(self.model, part), predictions(self.cured, part)) for part in stamped]
        was, now = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return was, now


def measure(
    pair: Pair, held_out: Dataset, found: Reversed | None, attacked: TrojanImages | None
) -> dict[str, Change]:
    """What the repair changed, by the names in MEASURES. The reversed trigger, the same one before and after,
    is measured on images of other classes than its target.
    """
    labels = held_out.labels
    was, now = pair.classes(held_out.images)
    changes = {"agreement": Change(None, Estimate(*rate_of(was == now)), None)}
    if labels is not None:
        changes["clean_accuracy"] = _change(was == labels, now == labels)
    if found is not None:
        others = (was if labels is None else labels) != found.target
        if others.any():
            under = pair.classes(held_out.images[others], found.trigger)
            changes["reversed_trigger"] = _change(*(classes == found.target for classes in under))
    return changes if attacked is None else changes | _trojan_changes(pair, attacked)


def _trojan_changes(pair: Pair, attacked: TrojanImages) -> dict[str, Change]:
    attacked = attacked.checked(pair.model)
    was, now = pair.classes(attacked.images)
    changes = {}
    if attacked.wanted is not None:
        counted = attacked.counted()
        wanted = attacked.wanted[counted]
        changes["trojan_accuracy"] = _change(was[counted] == wanted, now[counted] == wanted)
    if attacked.labels is not None:
        changes["recovery_accuracy"] = _change(was == attacked.labels, now == attacked.labels)
    return changes


def _change(was: Tensor, now: Tensor) -> Change:
    return Change(*(Estimate(*rate) for rate in (rate_of(was), rate_of(now), paired_drop(was, now))))


def _stamped(images: Tensor, trigger: ReconstructedTrigger) -> Images:
    return trigger(scaled(images), torch.Generator()).clamp(0, 1)


def stamped_by_victim(folder: Path, model: Classifier, held_out: Dataset) -> TrojanImages:
    """The held-out images under the trigger of a victim, which must be the model that is repaired."""
    victim = load_victim(folder)
    if victim.attack is None or not victim.card.get("trojaned"):
        raise ValueError(f"{folder} is a benign victim, it has no trigger: leave --card out")
    if weights_hash(victim.model) != weights_hash(model):
        raise ValueError(f"{folder} is not the model to repair: give the victim that the model is")
    if held_out.labels is None:
        raise ValueError("--card needs the labels of the clean images: leave --unlabelled out")
    return trojan_images(victim.attack, held_out, seed=int(victim.card["spec"]["seed"]))


# --- pictures -----------------------------------------------------------------------------------------------


def stamped_pictures(
    pair: Pair, held_out: Dataset, found: Reversed | None, attacked: TrojanImages | None
) -> Iterator[ImageGrid]:
    """A few images under the Trojan, or else the reversed trigger, with their class before and after."""
    if attacked is not None:
        images, whose = attacked.images[attacked.counted()], "Trojan images"
    elif found is not None:
        kept = (
            held_out.images if held_out.labels is None else held_out.images[held_out.labels != found.target]
        )
        images = _stamped(kept[:SHOWN], found.trigger)
        whose = "Held-out images under the reversed trigger"
    else:
        return
    shown, names = scaled(images[:SHOWN]), pair.model.class_names
    answers = zip(*pair.classes(shown), strict=True)
    captions = tuple(f"{class_name(names, int(was))} → {class_name(names, int(now))}" for was, now in answers)
    yield ImageGrid(f"{whose}: class before → after the repair", shown, captions)


def scan_pictures(
    before: ScanResult, finding: ScanResult, after: ScanResult, *, drawn: bool
) -> Iterator[Exhibit]:
    """The reversed triggers, unless the repair has `drawn` them, and what the scans drew of each class: masks
    and bars before, bars after.
    """
    if finding.triggers and not drawn:
        yield from evidence(ScanResult(finding.verdict, finding.scanner, triggers=finding.triggers))
    for scan in (before,) if finding is before else (before, finding):
        for exhibit in scan.exhibits:
            if isinstance(exhibit, Bars) or (isinstance(exhibit, ImageGrid) and "Masks" in exhibit.title):
                yield replace(exhibit, title=f"Before the repair: {exhibit.title}")
    for exhibit in after.exhibits:
        if isinstance(exhibit, Bars):
            yield replace(exhibit, title=f"After the repair: {exhibit.title}")
