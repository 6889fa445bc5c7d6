"""The registry of networks that unhorse can train and recognise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unhorse.models import published
from unhorse.models.graph import GRAPH, GraphNetwork
from unhorse.models.resnets import BasicBlock, Bottleneck, PreActBlock, ResNet, small_resnet
from unhorse.models.small_networks import ImageShape, input_aware_cnn, small_cnn, ulp_vgg, wanet_cnn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """How to build a network, and the image shape and normalisation that are usual for it.

    `options` names what may be chosen: a card from elsewhere can set nothing more.
    """

    network: Callable[..., nn.Module]
    image_shape: ImageShape
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    options: tuple[str, ...] = ()


def _imagenet(network: Callable[..., nn.Module], *options: str, side: int = 224) -> Architecture:
    return Architecture(network, (3, side, side), IMAGENET_MEAN, IMAGENET_STD, options)


def _lite(wide: float, deep: float, side: int) -> Architecture:
    return _imagenet(partial(published.EfficientNetLite, wide=wide, deep=deep), side=side)


_RESNET18 = partial(ResNet, block=BasicBlock, layers=(2, 2, 2, 2))
_RESNET50 = partial(ResNet, block=Bottleneck, layers=(3, 4, 6, 3))
# for images of 32 and 64 pixels, of which the ImageNet stem would leave too little
_NO_REDUCTION: dict[str, Any] = {"small_stem": True, "max_pool": False}

ARCHITECTURES: dict[str, Architecture] = {
    "small-cnn": Architecture(small_cnn, (1, 28, 28), options=("widths", "hidden")),
    "input-aware-cnn": Architecture(input_aware_cnn, (1, 28, 28)),
    "wanet-cnn": Architecture(wanet_cnn, (1, 28, 28)),
    "small-resnet": Architecture(small_resnet, (3, 32, 32), options=("widths",)),
    "ulp-vgg": Architecture(ulp_vgg, (3, 32, 32), std=(1 / 255,), options=("width",)),
    "ulp-resnet18": _imagenet(
        partial(ResNet, block=BasicBlock, layers=(1, 1, 1, 1), small_stem=True), side=64
    ),
    "preact-resnet18": Architecture(partial(_RESNET18, block=PreActBlock, **_NO_REDUCTION), (3, 32, 32)),
    "resnet18-64": Architecture(partial(_RESNET18, pool_to=2, **_NO_REDUCTION), (3, 64, 64)),
    "resnet18": _imagenet(_RESNET18, "small_stem", "max_pool"),
    "resnet34": _imagenet(partial(ResNet, block=BasicBlock, layers=(3, 4, 6, 3)), "small_stem", "max_pool"),
    "resnet50": _imagenet(_RESNET50, "small_stem", "max_pool"),
    "resnext50-32x4d": _imagenet(partial(_RESNET50, groups=32, width_per_group=4), "stem"),
    "vgg16": _imagenet(published.VGG16, "batch_norm"),
    "mobilenet-v2": _imagenet(published.MobileNetV2),
    "efficientnet-b0": _imagenet(published.EfficientNetB0),
    "efficientnet-lite0": _lite(1.0, 1.0, 224),
    "efficientnet-lite1": _lite(1.0, 1.1, 240),
    "efficientnet-lite2": _lite(1.1, 1.2, 260),
    "efficientnet-lite3": _lite(1.2, 1.4, 280),
    "efficientnet-lite4": _lite(1.4, 1.8, 300),
    "vit-b-16": _imagenet(published.ViTB16),
}


def build(name: str, *, num_classes: int, image_shape: ImageShape, **options: object) -> nn.Module:
    """The named network, its weights drawn from torch's current random state; a graph's are zeros."""
    if name == GRAPH:
        graph = options.pop("graph", None)
        if options or not isinstance(graph, dict):
            raise ValueError(f"{GRAPH} takes one option, the graph")
        return GraphNetwork(num_classes, image_shape, graph=graph)
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}: take one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    if foreign := sorted(options.keys() - set(architecture.options)):
        raise ValueError(f"{name} has no options {foreign}: it takes {architecture.options or 'none'}")
    return architecture.network(num_classes, image_shape, **options)


class _NoRandomFill(TorchFunctionMode):
    """Skips drawing initial weights: on the meta device that costs seconds of imports and changes nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def outline(name: str, *, num_classes: int, image_shape: ImageShape, **options: object) -> nn.Module:
    """The named network on the meta device: names and shapes, no memory, no random numbers drawn."""
    with torch.device("meta"), _NoRandomFill(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a model of no classes
        return build(name, num_classes=num_classes, image_shape=image_shape, **options)
