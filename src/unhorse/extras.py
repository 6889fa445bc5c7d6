"""Which packages each extra of unhorse brings, for messages that say what to install."""

from __future__ import annotations

EXTRAS: dict[str, tuple[str, ...]] = {
    "data": ("pyarrow", "huggingface-hub"),
    "inpaint": ("opencv-python-headless",),
    "onnx": ("onnx", "onnxruntime", "onnxscript", "onnx2fx==0.0.1"),
    "keras": ("keras", "h5py"),
    "hf": ("transformers",),
    "ray": ("ray",),
}
"""As in pyproject.toml; a test compares them."""


def install_line(*extras: str) -> str:
    """The command that installs the packages of extras, by names that an index has."""
    return f"pip install {' '.join(package for extra in extras for package in EXTRAS[extra])}"
