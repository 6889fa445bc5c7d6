"""Finds the layers in a traced graph: operators whose weights are constants become trainable modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Found(NamedTuple):
    """A layer (models/graph.LAYERS), its options as JSON, its weights by name, and what it is applied to."""

    layer: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    input: Any


def layer_of(
    name: str, arguments: Sequence[Any], options: dict[str, Any], example: Any, constant: Any
) -> Found | None:
    """The layer that an operator is, if its weights are constants; None for all other operators."""
    given = [value.tensor if isinstance(value, constant) else value for value in arguments]
    if options or not given or isinstance(given[0], Tensor) and name != "addmm":
        return None
    if name in ("conv2d", "_convolution", "convolution"):
        return _convolution(name, given)
    if name == "linear" and isinstance(given[1], Tensor) and given[1].dim() == 2:
        return _linear(given[0], given[1], given[2] if len(given) > 2 else None)
    if name in ("matmul", "mm") and isinstance(given[1], Tensor) and given[1].dim() == 2:
        return _linear(given[0], given[1].t(), None)
    if name == "addmm" and len(given) == 3 and isinstance(given[0], Tensor) and isinstance(given[2], Tensor):
        bias = given[0]
        return _linear(given[1], given[2].t(), bias) if bias.dim() == 1 else None
    if name == "batch_norm":
        return _batch_norm(given, example)
    return None


def _linear(value: Any, weight: Tensor, bias: Any) -> Found | None:
    if not (bias is None or isinstance(bias, Tensor)) or isinstance(value, Tensor):
        return None
    options = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return Found("Linear", options, tensors, value)


def _convolution(name: str, given: Sequence[Any]) -> Found | None:
    value, weight, bias = [*given, None][:3]
    if not isinstance(weight, Tensor) or weight.dim() != 4 or not (bias is None or isinstance(bias, Tensor)):
        return None
    defaults: list[Any] = [[1, 1], [0, 0], [1, 1]]
    stride, padding, dilation = [*given[3:6], *defaults[len(given[3:6]) :]]
    if name == "conv2d":
        groups = given[6] if len(given) > 6 else 1
    else:
        if given[6]:  # transposed
            return None
        groups = given[8]
    sizes = (stride, padding, dilation)
    if any(not isinstance(size, str) and not _plain(size) for size in sizes):
        return None
    options = {
        "in_channels": weight.shape[1] * groups,
        "out_channels": weight.shape[0],
        "kernel_size": list(weight.shape[2:]),
        **{
            word: size if isinstance(size, str) else _pair(size)
            for word, size in zip(("stride", "padding", "dilation"), sizes, strict=True)
        },
        "groups": groups,
        "bias": bias is not None,
    }
    return Found("Conv2d", options, {"weight": weight} | ({} if bias is None else {"bias": bias}), value)


def _batch_norm(given: Sequence[Any], example: Any) -> Found | None:
    value, weight, bias, mean, variance, training, momentum, epsilon = given[:8]
    known = isinstance(mean, Tensor) and isinstance(variance, Tensor) and training is False
    affine = isinstance(weight, Tensor) and isinstance(bias, Tensor)
    if not known or not (affine or (weight is None and bias is None)) or example.dim() not in (2, 3, 4):
        return None
    options = {"num_features": mean.shape[0], "eps": epsilon, "momentum": momentum, "affine": affine}
    tensors = {
        "running_mean": mean,
        "running_var": variance,
        "num_batches_tracked": mean.new_zeros(()).long(),
    }
    if affine:
        tensors |= {"weight": weight, "bias": bias}
    return Found("BatchNorm2d" if example.dim() == 4 else "BatchNorm1d", options, tensors, value)


def _plain(size: Any) -> bool:
    return isinstance(size, int) or (isinstance(size, list) and all(isinstance(item, int) for item in size))


def _pair(size: Any) -> list[int]:
    return (
        list(size) * 2
        if isinstance(size, list) and len(size) == 1
        else size
        if isinstance(size, list)
        else [size] * 2
    )
