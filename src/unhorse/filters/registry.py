"""Input filters by the name of their table rows, and a fitted one in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from unhorse.core import InputFilter
from unhorse.filters.adversarial_filter import AdversarialFilter
from unhorse.filters.februus import Februus
from unhorse.filters.input_filter import PurifyingFilter
from unhorse.filters.networks import FilterNetwork, build_filter

FORMAT = "unhorse-filter-1"
Filter = PurifyingFilter | AdversarialFilter
NETWORK_FILTERS: dict[str, Callable[..., Filter]] = {
    "ip": partial(PurifyingFilter, label_weight=0.0),
    "if": PurifyingFilter,
    "vif": partial(PurifyingFilter, kl_weight=0.003),
    "vif-selected": partial(PurifyingFilter, kl_candidates=(0.03, 0.01, 0.003, 0.001)),
    "aif": AdversarialFilter,
    "denoise": partial(PurifyingFilter, input_noise=0.2),
}
"""Filters that are one network, which a guard and a file can hold."""
FILTERS: dict[str, Callable[..., Filter | Februus]] = {
    **NETWORK_FILTERS,
    "februus": Februus,
    "februus-inpaint": partial(Februus, inpaint="telea"),
}
"""All of them: Februus asks the classifier about every image."""


def filter_name(fitted: InputFilter) -> str:
    """The name in FILTERS of a filter with these losses."""
    if isinstance(fitted, Februus):
        return "februus-inpaint" if fitted.inpaint == "telea" else "februus"
    if isinstance(fitted, AdversarialFilter):
        return "aif"
    if not isinstance(fitted, PurifyingFilter):
        raise ValueError(f"{type(fitted).__name__} is not in the registry: take one of {', '.join(FILTERS)}")
    if fitted.kl_candidates:
        return "vif-selected"
    if fitted.kl_weight:
        return "vif"
    if fitted.input_noise:
        return "denoise"
    return "if" if fitted.label_weight else "ip"


def save_filter(fitted: InputFilter, path: Path) -> Path:
    """Writes one safetensors file, whole or not at all; its metadata hold name, options and image shape."""
    name = filter_name(fitted)
    if isinstance(fitted, Februus):
        raise ValueError(
            f"a {name} filter asks the classifier about every image and is not saved: take one of "
            f"{', '.join(NETWORK_FILTERS)}, or fit it again from its completion_cache"
        )
    network = getattr(fitted, "network_", None)
    if network is None:
        raise ValueError(f"the {name} filter is not fitted: call fit() before saving it")
    assert isinstance(fitted, Filter)
    options = {entry.name: getattr(fitted, entry.name) for entry in dataclasses.fields(fitted) if entry.init}
    card = {
        "format": FORMAT,
        "name": name,
        "options": options,
        "image_shape": list(network.image_shape),
        "kl_weight": getattr(fitted, "kl_weight_", None),
    }
    weights = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    draft = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.write_bytes(save(weights, {"unhorse": json.dumps(card)}))
    draft.replace(path)
    return path


def load_filter(path: Path) -> Filter:
    """The fitted filter of a file, on the CPU; ValueError for a file that is not one."""
    if not path.is_file():
        raise ValueError(f"no filter at {path}: give a file written by save_filter")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["unhorse"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if card["format"] != FORMAT:
            raise ValueError(f"format {card['format']!r}")
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in card["options"].items()
        }
        fitted = NETWORK_FILTERS[card["name"]](**options)
        fitted.network_ = _network(fitted.network, card["image_shape"], weights)
        if isinstance(fitted, PurifyingFilter):
            fitted.kl_weight_ = float(card["kl_weight"])
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a filter of format {FORMAT} ({error}): fit and save it again"
        ) from error
    return fitted


def _network(size: str, image_shape: Any, weights: Mapping[str, torch.Tensor]) -> FilterNetwork:
    channels, height, width = (int(side) for side in image_shape)
    with torch.device("meta"):
        network = build_filter(size, (channels, height, width))
    network.load_state_dict(dict(weights), assign=True)
    return network.float().eval().requires_grad_(False)
