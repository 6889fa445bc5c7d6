"""The images a guard is fitted on and measured with: in the model's classes, each used for one purpose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from unhorse.core import Classifier, Dataset
from unhorse.datasets import load_dataset
from unhorse.image_files import read_parquet
from unhorse.jobs import say


@dataclass(frozen=True)
class ImageSource:
    """Where images come from: a folder, a parquet file or a data set's name, which split of it, and whose
    classes its labels are.

    `labels` is a file that maps folder names to classes of the model; `unlabelled` drops the labels.
    """

    source: Path
    split: str | None = None
    labels: Path | None = None
    unlabelled: bool = False

    def read(self, model: Classifier) -> Dataset:
        """The images in the model's shape, labelled by the model's classes; ValueError with the remedy."""
        data = read_images(self.source, model.image_shape[1:], self.split)
        if data.image_shape != tuple(model.image_shape):
            raise ValueError(
                f"the images of {self.source} are {data.image_shape}, the model takes {model.image_shape}: "
                "convert them"
            )
        if self.unlabelled or data.labels is None:
            return Dataset(data.images, None, model.class_names, data.name)
        mapping = None if self.labels is None else read_mapping(self.labels)
        return in_classes_of(model, data, mapping)

    def __str__(self) -> str:
        return str(self.source) if self.split is None else f"{self.source}, {self.split}"


def read_mapping(path: Path) -> dict[str, str]:
    """Folder name to class name or number, from a JSON object or from lines `folder<TAB>class`."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("{") else _from_lines(text)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no mapping of folders to classes ({error}): give a JSON object, or a line "
            "folder<TAB>class for each folder"
        ) from error
    return {str(folder): str(name) for folder, name in found.items()}


def _from_lines(text: str) -> dict[str, str]:
    lines = [line.split("\t") for line in text.splitlines() if line.strip()]
    if wrong := next((line for line in lines if len(line) != 2), None):
        raise ValueError(f"{len(wrong)} fields in {' '.join(wrong)!r}")
    return {folder.strip(): name.strip() for folder, name in lines}


def in_classes_of(model: Classifier, data: Dataset, mapping: Mapping[str, str] | None = None) -> Dataset:
    """`data` with the model's classes for labels: by `mapping`, else by equal names, else by
    numbers, else in order.
    """
    assert data.labels is not None
    names = data.class_names
    if len(data) and int(data.labels.max()) >= len(names):
        raise ValueError(f"label {int(data.labels.max())} is none of the {len(names)} classes: correct it")
    if mapping is not None:
        if missing := [name for name in names if name not in mapping]:
            raise ValueError(f"--labels does not map {', '.join(missing[:5])}: add a line for each folder")
        places = [class_index(model, mapping[name]) for name in names]
    elif set(names) <= set(model.class_names):
        places = [model.class_names.index(name) for name in names]
    elif all(name.isdecimal() and int(name) < model.num_classes for name in names):
        places = [int(name) for name in names]
    elif len(names) == model.num_classes:
        say(f"classes are taken in order, {names[0]} as {model.class_names[0]} ...: --labels says otherwise")
        places = list(range(len(names)))
    else:
        raise ValueError(
            f"the images have {len(names)} classes ({', '.join(names[:3])} ...), the model "
            f"{model.num_classes} ({', '.join(model.class_names[:3])} ...): map them by --labels FILE, or "
            "leave the labels out by --unlabelled"
        )
    return Dataset(data.images, torch.tensor(places)[data.labels], model.class_names, data.name)


def class_index(model: Classifier, name: str) -> int:
    """The class of that name or number; ValueError where the model has none."""
    if name in model.class_names:
        return model.class_names.index(name)
    if name.isdecimal() and int(name) < model.num_classes:
        return int(name)
    raise ValueError(
        f"the model has no class {name!r}: give one of {', '.join(model.class_names[:5])} ..., or a number "
        f"from 0 to {model.num_classes - 1}"
    )


def fingerprints(data: Dataset) -> list[str]:
    """A hash of each image's pixels: what tells that an image was used before."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in data.images]


def unused(data: Dataset, used: Collection[str] | None) -> tuple[Dataset, tuple[str, ...]]:
    """The images that a guard has not seen, by the fingerprints of those it has, and what to warn of."""
    if used is None:
        return data, ("what fitted this guard is not on record: be sure that these images did not",)
    known = set(used)
    left = data[torch.tensor([found not in known for found in fingerprints(data)], dtype=torch.bool)]
    if not len(left):
        raise ValueError(
            f"all {len(data)} images of {data.name!r} were used to fit this guard: give others to --clean or "
            "--split, or fit with fewer --images"
        )
    if len(left) == len(data):
        return data, ()
    return left, (f"{len(data) - len(left)} of {len(data)} clean images were left out: the guard knows them",)


def clean_images(source: Path | None, model: Classifier) -> Dataset | None:
    """The user's clean images, held to the model's input shape."""
    if source is None:
        return None
    size = model.image_shape[1:]
    data = read_images(source, size)
    if data.image_shape != model.image_shape:
        raise ValueError(
            f"the clean images are {data.image_shape}, the model takes {model.image_shape}: convert them"
        )
    return data


def read_images(source: Path, size: tuple[int, int], split: str | None = None) -> Dataset:
    """The images of a parquet file, or one split of a data set; of several splits the first of those that no
    model was trained on, unless named.
    """
    if source.suffix == ".parquet" and source.is_file():
        return read_parquet([source], source.stem, size)
    errors = []
    for name in ("test", "valid", "train") if split is None else (split,):
        try:
            return load_dataset(str(source), name, size=size)
        except ValueError as error:
            errors.append(error)
    raise errors[-1]
