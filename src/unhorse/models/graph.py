"""A network as data: a graph of operators from a closed list, and tensors. What a foreign file becomes."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unhorse.core import Images, Logits
from unhorse.models.graph_values import check_value, dtype_named, last_uses, literal

GRAPH = "graph"
MAX_NODES = 20_000
MAX_ELEMENTS = 2**28  # of one tensor: a gigabyte

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Conv2d": nn.Conv2d,
    "Linear": nn.Linear,
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
}
_LAYER_OPTIONS = {
    "Conv2d": {
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    },
    "Linear": {"in_features", "out_features", "bias"},
    "BatchNorm1d": {"num_features", "eps", "momentum", "affine"},
    "BatchNorm2d": {"num_features", "eps", "momentum", "affine"},
}
_WITHOUT_META = frozenset({"fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine"})
CREATING = frozenset({"arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros"})
"""Operators that make a tensor from numbers, and so must be told where."""
_OPERATORS_LISTED = """
_adaptive_avg_pool2d _convolution _log_softmax _native_batch_norm_legit_no_training
_scaled_dot_product_flash_attention_for_cpu fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
_softmax abs adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_max_pool2d add addcdiv addcmul addmm amax amin arange argmax atan avg_pool1d avg_pool2d baddbmm
batch_norm bitwise_and bmm cat ceil celu channel_shuffle chunk clamp clamp_max clamp_min concat
constant_pad_nd conv1d conv2d conv_transpose2d convolution copysign cos cumsum div divide dot einsum elu
embedding eq erf exp expand expand_as expm1 eye flatten flip floor floor_divide fmod full full_like gather ge
gelu getitem glu group_norm gt hardshrink hardsigmoid hardswish hardtanh hstack index index_put
index_select instance_norm layer_norm le leaky_relu linalg_vector_norm linear linspace log log10 log1p
log2 log_sigmoid log_softmax logical_and logical_not logical_or logsumexp lt masked_fill matmul max
max_pool1d max_pool2d max_pool2d_with_indices maximum mean min minimum mish mm movedim mul multiply mv
narrow native_batch_norm native_group_norm native_layer_norm ne neg negative new_full new_ones new_zeros
norm numpy_T ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal
reflection_pad2d relu relu6 remainder repeat repeat_interleave replication_pad2d reshape reshape_as
rms_norm roll round rsqrt rsub scalar_tensor scaled_dot_product_attention select selu sigmoid silu sin slice
softmax softplus softshrink softsign split split_with_sizes sqrt square squeeze stack std sub subtract
sum swapaxes swapdims t tanh tensor_split threshold tile to transpose tril triu true_divide type_as
unbind unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d var var_mean
vdot view_as vstack where zeros zeros_like
"""
OPERATORS = frozenset(_OPERATORS_LISTED.split())
"""Of torch.ops.aten: pure, without randomness, files, uninitialised memory or views of raw storage."""


class GraphNetwork(nn.Module):
    """Runs a graph, node after node, for batches of any size.

    `graph` is JSON: {"nodes": [...], "output": value, "tensors": {name: [dtype, shape]}}. A node is a layer
    with trainable weights, {"layer": "Conv2d", "options": {...}, "args": [value]}; the layer of an earlier
    node again, {"use": 3, "args": [value]}; or {"call": operator, "args": [...], "kwargs": {...}}. A value is
    a number, text, None, a list, or one of {"node": 3}, {"input": 0}, {"tensor": name}, {"dtype": name},
    {"number": "inf"} and {"batch": [a, b]}, which is a times the batch's size plus b. ValueError for anything
    else.
    """

    def __init__(self, num_classes: int, image_shape: Sequence[int], *, graph: Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(graph, Mapping) or not {"nodes", "output", "tensors"} <= graph.keys():
            raise ValueError("the graph has no nodes, output or tensors")
        nodes, tensors = graph["nodes"], graph["tensors"]
        if not isinstance(nodes, list) or not 0 < len(nodes) <= MAX_NODES or not isinstance(tensors, dict):
            raise ValueError(f"the graph needs between 1 and {MAX_NODES} nodes")
        self.constants = _Constants(tensors)
        self.layers = nn.ModuleList()
        self._steps: list[_Step] = []
        for index, node in enumerate(nodes):
            self._steps.append(self._step(index, node))
        check_value(graph["output"], len(nodes), self.constants.names)
        self._output = graph["output"]
        self._last = last_uses([step.arguments for step in self._steps], self._output)

    def forward(self, images: Images) -> Logits:
        values: dict[int, Any] = {}
        batch = images.shape[0]

        def get(value: object) -> Any:
            if isinstance(value, list):
                return [get(item) for item in value]
            if not isinstance(value, dict):
                return value
            ((kind, content),) = value.items()
            if kind == "node":
                return values[content]
            if kind == "tensor":
                return self.constants.get(content)
            return images if kind == "input" else literal(kind, content, batch)

        for index, step in enumerate(self._steps):
            arguments, options = step.arguments
            named = {name: get(value) for name, value in options.items()} | step.place(images)
            values[index] = self.layers[step.layer](*[get(value) for value in arguments], **named)
            for unused in self._last.get(index, ()):
                del values[unused]
        return get(self._output)

    def _step(self, index: int, node: object) -> _Step:
        """Checks a node and makes its module; a layer that is used again is not made again."""
        if not isinstance(node, dict) or len(node.keys() & {"layer", "use", "call"}) != 1:
            raise ValueError(f"node {index} is no layer, use or call")
        arguments, options = node.get("args", []), node.get("kwargs", {})
        if not isinstance(arguments, list) or not isinstance(options, dict):
            raise ValueError(f"node {index} has arguments that are no list")
        check_value([arguments, list(options.values())], index, self.constants.names)
        if "use" in node:
            first = node["use"]
            if type(first) is not int or not 0 <= first < index:
                raise ValueError(f"node {index} uses a layer that is not there")
            self.layers.append(nn.Module())  # so that the numbers of nodes and layers agree
            return _Step(self._steps[first].layer, (arguments, options))
        self.layers.append(_layer(node) if "layer" in node else Operator(_operator_of(node["call"])))
        return _Step(index, (arguments, options), creates=node.get("call") in CREATING)


class Operator(nn.Module):
    """One operator of torch.ops.aten, as a module so that its output can be watched."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if self.name == "getitem":
            return operator.getitem(*arguments)
        if self.name in _WITHOUT_META and arguments[0].is_meta:
            return torch.empty_like(arguments[0])
        return getattr(torch.ops.aten, self.name)(*arguments, **options)

    def extra_repr(self) -> str:
        return self.name


class _Step:
    """Which layer runs, on what: (positional values, values by name)."""

    def __init__(
        self, layer: int, arguments: tuple[list[Any], dict[str, Any]], *, creates: bool = False
    ) -> None:
        self.layer, self.arguments, self.creates = layer, arguments, creates

    def place(self, images: Images) -> dict[str, object]:
        """Where an operator that creates a tensor is to put it."""
        return {"device": images.device} if self.creates else {}


class _Constants(nn.Module):
    """The tensors that belong to no layer: floating ones are trained, others are not."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = frozenset(tensors)
        for name, (kind, shape) in tensors.items():
            if not name.isidentifier() or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"tensor {name!r} has no usable name or shape")
            empty = torch.zeros(shape, dtype=dtype_named(kind))
            if empty.is_floating_point():
                self.register_parameter(f"value_{name}", nn.Parameter(empty))
            else:
                self.register_buffer(f"value_{name}", empty)

    def get(self, name: str) -> Tensor:
        return getattr(self, f"value_{name}")


def graph_digest(graph: Mapping[str, Any]) -> str:
    """SHA-256 of a graph: two networks with the same weights need not compute the same."""
    return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()


def check_sizes(network: nn.Module, image_shape: Sequence[int], num_classes: int) -> None:
    """Runs the network without memory or numbers, on the meta device: ValueError where a tensor grows beyond
    MAX_ELEMENTS for one image or two, an operator refuses its arguments, or the output is not (n, k).
    """
    network.eval()
    for count in (1, 2):  # a size may be harmless for one image and grow with the second
        try:
            with torch.no_grad(), _Capped():
                found = tuple(network(torch.empty(count, *image_shape, device="meta")).shape)
        except (RuntimeError, TypeError, IndexError, NotImplementedError, KeyError, AttributeError) as error:
            first = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(f"the graph does not run ({type(error).__name__}: {first})") from error
        if found != (count, num_classes):
            raise ValueError(
                f"the graph answers a batch of {count} with shape {found}, not {num_classes} logits"
            )


@torch.no_grad()
def computed(nodes: Sequence[Mapping[str, Any]], output: object, tensors: Sequence[Tensor]) -> Tensor:
    """What nodes make of the tensors t0, t1 ..., without an image: ValueError as for a network, or where a
    tensor on the way has more than MAX_ELEMENTS.
    """
    listed = {
        f"t{index}": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for index, tensor in enumerate(tensors)
    }
    graph = {"nodes": list(nodes), "output": output, "tensors": listed}
    with torch.device("meta"):
        network = GraphNetwork(0, (), graph=graph)
    with _Capped():
        network(torch.empty(1, 0, 0, 0, device="meta"))
    state = {f"constants.value_t{index}": tensor for index, tensor in enumerate(tensors)}
    network.load_state_dict(state, strict=True, assign=True)
    found = network(torch.empty(1, 0, 0, 0))
    if not isinstance(found, Tensor):
        raise ValueError("the nodes make no tensor")
    return found.clone(memory_format=torch.contiguous_format)


class _Capped(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.numel() > MAX_ELEMENTS:
                raise ValueError(f"the graph makes a tensor of shape {tuple(tensor.shape)}: too large")
        return found


def _layer(node: Mapping[str, Any]) -> nn.Module:
    name, options = node["layer"], node.get("options", {})
    if name not in LAYERS or not isinstance(options, dict) or options.keys() - _LAYER_OPTIONS[name]:
        raise ValueError(f"layer {name!r} is not on the list, or an option of it is not")
    sizes = [size for value in options.values() for size in (value if isinstance(value, list) else [value])]
    if not all(
        size in ("same", "valid") or (isinstance(size, bool | int | float) and 0 <= size < 2**24)
        for size in sizes
    ):
        raise ValueError(f"layer {name} has an option that is no size")
    return LAYERS[name](
        **{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    )


def _operator_of(name: object) -> str:
    if not isinstance(name, str) or name not in OPERATORS:
        raise ValueError(f"operator {name!r} is not on the list")
    return name
