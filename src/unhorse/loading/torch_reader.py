"""Reads what torch itself writes: state dicts, TorchScript and torch.export archives."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from unhorse.checks.expectations import Facts
from unhorse.loading.containers import Contents, contents
from unhorse.loading.plain_checkpoints import plain_checkpoint
from unhorse.loading.readouts import LogitsOf, Readout, probed
from unhorse.loading.tensors import check_tensors
from unhorse.rules import LoadRefused

_CARD_MEMBER = "card.json"


def read_state_dict(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """The state dicts in a PyTorch checkpoint, as float32; LD209 where it has none."""
    found = checkpoint(files[0])
    return Readout(None, facts, found.networks, left_out=found.left_out)


def checkpoint(file: BinaryIO) -> Contents:
    """What an open file of torch.save holds: nothing but tensors and plain values is unpickled."""
    size = file.seek(0, 2)
    file.seek(0)
    found = contents(torch.load(plain_checkpoint(file), map_location="cpu", weights_only=True), size)
    checked = {key: check_tensors(tensors, size) for key, tensors in found.networks.items()}
    return Contents(checked, found.left_out)


def read_torchscript(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """A traced or scripted module; it keeps no image shape, so the usual ones are tried."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        module = torch.jit.load(files[0], map_location="cpu")
    if hasattr(module, "training"):  # a frozen module has none, and is in eval mode
        module.eval()
    network = LogitsOf(module.float())
    return Readout(network, probed(network, facts, options))


def read_exported_program(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """A torch.export archive (.pt2); a batch size that it was exported for stays the only one."""
    extra: dict[str, Any] = {_CARD_MEMBER: ""}
    program = torch.export.load(files[0], extra_files=extra)
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    shapes = [node.meta["val"].shape for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
    if len(inputs) != 1 or len(shapes) != 1 or len(shapes[0]) != 4:
        what = f"the program takes {len(inputs)} inputs" if len(inputs) != 1 else "the program takes no image"
        raise LoadRefused("LD221", what, "export it for one batch of images (n, c, h, w)")
    batch, *sides = (size if isinstance(size, int) else None for size in shapes[0])
    facts = replace(_with_card(facts, extra[_CARD_MEMBER]), image_shape=(sides[0], sides[1], sides[2]))
    module = program.module(check_guards=False)
    for node in module.graph.nodes:
        _judge_only(node)
    module.recompile()
    network = LogitsOf(module.float())
    return Readout(network, probed(network, facts, options, batch=batch), batch=batch)


def _judge_only(node: torch.fx.Node) -> None:
    """A network exported in training mode judges with the statistics it learnt, and drops nothing."""
    position = {"aten.batch_norm.default": 5, "aten.dropout.default": 2}.get(str(node.target))
    if position is not None and len(node.args) > position and node.args[position]:
        node.update_arg(position, False)


def _with_card(facts: Facts, card: Any) -> Facts:
    """The facts with class names and normalisation of an unhorse card in the archive, if there is one."""
    if not card:
        return facts
    try:
        found = json.loads(card)
        said = Facts.from_json({key: found.get(key) for key in ("class_names", "mean", "std")})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        remedy = "export it again without extra_files"
        raise LoadRefused("LD212", f"the card in the archive is not usable ({error})", remedy) from error
    return replace(facts, class_names=said.class_names, mean=said.mean, std=said.std)
