"""Channels of a stage switched off: for a while, or for good in a copy of the classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unhorse.core import Classifier, Images
from unhorse.metrics import evaluation
from unhorse.models.stages import Features, Stage, features_at, head

Channels = Int[Tensor, " some"]
Mask = Float[Tensor, "1 channels 1 1"]
PROBES = 8


class MaskedStage(nn.Module):
    """A stage that a network cannot prune by its own weights, with the mask behind it."""

    mask: Tensor

    def __init__(self, stage: nn.Module, mask: Mask) -> None:
        super().__init__()
        self.stage = stage
        self.register_buffer("mask", mask)

    def forward(self, features: Tensor) -> Features:
        return self.stage(features) * self.mask


def mask_without(stage: Stage, channels: Channels, device: torch.device) -> Mask:
    """1 everywhere, 0 at `channels`."""
    mask = torch.ones(1, stage.channels, 1, 1, device=device)
    mask[:, channels.to(device)] = 0
    return mask


@contextmanager
def masked(model: Classifier, stage: Stage, channels: Channels) -> Iterator[None]:
    """Inside, the network runs without these channels; nothing flows back through them either."""
    mask = mask_without(stage, channels, model.mean.device)
    hook = model.get_submodule(stage.name).register_forward_hook(
        lambda _module, _inputs, output: output * mask
    )
    try:
        yield
    finally:
        hook.remove()


def pruned(model: Classifier, stage: Stage, channels: Channels) -> Classifier:
    """A copy without these channels of `stage`, of the same architecture where its weights allow it.

    Zeroed are the weights of the layer that reads the stage, or else of the layer that writes it; that the
    copy then computes what the mask does is tested on random features, so that channels which clean images
    leave asleep count too. Where neither does, the stage becomes a MaskedStage and the copy names no
    architecture, so that it cannot be saved as what it no longer is.
    """
    mask = mask_without(stage, channels, model.mean.device)
    for bake in (_into_reader, _into_writer):
        baked = bake(model, stage, mask)
        if baked is not None:
            return baked
    wrapped = copy.deepcopy(model).eval()
    wrapped.set_submodule(stage.name, MaskedStage(wrapped.get_submodule(stage.name), mask))
    wrapped.architecture = {}
    return wrapped


def is_baked(model: Classifier) -> bool:
    """Whether a pruned copy is of the architecture of the original."""
    return not any(isinstance(module, MaskedStage) for module in model.modules())


def _into_reader(model: Classifier, stage: Stage, mask: Mask) -> Classifier | None:
    """A copy whose first layer behind the stage ignores the channels, or None where that is not the same."""
    layers = (nn.Linear, nn.Conv2d)
    name = next((name for name in _order(model, stage, layers)[1] if name), None)
    width = 0 if name is None else _weight(model, name).shape[1]
    if name is None or width % stage.channels:
        return None
    baked = copy.deepcopy(model).eval()
    weight = _weight(baked, name)
    columns = mask.flatten().repeat_interleave(width // stage.channels)  # flattened maps: channels first
    with torch.no_grad():
        weight.mul_(columns.view(1, -1, *[1] * (weight.ndim - 2)))
    features = 4 * _noise(model, PROBES, stage.channels, stage.height, stage.width)
    with evaluation(model), evaluation(baked):
        same = _same(head(baked, stage, features), head(model, stage, features * mask))
    return baked if same and _same_for_images(baked, model, stage, mask) else None


def _into_writer(model: Classifier, stage: Stage, mask: Mask) -> Classifier | None:
    """A copy whose last layer before the end of the stage writes zeros, or None where they do not last."""
    layers = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)
    names = _order(model, stage, layers)[0]
    if not names:
        return None
    baked = copy.deepcopy(model).eval()
    layer = baked.get_submodule(names[-1])
    scales = [value for value in (layer.weight, layer.bias) if isinstance(value, Tensor)]
    if not scales or len(scales[0]) != stage.channels:
        return None
    with torch.no_grad():
        for value in scales:
            value.mul_(mask.view(-1, *[1] * (value.ndim - 1)))
    found, wanted = (_excited(each, stage, names[-1]) for each in (baked, model))
    awake = bool((wanted.flatten(2).std(2).amax(0) > 0)[mask.flatten() == 0].all())
    return (
        baked
        if awake and _same(found, wanted * mask) and _same_for_images(baked, model, stage, mask)
        else None
    )


def _order(
    model: Classifier, stage: Stage, kinds: tuple[type[nn.Module], ...]
) -> tuple[list[str], list[str]]:
    """The layers of these kinds that start before the end of the stage, and those that start behind it."""
    before: list[str] = []
    behind: list[str] = []
    started = before
    with ExitStack() as hooks, evaluation(model):
        for name, module in model.named_modules():
            if isinstance(module, kinds):

                def note(_module: nn.Module, _inputs: object, name: str = name) -> None:
                    started.append(name)

                hooks.callback(module.register_forward_pre_hook(note).remove)

        def end(_module: nn.Module, _inputs: object, _output: object) -> None:
            nonlocal started
            started = behind

        hooks.callback(model.get_submodule(stage.name).register_forward_hook(end).remove)
        model(_grey(model))
    return before, behind


def _excited(model: Classifier, stage: Stage, name: str) -> Features:
    """The output of the stage when its layer `name` is fed large random features."""

    def feed(_module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return 4 * _noise(model, PROBES, *inputs[0].shape[1:])

    hook = model.get_submodule(name).register_forward_pre_hook(feed)
    try:
        with evaluation(model):
            return features_at(model, stage, _grey(model).expand(PROBES, -1, -1, -1))
    finally:
        hook.remove()


def _same_for_images(baked: Classifier, model: Classifier, stage: Stage, mask: Mask) -> bool:
    images: Images = (_noise(model, PROBES, *model.image_shape) / 4 + 0.5).clamp(0, 1)
    with evaluation(model), evaluation(baked):
        return _same(baked(images), head(model, stage, features_at(model, stage, images) * mask))


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6)


def _weight(model: Classifier, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _grey(model: Classifier) -> Images:
    return torch.full((1, *model.image_shape), 0.5, device=model.mean.device)


def _noise(model: Classifier, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(model.mean.device)
