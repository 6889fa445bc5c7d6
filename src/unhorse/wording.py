"""The words of a report: what each verdict means and asks for, and text that is safe to show."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from unhorse.rules import Severity

FAILED, NOT_SCANNED = "FAILED", "NOT SCANNED"
REFUSED = "refused"
"""The key of MEANING and REMEDY for a file that is NOT SCANNED because it breaks a rule."""
NAME_LENGTH, PROSE_LENGTH = 120, 2000
ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b."
)


SEVERITY = {"INFECTED": Severity.HIGH, "SUSPICIOUS": Severity.MEDIUM}
"""How loud a verdict is; every other one is no finding about the model's behaviour."""
ORDER = ("INFECTED", "SUSPICIOUS", "UNDECIDED", FAILED, NOT_SCANNED, "NO SIGN FOUND")
MEANING = {
    "INFECTED": "A trigger that forces the target class was demonstrated, and the score supports it.",
    "SUSPICIOUS": "Either the score passed its threshold or a trigger was demonstrated, but not both.",
    "NO SIGN FOUND": "The score stayed below its threshold and no trigger was demonstrated. "
    "This does not prove that there is none.",
    "UNDECIDED": "The scanner could not judge this model. It counts as not scanned.",
    FAILED: "The model could not be opened or scanned. Nothing is known about its behaviour.",
    NOT_SCANNED: "The file was looked at, and nothing of it was run. Its behaviour was not examined.",
    REFUSED: "The file breaks a rule and was not opened. Its behaviour was not examined.",
}
REMEDY = {
    "INFECTED": "Do not deploy. Send the publisher this report; ask for the training data and a new model.",
    "SUSPICIOUS": "Do not deploy yet. Scan again with --effort deep; pass --reference DIR with benign models "
    "of the same architecture and data for a p-value; ask the publisher where the training data came from.",
    "NO SIGN FOUND": "Compare the hash with the publisher's, and keep this report with the model.",
    "UNDECIDED": "Do not deploy on the strength of this scan. Correct the cause and scan again.",
    FAILED: "Do not deploy on the strength of this scan. Correct the cause and scan again.",
    REFUSED: "Do not use this file before the findings are settled.",
    NOT_SCANNED: "Follow the findings, if any. Then scan it: what a model does is seen only by running it.",
}
STYLES = {
    "INFECTED": "bold red",
    "SUSPICIOUS": "bold yellow",
    "NO SIGN FOUND": "cyan",
    "UNDECIDED": "magenta",
    NOT_SCANNED: "blue",
}


def plain(text: object, limit: int = NAME_LENGTH) -> str:
    """`text` without escape sequences, control, bidirectional or invisible characters, its middle cut out."""
    raw = str(text)
    if len(raw) <= limit and raw.isascii() and raw.isprintable():  # nearly all, and 30 times faster
        return " ".join(raw.split())
    if len(raw) > 8 * limit:
        raw = f"{raw[: 4 * limit]}…{raw[-4 * limit :]}"
    raw = " ".join(ESCAPES.sub("", raw).split())
    shown = "".join(letter for letter in raw if not unicodedata.category(letter).startswith("C"))
    if len(shown) <= limit:
        return shown
    tail = (limit - 1) // 3
    return f"{shown[: limit - 1 - tail]}…{shown[-tail:]}"


def class_name(names: Sequence[str], index: int) -> str:
    """The name of class `index`, its number where there is none."""
    return plain(names[index]) if 0 <= index < len(names) else str(index)


def number(value: float | None) -> str:
    """Three significant digits, a dash for what is missing."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in percent, a dash for what is missing."""
    return "–" if share is None or not math.isfinite(share) else f"{share:.1%}"


def finite(value: object) -> object:
    """`value` in the types of JSON; numbers that JSON cannot carry become None."""
    if hasattr(value, "tolist"):  # tensors, numpy arrays and numbers
        value = value.tolist()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {plain(key): finite(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [finite(item) for item in value]
    return plain(value, PROSE_LENGTH)
