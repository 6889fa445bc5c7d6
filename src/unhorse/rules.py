"""The rules that findings refer to, the findings, and the two ways in which a file is not loaded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is if the finding is right; NONE is for what is only worth knowing."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"
    NONE = "none"

    @property
    def rank(self) -> int:
        """0 for NONE up to 3 for HIGH."""
        return ("none", "low", "medium", "high").index(self)


class Confidence(StrEnum):
    """How sure the finding is."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


@dataclass(frozen=True)
class Rule:
    """What `unhorse explain` prints: `why` it matters, the `remedy`, and where to read more.

    PATH in the remedy stands for the model's file.
    """

    id: str
    title: str
    severity: Severity
    why: str
    remedy: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing found in a model file; `where` names the member, tensor or class. All text may be hostile.

    `suppressed` says why it does not count; empty: it counts.
    """

    rule: str
    message: str
    remedy: str
    severity: Severity
    confidence: Confidence = Confidence.HIGH
    where: str = ""
    suppressed: str = ""


class LoadRefused(ValueError):
    """A file that unhorse will not load: which `rule` (LD2xx), for what `reason`, and the `remedy`."""

    def __init__(self, rule: str, reason: str, remedy: str) -> None:
        super().__init__(f"{rule} {reason}: {remedy}")
        self.rule, self.reason, self.remedy = rule, reason, remedy


class LoadFailed(ValueError):
    """A file that looked loadable and turned out broken, or broke the process that opened it."""

    rule = "LD230"

    def __init__(self, reason: str, remedy: str = "download or export it again") -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason, self.remedy = reason, remedy
