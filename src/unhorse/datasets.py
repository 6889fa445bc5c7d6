"""Data sets as uint8 tensors in memory: Hugging Face parquet, image folders, digits; seeded splits."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from unhorse.core import Dataset, Images
from unhorse.image_files import (
    IMAGE_SUFFIXES,
    Size,
    image_classes,
    pixels_of,
    read_images,
    read_parquet,
    stack,
)

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
HUB_NAME = r"\w[\w.-]*/[\w.-]*\w"
CACHE_FORMAT = 2
HUB_BYTES = 20 * 10**9


def load_dataset(
    source: str, split: str = "train", *, cache: Path | None = None, size: Size = None
) -> Dataset:
    """One split of a data set: "digits", a folder, or hub:OWNER/NAME, such as "hub:ylecun/mnist".

    Only a name that begins with "hub:" goes to a network; hub:OWNER/NAME@COMMIT says which state of it.

    A folder holds parquet files (train*.parquet, there or one level below), or a folder of images per class,
    below a folder per split if there are several; loose images have no labels. Parquet with CelebA's
    attributes and no label column gets the 8 classes of `celeba_labels`. `size` (h, w) resizes the whole
    image (WaNet's CelebA is 64x64). Decoded images are kept in `cache`, by default $UNHORSE_CACHE or
    ~/.cache/unhorse/datasets.
    Raises ValueError naming the path and the remedy, ImportError naming the extra to install.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: give one of {', '.join(SPLITS)}")
    if source == "digits":
        return _digits(split, size)
    folder = Path(source).expanduser().resolve()
    if source.startswith("hub:"):
        hub_name, _, commit = source.removeprefix("hub:").partition("@")
        folder = _hub_folder(hub_name, split, commit)
        name = hub_name.rpartition("/")[2]
    elif not folder.is_dir():
        meant = f" (hub:{source}, if you mean that one)" if re.fullmatch(HUB_NAME, source) else ""
        raise ValueError(
            f"no data set {source!r}: give 'digits', an existing folder, or hub:OWNER/NAME{meant}"
        )
    else:
        name = folder.name
    asked = (name, split, size)
    cache = cache or Path(os.environ.get("UNHORSE_CACHE") or Path.home() / ".cache" / "unhorse" / "datasets")
    parquet = sorted(folder.glob("*.parquet")) + sorted(folder.glob("*/*.parquet"))
    if parquet:
        files = _parquet_files(folder, parquet, split)
        return _cached(files, asked, cache, lambda: read_parquet(files, name, size))
    classes = image_classes(_image_root(folder, split))
    files = list(chain.from_iterable(classes.values()))
    return _cached(files, asked, cache, lambda: read_images(classes, str(folder), name, size))


def split_dataset(
    data: Dataset, fractions: Sequence[float], *, seed: int, stratified: bool = True
) -> list[Dataset]:
    """Disjoint shuffled parts of the given fractions; what is left of 1 is left out.

    `stratified` keeps the shares of the classes where there are labels, in any stretch of a part too.
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError(f"fractions {tuple(fractions)}: give positive ones that sum to at most 1")
    edges = [round(sum(fractions[:count]) * len(data)) for count in range(len(fractions) + 1)]
    order = _order(data, seed, stratified)
    return [data[order[start:end]] for start, end in zip(edges, edges[1:], strict=False)]


def subset(data: Dataset, n: int, *, seed: int, stratified: bool = True) -> Dataset:
    """`n` of the images, shuffled; `stratified` keeps the shares of the classes where there are labels."""
    if not 0 < n <= len(data):
        raise ValueError(f"cannot take {n} of the {len(data)} images of {data.name!r}: give 1 to {len(data)}")
    return data[_order(data, seed, stratified)[:n]]


def of_classes(data: Dataset, classes: Sequence[int]) -> Dataset:
    """The images of some classes only, which are numbered in the order given."""
    if data.labels is None:
        raise ValueError(f"data set {data.name!r} has no labels: of which class an image is cannot be told")
    if len(set(classes)) < len(classes) or not all(0 <= one < len(data.class_names) for one in classes):
        raise ValueError(
            f"classes {tuple(classes)}: give different ones of the {len(data.class_names)} of {data.name!r}"
        )
    places = torch.full((len(data.class_names),), -1)
    places[list(classes)] = torch.arange(len(classes))
    chosen = data[(places[data.labels] >= 0).nonzero()[:, 0]]
    assert chosen.labels is not None
    names = tuple(data.class_names[one] for one in classes)
    return replace(chosen, labels=places[chosen.labels], class_names=names)


def _order(data: Dataset, seed: int, stratified: bool) -> Tensor:
    """A random order of which, if stratified, every stretch has the classes in their shares."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    if data.labels is None or not stratified:
        return order
    labels = data.labels[order]
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order)) - starts[labels[by_class]]
    quantile = (rank + 0.5).double() / counts[labels]
    return order[quantile.argsort(stable=True)]


# --- sources ------------------------------------------------------------------------------------------------


def _digits(split: str, size: Size) -> Dataset:
    from sklearn.datasets import load_digits  # a second that other sources need not wait

    if split == "valid":
        raise ValueError("digits has no split 'valid': give train or test, or divide train by split_dataset")
    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = stack([pixels_of(Image.fromarray(image), size) for image in grey], "digits")
    digits = Dataset(images, torch.from_numpy(bunch.target).long(), tuple("0123456789"), "digits")
    train, test = split_dataset(digits, (2 / 3, 1 / 3), seed=0)
    return train if split == "train" else test


def natural_images(count: int, image_shape: tuple[int, int, int], *, seed: int) -> Images:
    """`count` random square crops of the two photographs that scikit-learn bundles, scaled to `image_shape`.

    Images from outside every data set here, as image-blend attacks need them; grey for one channel.
    """
    from sklearn.datasets import load_sample_images

    photographs = [
        torch.from_numpy(photograph.copy()).permute(2, 0, 1) for photograph in load_sample_images().images
    ]
    channels, height, width = image_shape
    rng = torch.Generator().manual_seed(seed)
    crops = []
    for index in range(count):
        photograph = photographs[index % len(photographs)].float() / 255
        side = int(torch.randint(160, 400, (), generator=rng))
        top, left = (int(torch.randint(limit - side, (), generator=rng)) for limit in photograph.shape[1:])
        crop = photograph[None, :, top : top + side, left : left + side]
        crops.append(interpolate(crop, (height, width), mode="area").clamp(0, 1))
    images = torch.cat(crops)
    return images.mean(1, keepdim=True) if channels == 1 else images


def _hub_folder(name: str, split: str, commit: str = "") -> Path:
    """The files of a split, fetched at one commit, which is printed; without the user's stored token.

    Parquet files, or pictures below a folder named for the split, of 20 GB at most; nothing else is fetched.
    """
    if not re.fullmatch(HUB_NAME, name):
        raise ValueError(f"no hub name {name!r}: give OWNER/NAME, such as ylecun/mnist")
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ImportError(f"to ask the hub for {name!r}: pip install pyarrow huggingface-hub") from error
    try:
        info = HfApi(token=False).dataset_info(name, revision=commit or None, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        wanted = _of_split(sorted(sizes), name, split)
        total = sum(sizes[file] or 0 for file in wanted)
        if total > HUB_BYTES or any(sizes[file] is None for file in wanted):
            raise ValueError(
                f"hub:{name} has {total / 1e9:.1f} GB for split {split!r}, or does not say how much: fetch "
                "what you need yourself and give the folder"
            )
        print(f"hub: {name} at commit {info.sha}, {len(wanted)} files, {total / 1e6:.1f} MB", file=sys.stderr)
        folder = snapshot_download(
            name, repo_type="dataset", revision=info.sha, allow_patterns=wanted, token=False
        )
        return Path(folder)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot fetch {name!r} from the hub ({reason}): check the name and the network, or give a folder"
        ) from error


def _of_split(files: Sequence[str], name: str, split: str) -> list[str]:
    """The parquet files of a split, or if there are none the pictures below a folder that is named for it."""
    aliases = SPLITS[split]
    parquet = [
        file for file in files if file.endswith(".parquet") and any(alias in file for alias in aliases)
    ]
    pictures = [
        file
        for file in files
        if Path(file).suffix.lower() in IMAGE_SUFFIXES and file.partition("/")[0] in aliases
    ]
    if not parquet and not pictures:
        raise ValueError(f"hub:{name} has neither parquet files nor pictures of split {split!r}")
    return parquet or pictures


def _parquet_files(folder: Path, parquet: Sequence[Path], split: str) -> list[Path]:
    stems = {path: re.split(r"[-_.]", path.name.lower())[0] for path in parquet}
    files = [path for path, stem in stems.items() if stem in SPLITS[split]]
    if not files:
        there = ", ".join(path.name for path in parquet[:8])
        raise ValueError(f"{folder} has no parquet file of split {split!r}: choose among {there}")
    places = sorted({path.parent for path in files})
    if len(places) > 1:
        choices = ", ".join(str(place) for place in places)
        raise ValueError(f"{folder} holds several data sets: give one of {choices}")
    return files


def _image_root(folder: Path, split: str) -> Path:
    """The folder of a split where all sub-folders are named for splits, else the folder itself as train."""
    children = sorted(path.name for path in folder.glob("[!.]*/"))
    if children and set(children) <= set(chain.from_iterable(SPLITS.values())):
        for child in children:
            if child in SPLITS[split]:
                return folder / child
        raise ValueError(f"{folder} has splits {', '.join(children)}, not {split!r}: give one of them")
    if split != "train":
        raise ValueError(
            f"{folder} has no folder {split!r}: make one, or ask for 'train', which is all of it"
        )
    return folder


# --- the cache ----------------------------------------------------------------------------------------------


def _cached(
    files: Sequence[Path], asked: Sequence[object], folder: Path, read: Callable[[], Dataset]
) -> Dataset:
    """What `read` returns, from the cache if the same was `asked` of the same files before."""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, states, asked]).encode()).hexdigest()[:32]
    path = folder / f"{key}.safetensors"
    if not path.exists():
        _save(read(), path)
    with safe_open(path, framework="pt") as stored:
        card = json.loads(stored.metadata()["card"])
        labels = stored.get_tensor("labels") if "labels" in stored.keys() else None  # noqa: SIM118
        return Dataset(stored.get_tensor("images"), labels, tuple(card["class_names"]), card["name"])


def _save(data: Dataset, path: Path) -> None:
    tensors = {"images": data.images} | ({} if data.labels is None else {"labels": data.labels})
    card = json.dumps({"class_names": data.class_names, "name": data.name})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            save_file(tensors, Path(scratch) / path.name, metadata={"card": card})
            (Path(scratch) / path.name).replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}): set UNHORSE_CACHE to a writable folder") from error
