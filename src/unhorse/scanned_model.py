"""What a report knows of one model file: what it is, what was assumed and found, and how the scan ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unhorse.rulebook import RULES
from unhorse.rules import Finding, LoadFailed, Severity
from unhorse.wording import FAILED, MEANING, NOT_SCANNED, REFUSED, REMEDY, SEVERITY, class_name

if TYPE_CHECKING:
    from unhorse.core import ScanResult

BROKEN = {LoadFailed.rule, "LD231"}
"""The rules of files that looked loadable and turned out broken: a failure, not a refusal."""


@dataclass(frozen=True)
class FileCounts:
    """How many files a command has seen. All but models and those NOT SCANNED are counted here.

    `parts` belong to models of several files; `archives` were read to their end, and their members are files
    as well; `harmless` counts by kind; `links` lead to another file that was seen.
    """

    seen: int = 0
    parts: int = 0
    archives: int = 0
    excluded: int = 0
    harmless: Mapping[str, int] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ScannedModel:
    """One network of a model file: what it is, what was assumed, and its scan result or why there is none.

    `sha256` is of the file or of its weights, `size` in bytes; `error_rule` names the broken rule, for
    programs; `opened` says where and how the file was opened. `findings` are those that the file gave, to
    which `findings_of` adds those that follow from the rest. An `inspected` file was looked at and not run:
    it has no result and is no failure for that. `key` says which of several networks of the file this is, and
    `flags` are those of the command line that say how it is opened.
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
    findings: tuple[Finding, ...] = ()
    format: str = ""
    opened: str = ""
    size: int = 0
    inspected: bool = False
    key: str = ""
    flags: str = ""

    @property
    def name(self) -> str:
        """The file, and which of its networks."""
        return f"{self.path} [{self.key}]" if self.key else self.path

    @property
    def refused(self) -> bool:
        """Whether it was not opened because it breaks a rule, rather than because it is broken."""
        return self.error_rule.startswith("LD") and self.error_rule in RULES and self.error_rule not in BROKEN

    @property
    def verdict(self) -> str:
        """The verdict's word; FAILED where there is an error or no result, NOT SCANNED if only looked at."""
        if self.inspected and (self.refused or not self.error):
            return NOT_SCANNED
        return FAILED if self.error or self.result is None else str(self.result.verdict)

    @property
    def severity(self) -> Severity:
        return SEVERITY.get(self.verdict, Severity.NONE)

    @property
    def reason(self) -> str:
        if self.error or (self.inspected and self.result is None):
            return self.error
        return "The scan ended without a result." if self.result is None else self.result.reason

    @property
    def remedy(self) -> str:
        return REMEDY[self._key]

    @property
    def meaning(self) -> str:
        """What the verdict says, and what it does not say."""
        return MEANING[self._key]

    @property
    def _key(self) -> str:
        return REFUSED if self.verdict == NOT_SCANNED and self.refused else self.verdict

    def class_name(self, index: int | None) -> str | None:
        """The name of class `index`, its number where the model names none, or None."""
        return None if index is None else class_name(self.class_names, index)
