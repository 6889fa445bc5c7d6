"""What a file can be: the formats that unhorse opens, looks into, or names and leaves alone."""

from __future__ import annotations

from enum import StrEnum

from unhorse.rules import LoadFailed, LoadRefused


class Format(StrEnum):
    """What a model file can be."""

    SAFETENSORS = "safetensors"
    TORCH_ZIP = "PyTorch state dict"
    TORCH_OLD = "PyTorch state dict (before 1.6)"
    TORCH_LEGACY_PICKLE = "a pickle"
    TORCHSCRIPT = "TorchScript"
    PT2 = "torch.export archive"
    ONNX = "ONNX"
    KERAS_ZIP = "Keras"
    HDF5 = "HDF5 (Keras before 3)"
    TORCH_PACKAGE = "torch.package archive"
    TORCHSERVE = "TorchServe archive"
    NUMPY = "NumPy file"
    NUMPY_ZIP = "NumPy archive (.npz)"
    PICKLE_ZIP = "zip archive of pickles"
    SAVED_MODEL = "TensorFlow SavedModel"
    TF_GRAPH = "TensorFlow frozen graph"
    TF_CHECKPOINT = "TensorFlow checkpoint"
    TFLITE = "TensorFlow Lite"
    GGUF = "GGUF"
    GGML = "GGML"
    ORT = "ONNX Runtime's own format (.ort)"
    CAFFE = "Caffe model"
    COREML = "Core ML model"
    DLIB = "dlib model"
    DARKNET = "Darknet weights"
    NCNN = "ncnn model"
    RKNN = "RKNN model"
    TENSORRT = "TensorRT engine"
    OPENVINO = "OpenVINO model"
    PADDLE = "PaddlePaddle model"
    MXNET = "MXNet parameters"
    TORCH7 = "Torch 7 model"
    MSGPACK = "MessagePack (Flax)"
    MATLAB = "MATLAB data"
    R_DATA = "R data"
    TAR = "tar archive"
    COMPRESSED = "compressed file"
    BROKEN_ZIP = "zip archive without a readable directory"
    WEB_PAGE = "HTML page"
    LFS_POINTER = "Git LFS pointer"
    ERROR_TEXT = "error message of a server"
    UNKNOWN = "unknown"


OPENED = (
    *(Format.SAFETENSORS, Format.TORCH_ZIP, Format.TORCHSCRIPT, Format.PT2, Format.ONNX),
    *(Format.KERAS_ZIP, Format.HDF5, Format.TORCH_OLD),
)
LOOKED_INTO = (
    *(Format.TORCH_LEGACY_PICKLE, Format.NUMPY, Format.NUMPY_ZIP, Format.PICKLE_ZIP, Format.COMPRESSED),
)
"""Not opened, but checked for pickles that run code; checks/carriers.py refuses each of them."""
_NO_MODEL = {
    Format.WEB_PAGE: "the download failed: fetch the file itself, not the page that shows it",
    Format.LFS_POINTER: "fetch the file that it stands for: git lfs pull",
    Format.ERROR_TEXT: "the download failed: read the message, then download it again",
}

EXPORT_REMEDY = "export the weights with safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
_TRUSTED = "where you trust its author completely, load it on a machine without secrets and "
_TO_ONNX = "convert it to ONNX"
REMEDIES = {
    Format.TORCH_LEGACY_PICKLE: f"it runs code by design: {_TRUSTED}{EXPORT_REMEDY}",
    Format.TORCH_PACKAGE: f"it carries its own code: {_TRUSTED}{EXPORT_REMEDY}",
    Format.TORCHSERVE: "unpack the .mar archive and give the model file inside",
    Format.NUMPY: "build the network in PyTorch and " + EXPORT_REMEDY,
    Format.NUMPY_ZIP: "build the network in PyTorch and " + EXPORT_REMEDY,
    Format.PICKLE_ZIP: "unpack it and give the model file inside, as torch.save wrote it",
    Format.SAVED_MODEL: "run `python -m tf2onnx.convert --saved-model FOLDER --output model.onnx`",
    Format.TF_GRAPH: "run `python -m tf2onnx.convert --graphdef FILE --inputs ... --output model.onnx`",
    Format.TF_CHECKPOINT: "run `python -m tf2onnx.convert --checkpoint FILE.meta ... --output model.onnx`",
    Format.TFLITE: "run `python -m tf2onnx.convert --tflite FILE --output model.onnx`",
    Format.GGUF: "GGUF holds language models; unhorse scans image classifiers",
    Format.GGML: "GGML holds language and speech models; unhorse scans image classifiers",
    Format.ORT: "give the .onnx file that it was made from",
    Format.CAFFE: f"{_TO_ONNX} with its .prototxt, for example by the converters of OpenVINO or MMdnn",
    Format.COREML: "give the network that it was made from, or build it in PyTorch and export that to ONNX",
    Format.DLIB: "unhorse has no reader for dlib; train or export the classifier in PyTorch or ONNX",
    Format.DARKNET: f"build the network of its .cfg in PyTorch, load the weights there and {EXPORT_REMEDY}",
    Format.NCNN: "give the ONNX or PyTorch file that it was made from",
    Format.RKNN: "it is compiled for a chip: give the ONNX file that it was made from",
    Format.TENSORRT: "it is compiled for one GPU: give the ONNX file that it was made from",
    Format.OPENVINO: "give the ONNX or PyTorch file that it was made from",
    Format.PADDLE: "run `paddle2onnx --model_dir FOLDER --save_file model.onnx`",
    Format.MXNET: f"{_TO_ONNX} with mxnet.onnx.export_model(symbol, params, ...)",
    Format.TORCH7: f"load it with torchfile in Python, copy the weights into PyTorch and {EXPORT_REMEDY}",
    Format.MSGPACK: "load it with flax.serialization, copy the weights into PyTorch and " + EXPORT_REMEDY,
    Format.MATLAB: "run exportONNXNetwork(net, 'model.onnx') in MATLAB",
    Format.R_DATA: "export the network from R as ONNX or safetensors",
    Format.TAR: "unpack it and give the model file inside; a tar that torch.save wrote before 0.2 runs code",
    Format.COMPRESSED: "unpack it and give the model file inside; joblib files run code by design",
    Format.UNKNOWN: "give a .safetensors, .pt, .pt2, .onnx, .keras or .h5 file, or a Hugging Face folder",
    **_NO_MODEL,
}
_CARRIERS = (
    *(Format.TORCH_LEGACY_PICKLE, Format.TORCH_PACKAGE, Format.TORCHSERVE, Format.TAR, Format.COMPRESSED),
    Format.PICKLE_ZIP,
)
"""Known, and able to carry any code: LD201. The others are only not supported: LD235."""


def refusal(kind: Format, name: str) -> LoadRefused | LoadFailed | None:
    """Why a file of this kind, called `name`, is not opened; None if it can be opened or looked into.

    LD201 for what can carry any code, LD235 for other known formats, LD230 for what a failed download leaves,
    LD202 for the rest.
    """
    if kind in OPENED or kind in LOOKED_INTO:
        return None
    return refused_kind(kind, name)


def refused_kind(kind: Format, name: str) -> LoadRefused | LoadFailed:
    """The refusal of a kind that is not opened."""
    if kind is Format.BROKEN_ZIP:
        return LoadFailed(f"{name} is a {kind}: it is truncated or damaged")
    if kind in _NO_MODEL:
        return LoadFailed(f"{name} is no model but this: {kind}", REMEDIES[kind])
    if kind is Format.UNKNOWN:
        return _by_name(name) or LoadRefused("LD202", f"{name} is not a model file", REMEDIES[kind])
    rule = "LD201" if kind in _CARRIERS else "LD235"
    return LoadRefused(rule, f"{name} is {kind}, which unhorse does not open", REMEDIES[kind])


_BY_SUFFIX = {
    ".dat": Format.DLIB,
    ".weights": Format.DARKNET,
    ".caffemodel": Format.CAFFE,
    ".mlmodel": Format.COREML,
    ".engine": Format.TENSORRT,
    ".plan": Format.TENSORRT,
    ".trt": Format.TENSORRT,
    ".t7": Format.TORCH7,
    ".pdiparams": Format.PADDLE,
    ".pdmodel": Format.PADDLE,
    ".params": Format.MXNET,
    ".data-00000-of-00001": Format.TF_CHECKPOINT,
    ".rknn": Format.RKNN,
    ".tflite": Format.TFLITE,
    ".msgpack": Format.MSGPACK,
    ".rds": Format.R_DATA,
    ".mat": Format.MATLAB,
}


def _by_name(name: str) -> LoadRefused | None:
    """The refusal of bytes without a mark of their own, called like a format that has none."""
    for suffix, kind in _BY_SUFFIX.items():
        if name.lower().endswith(suffix):
            what = f"{name} has no mark of a format that unhorse opens; by its name it may be a {kind}"
            return LoadRefused("LD235", what, REMEDIES[kind])
    return None
