"""Reads a Hugging Face folder: config.json, weights and preprocessor_config.json, all as open files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from unhorse.checks import weight_files
from unhorse.checks.expectations import Facts
from unhorse.extras import install_line
from unhorse.loading.probing import readout
from unhorse.loading.readouts import LogitsOf, Readout
from unhorse.loading.tensors import check_tensors
from unhorse.loading.torch_reader import checkpoint
from unhorse.rules import LoadFailed, LoadRefused

INSTALL_REMEDY = install_line("hf")
_BUILD_ERRORS = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ImportError, OSError),
    *(ArithmeticError, AssertionError, NotImplementedError),
)
_REMEDY = "save it again with model.save_pretrained(folder) from transformers 5"


def read_huggingface(files: Sequence[BinaryIO], options: Mapping[str, Any], facts: Facts) -> Readout:
    """A folder given as open files with `options["names"]`; nothing is fetched, no class of its own is used.

    Folders that timm wrote come back as tensors, for the parent to name the architecture. Raises LD202
    where a file is absent, LD220 for a configuration that transformers does not take, LD224 without it.
    """
    beside = dict(zip(options["names"], files, strict=True))
    config = _json(beside, "config.json")
    tensors = _tensors(beside)
    if "model_type" not in config:
        return Readout(None, facts, {"": tensors})
    model = _filled(config, tensors).eval()
    network = LogitsOf(model, options=options)
    return readout(network, facts, options)


def _json(beside: Mapping[str, BinaryIO], name: str) -> dict[str, Any]:
    if name not in beside:
        raise LoadRefused("LD202", f"the folder has no {name}", "give the model file itself")
    try:
        found = json.loads(beside[name].read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadFailed(f"{name} is not JSON") from error
    if not isinstance(found, dict):
        raise LoadFailed(f"{name} holds no settings")
    return found


def _tensors(beside: Mapping[str, BinaryIO]) -> dict[str, Tensor]:
    """All weights that are given: safetensors or pickles of torch.save, in one file or several."""
    tensors: dict[str, Tensor] = {}
    for name in sorted(beside):
        if name.endswith(".json"):
            continue
        part = _part(name, beside[name])
        if twice := sorted(part.keys() & tensors.keys()):
            raise LoadRefused("LD209", f"two files of the folder have {twice[0]!r}", _REMEDY)
        tensors |= part
    if not tensors:
        raise LoadRefused("LD202", "the folder has no weights", "add model.safetensors to it")
    return tensors


def _part(name: str, stream: BinaryIO) -> dict[str, Tensor]:
    if name.endswith(".safetensors"):
        data = stream.read()
        weight_files.check_safetensors(data)
        return check_tensors(parse_safetensors(data), len(data))
    found = checkpoint(stream).networks
    if len(found) > 1:
        what = f"{name} holds {len(found)} networks, under {', '.join(found)}"
        raise LoadRefused("LD228", what, f"give {name} itself, with --key")
    return dict(next(iter(found.values())))


def _filled(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The network that the configuration describes, every weight from the file; else LD220 or LD209.

    transformers itself is handed tensors, not a path: it knows the names that older versions gave to weights.
    """
    _require_transformers()
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    kept = {key: value for key, value in config.items() if key not in ("auto_map", "dtype", "torch_dtype")}
    try:
        settings = AutoConfig.for_model(**kept)
        known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(settings)]
        kinds: tuple[Any, ...] = known if isinstance(known, tuple) else (known,)
        named = [kind for kind in kinds if kind.__name__ in (settings.architectures or ())]
        model, report = (named or kinds)[0].from_pretrained(
            None, config=settings, state_dict=tensors, output_loading_info=True, dtype=torch.float32
        )
    except _BUILD_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"transformers makes no image classifier of the configuration ({reason[:200]})"
        raise LoadRefused("LD220", what, _REMEDY) from error
    _check_complete(report)
    return model


def _require_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        what = "this needs transformers, which is not installed"
        raise LoadRefused("LD224", what, INSTALL_REMEDY) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _check_complete(report: Mapping[str, Any]) -> None:
    """LD209 where a weight of the network stayed random or one of the file found no place."""
    words = (("lacks", "missing_keys"), ("adds", "unexpected_keys"), ("resizes", "mismatched_keys"))
    found = [(word, sorted(map(str, report.get(kind, ())))) for word, kind in words]
    said = [f"{word} {names[0]!r}" for word, names in found if names]
    if said:
        what = f"the weights do not fit the configuration: the file {', '.join(said)}"
        raise LoadRefused("LD209", what, _REMEDY)
