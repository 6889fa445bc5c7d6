"""Images through a guarded model, one answer each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from unhorse.core import Classifier
from unhorse.image_files import IMAGE_SUFFIXES, pixels_of
from unhorse.jobs import say
from unhorse.monitors.guard import Guard
from unhorse.monitors.guarded_classifier import HELD
from unhorse.wording import finite, number, plain

SCHEMA = "unhorse-guarded-images-1"
BATCH = 256


@dataclass(frozen=True)
class JudgedImage:
    """The answer for one image file: `label` is None where it is held; pictures where they were asked for."""

    path: Path
    label: str | None
    index: int | None
    alarm: bool
    score: float
    filtered: Path | None = None
    counter_trigger: Path | None = None


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and the images directly below folders."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if path.is_dir() and not inside:
            raise ValueError(f"no images in {path}: give image files, or a folder that holds them")
        found += inside if path.is_dir() else [path]
    return found


def judge(guard: Guard, files: Sequence[Path], output: Path | None = None) -> list[JudgedImage]:
    """The guard's answers; with `output`, filtered images and counter-triggers are written there as PNG."""
    judged: list[JudgedImage] = []
    resized = 0
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        read = [_pixels(file, guard.model) for file in part]
        resized += sum(changed for _, changed in read)
        images = torch.stack([pixels for pixels, _ in read]).to(guard.model.mean.device)
        decision = guard(images)
        written = _write(output, start, part, decision.filtered, decision.counter_trigger)
        answers = zip(decision.label.tolist(), decision.alarm.tolist(), decision.score.tolist(), strict=True)
        for file, (label, alarm, score), pictures in zip(part, answers, written, strict=True):
            index = None if label == HELD else label
            name = None if index is None else guard.model.class_names[index]
            judged.append(JudgedImage(file, name, index, alarm, score, *pictures))
    if resized:
        height, width = guard.model.image_shape[1:]
        say(f"{resized} of {len(files)} images were resized to {height}x{width}: a small trigger may suffer")
    return judged


def _pixels(file: Path, model: Classifier) -> tuple[Tensor, bool]:
    """An image (c, h, w) in [0, 1] in the model's shape, and whether it was resized for that."""
    channels, height, width = model.image_shape
    try:
        with Image.open(file) as image:
            changed = image.size != (width, height)
            array = pixels_of(image, (height, width))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"cannot read {file} ({error}): give PNG, JPEG or another image file") from error
    if array.shape[2] > channels:
        raise ValueError(f"{file} is a colour image, the model takes {channels} channel: convert it to grey")
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    return pixels.expand(channels, -1, -1), changed


def _write(
    folder: Path | None, start: int, files: Sequence[Path], filtered: Tensor, counter_trigger: Tensor
) -> list[tuple[Path | None, Path | None]]:
    """Writes two pictures per image, named for the image and its place among all."""
    if folder is None:
        return [(None, None)] * len(files)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path | None, Path | None]] = []
    for place, file in enumerate(files):
        stem = f"{start + place:04d}-{file.stem}"
        pair = (folder / f"{stem}.filtered.png", folder / f"{stem}.counter-trigger.png")
        _save(filtered[place], pair[0])
        _save(0.5 + counter_trigger[place] / 2, pair[1])  # grey is no change
        written.append(pair)
    return written


def _save(pixels: Tensor, path: Path) -> None:
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(path)


# --- what is shown ------------------------------------------------------------------------------------------


def show(judged: Sequence[JudgedImage]) -> None:
    """A table on stdout, one row per image."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("label")
    table.add_column("alarm")
    table.add_column("score", justify="right")
    for image in judged:
        label = Text("held", "bold red") if image.label is None else Text(plain(image.label, 40))
        alarm = Text("ALARM", "bold red") if image.alarm else Text("–", "dim")
        table.add_row(Text(plain(image.path)), label, alarm, number(image.score))
    Console().print(table)
    alarms = sum(image.alarm for image in judged)
    say(f"{alarms} of {len(judged)} images alarm")


def save(judged: Sequence[JudgedImage], path: Path, *, guard: Path, policy: str, threshold: float) -> None:
    """The answers as JSON, whole or not at all; a score that is not finite is null."""
    images: list[dict[str, Any]] = [
        {
            "path": str(image.path),
            "label": image.label,
            "index": image.index,
            "alarm": image.alarm,
            "score": image.score,
            "filtered": None if image.filtered is None else str(image.filtered),
            "counter_trigger": None if image.counter_trigger is None else str(image.counter_trigger),
        }
        for image in judged
    ]
    content = {"schema": SCHEMA, "guard": str(guard), "policy": policy, "threshold": threshold}
    text = json.dumps(finite(content | {"images": images}), indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
