"""Neural Cleanse's input check: neurons that the reversed trigger excites give its images away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unhorse.core import Classifier, Dataset, Images, ReconstructedTrigger, ScanResult, Scores
from unhorse.inputs import check_clean, check_images, scaled
from unhorse.metrics import evaluation

Activations = Float[Tensor, "n neurons"]
LEAST_DEVIATION = 0.1
"""Of a neuron, as a share of the layer's mean: one that clean images never excite must not divide by 0."""


def most_excited(clean: Activations, stamped: Activations, share: float) -> Tensor:
    """The top `share` of the neurons, at least one, by how much more the stamped images excite them."""
    gap = (stamped - clean).mean(0)
    return gap.topk(max(1, round(share * len(gap)))).indices


@dataclass
class NeuronCheck:
    """The input filter of Neural Cleanse (Wang et al., S&P 2019, Sec. VI-A), which needs a reversed trigger.

    Of the neurons that the last linear layer reads, the top `share` by the activation that the trigger adds
    to clean images are watched. The score is their mean activation, each in deviations from its clean mean.
    """

    share: float = 0.01
    batch_size: int = 512
    model_: Classifier = field(init=False, repr=False, compare=False)
    neurons_: Tensor = field(init=False, repr=False, compare=False)
    mean_: Tensor = field(init=False, repr=False, compare=False)
    deviation_: Tensor = field(init=False, repr=False, compare=False)

    def fit(self, model: Classifier, clean: Dataset, finding: ScanResult | None = None) -> Self:
        """Ranks the neurons by the trigger of `finding`, on clean images with or without labels.

        ValueError without a trigger, and for a classifier that does not end in a linear layer.
        """
        if not 0 < self.share <= 1 or self.batch_size < 1:
            raise ValueError(
                f"share={self.share}, batch_size={self.batch_size}: give a share in (0, 1] and 1 or more"
            )
        trigger = _trigger_of(finding)
        check_clean(model, clean)
        shape = (*trigger.mask.shape[1:], *trigger.pattern.shape)
        if shape != (*model.image_shape[1:], *model.image_shape):
            raise ValueError(
                f"the trigger is {tuple(trigger.pattern.shape)} under a mask {tuple(trigger.mask.shape)}, "
                f"the model takes {tuple(model.image_shape)}: give a finding of this model"
            )
        plain = self._activations(model, clean.images)
        stamped = self._activations(model, clean.images, trigger)
        watched = most_excited(plain, stamped, self.share)
        deviation = plain.std(0, correction=0)
        floor = (LEAST_DEVIATION * deviation.mean()).clamp_min(torch.finfo(deviation.dtype).tiny)
        self.model_, self.neurons_ = model, watched
        self.mean_, self.deviation_ = plain.mean(0)[watched], deviation.clamp_min(floor)[watched]
        return self

    def score(self, images: Images) -> Scores:
        """Mean deviation of the watched neurons, on the device of `images`; infinite where one is NaN.

        Any number of images, uint8 or floats in [0, 1].
        """
        if getattr(self, "model_", None) is None:
            raise ValueError("the neuron check has no model and no neurons: call fit first")
        check_images(self.model_, images)
        found = self._activations(self.model_, images)[:, self.neurons_]
        scores = ((found - self.mean_) / self.deviation_).mean(1)
        return scores.masked_fill(scores.isnan(), torch.inf).to(images.device)

    def _activations(
        self, model: Classifier, images: Tensor, trigger: ReconstructedTrigger | None = None
    ) -> Activations:
        """What the last linear layer reads of images, stamped where a trigger is given."""
        device, parts = model.mean.device, []
        with evaluation(model), _last_inputs(model) as seen:
            for part in images.split(self.batch_size):
                pixels = scaled(part.to(device))
                if trigger is not None:
                    pixels = trigger(pixels, torch.Generator())
                model(pixels)
                parts.append(seen[-1].float())
                seen.clear()
        return torch.cat(parts)


def _trigger_of(finding: ScanResult | None) -> ReconstructedTrigger:
    """The trigger of the flagged class, otherwise the one of the smallest mask."""
    if finding is None or not finding.triggers:
        raise ValueError(
            "the neuron check needs a reversed trigger, and there is no finding with one: run "
            "`unhorse scan MODEL --clean IMAGES --scanner neural-cleanse` first"
        )
    if finding.target is not None and finding.target in finding.triggers:
        return finding.triggers[finding.target]
    return min(finding.triggers.values(), key=lambda trigger: float(trigger.mask.sum()))


@contextmanager
def _last_inputs(model: Classifier) -> Iterator[list[Tensor]]:
    """Inside, every forward pass adds what the classifier's last linear layer was given."""
    last = _last_linear(model)
    seen: list[Tensor] = []

    def keep(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = last.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _last_linear(model: Classifier) -> nn.Linear:
    """The linear layer that runs last and gives the logits, found by running the model."""
    ran: list[tuple[nn.Linear, tuple[int, ...]]] = []
    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):

                def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                    assert isinstance(module, nn.Linear)
                    ran.append((module, tuple(output.shape)))

                hooks.callback(layer.register_forward_hook(note).remove)
        model(torch.full((2, *model.image_shape), 0.5, device=model.mean.device))
    if not ran or ran[-1][1] != (2, model.num_classes):
        name = model.architecture.get("name", "this model")
        raise ValueError(
            f"this needs a classifier that ends in a linear layer, and {name} does not: use STRIP or a filter"
        )
    return ran[-1][0]
