"""Image files to data sets: Hugging Face parquet, folders of pictures; decoded in threads, to uint8."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unhorse.core import Dataset, Labels
from unhorse.extras import install_line

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels", "target")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
CELEBA_ATTRIBUTES = ("heavy_makeup", "mouth_slightly_open", "smiling")
CELEBA_CLASSES = tuple(
    ", ".join(words)
    for words in product(("no makeup", "makeup"), ("closed mouth", "open mouth"), ("not smiling", "smiling"))
)

Size = tuple[int, int] | None


def read_parquet(files: Sequence[Path], name: str, size: Size) -> Dataset:
    """The images of parquet files in the Hugging Face layout, with labels where there is such a column, or
    where there are the three attributes that make CelebA's 8 classes (`celeba_labels`).
    """
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{files[0]} is parquet: {install_line('data')}") from error
    try:
        readers = [ParquetFile(path) for path in files]
    except ArrowInvalid as error:
        raise ValueError(f"{', '.join(map(str, files))}: not parquet ({error}); fetch it again") from error
    schema = readers[0].schema_arrow
    image_column = next((column for column in IMAGE_COLUMNS if column in schema.names), None)
    label_column = next((column for column in LABEL_COLUMNS if column in schema.names), None)
    if image_column is None:
        raise ValueError(f"{files[0]} has columns {schema.names}: name that of images 'image' or 'img'")

    celeba = celeba_labels(readers, files[0]) if label_column is None else None  # quick, so before decoding
    batches = chain.from_iterable(reader.iter_batches(columns=[image_column]) for reader in readers)
    cells = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
    encoded = (io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell) for cell in cells)
    images = _decode(encoded, str(files[0]), size)
    if label_column is None:
        return Dataset(images, celeba, () if celeba is None else CELEBA_CLASSES, name)
    columns = [reader.read([label_column]).column(0).to_numpy() for reader in readers]
    labels = _labels(np.concatenate(columns), f"{label_column!r} of {files[0]}")
    if labels is None:
        return Dataset(images, None, (), name)
    names = _class_names(schema.metadata or {}, label_column) or map(str, range(int(labels.max()) + 1))
    return Dataset(images, labels, tuple(names), name)


def _labels(values: np.ndarray, where: str) -> Labels | None:
    """Class indices; None where the hub's -1 says that a split is unlabelled."""
    if (values == -1).all():
        return None
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
        raise ValueError(f"{where} ({values.dtype}, lowest {values.min()}): give class indices 0..k-1")
    return torch.from_numpy(values.astype(np.int64))


def celeba_labels(readers: Sequence[ParquetFile], file: Path) -> Labels | None:
    """CelebA's 8 classes, 4 * Heavy_Makeup + 2 * Mouth_Slightly_Open + Smiling; None without these columns.

    WaNet's rule (Nguyen and Tran, ICLR 2021), but the code published with it counts Smiling 2 and
    Mouth_Slightly_Open 1, so its classes 1 and 2, and 5 and 6, change places here. Columns may be spelled
    with spaces and in any case, and hold true and false, 1 and 0, or 1 and -1.
    """
    spelled = {name.strip().lower().replace(" ", "_"): name for name in readers[0].schema_arrow.names}
    if not spelled.keys() >= set(CELEBA_ATTRIBUTES):
        return None
    makeup, open_mouth, smiling = (
        torch.from_numpy(_attribute(readers, spelled[name], file)).long() for name in CELEBA_ATTRIBUTES
    )
    return 4 * makeup + 2 * open_mouth + smiling


def _attribute(readers: Sequence[ParquetFile], column: str, file: Path) -> np.ndarray:
    """Whether each image has the attribute: true or 1, against false, 0 or -1."""
    values = np.concatenate([reader.read([column]).column(0).to_numpy() for reader in readers])
    given = set(values.tolist())
    if not (given <= {0, 1} or given <= {-1, 1}):  # True == 1
        strange = ", ".join(sorted({repr(value) for value in given if value != 1})[:5])
        raise ValueError(
            f"attribute {column!r} of {file} holds {strange}: give true and false, 1 and 0, or 1 and -1"
        )
    return values == 1


def _class_names(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...]:
    """Names from the schema that the datasets library writes, empty where there are none."""
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    return tuple(info.get("features", {}).get(label_column, {}).get("names", ()))


def image_classes(root: Path) -> dict[str, list[Path]]:
    """Image files by class name; a folder of loose images is one nameless class."""
    folders = sorted(root.glob("[!.]*/"))
    classes = {path.name: _image_files(path) for path in folders} if folders else {"": _image_files(root)}
    empty = [name or str(root) for name, files in classes.items() if not files]
    if empty:
        raise ValueError(
            f"no images in {', '.join(empty[:5])} of {root}: give PNG, JPEG or parquet files there"
        )
    return classes


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def read_images(classes: dict[str, list[Path]], where: str, name: str, size: Size) -> Dataset:
    """The images of `classes`, labelled in the order of the names; `where` is what an error names."""
    images = _decode(chain.from_iterable(classes.values()), where, size)
    if list(classes) == [""]:
        return Dataset(images, None, (), name)
    counts = torch.tensor([len(files) for files in classes.values()])
    return Dataset(images, torch.arange(len(classes)).repeat_interleave(counts), tuple(classes), name)


def _decode(files: Iterable[Path | io.BytesIO], where: str, size: Size) -> Tensor:
    """Encoded images to uint8 (n, c, h, w)."""

    def decode(block: list[tuple[int, Path | io.BytesIO]]) -> list[np.ndarray]:
        arrays = []
        for number, file in block:
            try:
                with Image.open(file) as image:
                    arrays.append(pixels_of(image, size))
            except (OSError, ValueError, SyntaxError) as error:
                named = file if isinstance(file, Path) else f"image {number} of {where}"
                raise ValueError(f"cannot decode {named} ({error}): repair or remove it") from error
        return arrays

    numbered = enumerate(files)
    # In blocks: a future for each small image would cost as much as its decoding.
    blocks = iter(lambda: list(islice(numbered, 256)), [])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return stack(list(chain.from_iterable(pool.map(decode, blocks))), where)


def pixels_of(image: Image.Image, size: Size) -> np.ndarray:
    """uint8 (h, w, 1) or (h, w, 3); `size` takes the whole image, whatever its proportions."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 bits")
    image = image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB")
    if size is not None and image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image))


def stack(arrays: Sequence[np.ndarray], where: str) -> Tensor:
    """Pictures of one size (h, w, 1 or 3) as uint8 (n, c, h, w)."""
    if not arrays:
        raise ValueError(f"{where} holds no images: give at least one")
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) > 1:
        raise ValueError(
            f"{where} has images of {len(sizes)} sizes, {sizes[0]} to {sizes[-1]}: resize them by size=(h, w)"
        )
    channels = max(array.shape[2] for array in arrays)  # grey images among colour ones become colour
    stacked = np.empty((len(arrays), channels, *sizes[0]), dtype=np.uint8)
    for row, array in zip(stacked, arrays, strict=True):
        row[:] = array.transpose(2, 0, 1)
    return torch.from_numpy(stacked)
