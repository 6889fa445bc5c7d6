"""Many networks of one architecture as a single one: grouped convolutions, normalisation over all channels,
batched products.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Classifier, Images, Logits
from unhorse.models.resnets import BasicBlock, Bottleneck, PreActBlock, ResNet

# what treats every channel alone or keeps the channels in their order, and so acts on m networks as on one
_CHANNELWISE = (nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity)
_NORMALISED = (nn.BatchNorm1d, nn.BatchNorm2d)
_CONTAINERS = (nn.Sequential, ResNet, BasicBlock, Bottleneck, PreActBlock)
_KNOWN = (*_CHANNELWISE, *_NORMALISED, *_CONTAINERS, nn.Conv2d, nn.Linear, nn.Dropout)


class StackedClassifier(Classifier):
    """`models` (m) as one classifier of copies of their weights: image i * m + j goes through model j.

    Dropout draws for each model apart, from the global generator unless `seed_dropout` was called. Raises
    ValueError for models that differ in architecture, class count or normalisation, and for networks that
    have no stacked form.
    """

    def __init__(self, models: Sequence[Classifier]) -> None:
        if reason := obstacle(models):
            raise ValueError(f"these models cannot be stacked: {reason}")
        first = models[0]
        super().__init__(
            StackedNetwork([model.network for model in models]),
            image_shape=first.image_shape,
            class_names=first.class_names,
            mean=first.mean.flatten().tolist(),
            std=first.std.flatten().tolist(),
        )
        self.to(first.mean.device)

    def seed_dropout(self, seeds: Sequence[int]) -> None:
        """Each model's dropout draws from its own seed on, as the model alone would; on the CPU only."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for module in self.modules():
            if isinstance(module, _Dropout):
                module.generators = generators

    def unstack(self, models: Sequence[Classifier]) -> None:
        """Copies each model's weights and running statistics out of the stack into `models`."""
        count = len(models)
        states: list[dict[str, Tensor]] = [{} for _ in models]
        for name, tensor in self.network.inner.state_dict().items():  # type: ignore[union-attr]
            parts = tensor.chunk(count) if tensor.dim() else (tensor,) * count
            for state, part in zip(states, parts, strict=True):
                state[name] = part
        for model, state in zip(models, states, strict=True):
            model.network.load_state_dict(state)


def obstacle(models: Sequence[Classifier]) -> str:
    """Why these models cannot be stacked; empty if they can."""
    first = models[0]
    for model in models:
        for module in model.network.modules():
            if type(module) not in _KNOWN:
                return f"a {type(module).__name__} has no stacked form"
        if (model.image_shape, model.num_classes) != (first.image_shape, first.num_classes):
            return "they differ in image shape or class count"
        if not (torch.equal(model.mean, first.mean) and torch.equal(model.std, first.std)):
            return "they differ in normalisation"
        if _structure(model.network) != _structure(first.network):
            return "they differ in architecture"
    return ""


def _structure(network: nn.Module) -> list[object]:
    # extra_repr names strides, paddings and rates, of which the shapes say nothing
    layers = [(name, type(module), module.extra_repr()) for name, module in network.named_modules()]
    return [*layers, *((name, tensor.shape) for name, tensor in network.state_dict().items())]


class StackedNetwork(nn.Module):
    """Networks side by side in the channels: (n * m, c, h, w) to (n * m, k), the model running fastest."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.count = len(networks)
        self.inner = _stacked(networks)

    def forward(self, images: Images) -> Logits:
        channels, height, width = images.shape[1:]
        side_by_side = images.reshape(-1, self.count * channels, height, width)
        return self.inner(side_by_side).reshape(len(images), -1)


def _stacked(modules: Sequence[nn.Module]) -> nn.Module:
    first, count = modules[0], len(modules)
    if isinstance(first, nn.Dropout):
        return _Dropout(first.p, count)
    whole = _Linear(first, count) if isinstance(first, nn.Linear) else copy.copy(first)
    whole._parameters, whole._buffers = dict(first._parameters), dict(first._buffers)
    whole._modules = dict(first._modules)
    for name, parameter in first._parameters.items():
        if parameter is not None:
            joined = torch.cat([getattr(module, name).detach() for module in modules])
            whole._parameters[name] = nn.Parameter(joined, parameter.requires_grad)
    for name, buffer in first._buffers.items():
        if buffer is not None:
            each = [getattr(module, name) for module in modules]
            whole._buffers[name] = torch.cat(each) if buffer.dim() else buffer.clone()
    for name in first._modules:
        children = [module._modules[name] for module in modules]
        whole._modules[name] = None if children[0] is None else _stacked(children)  # type: ignore[arg-type]
    if isinstance(whole, nn.Conv2d):
        whole.in_channels, whole.out_channels = count * whole.in_channels, count * whole.out_channels
        whole.groups *= count
    elif isinstance(whole, _NORMALISED):
        whole.num_features *= count
    return whole


class _Linear(nn.Module):
    """A linear layer per model on (n, m * f) features, as one batched product."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, single: nn.Linear, count: int) -> None:
        super().__init__()
        self.wide_in, self.wide_out, self.count = single.in_features, single.out_features, count

    def forward(self, features: Tensor) -> Tensor:
        each = features.reshape(-1, self.count, self.wide_in).transpose(0, 1)  # (m, n, f)
        weight = self.weight.view(self.count, self.wide_out, self.wide_in).transpose(1, 2)
        if self.bias is None:
            out = torch.bmm(each, weight)
        else:
            out = torch.baddbmm(self.bias.view(self.count, 1, self.wide_out), each, weight)
        return out.transpose(0, 1).flatten(1)


class _Dropout(nn.Module):
    """Dropout on (n, m * ...) features that can draw as each model alone would."""

    def __init__(self, rate: float, count: int) -> None:
        super().__init__()
        self.rate, self.count = rate, count
        self.generators: list[torch.Generator] = []

    def forward(self, features: Tensor) -> Tensor:
        if not (self.training and self.generators):
            return functional.dropout(features, self.rate, self.training)
        shape = (len(features), features.shape[1] // self.count, *features.shape[2:])
        kept = [features.new_empty(shape).bernoulli_(1 - self.rate, generator=rng) for rng in self.generators]
        return features * torch.stack(kept, 1).div_(1 - self.rate).view(features.shape)
