"""The reversed triggers of a finding, and a repair that works with them and is measured by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from unhorse.core import (
    Classifier,
    Curve,
    Dataset,
    Exhibit,
    ImageGrid,
    Images,
    ReconstructedTrigger,
    RepairResult,
    ScanResult,
)
from unhorse.metrics import accuracy, evaluation
from unhorse.repairs.fine_tuning import BATCH, MINIMUM_IMAGES, labelled, outcome

Triggers = Mapping[int, ReconstructedTrigger]
"""The reversed trigger of each flagged class."""
TELLING = 0.5
"""A reversed trigger that succeeds on fewer images than this is hardly the model's."""
SHOWN = 4


class Measured(NamedTuple):
    """Clean accuracy, and the share of images of other classes that the best trigger leads to its class."""

    accuracy: float
    success: float


class Case(NamedTuple):
    """What a repair works on (`fitting`) and is measured on (`aside`), with the triggers of the finding."""

    triggers: Triggers
    fitting: Dataset
    aside: Dataset
    warnings: tuple[str, ...]

    def measure(self, model: Classifier) -> Measured:
        rates = [_success(model, self.aside, *entry) for entry in self.triggers.items()]
        return Measured(accuracy(model, self.aside), max(rates))

    def result(  # noqa: PLR0913
        self,
        repair: str,
        model: Classifier,
        cured: Classifier,
        before: Measured,
        *,
        facts: Mapping[str, object],
        drawn: Curve,
        warnings: tuple[str, ...] = (),
    ) -> RepairResult:
        """The cured model with the numbers of both, the pictures of the triggers, and what to warn of."""
        after = self.measure(cured)
        shared, costs = outcome(model, cured, self.aside)
        numbers = {
            **shared,
            "clean_images": len(self.fitting) + len(self.aside),
            "held_out_images": len(self.aside),
            "trigger_success_before": before.success,
            "trigger_success_after": after.success,
            "target_classes": [model.class_names[target] for target in self.triggers],
            **facts,
        }
        if before.success < TELLING:
            costs += (
                f"the reversed trigger succeeds on only {before.success:.0%} of the held-out images: it is "
                "hardly a trigger of this model, so do not count on the repair",
            )
        exhibits: tuple[Exhibit, ...] = (*grids(model, self.aside, self.triggers), drawn)
        return RepairResult(repair, cured, numbers, exhibits, (*self.warnings, *warnings, *costs))


def made_case(  # noqa: PLR0913
    repair: str, model: Classifier, clean: Dataset, finding: ScanResult | None, held_out: float, seed: int
) -> Case:
    """ValueError without a reversed trigger, and for images that do not fit the model or are too few."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}: give a share of the clean images between 0 and 1")
    triggers = reversed_triggers(repair, model, finding)
    clean, warnings = labelled(model, clean, least=MINIMUM_IMAGES)
    if finding is not None and finding.target is None:
        name = model.class_names[next(iter(triggers))]
        warnings += (
            f"the scan accused no class: the repair works with the trigger of {name}, the likeliest it found",
        )
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(held_out * len(clean))), len(clean) - 1)
    case = Case(triggers, clean[order[held:]], clean[order[:held]], warnings)
    for target in triggers:
        for part in (case.fitting, case.aside):
            assert part.labels is not None
            if bool((part.labels == target).all()):
                raise ValueError(
                    f"the clean images are all of class {model.class_names[target]!r}, the trigger's target: "
                    "give images of other classes too"
                )
    return case


def reversed_triggers(repair: str, model: Classifier, finding: ScanResult | None) -> Triggers:
    """The triggers that a finding accuses: that of its target class (where it names none, the one with the
    largest flip rate), and those of other classes whose score passes the threshold.
    """
    if finding is None or not finding.triggers:
        what = "a finding" if finding is None else "a finding with a reversed trigger, and this one has none"
        raise ValueError(
            f"{repair} needs {what}: run `unhorse scan MODEL --clean IMAGES --scanner neural-cleanse` and "
            f"pass its result, or `unhorse repair MODEL --method {repair} --clean IMAGES`, which runs "
            "the scan itself"
        )
    found, scores, threshold = finding.triggers, finding.class_scores, finding.threshold
    first = finding.target
    if first is None or first not in found:
        first = max(found, key=lambda label: torch.tensor(found[label].flip_rate).nan_to_num(-1.0).item())
    accused = [first]
    if threshold is not None and len(scores) == model.num_classes:
        accused += [label for label in found if label != first and scores[label] >= threshold]
    for label in accused:
        trigger, (channels, height, width) = found[label], model.image_shape
        fits = trigger.mask.shape == (1, height, width) and trigger.pattern.shape == (channels, height, width)
        if not fits or not 0 <= label < model.num_classes:
            raise ValueError(
                f"the finding has a trigger {tuple(trigger.pattern.shape)} for class {label}, the model "
                f"takes {tuple(model.image_shape)} and has {model.num_classes} classes: scan this model"
            )
    return {label: found[label] for label in accused}


def stamped_share(data: Dataset, triggers: Triggers, share: float) -> Dataset:
    """A copy of `data` whose first images, a `share` of them, carry the triggers in turn; labels stay."""
    count = max(1, round(share * len(data)))
    images = data.images.clone()
    for index, trigger in enumerate(triggers.values()):
        dealt = slice(index, count, len(triggers))
        images[dealt] = (stamped(trigger, images[dealt].float() / 255) * 255).round().to(torch.uint8)
    return replace(data, images=images)


def stamped(trigger: ReconstructedTrigger, images: Images) -> Images:
    return trigger(images, torch.Generator()).clamp(0, 1)


def _success(model: Classifier, data: Dataset, target: int, trigger: ReconstructedTrigger) -> float:
    """Share of the images of other classes that are classified as `target` under its trigger."""
    others, device = data.images[data.labels != target], model.mean.device
    with evaluation(model):
        hits = [
            model(stamped(trigger, part.to(device).float() / 255)).argmax(1) == target
            for part in others.split(BATCH)
        ]
        return float(torch.cat(hits).float().mean())


def grids(model: Classifier, data: Dataset, triggers: Triggers) -> list[ImageGrid]:
    """A picture of each trigger: mask, pattern, and images of other classes before and after."""
    pictures = []
    for target, trigger in triggers.items():
        assert data.labels is not None
        shown = data[data.labels != target][:SHOWN].pixels()
        mask = trigger.mask.detach().cpu().float().clamp(0, 1)[None].expand(1, *model.image_shape)
        pattern = trigger.pattern.detach().cpu().float().clamp(0, 1)[None]
        pictures.append(
            ImageGrid(
                f"The reversed trigger of class {model.class_names[target]}",
                torch.cat([mask, pattern, shown, stamped(trigger, shown)]),
                ("mask", "pattern", *["as it is"] * len(shown), *["under the trigger"] * len(shown)),
                columns=2 + len(shown),
            )
        )
    return pictures


def curve(title: str, measured: Mapping[int, Measured], axis: str) -> Curve:
    """Trigger success and clean accuracy over `axis`."""
    steps = [float(step) for step in measured]
    series = {
        "success of the reversed trigger": (steps, [each.success for each in measured.values()]),
        "clean accuracy": (steps, [each.accuracy for each in measured.values()]),
    }
    return Curve(title, series, axis, "share of the images")
