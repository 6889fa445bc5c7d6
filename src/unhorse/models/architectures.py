"""The registry of networks that unhorse can train and recognise."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from unhorse.models.chains import CHAIN, chain
from unhorse.models.cifar_networks import CIFAR_NETWORKS
from unhorse.models.convnexts import CONVNEXTS
from unhorse.models.densenets import DENSENETS
from unhorse.models.efficientnet_lites import EFFICIENTNET_LITES
from unhorse.models.efficientnets import EFFICIENTNETS
from unhorse.models.graph import GRAPH, GraphNetwork
from unhorse.models.inceptions import INCEPTIONS
from unhorse.models.mobilenets import MNASNETS, MOBILENETS
from unhorse.models.narrow_resnets import NARROW_RESNETS
from unhorse.models.registry import Architecture, ImageShape
from unhorse.models.regnets import REGNETS
from unhorse.models.resnets import RESNETS
from unhorse.models.small_networks import SMALL_NETWORKS
from unhorse.models.squeezenets import SHUFFLENETS, SQUEEZENETS
from unhorse.models.swin_names import SWINS
from unhorse.models.vggs import VGGS
from unhorse.models.vision_transformers import VISION_TRANSFORMERS

ONE_LOGIT = "one_logit"
"""The option of any network of two classes that ends in one number."""

ARCHITECTURES: dict[str, Architecture] = {
    **SMALL_NETWORKS,
    **RESNETS,
    **NARROW_RESNETS,
    **CIFAR_NETWORKS,
    **VGGS,
    **DENSENETS,
    **INCEPTIONS,
    **SQUEEZENETS,
    **SHUFFLENETS,
    **REGNETS,
    **MOBILENETS,
    **MNASNETS,
    **EFFICIENTNETS,
    **EFFICIENTNET_LITES,
    **CONVNEXTS,
    **SWINS,
    **VISION_TRANSFORMERS,
}
"""Every known network by its name: torchvision's, with hyphens, where torchvision has it."""


def spelled(name: str) -> str | None:
    """The known name that differs from `name` in case, hyphens, underscores and dots only."""
    plain = {_plain(known): known for known in ARCHITECTURES}
    return name if name in ARCHITECTURES else plain.get(_plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


def families() -> str:
    """All names on a line, the members of a family by what is different: resnet18/34/50, vgg16/19."""
    groups: dict[str, list[str]] = {}
    for name, known in ARCHITECTURES.items():
        groups.setdefault(known.family or name, []).append(name)
    listed = []
    for family, (first, *others) in groups.items():
        listed.append("/".join([first, *(name.removeprefix(family).lstrip("-") for name in others)]))
    return ", ".join(listed)


def build(name: str, *, num_classes: int, image_shape: ImageShape, **options: object) -> nn.Module:
    """The named network, its weights drawn from torch's current random state; a graph's are zeros.

    With ONE_LOGIT it has two classes and ends in one number, which is the second one's lead.
    """
    if options.pop(ONE_LOGIT, False):
        if num_classes != 2 or name == GRAPH:
            raise ValueError(f"one logit tells 2 classes apart, not {num_classes}: leave {ONE_LOGIT} out")
        network = build(name, num_classes=1, image_shape=image_shape, **options)
        network.register_forward_hook(_against_zero)
        return network
    if name == GRAPH:
        graph = options.pop("graph", None)
        if options or not isinstance(graph, dict):
            raise ValueError(f"{GRAPH} takes one option, the graph")
        return GraphNetwork(num_classes, image_shape, graph=graph)
    if name == CHAIN:
        if options.keys() != {"words", "widths", "biased"}:
            raise ValueError(f"{CHAIN} takes words, widths and biased, not {sorted(options)}")
        return chain(num_classes, image_shape, **options)  # type: ignore[arg-type]
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}: take one of {families()}")
    architecture = ARCHITECTURES[name]
    if foreign := sorted(options.keys() - set(architecture.options)):
        raise ValueError(f"{name} has no options {foreign}: it takes {architecture.options or 'none'}")
    return architecture.network(num_classes, image_shape, **options)


def _against_zero(network: nn.Module, inputs: object, logit: Tensor) -> Tensor:
    """(n, 1) to (n, 2): logits (0, x) decide as a logit x does, with the cross-entropy of its sigmoid."""
    return functional.pad(logit, (1, 0))


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
