"""Scan results for people and machines: a self-contained HTML page, JSON, a terminal table, an exit code."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
from markupsafe import Markup
from PIL import Image
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as TerminalTable
from rich.text import Text

from .core import Bars, Exhibit, Histogram, ImageGrid, ScanResult, Verdict

SCHEMA = "unhorse-report-1"
FAILED = "FAILED"
NAME_LENGTH, PROSE_LENGTH = 120, 2000
PAGE_BYTES, PICTURE_BYTES = 3_000_000, 1_800_000
MAX_TILES, MAX_BARS, BINS = 120, 40, 24
FRAME, GAP, ACCENT = 4, 2, (208, 52, 44)
ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b."
)


class Severity(StrEnum):
    """How loud a verdict is: INFECTED is high, SUSPICIOUS is medium, everything else is no finding."""

    HIGH = "high"
    MEDIUM = "medium"
    NONE = "none"


SEVERITY = {str(Verdict.INFECTED): Severity.HIGH, str(Verdict.SUSPICIOUS): Severity.MEDIUM}
ORDER = (
    str(Verdict.INFECTED),
    str(Verdict.SUSPICIOUS),
    str(Verdict.UNDECIDED),
    FAILED,
    str(Verdict.NO_SIGN_FOUND),
)
MEANING = {
    "INFECTED": "The score passed its threshold and a trigger that forces the target class was demonstrated.",
    "SUSPICIOUS": "Either the score passed its threshold or a trigger was demonstrated, but not both.",
    "NO SIGN FOUND": "The score stayed below its threshold and no trigger was demonstrated. "
    "This does not prove that there is none.",
    "UNDECIDED": "The scanner could not judge this model. It counts as not scanned.",
    FAILED: "The model could not be scanned. Nothing is known about it.",
}
REMEDY = {
    "INFECTED": "Do not deploy. Send the publisher this report; ask for the training data and a retrained model.",
    "SUSPICIOUS": "Do not deploy yet. Scan again with --effort deep; pass --reference DIR with benign models of the "
    "same architecture and data for a p-value; ask the publisher how the training data was obtained.",
    "NO SIGN FOUND": "Compare the hash with the one that the publisher announced; keep this report with the model.",
    "UNDECIDED": "Do not deploy on the strength of this scan. Correct the cause above and scan again.",
    FAILED: "Do not deploy on the strength of this scan. Correct the cause above and scan again.",
}


@dataclass(frozen=True)
class ScannedModel:
    """One model file: what it is, what was assumed, and its scan result or the error that prevented one.

    `sha256` is of the file or of its weights; `error_rule` names the broken rule for programs; `seconds` is wall time.
    """

    path: str
    sha256: str = ""
    architecture: str = ""
    image_shape: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    result: ScanResult | None = None
    error: str = ""
    error_rule: str = ""
    seconds: float = math.nan

    @property
    def verdict(self) -> str:
        """The verdict's word; FAILED where there is an error or no result."""
        return FAILED if self.error or self.result is None else str(self.result.verdict)

    @property
    def severity(self) -> Severity:
        return SEVERITY.get(self.verdict, Severity.NONE)

    @property
    def reason(self) -> str:
        if self.error or self.result is None:
            return self.error or "The scan ended without a result."
        return self.result.reason

    @property
    def remedy(self) -> str:
        return REMEDY[self.verdict]

    def class_name(self, index: int | None) -> str | None:
        """The name of class `index`, its number where the model names none, or None."""
        if index is None:
            return None
        return plain(self.class_names[index]) if 0 <= index < len(self.class_names) else str(index)


@dataclass(frozen=True)
class Report:
    """All models of one command (its argv); `environment` holds versions, device, seed ...; `created` is ISO 8601."""

    models: tuple[ScannedModel, ...]
    command: tuple[str, ...] = ()
    environment: Mapping[str, object] = field(default_factory=dict)
    created: str = ""


def exit_code(report: Report, fail_on: str = Severity.MEDIUM) -> int:
    """1 a finding at or above `fail_on`, else 2 a model FAILED or UNDECIDED, 3 no models, 0 otherwise."""
    if fail_on not in tuple(Severity):
        raise ValueError(f"fail_on is {fail_on!r}: use one of {', '.join(Severity)}")
    loud = {"high": {"high"}, "medium": {"high", "medium"}, "none": set()}[fail_on]
    if not report.models:
        return 3
    if any(model.severity in loud for model in report.models):
        return 1
    return 2 if any(model.verdict in (FAILED, Verdict.UNDECIDED) for model in report.models) else 0


def save(report: Report, *, html: Path | None = None, json: Path | None = None) -> None:
    """Write the page and the JSON; a reader sees the old file or the whole new one, never a part."""
    if html is not None:
        _replace(Path(html), to_html(report))
    if json is not None:
        _replace(Path(json), dumps(report))


def dumps(report: Report) -> str:
    """The JSON text of a report: ASCII only, so that no terminal acts on a name in it."""
    return json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def plain(text: object, limit: int = NAME_LENGTH) -> str:
    """`text` without escape sequences, control, bidirectional or invisible characters, its middle cut out."""
    raw = str(text)
    if len(raw) > 8 * limit:
        raw = f"{raw[: 4 * limit]}…{raw[-4 * limit :]}"
    raw = " ".join(ESCAPES.sub("", raw).split())
    shown = "".join(letter for letter in raw if not unicodedata.category(letter).startswith("C"))
    if len(shown) <= limit:
        return shown
    tail = (limit - 1) // 3
    return f"{shown[: limit - 1 - tail]}…{shown[-tail:]}"


# --- JSON ---------------------------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, object]:
    """The report as finite JSON (NaN and infinities become null), as report.schema.json describes it."""
    counts = Counter(model.verdict for model in report.models)
    return {
        "schema": SCHEMA,
        "created": report.created,
        "command": list(report.command),
        "environment": _finite(report.environment),
        "summary": {verdict: counts[verdict] for verdict in ORDER},
        "models": [_model_json(model) for model in report.models],
    }


def _model_json(model: ScannedModel) -> dict[str, object]:
    result = model.result or ScanResult(Verdict.UNDECIDED, "")
    reference = result.reference
    content = {
        "path": model.path,
        "sha256": model.sha256,
        "verdict": model.verdict,
        "severity": model.severity,
        "reason": plain(model.reason, PROSE_LENGTH),
        "remedy": model.remedy,
        "error_rule": model.error_rule,
        "architecture": plain(model.architecture),
        "image_shape": model.image_shape,
        "class_names": [plain(name) for name in model.class_names],
        "assumptions": [plain(text, PROSE_LENGTH) for text in model.assumptions],
        "scanner": result.scanner,
        "score": result.score,
        "threshold": result.threshold,
        "p_value": result.p_value,
        "class_scores": result.class_scores,
        "reached": result.reached,
        "target": None
        if result.target is None
        else {"index": result.target, "name": model.class_name(result.target)},
        "triggers": [
            {
                "target": target,
                "name": model.class_name(target),
                "flip_rate": trigger.flip_rate,
                "mask_share": float(trigger.mask.float().mean()),
            }
            for target, trigger in sorted(result.triggers.items())
        ],
        "reference": None
        if reference is None
        else {"name": plain(reference.name), "n": len(reference.scores)},
        "facts": result.facts,
        "warnings": [plain(text, PROSE_LENGTH) for text in result.warnings],
        "seconds": model.seconds,
    }
    finite = _finite(content)
    assert isinstance(finite, dict)
    return finite


def _finite(value: object) -> object:
    """`value` in the types of JSON; numbers that JSON cannot carry become None."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "__float__"):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {plain(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_finite(item) for item in value]
    return plain(value, PROSE_LENGTH)


# --- the page -----------------------------------------------------------------------------------------------


def to_html(report: Report) -> str:
    """One page without scripts or outside references, under 3 MB: if need be, only the worst models in detail."""
    models = sorted(report.models, key=lambda model: ORDER.index(model.verdict))
    page = ""
    for detailed in (len(models), 32, 8, 2, 1):
        page = _render(report, models, detailed)
        if len(page.encode()) < PAGE_BYTES:
            break
    return page


def _render(report: Report, models: Sequence[ScannedModel], detailed: int) -> str:
    evidence = [(model, exhibits(model)) for model in models[:detailed]]
    grids = sum(isinstance(exhibit, ImageGrid) for _, shown in evidence for exhibit in shown)
    budget = PICTURE_BYTES // max(1, grids)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(prose=_prose, number=_number, percent=_percent, plain=plain)
    return environment.get_template("report.html").render(
        report=report,
        models=models,
        evidence=evidence,
        meaning=MEANING,
        command=shlex.join(report.command),
        counts=Counter(model.verdict for model in models),
        kind=lambda exhibit: type(exhibit).__name__,
        contact_sheet=lambda grid: contact_sheet(grid, budget),
        axis=axis,
        tallest=tallest,
        bins=bins,
        points=points,
    )


def exhibits(model: ScannedModel) -> tuple[Exhibit, ...]:
    """The scanner's exhibits, and what every result allows to draw: class scores, triggers, the reference."""
    result = model.result
    if result is None:
        return ()
    shown: list[Exhibit] = []
    kinds = {type(exhibit) for exhibit in result.exhibits}
    names = tuple(model.class_name(index) or "" for index in range(len(result.class_scores)))
    target = () if result.target is None else (result.target,)
    if result.class_scores and Bars not in kinds:
        shown.append(Bars("Score of each class", names, result.class_scores, result.threshold, target))
    pictures, captions = [], []
    for index, trigger in sorted(result.triggers.items())[:8]:
        name = plain(model.class_name(index), 40)
        mask, pattern = trigger.mask.float().cpu(), trigger.pattern.float().cpu()
        pictures += [mask.expand_as(pattern), pattern, mask * pattern]
        captions += [f"mask for {name}", "pattern", f"stamped; flips {_percent(trigger.flip_rate)}"]
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


def _prose(text: object) -> str:
    return Markup.escape(plain(text, PROSE_LENGTH))


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{share:.1%}"


# --- geometry of the exhibits; the template draws -----------------------------------------------------------


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
    """The filled bins of `sample`, in order; each sample fills the height, so that its size does not matter."""
    places = [min(BINS - 1, int(scale.at(value) * BINS / 100)) for value in sample if abs(value) < 1e30]
    counts = Counter(places)
    return [Bin(place, BINS, 96 * count / max(counts.values())) for place, count in sorted(counts.items())]


def points(across: Axis, xs: Sequence[float], up: Axis, ys: Sequence[float]) -> str:
    """The drawable points of a curve in a square of 100 by 100, at most about 1000 of them."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if abs(x) < 1e30 and abs(y) < 1e30]
    stride = 1 + len(pairs) // 1000
    return Markup(" ".join(f"{across.at(x)},{100 - up.at(y):.2f}" for x, y in pairs[::stride]))


class ContactSheet(NamedTuple):
    """One picture of many tiles of `width` x `height` pixels with their frames; `shown` are the images drawn."""

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
    for side in (128, 96, 64, 48, 32, 16):
        tiles = _resized(images, side // longest if longest <= side else side / longest)
        sheet = _framed(tiles, marked, across)
        buffer = io.BytesIO()
        Image.fromarray(sheet.numpy(), "RGBA").save(buffer, "PNG", optimize=True)
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) <= budget:
            height, width = tiles.shape[2] + 2 * FRAME, tiles.shape[3] + 2 * FRAME
            return ContactSheet(Markup(uri), (sheet.shape[1], sheet.shape[0]), width, height, shown)
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


# --- the terminal -------------------------------------------------------------------------------------------

STYLES = {
    "INFECTED": "bold red",
    "SUSPICIOUS": "bold yellow",
    "NO SIGN FOUND": "cyan",
    "UNDECIDED": "magenta",
}


def to_terminal(report: Report) -> RenderableType:
    """A rich table with one row per model; below it what each model's owner should know and do."""
    table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for column in ("score / threshold", "p", "target", "flips", "seconds"):
        table.add_column(column, justify="left" if column == "target" else "right", overflow="fold")
    for model in report.models:
        table.add_row(*_terminal_row(model))
    return Group(table, *(line for model in report.models for line in _terminal_lines(model)))


def _terminal_row(model: ScannedModel) -> list[Text]:
    result = model.result or ScanResult(Verdict.UNDECIDED, "")
    trigger = None if result.target is None else result.triggers.get(result.target)
    cells = [
        f"{_number(result.score)} / {_number(result.threshold)}",
        _number(result.p_value),
        plain(model.class_name(result.target) or "–", 40),
        _percent(trigger.flip_rate if trigger else None),
        "–" if not math.isfinite(model.seconds) else f"{model.seconds:.1f}",
    ]
    return [
        Text(plain(model.path)),
        Text(model.verdict, STYLES.get(model.verdict, "bold magenta")),
        *map(Text, cells),
    ]


def _terminal_lines(model: ScannedModel) -> list[Text]:
    warnings = model.result.warnings if model.result else ()
    rule = f" [{model.error_rule}]" if model.error_rule else ""
    notes = [("reason", model.reason + rule)] if model.reason else []
    notes += [("assumed", text) for text in model.assumptions] + [("warning", text) for text in warnings]
    notes += [("do", model.remedy)]
    lines = [Text.assemble((plain(model.path), "bold"))]
    lines += [Text.assemble((f"  {word:<8} ", "dim"), plain(text, PROSE_LENGTH)) for word, text in notes]
    return lines
