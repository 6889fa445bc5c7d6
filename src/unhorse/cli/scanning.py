"""`scan` and `scanner`: is this model trojaned?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from unhorse.cli.labels import read_class_names
from unhorse.cli.options import (
    COMPUTE,
    EVERY_FILE,
    MODEL,
    SCANNED_AS_THE_FILE_SAYS,
    TERMINAL_ONLY,
    TWO_JOBS_HERE,
    EngineOptions,
    FileOptions,
    ReportOptions,
    ScannedModelOptions,
)
from unhorse.cli.output import command_line, delivery, epochs_progress, interrupted, listing
from unhorse.jobs import say

Effort = Literal["quick", "standard", "deep"]

scanner_app = App(name="scanner", help="Learned scanners.")


def scan(  # noqa: PLR0913 - one parameter per flag
    paths: Annotated[
        tuple[Path, ...], Parameter(help="Model files, classifier folders, archives, or folders of them.")
    ],
    /,
    *,
    scanner: Annotated[
        Path | None,
        Parameter(
            help="generalist (the default), activation-outlier (margins alone: faster), "
            "neural-cleanse (with --clean), or a fitted scanner's folder (`scanner fit`)."
        ),
    ] = None,
    reference: Annotated[
        Path | None, Parameter(help="A folder of your own benign models: gives a p-value.")
    ] = None,
    clean: Annotated[
        Path | None, Parameter(help="Clean images (folder or parquet) to demonstrate a trigger on.")
    ] = None,
    effort: Annotated[Effort, Parameter(group=COMPUTE, help="How long to search.")] = "standard",
    device: Annotated[str, Parameter(group=COMPUTE)] = "auto",
    seed: Annotated[int, Parameter(group=COMPUTE)] = 0,
    jobs: Annotated[int, Parameter(group=COMPUTE, help="Models at a time.")] = 1,
    labels: Annotated[
        Path | None, Parameter(group=MODEL, help="Class names: a text file with one a line, or JSON.")
    ] = None,
    files: FileOptions = EVERY_FILE,
    options: ScannedModelOptions = SCANNED_AS_THE_FILE_SAYS,
    timeout: Annotated[
        float | None, Parameter(group=COMPUTE, help="Seconds per model; then UNDECIDED, with what was seen.")
    ] = None,
    use_cache: Annotated[
        bool, Parameter(name="--cache", group=COMPUTE, help="Take what was scanned before from the cache.")
    ] = True,
    output: ReportOptions = TERMINAL_ONLY,
) -> int:
    """Say whether models are trojaned, with evidence; no training data needed."""
    from unhorse.model_files import prepare, with_listing

    deliver = delivery(output, options.flags())
    found = listing(paths, files, output)
    models = [*found.models, *(Path(looked.path) for looked in found.looked)]
    names = None if labels is None else read_class_names(labels)
    try:
        if jobs == 1:
            prepare(models)
        from unhorse.survey import Request, scan_models

        request = Request(
            scanner=scanner,
            reference=reference,
            clean=clean,
            effort=effort,
            device=device,
            seed=seed,
            loading=options.loading() | {"class_names": names},
            timeout=timeout,
            cached=use_cache,
        )
        report = scan_models(models, request, workers=jobs, command=command_line())
    except KeyboardInterrupt:
        report = interrupted(models)
    return deliver(with_listing(report, found))


@scanner_app.command
def fit(
    population: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    kind: Literal["set", "convolution", "transformer"] = "set",
    maps: Literal["min", "max", "both"] = "both",
    preset: Annotated[
        str | None, Parameter(help="Signature preset; the kind's own default if left out.")
    ] = None,
    epochs: int | None = None,
    seed: int = 0,
    engine: EngineOptions = TWO_JOBS_HERE,
) -> int:
    """Fit a scanner on the signatures of a population's `fit` split."""
    from unhorse.benchmark.signatures import population_signatures
    from unhorse.scanners.signature_scanner import SignatureScanner

    settings: dict[str, Any] = {} if preset is None else {"preset": preset}
    scanner = SignatureScanner(kind=kind, maps=maps, epochs=epochs, seed=seed, **settings)
    with engine.open() as workers:
        register, signatures = population_signatures(population, "fit", scanner.preset, workers=workers)
    say(f"fitting on {len(register)} models, {sum(member.trojaned for member in register)} of them trojaned")
    trojaned, targets = [member.trojaned for member in register], [member.target for member in register]
    step = epochs_progress("fitting")

    def progress(done: int, total: int, loss: float) -> None:
        step(done, total, f"validation loss {loss:.4f}")

    scanner.fit(signatures, trojaned, targets, progress=progress)
    scanner.save(output)
    say(f"scanner written to {output}: use it with `unhorse scan MODEL --scanner {output}`")
    return 0
