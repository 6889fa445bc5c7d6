"""What several commands ask for: groups of flags, and what a model file does not say of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

MODEL = Group("What the file does not say", sort_key=2)
OUTPUT = Group("Output", sort_key=3)
COMPUTE = Group("Compute", sort_key=4)


@Parameter(name="*", group=MODEL, consume_multiple=True, negative=())
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The flags of that name; None means: as the file says."""

    arch: Annotated[str, Parameter(help="Architecture name; auto reads it from keys and shapes.")] = "auto"
    classes: Annotated[int | None, Parameter(help="Number of classes.")] = None
    size: Annotated[tuple[int, int] | None, Parameter(help="Input height and width.")] = None
    channels: Annotated[int | None, Parameter(help="Input channels, with --size.")] = None
    mean: Annotated[tuple[float, ...] | None, Parameter(help="Normalisation mean.")] = None
    std: Annotated[tuple[float, ...] | None, Parameter(help="Normalisation deviation.")] = None
    range: Annotated[tuple[float, float] | None, Parameter(help="Input range, e.g. 0 255.")] = None

    def loading(self) -> dict[str, Any]:
        """As arguments of survey.load."""
        return {
            "architecture": self.arch,
            "num_classes": self.classes,
            "image_size": self.size,
            "channels": self.channels,
            "mean": self.mean,
            "std": self.std,
            "value_range": self.range,
        }


AS_THE_FILE_SAYS = ModelOptions()


@Parameter(name="*", group=OUTPUT, negative=())
@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where a report goes beside the terminal, and what counts in the exit code."""

    html: Annotated[Path | None, Parameter(help="Write a self-contained page.")] = None
    json: Annotated[Path | None, Parameter(help="Write machine-readable results.")] = None
    sarif: Annotated[Path | None, Parameter(help="Write SARIF 2.1.0, for code scanning.")] = None
    junit: Annotated[Path | None, Parameter(help="Write JUnit XML, for CI.")] = None
    cyclonedx: Annotated[Path | None, Parameter(help="Write a CycloneDX 1.6 bill of materials.")] = None
    fail_on: Annotated[
        Literal["high", "medium", "low", "none"], Parameter(help="Severity that makes the exit code 1.")
    ] = "medium"
    baseline: Annotated[
        Path | None, Parameter(help="An older --json report: what it lists does not count again.")
    ] = None
    config: Annotated[
        Path | None, Parameter(help="Suppressions; unhorse.toml of the working folder if left out.")
    ] = None

    def files(self) -> dict[str, Path | None]:
        """As arguments of report.save."""
        return {name: getattr(self, name) for name in ("html", "json", "sarif", "junit", "cyclonedx")}


TERMINAL_ONLY = ReportOptions()
