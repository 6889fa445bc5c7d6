"""Hugging Face folders: the JSON beside the weights names a known kind of network and no code to fetch."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any, BinaryIO

from unhorse.checks.documents import parse_document, walk
from unhorse.checks.expectations import Facts, Sides
from unhorse.rules import LoadRefused

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MODEL_TYPES = {
    *(
        "beit",
        "bit",
        "convnext",
        "convnextv2",
        "data2vec-vision",
        "deit",
        "dinov2",
        "efficientnet",
        "focalnet",
    ),
    *("levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "poolformer", "pvt", "regnet", "resnet"),
    *("segformer", "swin", "swinv2", "vit"),
}
MAX_DEPTH = 12
MAX_BYTES = 8 * 2**20
MAX_SIZE = 2**20

_REMEDY = "ask its publisher for a folder that transformers opens without trust_remote_code"
_CODE = {"auto_map", "trust_remote_code", "custom_pipelines", "code_revision", "custom_load", "_commit_code"}
_ATTENTION = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_FREE_NUMBERS = {"seed", "id2label", "label2id", "num_parameters", "total_size", "eos_token_id"}
_PROCESSOR = re.compile(r"[A-Za-z0-9]+(ImageProcessor|FeatureExtractor)(Fast|Pil)?")
_CLASSIFIER = re.compile(r"[A-Za-z0-9]+ForImageClassification(WithTeacher)?")


def check_huggingface(beside: Mapping[str, BinaryIO]) -> Facts:
    """The facts in the JSON files beside some weights; LD220 for code, unknown kinds and absurd sizes."""
    documents = {name: _document(name, stream) for name, stream in beside.items() if name.endswith(".json")}
    for name in INDEXES:
        if name in documents:
            _check_index(documents[name])
    config = documents.get(CONFIG)
    if not isinstance(config, dict):
        raise _refused("config.json is absent or no object")
    processor = documents.get(PREPROCESSOR, {})
    if not isinstance(processor, dict):
        raise _refused("preprocessor_config.json is no object")
    try:
        if "pretrained_cfg" in config or ("architecture" in config and "model_type" not in config):
            return _timm_facts(config)
        return _transformers_facts(config, processor)
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        if isinstance(error, LoadRefused):
            raise
        raise _refused("its configuration is not what transformers writes") from error


def _document(name: str, stream: BinaryIO) -> Any:
    if stream.seek(0, io.SEEK_END) > MAX_BYTES:
        raise _refused(f"{name[:100]} is larger than any configuration")
    stream.seek(0)
    document = parse_document(stream.read(), name[:100], _refused, max_depth=MAX_DEPTH)
    for _, key, value in walk(document):
        if isinstance(value, dict):
            if code := sorted(_CODE & value.keys()):
                raise _refused(
                    f"{name[:100]} has {code[0]!r}, which makes transformers run code of the folder"
                )
            if "quantization_config" in value:
                raise _refused(f"{name[:100]} asks for a library that quantises")
        elif key in _ATTENTION and value not in (None, "eager", "sdpa", key):
            raise _refused(f"{name[:100]} asks for attention {str(value)[:100]!r}, which may be fetched code")
        elif type(value) in (int, float) and key not in _FREE_NUMBERS and not abs(value) <= MAX_SIZE:  # type: ignore[arg-type]
            raise _refused(f"{key[:100]} {str(value)[:30]} in {name[:100]} is absurd")
    return document


def _check_index(index: Any) -> None:
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict):
        raise _refused("the index of the weights is not one")
    for file in files.values():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.\-]*\.(safetensors|bin)", file):
            raise _refused(f"the index puts weights into {str(file)[:100]!r}, which is no file of the folder")


def _transformers_facts(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Facts:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise _refused(
            f"model_type {str(kind)[:100]!r} is not on the list ({', '.join(sorted(MODEL_TYPES))})"
        )
    for name in config.get("architectures") or []:
        if not isinstance(name, str) or not _CLASSIFIER.fullmatch(name):
            raise _refused(f"architecture {str(name)[:100]!r} is no classifier of images")
    for key in ("image_processor_type", "feature_extractor_type", "processor_class"):
        value = processor.get(key)
        if value is not None and not (isinstance(value, str) and _PROCESSOR.fullmatch(value)):
            raise _refused(f"{key} {str(value)[:100]!r} is no image processor")
    names = _class_names(config.get("id2label"))
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rescaled = processor.get("do_rescale", True) and processor.get("rescale_factor", 1 / 255) == 1 / 255
    if processor.get("do_normalize") is False and rescaled and not processor.get("rescale_offset"):
        mean, std = (0.0,), (1.0,)
    elif processor.get("do_normalize", "image_mean" in processor) and not processor.get("rescale_offset"):
        # from the units after rescaling, by 1/255 as a rule, to those of pixels in 0..1
        factor = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
        mean, std = (
            tuple(float(value) / factor for value in processor[key]) if key in processor else None
            for key in ("image_mean", "image_std")
        )
    return Facts(
        _image_shape(config, processor),
        config.get("num_labels") if names is None else len(names),
        mean,
        std,
        names,
        producer=f"transformers {config.get('transformers_version', '')}"[:100],
        extra={"model_type": kind},
    )


def _image_shape(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Sides:
    channels = config.get("num_channels", 3)
    cropped = processor.get("do_center_crop", "crop_size" in processor) and "crop_size" in processor
    size = processor.get("crop_size") if cropped else processor.get("size", config.get("image_size"))
    if isinstance(size, dict):
        shortest = size.get("shortest_edge")
        size = (size.get("height", shortest), size.get("width", shortest))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return tuple(value if type(value) is int else None for value in (channels, height, width))  # type: ignore[return-value]


def _class_names(id2label: Any) -> tuple[str, ...] | None:
    if id2label is None:
        return None
    names = {int(key): value for key, value in id2label.items()}
    if sorted(names) != list(range(len(id2label))) or not all(type(name) is str for name in names.values()):
        raise _refused("id2label does not number the classes from 0")
    return tuple(names[index] for index in range(len(names)))


def _timm_facts(config: Mapping[str, Any]) -> Facts:
    known = config.get("pretrained_cfg", config)
    name = config.get("architecture")
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[a-z0-9_]{1,100}", name)
        or not isinstance(known, dict)
    ):
        raise _refused(f"architecture {str(name)[:100]!r} is no name of timm's")
    labels = known.get("label_names", config.get("label_names"))
    if labels is not None and not (isinstance(labels, list) and all(type(label) is str for label in labels)):
        raise _refused("label_names is no list of names")
    size = known.get("input_size")
    mean, std = (
        tuple(float(value) for value in known[key]) if key in known else None for key in ("mean", "std")
    )
    return Facts(
        None if size is None else (int(size[0]), int(size[1]), int(size[2])),
        config.get("num_classes", known.get("num_classes")),
        mean,
        std,
        None if labels is None else tuple(labels),
        producer="timm",
        extra={"architecture": name},
    )


def _refused(what: str) -> LoadRefused:
    return LoadRefused("LD220", f"the Hugging Face folder is refused: {what}", _REMEDY)
