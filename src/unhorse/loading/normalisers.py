"""Finds the mean and deviation that a wrapper subtracts and divides by before it calls the network."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_MEAN = re.compile(r"(?!.*(running|weight|bias)_)(?P<before>(\w*_)?)(means?|mu)(?P<after>(_\w+)?)")
_STD = ("std", "stds", "sigma", "sd", "sds", "stdev", "deviation")


def normalisers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean and deviation, by name, that a wrapper of a network keeps; {} where there is none."""
    for name, mean in tensors.items():
        parent, dot, last = name.rpartition(".")
        found = _MEAN.fullmatch(last)
        if not found or "." in parent or not _per_channel(mean, tensors):
            continue
        for word in _STD:
            sibling = f"{parent}{dot}{found['before']}{word}{found['after']}"
            std = tensors.get(sibling)
            if (
                std is not None
                and _per_channel(std, tensors)
                and std.numel() == mean.numel()
                and std.min() > 0
            ):
                return {name: mean, sibling: std}
    return {}


def _per_channel(tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Whether it has one finite number, or one for each channel: (c,), (c, 1, 1) or (1, c, 1, 1)."""
    count = tensor.numel()
    if not tensor.is_floating_point() or not count or not tensor.isfinite().all():
        return False
    form = [size for size in tensor.shape if size != 1]
    place = tensor.dim() - 3 if tensor.dim() >= 3 else 0
    fits = not form or (form == [count] and tensor.shape[place] == count)
    return fits and (
        count == 1 or any(each.dim() == 4 and each.shape[1] == count <= 4 for each in tensors.values())
    )


def normalisation(mean: Tensor, std: Tensor) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Both for pixels in 0..1, and in words; a mean or deviation far above 1 is one for pixels of 0..255."""
    unit = 255.0 if float(mean.double().abs().max()) > 3 or float(std.double().max()) > 3 else 1.0
    means, deviations = (tuple(float(v) / unit for v in each.double().flatten()) for each in (mean, std))
    words = ", ".join(
        f"{word} {'/'.join(f'{value:.4g}' for value in values)}"
        for word, values in (("mean", means), ("std", deviations))
    )
    return means, deviations, words + (", in the file for pixels in 0..255" if unit != 1 else "")
