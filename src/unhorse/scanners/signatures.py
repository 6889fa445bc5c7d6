"""Signatures by activation optimisation (Hussein et al., arXiv 2306.04877; TRIGS, ICPR 2024).

Images that minimise and maximise each logit, cached by weights and preset.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unhorse.core import Classifier, Logits, Signature
from unhorse.models.classifier import weights_hash
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


def compute_signature(
    model: Classifier,
    preset: Preset | str = "paper-cifar10",
    *,
    directions: Sequence[str] = ("min", "max"),
    precision: Precision = "auto",
    cache: Path | None = None,
) -> Signature:
    """The signature of `model`; with a `cache` folder it is computed once per weights and preset."""
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    digest = weights_hash(model)
    stored = None if cache is None else cache_file(Path(cache), digest, preset, precision)
    if (found := read_cached(stored, directions)) is not None:
        return found
    targets, signs = goals(model.num_classes, directions)
    device = model.mean.device
    maps, reached = _optimised_logits(model, preset, targets.to(device), signs.to(device), precision)
    signature = Signature(maps, reached, preset.name, tuple(directions), digest)
    if stored is not None:
        write_signature(signature, stored)
    return signature


def goals(k: int, directions: Sequence[str]) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """The class whose logit each map is about, and 1 where the map is to lower it, -1 where to raise it."""
    signs = torch.cat([torch.full((k,), 1.0 if name == "min" else -1.0) for name in directions])
    return torch.arange(k).repeat(len(directions)), signs


def _optimised_logits(
    model: Classifier,
    preset: Preset,
    targets: Int[Tensor, " m"],
    signs: Float[Tensor, " m"],
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """uint8 maps (m, c, h, w) and their logits (m,), chunk by chunk, on the CPU."""
    start, maps, reached = start_image(model), [], []
    with frozen(model, precision):
        size = chunk_size(model)
        for first in range(0, len(targets), size):
            rows = slice(first, first + size)
            wanted, sign = targets[rows], signs[rows]

            def objective(
                logits: Logits, part: slice, wanted: Tensor = wanted, sign: Tensor = sign
            ) -> Tensor:
                return sign[part] * logits.gather(1, wanted[part, None])[:, 0]

            found = optimise(
                model, objective, start.expand(len(wanted), -1, -1, -1), preset, precision=precision
            )
            maps.append(as_levels(to_pixels(model, found.maps, preset), preset).cpu())
            reached.append((sign * found.objective).cpu())
    return torch.cat(maps), torch.cat(reached)


def as_levels(pixels: Tensor, preset: Preset) -> Tensor:
    """uint8 maps: standardised per image over all channels if the preset says so, clipped, rounded."""
    if preset.standardise:
        flat = pixels.flatten(1)
        mean, deviation = flat.mean(1), flat.std(1)
        pixels = (pixels - mean[:, None, None, None]) / (deviation[:, None, None, None] + 1e-5) * 0.25 + 0.5
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


# --- on disk ------------------------------------------------------------------------------------------------


def cache_file(folder: Path, digest: str, preset: Preset, precision: Precision) -> Path:
    """Where the signature of the model with this hash is kept."""
    return folder / f"{digest[:32]}-{preset.digest()}-{precision}.safetensors"


def read_cached(path: Path | None, directions: Sequence[str]) -> Signature | None:
    """These directions of the signature at `path`, if it is there and has them."""
    if path is None or not path.exists():
        return None
    found = read_signature(path)
    return found.only(*directions) if set(directions) <= set(found.directions) else None


def write_signature(signature: Signature, path: Path) -> None:
    """One safetensors file, renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    fields = {
        "preset": signature.preset,
        "directions": " ".join(signature.directions),
        "model_hash": signature.model_hash,
    }
    save_file({"maps": signature.maps, "reached": signature.reached}, draft, fields)
    draft.replace(path)


def read_signature(path: Path) -> Signature:
    """The signature that `write_signature` wrote."""
    with safe_open(path, framework="pt") as stored:
        fields = stored.metadata()
        maps, reached = stored.get_tensor("maps"), stored.get_tensor("reached")
    return Signature(
        maps, reached, fields["preset"], tuple(fields["directions"].split()), fields["model_hash"]
    )


def statistics(signature: Signature, *, quantiles: int = 3, bins: int = 8) -> Float[Tensor, "s h w"]:
    """A signature of fixed size for any number of classes (used from 100 up): per pixel, statistics over all
    maps and channels.

    For the minimisation maps, the maximisation maps and all of them: minimum, maximum, mean, standard
    deviation, `quantiles` inner quantiles (3: quartiles, 7: octiles) and a histogram of `bins` on [0, 1], all
    in [0, 1]; 3 * (4 + quantiles + bins) channels.
    """
    parts = [signature.only(name).maps for name in signature.directions]
    groups = parts + ([signature.maps] if len(parts) > 1 else [])
    height, width = signature.maps.shape[2:]
    rows = []
    for group in groups:
        pixels = group.transpose(0, 1).flatten(2).flatten(0, 1)  # (c*m, h*w)
        # a few million values at a time: torch.quantile takes no more, and 1000 classes then fit in memory
        blocks = pixels.split(max(1, 2**22 // len(pixels)), dim=1)
        rows.append(torch.cat([_pixel_statistics(block, quantiles, bins) for block in blocks], 1))
    return torch.cat(rows).view(-1, height, width)


def statistics_maps(signature: Signature) -> UInt8[Tensor, "s 1 h w"]:
    """The statistics as grey maps of 256 levels, for a network that reads maps."""
    return (statistics(signature)[:, None] * 255).round().to(torch.uint8)


def _pixel_statistics(levels: Tensor, quantiles: int, bins: int) -> Tensor:
    """(4 + quantiles + bins, pixels) from uint8 (values, pixels)."""
    values = levels.float() / 255
    basic = [values.amin(0), values.amax(0), values.mean(0), values.std(0, correction=0)]
    places = (values * bins).long().clamp(max=bins - 1)
    shares = [(places == index).float().mean(0) for index in range(bins)]
    inner = torch.linspace(0, 1, quantiles + 2)[1:-1]
    return torch.stack([*basic, *values.quantile(inner, 0), *shares])
