"""Checks of tensors after a file was parsed and before they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from unhorse.checks.sniff import EXPORT_REMEDY
from unhorse.rules import LoadRefused


def check_tensors(tensors: Mapping[str, object], file_bytes: int) -> dict[str, Tensor]:
    """Plain CPU tensors of their own, floats as float32 and finite; otherwise LD206, LD207 or LD209."""
    plain = {name: _check_tensor(name, value) for name, value in tensors.items()}
    check_size(plain.values(), file_bytes)
    return {name: _as_finite(name, tensor) for name, tensor in plain.items()}


def check_size(tensors: Iterable[Tensor], file_bytes: int) -> None:
    """LD206 where tensors take more memory than a file of so many bytes can hold.

    Tied weights count twice; a file of a thousand views of one tensor would count a thousand times.
    """
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > 4 * file_bytes + 2**20:
        raise LoadRefused("LD206", "the tensors claim more memory than the file has bytes", EXPORT_REMEDY)


def _check_tensor(name: str, value: object) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter):
        raise LoadRefused("LD209", f"entry {name!r} is a {type(value).__name__}, not a tensor", EXPORT_REMEDY)
    tensor: Tensor = value.detach()  # type: ignore[attr-defined]
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        kind = "quantised" if tensor.is_quantized else "complex" if tensor.is_complex() else "sparse"
        remedy = "save the weights as plain float32 tensors"
        raise LoadRefused("LD209", f"tensor {name!r} is {kind}, not a plain dense tensor", remedy)
    if tensor.device.type != "cpu":
        raise LoadRefused("LD206", f"tensor {name!r} has no data in the file", EXPORT_REMEDY)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise LoadRefused("LD206", f"tensor {name!r} claims more than the file has", EXPORT_REMEDY)
    return tensor


def _as_finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        remedy = "the training diverged or the file is damaged; export a healthy checkpoint"
        raise LoadRefused("LD207", f"the weights contain NaN or infinity, first in {name!r}", remedy)
    return tensor
