"""Reads ONNX: converts the graph to torch and refuses it unless ONNX Runtime computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn

from unhorse.checks.expectations import Facts
from unhorse.extras import install_line
from unhorse.loading.layouts import BYTES_MEAN, BYTES_STD, Expected, Fed, arranged, expected
from unhorse.loading.onnx_folding import (
    check_weights,
    folded,
    is_narrow,
    widened,
    with_data,
    without_idle_domains,
)
from unhorse.loading.onnx_metadata import with_metadata
from unhorse.loading.onnx_quantised import dequantised, has_quantised_activations, register_quantisers
from unhorse.loading.outputs import CLASSIFIER_REMEDY
from unhorse.loading.probing import readout
from unhorse.loading.readouts import LogitsOf, Readout
from unhorse.rules import LoadFailed, LoadRefused

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-3
NARROW_TOLERANCE = 5e-2  # half precision keeps three digits, and a network has many layers
MAX_MODEL_BYTES = 2**31 - 1
INSTALL_REMEDY = install_line("onnx")
_NUMBERS = ("float16", "float32", "float64", "int64", "int32", "bool", "uint8", "int8")
_UINT8 = 2
_IMAGE_TYPES = (1, 10, 11, 16, _UINT8)  # float, half, double, bfloat16
_NUMPY_TYPES = {"tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8"}
_EXPORT_REMEDY = "export it again with torch.onnx.export(..., opset_version=18) in float32"


def read_onnx(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """The network of an ONNX file, with the data files beside it given as open files.

    `options["names"]` names the files, the model first. Raises LD216 for its external data, LD221 where it
    is no image classifier, LD222 where converted network and ONNX Runtime disagree, LD224 where a library
    is absent, LD207 for weights that are not finite, LD235 for what is not supported.
    """
    _require_libraries()
    names = options["names"]
    model = _parsed(files[0].read(MAX_MODEL_BYTES + 1))
    without_idle_domains(model)
    with_data(model, dict(zip(names[1:], files[1:], strict=True)))
    runnable = _checked(model)
    check_weights(model)
    takes, bytes_in = _image_input(model, options)
    facts = with_metadata(replace(facts, image_shape=takes.shape))
    if bytes_in:
        facts = replace(facts, mean=BYTES_MEAN, std=BYTES_STD)
    converted = _converted(dequantised(folded(widened(model))))
    names = [output.name for output in model.graph.output]
    network = LogitsOf(Fed(converted, takes.layout), options=options, names=names)
    found = readout(network, facts, options, batch=takes.batch, notes=takes.notes)
    narrow = is_narrow(model) or has_quantised_activations(model)
    session, size = _Session(runnable), found.batch or 6
    for images in _probes(found.facts.image_shape or (), size, bytes_in=bytes_in).split(size):
        answers = session.run(arranged(images, takes.layout))
        _check_parity(network, answers, images, NARROW_TOLERANCE if narrow else TOLERANCE)
    return found


def _require_libraries() -> None:
    try:
        import onnx  # noqa: F401
        import onnx2fx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise LoadRefused(
            "LD224", f"this needs {error.name}, which is not installed", INSTALL_REMEDY
        ) from error


def _parsed(data: bytes) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise LoadFailed("the ONNX message cannot be read") from error


def _checked(model: onnx.ModelProto) -> bytes:
    """The model as one message, external data included, that onnx's own checker accepts."""
    import onnx

    try:
        if model.ByteSize() > MAX_MODEL_BYTES:
            raise LoadRefused("LD208", "the ONNX model has more than 2 GiB of weights", _EXPORT_REMEDY)
        onnx.checker.check_model(model)
        return model.SerializeToString()
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise LoadRefused(
            "LD217", f"onnx's checker rejects it ({reason[0][:200]})", _EXPORT_REMEDY
        ) from error


def _image_input(model: onnx.ModelProto, options: Mapping[str, Any]) -> tuple[Expected, bool]:
    """What the only input stands for, and whether it takes bytes (0..255); otherwise LD221 or LD235."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise LoadRefused("LD221", f"the model takes {len(inputs)} inputs, not one", CLASSIFIER_REMEDY)
    kind = inputs[0].type.tensor_type
    sizes = [size.dim_value if size.dim_value > 0 else None for size in kind.shape.dim]
    if kind.elem_type not in _IMAGE_TYPES:
        import onnx

        name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        what = f"unhorse does not read models that take {name}; images are float or uint8"
        raise LoadRefused("LD235", what, CLASSIFIER_REMEDY)
    return expected(sizes, options.get("image_shape")), kind.elem_type == _UINT8


def _converted(model: onnx.ModelProto) -> nn.Module:
    import onnx2fx

    register_quantisers()
    try:
        return onnx2fx.convert(model)
    except (
        *(onnx2fx.Onnx2FxError, RuntimeError, ValueError, KeyError, IndexError, TypeError),
        *(AttributeError, NotImplementedError, AssertionError),
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadRefused(
            "LD221", f"the ONNX graph cannot be converted ({reason[:200]})", _EXPORT_REMEDY
        ) from error


def _probes(shape: Sequence[int | None], batch: int, *, bytes_in: bool) -> Tensor:
    """At least six images over the ranges that networks are trained on: standardised, 0..1 and 0..255."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(6, *shape, generator=noise)  # type: ignore[arg-type]
    spread = torch.tensor([1.0, 0.25, 64.0, 1.0, 0.25, 64.0]).reshape(-1, 1, 1, 1)
    middle = torch.tensor([0.0, 0.5, 128.0, 0.0, 0.5, 128.0]).reshape(-1, 1, 1, 1)
    images = images * spread + middle
    if bytes_in:
        images = (images * 255 / spread.clamp_max(64)).abs().round() % 256
    return images.repeat(-(-batch // 6), 1, 1, 1)[: batch * max(1, 6 // batch)]


@torch.no_grad()
def _check_parity(network: LogitsOf, answers: list[Tensor], images: Tensor, tolerance: float) -> None:
    """LD222 unless ONNX Runtime answers as the network does, relative to how far its answers lie apart."""
    ours = network(images)
    theirs = network.taken(answers, len(images)).float()
    # per image, and without what all logits share: neither a large constant nor a bright image makes room
    spread = (theirs - theirs.mean(1, keepdim=True)).abs().amax(1)
    if theirs.shape[1] == 1:  # one number per image: by how much it differs among them
        spread = (theirs.amax() - theirs.amin()).expand(len(theirs))
    scale = torch.maximum(spread, 1e-3 * theirs.abs().amax(1)).clamp_min(1e-6)
    error = float(((ours - theirs).abs().amax(1) / scale).max())
    if not error < tolerance:  # NaN is no agreement
        what = f"converted network and ONNX Runtime differ by {error:.2g} of the spread of their answers"
        raise LoadRefused("LD222", what, _EXPORT_REMEDY)


class _Session:
    """ONNX Runtime on one thread, without telemetry, fed from memory alone; what it cannot run is LD235."""

    def __init__(self, runnable: bytes) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        settings.log_severity_level = 4
        providers = ["CPUExecutionProvider"]
        with _runtime_refusals():
            self.session = onnxruntime.InferenceSession(runnable, settings, providers=providers)

    def run(self, images: Tensor) -> list[Tensor]:
        """All outputs that are tensors, in the order of the file."""
        wanted = self.session.get_inputs()[0]
        kind = _NUMPY_TYPES.get(wanted.type, "float32")
        with _runtime_refusals():
            answers = self.session.run(None, {wanted.name: images.numpy().astype(kind)})
        return [torch.from_numpy(answer) for answer in answers if getattr(answer, "dtype", None) in _NUMBERS]


@contextmanager
def _runtime_refusals() -> Iterator[None]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (
        "Fail",
        "InvalidGraph",
        "InvalidArgument",
        "InvalidProtobuf",
        "NotImplemented",
        "RuntimeException",
    )
    errors = tuple(getattr(state, kind) for kind in kinds)
    try:
        yield
    except (*errors, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"ONNX Runtime cannot run it ({reason[:200]})"
        raise LoadRefused("LD235", what, _EXPORT_REMEDY) from error
