"""Clean images for defenders: of a population's test split, apart from those that victims are measured on."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from unhorse.core import Classifier, Dataset
from unhorse.datasets import load_dataset, of_classes, subset
from unhorse.victims import DataSpec


@functools.lru_cache(maxsize=4)
def clean_and_test(data: DataSpec, count: int) -> tuple[Dataset, Dataset]:
    """(`count` clean images, the rest of the test split or `data.test_images` of the rest)."""
    everything = load_dataset(data.source, data.test, size=data.size)
    if data.classes is not None:
        everything = of_classes(everything, data.classes)
    if not 0 <= count < len(everything):
        raise ValueError(
            f"{count} of the {len(everything)} test images of {data.source}: leave some to measure on"
        )
    order = subset(everything, len(everything), seed=1)
    most = data.test_images or len(everything)
    return order[:count], order[count : count + most]


def images_for(model: Classifier, data: DataSpec, count: int) -> Dataset:
    """Clean images whose labels number the classes as `model` does, by the names of the classes."""
    clean, _ = clean_and_test(data, count)
    names = list(clean.class_names)
    if clean.labels is None or names == list(model.class_names) or set(names) != set(model.class_names):
        return clean
    place = torch.tensor([model.class_names.index(name) for name in names])
    return replace(clean, labels=place[clean.labels], class_names=model.class_names)
