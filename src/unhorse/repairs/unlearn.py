"""Neural Cleanse's two mitigations: unlearn a reversed trigger, or prune the neurons that it excites."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unhorse.core import Classifier, Dataset, Labels, ReconstructedTrigger, RepairResult, ScanResult
from unhorse.metrics import evaluation
from unhorse.models.training import EpochLog, train
from unhorse.repairs.fine_tuning import BATCH, OnEpoch, fitting, recipe_of, settled, trainable_copy
from unhorse.repairs.reversed_triggers import Case, Measured, curve, made_case, stamped, stamped_share

Activations = Float[Tensor, "n neurons"]
PRODUCTS = 2**22
"""How many numbers the curve of pruning holds at a time."""


@dataclass
class Unlearning:
    """Unlearning (Wang et al., S&P 2019, Sec. VI-C): an epoch on clean images, a `share` of which carry the
    reversed trigger and their own label.

    `held_out` of the clean images are not trained on: success of the trigger and clean accuracy are measured
    there. With several flagged classes the stamped images are dealt out among their triggers. The optimiser
    is that of the other repairs, so that plain fine-tuning is the control.
    """

    epochs: int = 1
    share: float = 0.2
    batch_size: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    crop: int = 0
    flip: bool = False
    cutout: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    held_out: float = 0.5
    seed: int = 0

    @property
    def total_epochs(self) -> int:
        """How often `on_epoch` is called."""
        return self.epochs

    def __call__(
        self,
        model: Classifier,
        clean: Dataset,
        finding: ScanResult | None = None,
        *,
        on_epoch: OnEpoch | None = None,
        checkpoint: Path | None = None,
    ) -> RepairResult:
        """ValueError without a reversed trigger. With a checkpoint a killed training goes on."""
        started = time.monotonic()
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: give the share of stamped images, such as 0.2")
        recipe = recipe_of(self, self.epochs, self.learning_rate)
        case = made_case("unlearning", model, clean, finding, self.held_out, self.seed)
        cured, before = trainable_copy(model), case.measure(model)
        measured = {0: before}

        def after_epoch(entry: EpochLog) -> None:
            measured[entry.epoch + 1] = case.measure(cured)
            if on_epoch is not None:
                on_epoch(entry)

        data = stamped_share(case.fitting, case.triggers, self.share)
        recipe = fitting(recipe, len(data))
        train(cured, data, recipe, seed=self.seed, checkpoint=checkpoint, on_epoch=after_epoch)
        facts = {"epochs": self.epochs, "seconds": round(time.monotonic() - started, 2)}
        drawn = curve("Unlearning the reversed trigger", measured, "epochs")
        return case.result("unlearning", model, settled(cured), before, facts=facts, drawn=drawn)


@dataclass
class NeuronPruning:
    """Neuron pruning (Wang et al., S&P 2019, Sec. VI-B): neurons of the second-to-last layer are set to zero,
    those first whose activation the reversed trigger raises most.

    It stops when the trigger succeeds on a share below `success`, or before clean accuracy would have fallen
    by more than `clean_drop`. Both are judged on the images that rank the neurons; `held_out` of the clean
    images are kept for what the result states. With several flagged classes the largest gap ranks a neuron
    and the most successful trigger decides.
    """

    success: float = 0.05
    clean_drop: float = 0.05
    held_out: float = 0.5
    seed: int = 0

    @property
    def total_epochs(self) -> int:
        """How often `on_epoch` is called: nothing is trained."""
        return 0

    def __call__(
        self,
        model: Classifier,
        clean: Dataset,
        finding: ScanResult | None = None,
        *,
        on_epoch: OnEpoch | None = None,
        checkpoint: Path | None = None,
    ) -> RepairResult:
        """ValueError without a reversed trigger, and for a model that does not end in a linear layer."""
        started = time.monotonic()
        if not 0 < self.success <= 1 or not 0 <= self.clean_drop < 1:
            raise ValueError(
                f"success is {self.success}, clean_drop {self.clean_drop}: give fractions, such as 0.05 each"
            )
        case = made_case("neuron-pruning", model, clean, finding, self.held_out, self.seed)
        course = _course(model, case)
        count, warnings = self._stop(course)
        cured, before = deepcopy(model).eval(), case.measure(model)
        with torch.no_grad():
            _linear(cured, course.layer).weight[:, course.order[:count]] = 0
        neurons = len(course.order)
        facts = {
            "layer": course.layer,
            "neurons": neurons,
            "neurons_pruned": count,
            "seconds": round(time.monotonic() - started, 2),
        }
        pairs = zip(course.accuracy.tolist(), course.success.tolist(), strict=True)
        drawn = curve(
            f"Pruning the neurons that the reversed trigger excites: {count} of {neurons}",
            {index: Measured(*pair) for index, pair in enumerate(pairs)},
            "neurons set to zero",
        )
        return case.result(
            "neuron-pruning", model, cured, before, facts=facts, drawn=drawn, warnings=warnings
        )

    def _stop(self, course: _Course) -> tuple[int, tuple[str, ...]]:
        """How many neurons to prune, and a warning where the trigger is then still successful."""
        kept = course.accuracy >= course.accuracy[0] - self.clean_drop - 1e-6
        affordable = int(kept.int().cumprod(0).sum()) - 1
        cured = (course.success < self.success).nonzero()
        if len(cured) and int(cured[0]) <= affordable:
            return int(cured[0]), ()
        return affordable, (
            f"stopped after {affordable} of {len(course.order)} neurons, where more would cost over "
            f"{self.clean_drop:.0%} of clean accuracy: the reversed trigger still succeeds on "
            f"{float(course.success[affordable]):.0%} of the images (unlearning changes all layers)",
        )


# --- the second-to-last layer -------------------------------------------------------------------------------


class _Course(NamedTuple):
    """Clean accuracy and trigger success after 0, 1, ... all neurons, pruned in `order`."""

    layer: str
    order: Int[Tensor, " neurons"]
    accuracy: Float[Tensor, " steps"]
    success: Float[Tensor, " steps"]


def _course(model: Classifier, case: Case) -> _Course:
    """One forward pass of the plain images and one per trigger; the rest is the last layer's arithmetic."""
    name = last_linear(model)
    layer, device = _linear(model, name), model.mean.device
    images, labels = case.fitting.images, case.fitting.labels
    assert labels is not None
    labels = labels.to(device)
    with evaluation(model):
        plain = _activations(model, name, images)
        gaps, under = [], {}
        for target, trigger in case.triggers.items():
            others = labels != target
            under[target] = _activations(model, name, images, trigger)[others]
            gaps.append(under[target].abs().mean(0) - plain[others].abs().mean(0))
        order = torch.stack(gaps).amax(0).argsort(descending=True, stable=True)
        accuracy = shares_after_pruning(layer, plain, order, labels)
        rates = [
            shares_after_pruning(layer, found, order, torch.full_like(labels[: len(found)], target))
            for target, found in under.items()
        ]
        success = torch.stack(rates).amax(0)
    return _Course(name, order.clone(), accuracy.cpu(), success.cpu())


def last_linear(model: Classifier) -> str:
    """The name of the linear layer that gives the logits, found by running the model."""
    outputs: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
                outputs.pop(name, None)  # the order is that of the last call
                outputs[name] = output

            hooks.append(module.register_forward_hook(keep))
    try:
        with evaluation(model):
            logits = model(torch.full((2, *model.image_shape), 0.5, device=model.mean.device))
    finally:
        for hook in hooks:
            hook.remove()
    name = list(outputs)[-1] if outputs else ""
    if not outputs or not torch.equal(outputs[name].float(), logits):
        raise ValueError(
            "this repair needs a classifier whose logits are those of a linear layer, and "
            f"{model.architecture.get('name', 'this model')} does not end in one: use unlearning"
        )
    return name


def _linear(model: Classifier, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _activations(
    model: Classifier, name: str, images: Tensor, trigger: ReconstructedTrigger | None = None
) -> Activations:
    """What the named layer is given for uint8 images, under `trigger` if one is given."""
    parts: list[Tensor] = []
    hook = _linear(model, name).register_forward_pre_hook(lambda _layer, inputs: parts.append(inputs[0]))
    try:
        for part in images.split(BATCH):
            pixels = part.to(model.mean.device).float() / 255
            model(pixels if trigger is None else stamped(trigger, pixels))
    finally:
        hook.remove()
    return torch.cat(parts).float()


def shares_after_pruning(
    layer: nn.Linear, inputs: Activations, order: Int[Tensor, " neurons"], wanted: Labels
) -> Float[Tensor, " steps"]:
    """Share of `inputs` that `layer` calls `wanted` with the first 0, 1, ... all neurons of `order` at zero.

    A neuron's part of the logits is subtracted when it goes, so that all steps cost little more than one
    layer.
    """
    logits = layer(inputs).float()
    shares = [(logits.argmax(1) == wanted).float().mean()[None]]
    for neurons in order.split(max(1, PRODUCTS // logits.numel())):
        removed = inputs.T[neurons, :, None] * layer.weight.T[neurons, None]  # (neurons, n, classes)
        left = logits - removed.cumsum(0)
        shares.append((left.argmax(2) == wanted).float().mean(1))
        logits = left[-1]
    return torch.cat(shares)
