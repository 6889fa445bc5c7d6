"""How well a chain fits the statistics that its batch normalisations have learnt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unhorse.core import Images
from unhorse.loading.chain_sizes import Pairs, Reading
from unhorse.loading.chains import as_identified
from unhorse.models.architectures import outline
from unhorse.models.chains import side_after

_OUTPUT = 64  # a number kept costs as much as so many multiplications


def network_of(pairs: Pairs, reading: Reading) -> nn.Module:
    """The chain of a reading with the file's tensors; its statistics are copies."""
    found = as_identified(reading, pairs, "")
    network = outline(
        found.name, num_classes=found.num_classes, image_shape=found.image_shape, **found.options
    )
    state = {
        name: tensor.clone() if name.endswith(("running_mean", "running_var")) else tensor
        for name, tensor in found.state.items()
    }
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def cost(pairs: Pairs, reading: Reading) -> int:
    """Multiplications of one image in the convolutions and linear layers, and numbers that they put out."""
    sides = list(reading.image_shape[1:])
    total = 0
    for word, (_, part) in zip(reading.words, pairs, strict=True):
        if word.kind == "conv" or word.pools:
            sides = [side_after(word, side) for side in sides]
        elif word.kind in ("gap", "flatten"):
            sides = [word.kernel or 1] * 2
        if part is not None and word.weighted:
            total += (part.weight.numel() + _OUTPUT * part.width) * math.prod(sides)
    return total


def mismatch(network: nn.Module, images: Images) -> float | None:
    """How far the inputs of each normalisation are from the statistics that it has learnt, 0 for not at all.

    Each but the first is fed as in training, by features that the one before has normalised in this batch:
    then the distance depends on the layers between them more than on the images. It is the mean over layers
    of the mean over channels of |difference of means| / deviation + |log ratio of deviations|. None with
    fewer than two normalisations.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    if len(norms) < 2:
        return None
    seen: list[float] = []

    def keep(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].transpose(0, 1).flatten(1)
        assert module.running_mean is not None and module.running_var is not None
        deviation = (module.running_var + module.eps).sqrt()
        mean = (features.mean(1) - module.running_mean).abs() / deviation
        ratio = (features.std(1) / deviation).clamp(1e-3, 1e3).log().abs()
        seen.append(float((mean + ratio).clamp(max=10).mean()))

    hooks = [module.register_forward_pre_hook(keep) for module in norms]
    try:
        for module in norms:
            module.train()
            module.num_batches_tracked = None
            module.momentum = 0.0
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = sum(seen[1:]) / len(seen[1:])
    return found if math.isfinite(found) else None
