"""Files of formats that unhorse does not open, made by their specifications, and damaged files."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import torch
from safetensors.torch import save

from unhorse.checks.kinds import Format


def field(number: int, value: int | bytes) -> bytes:
    """A field of a message of protocol buffers."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _flatbuffer(identifier: bytes) -> bytes:
    return struct.pack("<I", 28) + identifier + bytes(200)


def _caffe() -> bytes:
    blob = field(7, field(1, 4)) + field(5, np.ones(4, np.float32).tobytes())
    layer = field(1, b"conv1") + field(2, b"Convolution") + field(7, blob)
    return field(1, b"CaffeNet") + field(100, layer) * 2


def _caffe_v1() -> bytes:
    return field(1, b"AlexNet") + field(2, field(4, b"conv1") + field(5, 4)) * 2


def _coreml(kind: int = 500) -> bytes:
    feature = field(1, b"image") + field(3, field(4, field(1, 224) + field(2, 224)))
    network = field(1, field(1, b"conv") + field(100, field(1, 8)))
    return field(1, 4) + field(2, field(1, feature)) + field(kind, network)


def _tf_graph() -> bytes:
    node = field(1, b"input/x") + field(2, b"Placeholder")
    return field(1, node) + field(1, field(1, b"conv") + field(2, b"Conv2D")) + field(4, field(1, 27))


def _paddle() -> bytes:
    block = field(1, 0) + varint(2 << 3) + b"\xff" * 9 + b"\x01" + field(3, field(1, b"x"))
    return field(1, block) + field(4, field(1, 0))


def _leveldb() -> bytes:
    return b"\0\0\x08\x01" + bytes(100) + struct.pack("<Q", 0xDB4775248B80FB57)


def _torch7() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<i", len(value)) + value.encode()

    return struct.pack("<ii", 4, 1) + text("V 1") + text("nn.Sequential") + bytes(40)


def _hdf5_of_others() -> bytes:
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["measured"] = np.arange(10)
        file["names"] = ["a", "b"]
        file.create_dataset("packed", (1000,), "f4", compression="lzf", data=range(1000))
        file["again"] = h5py.SoftLink("/measured")
    return buffer.getvalue()


def foreign() -> dict[str, tuple[Format, bytes]]:
    """Files of other formats by name, and what they are."""
    npz = io.BytesIO()
    np.savez(npz, a=np.arange(3))
    npy = io.BytesIO()
    np.save(npy, np.arange(3))
    return {
        "model.tflite": (Format.TFLITE, _flatbuffer(b"TFL3")),
        "model.ort": (Format.ORT, _flatbuffer(b"ORTM")),
        "net.caffemodel": (Format.CAFFE, _caffe()),
        "old.caffemodel": (Format.CAFFE, _caffe_v1()),
        "net.mlmodel": (Format.COREML, _coreml()),
        "program.mlmodel": (Format.COREML, _coreml(502)),
        "pipeline.mlmodel": (Format.COREML, field(1, 1) + _coreml(200)[2:]),
        "frozen.pb": (Format.TF_GRAPH, _tf_graph()),
        "saved_model.pb": (Format.SAVED_MODEL, field(1, 1) + field(2, field(1, b"x" * 40))),
        "model.ckpt.index": (Format.TF_CHECKPOINT, _leveldb()),
        "checkpoint": (Format.TF_CHECKPOINT, b'model_checkpoint_path: "model.ckpt-1"\n'),
        "inference.pdmodel": (Format.PADDLE, _paddle()),
        "net.params": (Format.MXNET, struct.pack("<QQQ", 0x112, 0, 2) + bytes(80)),
        "net-symbol.json": (Format.MXNET, b'{\n  "nodes": [\n    {\n      "op": "null", "name": "data"}]}'),
        "yolo.weights": (Format.DARKNET, struct.pack("<iiiq", 0, 2, 5, 32013312) + bytes(400)),
        "net.param": (Format.NCNN, b"7767517\n75 83\nInput data 0 1 data\n"),
        "net.param.bin": (Format.NCNN, struct.pack("<i", 7767517) + bytes(40)),
        "net.rknn": (Format.RKNN, b"RKNN" + bytes(60)),
        "net.engine": (Format.TENSORRT, b"ptrt" + bytes(60)),
        "net.xml": (Format.OPENVINO, b'<?xml version="1.0"?>\n<net name="x" version="11">\n<layers/></net>'),
        "net.t7": (Format.TORCH7, _torch7()),
        "flax.msgpack": (Format.MSGPACK, b"\x81\xa6params\x81\xa6kernel\xc7\x04\x01abcd"),
        "llama.gguf": (Format.GGUF, b"GGUF\x03\0\0\0" + bytes(60)),
        "ggml.bin": (Format.GGML, b"lmgg" + bytes(60)),
        "data.mat": (
            Format.MATLAB,
            b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\1IM" + bytes(40),
        ),
        "net73.mat": (Format.MATLAB, b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n" + bytes(60)),
        "forest.rds": (Format.R_DATA, b"X\n\0\0\0\3\0\4\1\2" + bytes(60)),
        "arrays.npz": (Format.NUMPY_ZIP, npz.getvalue()),
        "array.npy": (Format.NUMPY, npy.getvalue()),
        "others.h5": (Format.HDF5, _hdf5_of_others()),
    }


def unmarked() -> dict[str, bytes]:
    """Formats without a mark in their bytes, which only a name tells."""
    raw = np.random.default_rng(0).random(64).astype(np.float32).tobytes()
    return dict.fromkeys(("shape.dat", "net.pdiparams", "net.weights", "net.trt"), b"\x3d\xcc" + raw)


def damaged() -> dict[str, bytes]:
    """Files that a download or a copy left incomplete, or that are something else than was asked for."""
    state = {"a": torch.ones(300), "b": torch.zeros(20)}
    whole, old, values = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(state, whole)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "best": np.float64(1)}, values, pickle_protocol=4)
    import pickle

    pickled = pickle.dumps({"a": np.arange(100), "b": [1, 2, 3] * 50})
    return {
        "cut.pt": whole.getvalue()[:-200],
        "half.pt": whole.getvalue()[: len(whole.getvalue()) // 2],
        "values.pt": values.getvalue()[:-50],
        "old.pth": old.getvalue()[:150],
        "cut.safetensors": save(state)[:-40],
        "header.safetensors": save(state)[:60],
        "cut.pkl": pickled[:-20],
        "start.pkl": pickled[:60],
        "cut0.pkl": pickle.dumps({"a": np.arange(100)}, 0)[:-20],
        "page.pt": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
        "page.onnx": b"\n\n<html lang='en'><body>Sign in</body></html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 44730640\n",
        "denied.pth": b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        "missing.bin": json.dumps({"error": "Entry not found"}).encode(),
    }


def rootless() -> bytes:
    """A zip archive whose pickle lies in no folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02]q\0.")
        archive.writestr("version", "3\n")
    return buffer.getvalue()
