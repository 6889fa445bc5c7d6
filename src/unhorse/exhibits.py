"""What the page draws of a result: its exhibits, and their geometry. The template only places them."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from markupsafe import Markup
from PIL import Image

from unhorse.core import Bars, Exhibit, Histogram, ImageGrid, ScanResult
from unhorse.wording import class_name, percent, plain

PICTURE_BYTES = 1_800_000
MAX_TILES, MAX_BARS, BINS = 120, 40, 24
FRAME, GAP, ACCENT = 3, 2, (208, 52, 44)


def evidence(result: ScanResult, class_names: Sequence[str] = ()) -> tuple[Exhibit, ...]:
    """The scanner's exhibits, and what every result allows to draw: class scores, triggers, the reference."""
    shown: list[Exhibit] = []
    kinds = {type(exhibit) for exhibit in result.exhibits}
    names = tuple(class_name(class_names, index) for index in range(len(result.class_scores)))
    target = () if result.target is None else (result.target,)
    if result.class_scores and Bars not in kinds:
        shown.append(Bars("Score of each class", names, result.class_scores, result.threshold, target))
    pictures, captions = [], []
    for index, trigger in sorted(result.triggers.items())[:8]:
        name = plain(class_name(class_names, index), 40)
        mask, pattern = trigger.mask.float().cpu(), trigger.pattern.float().cpu()
        pictures += [mask.expand_as(pattern), pattern, mask * pattern]
        captions += [f"mask for {name}", "pattern", f"stamped; flips {percent(trigger.flip_rate)}"]
    if pictures:
        note = "What is blended into an input, found from the model alone."
        shown.append(
            ImageGrid("Reconstructed triggers", torch.stack(pictures), tuple(captions), columns=3, note=note)
        )
    if result.reference and result.score is not None and Histogram not in kinds:
        series = {f"benign reference, n = {len(result.reference.scores)}": result.reference.scores}
        series["this model"] = (result.score,)
        shown.append(Histogram("Against the reference", series, result.threshold, "score"))
    return (*result.exhibits, *shown)


class Axis(NamedTuple):
    """A linear axis with round ends and ticks; `at` gives the place of a value in percent."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low))), 2)


def axis(*samples: Iterable[float | None], steps: int = 4) -> Axis:
    """An axis around the drawable values of all samples, with ticks at 1, 2 or 5 times a power of ten."""
    values = [
        float(value) for sample in samples for value in sample if value is not None and abs(value) < 1e30
    ]
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = max(high - low, 1e-9 * abs(high), 1e-30) if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / steps))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * steps >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Axis(first * step, last * step, tuple(index * step for index in range(first, last + 1)))


def tallest(bars: Bars) -> list[int]:
    """The bars to draw, in order: all of a few, else the marked ones and the highest."""
    heights = [value if math.isfinite(value) else -math.inf for value in bars.values]
    ranked = sorted(range(len(heights)), key=lambda index: (index not in bars.marked, -heights[index]))
    return sorted(ranked[:MAX_BARS])


class Bin(NamedTuple):
    """One of `of` equal bins of an axis; `height` is a percentage of the fullest bin."""

    place: int
    of: int
    height: float


def bins(sample: Sequence[float], scale: Axis) -> list[Bin]:
    """The filled bins of `sample`, in order; each sample fills the height, whatever its size."""
    places = [min(BINS - 1, int(scale.at(value) * BINS / 100)) for value in sample if abs(value) < 1e30]
    counts = Counter(places)
    return [Bin(place, BINS, 96 * count / max(counts.values())) for place, count in sorted(counts.items())]


def points(across: Axis, xs: Sequence[float], up: Axis, ys: Sequence[float]) -> str:
    """The drawable points of a curve in a square of 100 by 100, at most about 1000 of them."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if abs(x) < 1e30 and abs(y) < 1e30]
    stride = 1 + len(pairs) // 1000
    return Markup(" ".join(f"{across.at(x)},{100 - up.at(y):.2f}" for x, y in pairs[::stride]))


class ContactSheet(NamedTuple):
    """One picture of many tiles of `width` x `height` pixels, frame included; `shown`: the images drawn."""

    uri: str
    size: tuple[int, int]
    width: int
    height: int
    shown: list[int]

    def view(self, place: int) -> str:
        """The viewBox that shows one tile."""
        width, height = self.width + 2 * GAP, self.height + 2 * GAP
        down, right = divmod(place, self.size[0] // width)
        return f"{right * width + GAP} {down * height + GAP} {self.width} {self.height}"


def contact_sheet(grid: ImageGrid, budget: int = PICTURE_BYTES) -> ContactSheet | None:
    """A grid as one PNG data URI of at most `budget` bytes; None where even tiles of 16 pixels are more."""
    shown = sorted(sorted(range(len(grid.images)), key=lambda index: index not in grid.marked)[:MAX_TILES])
    images = grid.images[shown].detach().float().cpu().nan_to_num(0, 1, 0).clamp(0, 1)
    images = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    across = max(1, min(grid.columns, len(shown)))
    marked = torch.tensor([index in grid.marked for index in shown])
    longest = max(images.shape[2:])
    largest = 128 if len(shown) <= 32 else 64
    for side in (128, 96, 64, 48, 32, 16):
        if side > largest:
            continue
        tiles = _resized(images, side // longest if longest <= side else side / longest)
        sheet = _framed(tiles, marked, across)
        buffer = io.BytesIO()
        Image.fromarray(sheet.numpy(), "RGBA").save(buffer, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) <= budget:
            height, width = tiles.shape[2] + 2 * FRAME, tiles.shape[3] + 2 * FRAME
            return ContactSheet(Markup(uri), (sheet.shape[1], sheet.shape[0]), width, height, shown)
        largest = max(16, int(1.5 * side * (budget / len(uri)) ** 0.5))  # skips sides that are hopeless
    return None


def _resized(images: torch.Tensor, scale: float) -> torch.Tensor:
    size = [max(1, round(length * scale)) for length in images.shape[2:]]
    return torch.nn.functional.interpolate(images, size, mode="nearest" if scale >= 1 else "area")


def _framed(tiles: torch.Tensor, marked: torch.Tensor, across: int) -> torch.Tensor:
    """Tiles (n, 3, h, w) side by side as uint8 (H, W, 4), the marked ones in a frame, transparent between."""
    rows = -(-len(tiles) // across)
    edge = FRAME + GAP
    height, width = tiles.shape[2] + 2 * edge, tiles.shape[3] + 2 * edge
    cells = torch.zeros(rows * across, 4, height, width, dtype=torch.uint8)
    frames = torch.tensor([*ACCENT, 255], dtype=torch.uint8) * marked[:, None]
    cells[: len(tiles), :, GAP:-GAP, GAP:-GAP] = frames[:, :, None, None]
    cells[: len(tiles), :3, edge:-edge, edge:-edge] = (tiles * 255).round().to(torch.uint8)
    cells[: len(tiles), 3, edge:-edge, edge:-edge] = 255
    sheet = cells.view(rows, across, 4, height, width).permute(0, 3, 1, 4, 2)  # (rows, h, across, w, 4)
    return sheet.reshape(rows * height, across * width, 4).contiguous()
