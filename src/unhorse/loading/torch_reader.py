"""Reads what torch itself writes: state dicts, TorchScript and torch.export archives."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from unhorse.checks.expectations import Facts, Sides
from unhorse.loading.containers import Contents, contents
from unhorse.loading.layouts import BYTES_MEAN, BYTES_STD, Fed, Layout, expected, square
from unhorse.loading.plain_checkpoints import plain_checkpoint
from unhorse.loading.probing import readout, rows_taken
from unhorse.loading.readouts import LogitsOf, Readout
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
    module = module.float()
    first: LoadRefused | None = None
    for layout, shape in _layouts(module):
        network = LogitsOf(Fed(module, layout), options=options)
        notes = (
            ()
            if layout is Layout.FIRST
            else (f"MD301 input layout assumed {layout}: the network runs on it",)
        )
        try:
            return readout(network, replace(facts, image_shape=shape), options, notes=notes)
        except LoadRefused as refusal:
            if refusal.rule != "LD221":
                raise
            first = first or refusal
    assert first is not None
    raise first


def _layouts(module: torch.nn.Module) -> Iterator[tuple[Layout, Sides | None]]:
    """How a module that does not say it may want its images, the likely first, with a shape that is known."""
    yield Layout.FIRST, None
    if (shape := square(rows_taken(module))) is not None:
        yield Layout.FLAT, shape
    yield Layout.LAST, None


def read_exported_program(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """A torch.export archive (.pt2); a batch size that it was exported for stays the only one."""
    extra: dict[str, Any] = {_CARD_MEMBER: ""}
    program = torch.export.load(files[0], extra_files=extra)
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    shapes = [node.meta["val"].shape for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
    if len(inputs) != 1 or len(shapes) != 1:
        what = f"the program takes {len(inputs)} inputs" if len(inputs) != 1 else "the program takes no image"
        raise LoadRefused("LD221", what, "export it for one batch of images (n, c, h, w)")
    sizes = [size if isinstance(size, int) else None for size in shapes[0]]
    takes = expected(sizes, options.get("image_shape"))
    facts = replace(_with_card(facts, extra[_CARD_MEMBER]), image_shape=takes.shape)
    if inputs[0].meta["val"].dtype is torch.uint8 and facts.mean is None:
        facts = replace(facts, mean=BYTES_MEAN, std=BYTES_STD)
    module = program.module(check_guards=False)
    for node in list(module.graph.nodes):
        _judge_only(node)
        if "_assert_tensor_metadata" in str(node.target):  # of the type that the images came in
            module.graph.erase_node(node)
    module.recompile()
    network = LogitsOf(Fed(module.float(), takes.layout), options=options)
    return readout(network, facts, options, batch=takes.batch, notes=takes.notes)


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
