"""What the restricted child does with a file: check again, read, trace, and send data home."""

from __future__ import annotations

import logging
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from unhorse.checks.inspection import check
from unhorse.checks.sniff import sniff
from unhorse.loading.drafts import Traced
from unhorse.loading.layouts import BYTES_MEAN, BYTES_STD
from unhorse.loading.ranges import takes_bytes
from unhorse.loading.readers import FOLDER_READER, READERS
from unhorse.loading.readouts import Readout
from unhorse.loading.tracing import trace
from unhorse.rules import LoadFailed, LoadRefused

_READ_ERRORS = (
    *(RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError),
    *(ArithmeticError, AssertionError, ImportError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, safetensors.SafetensorError),
)


def read_task(files: list[BinaryIO], options: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The network of the files as a graph and its tensors, or the tensors of a state dict.

    `options`: "format" (a Format, or "folder" for a Hugging Face one), "names" of the files (the model or its
    weights first), "image_shape" if the user gave one. The document has "kind" ("tensors" or
    "graph"), "facts", and for a graph "graph", "num_classes", "notes" and "batch". Raises LoadRefused or
    LoadFailed, whatever the file does to the libraries that read it.
    """
    logging.disable(logging.WARNING)  # libraries speak of their own affairs, and of what hostile files say
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _sent(_read(files, options), options)
    except (LoadRefused, LoadFailed):
        raise
    except _READ_ERRORS as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise LoadFailed(f"the file is damaged ({type(error).__name__}: {reason})") from error
    finally:
        logging.disable(logging.NOTSET)


def _read(files: list[BinaryIO], options: Mapping[str, Any]) -> Readout:
    names = list(options["names"])
    kind = sniff(files[0])
    if options["format"] not in ("folder", kind):
        raise LoadFailed(f"the file was {options['format']} and is {kind} now", "keep it still and try again")
    facts = check(files[0], kind, dict(zip(names[1:], files[1:], strict=True)), names[0])
    for stream in files:
        stream.seek(0)
    if options["format"] == "folder":
        return FOLDER_READER(files, options, facts)
    if kind not in READERS:
        raise LoadRefused("LD201", f"there is no reader for {kind}", "export it as ONNX or safetensors")
    return READERS[kind](files, options, facts)


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, as safetensors wants it."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in tensors.items():
        untied[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return untied


def _sent(readout: Readout, options: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    facts = readout.facts.to_json()
    if readout.network is None:
        # before each name: which network it is of, and its place there, for safetensors keep no order
        numbered = {
            f"{number}/{place}/{name}": tensor
            for number, tensors in enumerate(readout.networks.values())
            for place, (name, tensor) in enumerate(tensors.items())
        }
        said = {"keys": list(readout.networks), "left_out": [line[:200] for line in readout.left_out[:100]]}
        return {"kind": "tensors", "facts": facts, **said}, to_safetensors(_untied(numbered))
    shape = [size for size in readout.facts.image_shape or () if size is not None]
    traced = _traced(readout, shape, options.get("num_classes"))
    if facts["mean"] is None and takes_bytes(traced.graph, traced.tensors):
        facts |= {"mean": list(BYTES_MEAN), "std": list(BYTES_STD)}
    document = {
        "kind": "graph",
        "facts": facts,
        "graph": traced.graph,
        "num_classes": traced.num_classes,
        "notes": [*readout.notes, *traced.notes],
        "batch": readout.batch,
    }
    return document, to_safetensors(traced.tensors)


def _traced(readout: Readout, shape: list[int], classes: int | None) -> Traced:
    """The graph of the network; where there is none and a tensor is not finite, LD207 names that one."""
    assert readout.network is not None
    try:
        return trace(readout.network, shape, batch=readout.batch, classes=classes)
    except LoadRefused as refusal:
        for name, tensor in (*readout.network.named_parameters(), *readout.network.named_buffers()):
            if refusal.rule == "LD221" and tensor.is_floating_point() and not tensor.isfinite().all():
                what = f"the weights contain NaN or infinity, first in {name.split('network.')[-1][:100]!r}"
                remedy = "the training diverged or the file is damaged; export a healthy checkpoint"
                raise LoadRefused("LD207", what, remedy) from refusal
        raise
