"""What the restricted child does with a user's network file: build it, load the weights, send a graph home.

Nothing that this process says after the user's code has run is believed; loading/own_networks.py checks it.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from unhorse.checks.expectations import Facts
from unhorse.checks.inspection import check
from unhorse.checks.sniff import Format, sniff
from unhorse.loading.checkpoints import Fit, fitting, flattened
from unhorse.loading.drafts import Traced
from unhorse.loading.network_code import unconfined
from unhorse.loading.network_imports import guarded, named_in, refused
from unhorse.loading.probing import USUAL_SHAPES, ImageShape, probed
from unhorse.loading.readouts import LogitsOf
from unhorse.loading.tensors import check_tensors
from unhorse.loading.torch_reader import checkpoint
from unhorse.loading.traced_values import own
from unhorse.loading.tracing import trace
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox.confinement import Tier

Answer = tuple[dict[str, Any], bytes]
# further sides of images that networks of a file of one's own are written for
_SIDES = (
    *(40, 48, 56, 64, 72, 80, 84, 90, 100, 112, 120, 128, 150, 160, 180, 192, 200),
    227,
    240,
    256,
    384,
    512,
)


def tier_task(files: list[BinaryIO], options: Mapping[str, Any]) -> Answer:
    """Answers at once: who asks wants to know the tier."""
    return {}, b""


def tensors_task(files: list[BinaryIO], options: Mapping[str, Any]) -> Answer:
    """All tensors of a file of weights, as float32 and under flat names; no network is looked for.

    The document has "facts". Raises LoadRefused and LoadFailed as read_task does.
    """
    with _quiet():
        facts, tensors = _tensors(files, options)
        return {"facts": facts.to_json()}, to_safetensors(tensors)


def network_task(files: list[BinaryIO], options: Mapping[str, Any]) -> Answer:
    """The graph of the user's network with the file's weights.

    `options["network"]` is NetworkCode.to_json(). The document has "graph", "num_classes", "notes",
    "image_shape", "assumed_size", "prefix" and "weights": for each tensor of the graph where it is
    from, {"key", "sha256", "turned"}, {"made", "called"} or {"origin": {"nodes", "output"}, "leaves"}. The
    blob holds the tensors that are not in the file. LD225 where this process is not confined, LD226 where the
    network does not fit.
    """
    code = options["network"]
    if options["tier"] != Tier.FULL and not code["trusted"]:
        raise unconfined(options["tier"])
    with _quiet():
        facts, tensors = _tensors(files, options)
        torch.backends.mha.set_fastpath_enabled(False)
        network, fit = _loaded(code, tensors, options)
        shape, assumed = _image_shape(network, facts, options, code)
        judged = LogitsOf(network, options=options)
        traced = guarded(lambda: trace(judged, shape, classes=options.get("num_classes")), code)
        return _sent(traced, shape, assumed, fit, tensors, _names(network))


class _quiet:  # noqa: N801 - a context like those of contextlib
    """Libraries and the user's code say nothing, and what they raise has a rule."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error: Any) -> None:
        self.warnings.__exit__(*error)
        logging.disable(logging.NOTSET)


def _tensors(files: list[BinaryIO], options: Mapping[str, Any]) -> tuple[Facts, dict[str, Tensor]]:
    """The file's own tensors, which no code of the user's has seen yet."""
    kind = sniff(files[0])
    if kind != options["format"]:
        raise LoadFailed(f"the file was {options['format']} and is {kind} now", "keep it still and try again")
    facts = check(files[0], kind, {}, options["names"][0])
    if kind is Format.SAFETENSORS:
        data = files[0].read()
        return facts, check_tensors(parse_safetensors(data), len(data))
    if kind not in (Format.TORCH_ZIP, Format.TORCH_OLD):
        raise refused(f"{kind} carries its own network", "leave --network out")
    return facts, flattened(checkpoint(files[0]).networks)


def _loaded(
    code: Mapping[str, Any], tensors: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[nn.Module, Fit]:
    """The network, built and with the file's weights, in eval mode and float32."""
    named = named_in(code)
    network = named if isinstance(named, nn.Module) else guarded(_building(named, code["arguments"]), code)
    if not isinstance(network, nn.Module):
        what = type(network).__name__
        raise refused(
            f"{code['name']} gives a {what}, not a torch.nn.Module", "name a class or factory of one"
        )
    wanted = guarded(lambda: {name: tuple(value.shape) for name, value in network.state_dict().items()}, code)
    fit = fitting(tensors, wanted, options.get("key"))

    def load() -> None:
        network.float()
        network.load_state_dict(fit.state, strict=False)
        network.eval()

    guarded(load, code)
    return network, fit


def _building(named: Any, arguments: Any) -> Callable[[], Any]:
    if not callable(named):
        raise refused(f"the name stands for a {type(named).__name__}", "name a class or factory of a network")
    return lambda: named(*arguments) if isinstance(arguments, list) else named(**arguments)


def _image_shape(
    network: nn.Module, facts: Facts, options: Mapping[str, Any], code: Mapping[str, Any]
) -> tuple[ImageShape, bool]:
    """The shape of images that the network runs on, and whether it was found by trying."""
    if options.get("image_shape"):
        found = guarded(lambda: probed(LogitsOf(network, options=options), facts, options), code)
        return found.image_shape, False
    kernel = next((value for value in network.parameters() if value.dim() == 4), None)
    counts = (3, 1) if kernel is None or kernel.shape[1] not in (1, 2, 3, 4) else (int(kernel.shape[1]),)
    first: LoadRefused | None = None
    try:
        found = guarded(lambda: probed(LogitsOf(network, options=options), facts, options), code)
        return found.image_shape, "assumed_size" in found.extra
    except LoadRefused as error:
        if error.rule != "LD221":
            raise
        first = error
    for shape in _further(counts):
        try:
            with torch.no_grad():
                LogitsOf(network, options=options)(torch.full((2, *shape), 0.5))
            return shape, True
        except Exception:  # noqa: BLE001, S112 - the user's code, on images that it may not be written for
            continue
    raise first


def _further(counts: tuple[int, ...]) -> list[ImageShape]:
    usual = [shape for shape in USUAL_SHAPES if shape[0] in counts]
    sides = sorted({shape[1] for shape in USUAL_SHAPES} | set(_SIDES))
    return [*usual, *((count, side, side) for count in counts for side in sides)]


def _sent(
    traced: Traced,
    shape: ImageShape,
    assumed: bool,
    fit: Fit,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
) -> Answer:
    """The graph, where each of its tensors is from, and those that are from nowhere."""
    known: dict[str, str] = {}
    for name in (*(fit.prefix + name for name in fit.state), *tensors):
        known.setdefault(digest(tensors[name]), name)
    made: dict[str, Tensor] = {}

    def new(name: str, tensor: Tensor) -> dict[str, Any]:
        made[name] = own(tensor)
        return {"made": name, "called": names.get(digest(made[name]), f"a constant ({name})")}

    def source_of(name: str, tensor: Tensor) -> dict[str, Any]:
        source, origin = _source(tensor, known), traced.origins.get(name)
        if source is None and origin is not None:
            leaves = [own(leaf) for leaf in origin.leaves]
            sources = [_source(leaf, known) for leaf in leaves]
            if any(sources):
                pairs = enumerate(zip(leaves, sources, strict=True))
                listed = [found or new(f"{name}.{index}", leaf) for index, (leaf, found) in pairs]
                return {"origin": {"nodes": origin.nodes, "output": origin.output}, "leaves": listed}
        return source or new(name, tensor)

    weights = {name: source_of(name, tensor) for name, tensor in traced.tensors.items()}
    document = {
        **{"graph": traced.graph, "num_classes": traced.num_classes},
        **{"notes": list(traced.notes), "image_shape": list(shape), "assumed_size": assumed},
        **{"prefix": fit.prefix, "weights": weights},
    }
    return document, to_safetensors(made)


def _names(network: nn.Module) -> dict[str, str]:
    """What the network calls its tensors, by their digests."""
    held = [*network.named_parameters(), *network.named_buffers()]
    return {digest(own(tensor)): name for name, tensor in held}


def _source(tensor: Tensor, known: Mapping[str, str]) -> dict[str, Any] | None:
    for turned in (False, True):
        if turned and tensor.dim() != 2:
            return None
        found = digest(tensor.t().contiguous() if turned else tensor)
        if found in known:
            return {"key": known[found], "sha256": digest(tensor), "turned": turned}
    return None


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    value = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    value.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return value.hexdigest()
