"""What several commands ask for: groups of flags, and what a model file does not say of itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

MODEL = Group("What the file does not say", sort_key=2)
FILES = Group("Files", sort_key=1)
OUTPUT = Group("Output", sort_key=3)
COMPUTE = Group("Compute", sort_key=4)


@Parameter(name="*", group=MODEL, consume_multiple=True, negative=())
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The flags of that name; None means: as the file says."""

    arch: Annotated[str, Parameter(help="Architecture name; auto reads it from keys and shapes.")] = "auto"
    layers: Annotated[
        str | None,
        Parameter(help='A plain network in words: "conv relu maxpool2 flatten linear" (docs/formats.md).'),
    ] = None
    classes: Annotated[int | None, Parameter(help="Number of classes.")] = None
    output_name: Annotated[
        str | None, Parameter(help="The output that holds the logits: its name or its place.")
    ] = None
    size: Annotated[tuple[int, int] | None, Parameter(help="Input height and width.")] = None
    channels: Annotated[int | None, Parameter(help="Input channels, with --size.")] = None
    mean: Annotated[tuple[float, ...] | None, Parameter(help="Normalisation mean.")] = None
    std: Annotated[tuple[float, ...] | None, Parameter(help="Normalisation deviation.")] = None
    range: Annotated[tuple[float, float] | None, Parameter(help="Input range, e.g. 0 255.")] = None
    network: Annotated[
        str | None,
        Parameter(help="FILE.py:NAME, your class or factory for these weights; run only in the sandbox."),
    ] = None
    network_args: Annotated[str | None, Parameter(help="Its arguments as JSON: '{\"num_classes\": 10}'.")] = (
        None
    )
    trust_network: Annotated[
        bool, Parameter(help="Run it also where the sandbox is weaker than Landlock with seccomp.")
    ] = False
    key: Annotated[str | None, Parameter(help="Which of several networks in the file.")] = None

    def flags(self) -> str:
        """The flags that were given, as a shell takes them, for a command that opens the same model."""
        given: list[str] = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value == entry.default:
                continue
            given.append("--" + entry.name.replace("_", "-"))
            if value is not True:
                given += map(str, value if isinstance(value, tuple) else (value,))
        return shlex.join(given)

    def loading(self) -> dict[str, Any]:
        """As arguments of survey.load; the network file is read here, and not run."""
        return self._network() | {
            "architecture": self.arch,
            "layers": self.layers,
            "num_classes": self.classes,
            "output": self.output_name,
            "image_size": self.size,
            "channels": self.channels,
            "mean": self.mean,
            "std": self.std,
            "value_range": self.range,
            "key": self.key,
        }

    def _network(self) -> dict[str, Any]:
        if self.network is None:
            if self.network_args is not None or self.trust_network:
                raise ValueError("--network-args and --trust-network go with --network FILE.py:NAME")
            return {}
        from unhorse.loading.network_code import read_network

        return {"network": read_network(self.network, self.network_args, trusted=self.trust_network)}


AS_THE_FILE_SAYS = ModelOptions()


@Parameter(name="*", group=MODEL, consume_multiple=True, negative=())
@dataclass(frozen=True, kw_only=True)
class ScannedModelOptions(ModelOptions):
    """The same for a command that writes no model, where --output names one of the network's outputs, too."""

    output_name: Annotated[
        str | None,
        Parameter(
            name=("--output", "--output-name"),
            help="The output that holds the logits: its name or its place.",
        ),
    ] = None


SCANNED_AS_THE_FILE_SAYS = ScannedModelOptions()


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


@Parameter(name="*", group=FILES, negative=())
@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Which files below the paths count; those left out are counted in the report."""

    exclude: Annotated[
        tuple[str, ...], Parameter(help="Leave out files of this pattern, e.g. '*.parquet'; repeatable.")
    ] = ()
    include: Annotated[
        tuple[str, ...], Parameter(help="Look only at files of this pattern; repeatable.")
    ] = ()


EVERY_FILE = FileOptions()


@Parameter(name="*", group=COMPUTE, negative=())
@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where jobs run, and how many at a time."""

    jobs: Annotated[
        int | None, Parameter(help="Jobs at a time; 2 if left out, on a cluster all that have room.")
    ] = None
    engine: Annotated[
        Literal["local", "ray"], Parameter(help="Processes here, or tasks of a Ray cluster.")
    ] = "local"
    address: Annotated[
        str | None,
        Parameter(help="The Ray cluster: host:port, auto (one running here), or local (one of its own)."),
    ] = None
    gpus_per_job: Annotated[
        float, Parameter(help="GPUs of a job on Ray: 0.25 puts four on one; at 0 a job sees none.")
    ] = 0.0
    cpus_per_job: Annotated[float, Parameter(help="CPUs, and so threads, of a job on Ray.")] = 1.0

    @contextmanager
    def open(self) -> Iterator[int]:
        """Jobs inside run on the engine; gives the number of workers to ask for."""
        from unhorse import jobs

        with jobs.engine(
            self.engine,
            address=self.address,
            cpus_per_job=self.cpus_per_job,
            gpus_per_job=self.gpus_per_job,
        ):
            here = (
                self.engine == "local" or (self.address or os.environ.get("RAY_ADDRESS", "local")) == "local"
            )
            yield self.jobs if self.jobs is not None else 2 if here else 0


TWO_JOBS_HERE = EngineOptions()
