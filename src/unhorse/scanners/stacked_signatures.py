"""Signatures of many models in one batch over models x maps."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unhorse.core import Classifier, Logits, Signature
from unhorse.models.classifier import weights_hash
from unhorse.models.stacking import StackedClassifier, obstacle
from unhorse.models.training import bf16_pays
from unhorse.scanners.optimisation import (
    PRESETS,
    Precision,
    Preset,
    chunk_size,
    frozen,
    optimise,
    start_image,
    to_pixels,
)
from unhorse.scanners.signatures import (
    as_levels,
    cache_file,
    compute_signature,
    goals,
    read_cached,
    write_signature,
)


def stacked_signatures(
    models: Sequence[Classifier],
    preset: Preset | str = "paper-cifar10",
    *,
    directions: Sequence[str] = ("min", "max"),
    precision: Precision = "auto",
    device: torch.device | None = None,
    cache: Path | None = None,
) -> list[Signature]:
    """The signature of each of `models`, in their order, as `compute_signature` finds it but for rounding.

    Models of one architecture and normalisation are optimised together on `device` (by default their own), as
    many at once as the activations of one backward pass fit in; what cannot be stacked goes one by one. The
    cache is that of `compute_signature`. The models stay as and where they are.
    """
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    digests = [weights_hash(model) for model in models]
    files = [None if cache is None else cache_file(Path(cache), each, preset, precision) for each in digests]
    found: dict[int, Signature] = {}
    for index, file in enumerate(files):
        if (cached := read_cached(file, directions)) is not None:
            found[index] = cached
    for chunk in _chunks(models, [index for index in range(len(models)) if index not in found], directions):
        made = _signatures([models[index] for index in chunk], preset, directions, precision, device)
        for index, signature in zip(chunk, made, strict=True):
            found[index] = replace(signature, model_hash=digests[index])
            if (file := files[index]) is not None:
                write_signature(found[index], file)
    return [found[index] for index in range(len(models))]


def _chunks(
    models: Sequence[Classifier], wanted: Sequence[int], directions: Sequence[str]
) -> list[list[int]]:
    """The numbers of models that go through one batch together."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index in wanted:
        groups[_kind(models[index])].append(index)
    chunks = []
    for group in groups.values():
        first = models[group[0]]
        each = first.num_classes * len(directions)
        size = 1 if obstacle([first]) else max(1, chunk_size(first) // each)
        chunks += [group[start : start + size] for start in range(0, len(group), size)]
    return chunks


def _kind(model: Classifier) -> str:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.network.state_dict().items()]
    normalisation = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return repr((model.architecture, model.image_shape, model.num_classes, normalisation, shapes))


def _signatures(
    models: Sequence[Classifier],
    preset: Preset,
    directions: Sequence[str],
    precision: Precision,
    device: torch.device | None,
) -> list[Signature]:
    if len(models) == 1:
        model = models[0] if device is None else copy.deepcopy(models[0]).to(device)
        return [compute_signature(model, preset, directions=directions, precision=precision)]
    stack = StackedClassifier(models).to(device).eval()
    # by one model's size: the stack is always large
    if precision == "auto":
        precision = "bf16" if bf16_pays(models[0], stack.mean.device) else "fp32"
    targets, signs = (each.to(stack.mean.device) for each in goals(models[0].num_classes, directions))
    wanted, sign = (each.repeat_interleave(len(models)) for each in (targets, signs))

    def objective(logits: Logits, part: slice) -> Tensor:
        return sign[part] * logits.gather(1, wanted[part, None])[:, 0]

    start = start_image(stack).expand(len(wanted), -1, -1, -1)
    with frozen(stack, precision):
        best = optimise(stack, objective, start, preset, precision=precision)
    maps = as_levels(to_pixels(stack, best.maps, preset), preset).cpu().unflatten(0, (-1, len(models)))
    reached = (sign * best.objective).cpu().view(-1, len(models))
    return [
        Signature(maps[:, index].contiguous(), reached[:, index].contiguous(), preset.name, tuple(directions))
        for index in range(len(models))
    ]
