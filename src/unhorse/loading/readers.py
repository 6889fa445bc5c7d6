"""Which reader opens which format; libraries of a format are imported when a file of it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from unhorse.checks.expectations import Facts
from unhorse.checks.sniff import Format
from unhorse.loading import huggingface_reader, keras_reader, onnx_reader, torch_reader
from unhorse.loading.readouts import Readout

Reader = Callable[[Sequence[BinaryIO], Mapping[str, Any], Facts], Readout]

READERS: dict[Format, Reader] = {
    Format.TORCH_ZIP: torch_reader.read_state_dict,
    Format.TORCH_OLD: torch_reader.read_state_dict,
    Format.TORCHSCRIPT: torch_reader.read_torchscript,
    Format.PT2: torch_reader.read_exported_program,
    Format.ONNX: onnx_reader.read_onnx,
    Format.KERAS_ZIP: keras_reader.read_keras_archive,
    Format.HDF5: keras_reader.read_keras_hdf5,
}
FOLDER_READER: Reader = huggingface_reader.read_huggingface
