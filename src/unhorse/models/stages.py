"""The convolutional stages of a classifier, found by running it: any architecture, no layer names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unhorse.core import Classifier, Images, Logits

Features = Float[Tensor, "n channels height width"]


class Stage(NamedTuple):
    """A module of a classifier whose output is all that the rest of the network sees of an image.

    `name` is its place below the classifier ("network.layer4"), the others the shape of its output.
    """

    name: str
    channels: int
    height: int
    width: int


def convolution_stages(model: Classifier, *, least: int = 1) -> tuple[Stage, ...]:
    """The stages in the order of execution: one per size of feature maps at which the network convolves.

    Each is the last module at that size through which everything passes, which is tested: with its output
    replaced by that of other images, the network must answer as for those images. ValueError where fewer
    than `least` are found: a network without convolutions, or a transformer, whose one convolution only cuts
    the image into patches.
    """
    runs = _executed(model)
    convolutions = [run for run in runs if isinstance(run.module, nn.Conv2d)]
    if all(_cuts_patches(run.module) for run in convolutions):
        kind = "a transformer" if convolutions else "a network without convolutions"
        raise ValueError(
            f"this needs a convolutional classifier, and {_called(model)} is {kind}: use fine-tuning, or a "
            "filter"
        )
    found = []
    for size in dict.fromkeys(run.size for run in convolutions):  # in order of execution
        first = next(i for i, run in enumerate(runs) if run.size == size and run in convolutions)
        candidates = [run for run in runs[first:] if run.size == size]
        stages = (Stage(run.name, run.channels, *run.size) for run in reversed(candidates))
        passed = next((stage for stage in stages if _everything_passes(model, stage)), None)
        found += [] if passed is None else [passed]
    if len(found) < least:
        raise ValueError(
            f"this needs {least} convolutional stages that the whole image passes through, and "
            f"{_called(model)} has {len(found)}: use fine-tuning, or a filter"
        )
    return tuple(found)


@contextmanager
def watched(model: Classifier, stages: Sequence[Stage]) -> Iterator[dict[str, Features]]:
    """Inside, every forward pass leaves the output of each stage here, by its name, with its gradient."""
    seen: dict[str, Features] = {}
    with ExitStack() as hooks:
        for stage in stages:
            module = model.get_submodule(stage.name)

            def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str = stage.name) -> None:
                seen[name] = output

            hooks.callback(module.register_forward_hook(keep).remove)
        yield seen


def features_at(model: Classifier, stage: Stage, images: Images) -> Features:
    """The output of `stage` for `images`."""
    with watched(model, [stage]) as seen:
        model(images)
    return seen[stage.name]


def head(model: Classifier, stage: Stage, features: Features) -> Logits:
    """What the rest of the network answers to `features` of `stage`; it differentiates.

    The network runs up to the stage on one grey image, whose features are then replaced: what comes before
    the stage costs one image, however many the features are of.
    """
    grey = torch.full((1, *model.image_shape), 0.5, device=features.device)
    module = model.get_submodule(stage.name)
    hook = module.register_forward_hook(lambda _module, _inputs, _output: features)
    try:
        return model(grey)
    finally:
        hook.remove()


class _Run(NamedTuple):
    """One finished call of a module that returned feature maps."""

    name: str
    module: nn.Module
    channels: int
    size: tuple[int, int]


def _executed(model: Classifier) -> list[_Run]:
    """The modules below the network that return feature maps of more than one pixel, as they finish."""
    runs: list[_Run] = []
    with ExitStack() as hooks, _judging(model):
        for name, module in model.named_modules():

            def keep(module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
                if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                    runs.append(_Run(name, module, output.shape[1], (output.shape[2], output.shape[3])))

            if name:
                hooks.callback(module.register_forward_hook(keep).remove)
        model(_probes(model, 1))
    last = {run.name: index for index, run in enumerate(runs)}
    return [run for index, run in enumerate(runs) if last[run.name] == index]  # a shared module counts once


def _everything_passes(model: Classifier, stage: Stage) -> bool:
    """Whether the features of a stage decide the logits, for more images than the network was started on."""
    images = _probes(model, 3)
    with _judging(model):
        wanted = model(images)
        try:
            found = head(model, stage, features_at(model, stage, images).clone())
        except RuntimeError:  # the rest also needs something of the first image, in its batch size
            return False
    scale = float((wanted - wanted.mean(0)).abs().max())
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= 1e-3 * scale + 1e-6


@contextmanager
def _judging(model: Classifier) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _probes(model: Classifier, count: int) -> Images:
    drawn = torch.rand(count, *model.image_shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(model.mean.device)


def _cuts_patches(module: nn.Module) -> bool:
    assert isinstance(module, nn.Conv2d)
    return module.kernel_size == module.stride and module.kernel_size[0] > 1


def _called(model: Classifier) -> str:
    return str(model.architecture.get("name", "this model"))
