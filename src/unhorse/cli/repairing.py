"""`repair`: a copy of the model without its Trojan, and what was measured of both."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from unhorse.cli.guarding import Clean, Device, Html, Json, Labels, Split
from unhorse.cli.options import AS_THE_FILE_SAYS, COMPUTE, OUTPUT, ModelOptions
from unhorse.cli.output import check_writable, command_line, show
from unhorse.cli.scanning import Effort
from unhorse.jobs import say

Method = Literal["unlearning", "neuron-pruning", "fine-pruning", "pruning", "fine-tuning", "nad"]
ScannerName = Literal["generalist", "activation-outlier", "neural-cleanse"]


def repair(  # noqa: PLR0913 - one parameter per flag
    model: Annotated[Path, Parameter(help="A model file or classifier folder, as `scan` takes it.")],
    /,
    *,
    clean: Clean,
    method: Annotated[
        Method, Parameter(help="unlearning and neuron-pruning need a trigger, which a scan finds.")
    ] = "unlearning",
    output: Annotated[
        Path | None, Parameter(alias="-o", group=OUTPUT, help="Folder; runs/repaired-MODEL if left out.")
    ] = None,
    split: Annotated[Split | None, Parameter(help="Which images; test, valid or train is tried.")] = None,
    images: Annotated[int | None, Parameter(help="Use so many of them, drawn by --seed.")] = None,
    labels: Labels = None,
    unlabelled: Annotated[
        bool, Parameter(negative=(), help="Take the model's own predictions for labels.")
    ] = False,
    card: Annotated[Path | None, Parameter(help="The victim's folder: its own trigger is measured.")] = None,
    trojaned: Annotated[
        Path | None, Parameter(help="Images that carry a trigger, in a folder per true class.")
    ] = None,
    target: Annotated[str | None, Parameter(help="The class that --trojaned images aim at.")] = None,
    scanner: Annotated[ScannerName | None, Parameter(help="What scans before and after.")] = None,
    effort: Annotated[Effort, Parameter(group=COMPUTE, help="How long to search.")] = "standard",
    epochs: Annotated[int | None, Parameter(help="The method's own, or more where images are few.")] = None,
    options: ModelOptions = AS_THE_FILE_SAYS,
    device: Device = "auto",
    seed: Annotated[int, Parameter(group=COMPUTE)] = 0,
    html: Html = None,
    json: Json = None,
) -> int:
    """Write a cured copy, and measure both: 70 % of the clean images repair, 30 % are held out to measure."""
    from unhorse import survey
    from unhorse.cli import guard_runs, repair_runs
    from unhorse.cli.clean_images import ImageSource
    from unhorse.cli.repair_measures import stamped_by_victim

    if card is not None and trojaned is not None:
        raise ValueError("--card and --trojaned both give Trojan images: give one of them")
    if target is not None and trojaned is None:
        raise ValueError("--target belongs to --trojaned: a victim's card knows its own target")
    started = time.monotonic()
    folder = Path("runs") / f"repaired-{model.resolve().stem}" if output is None else output
    repair_runs.check_folder(folder)
    check_writable({"html": html, "json": json, "output": None if folder.exists() else folder})
    request = repair_runs.RepairRequest(method, epochs, scanner, effort, seed)
    request.make_repair(images=1)  # refuses a flag that does not fit the method before anything is read
    source = ImageSource(clean, split, labels, unlabelled)
    loading = {**options.loading(), "clean": source.read}
    classifier = survey.load(model, loading).to(survey.choose_device(device))
    parts = repair_runs.divide(classifier, source.read(classifier), images=images, seed=seed)
    attacked = None
    if card is not None:
        attacked = stamped_by_victim(card, classifier, parts.held_out)
    elif trojaned is not None:
        attacked = guard_runs.stamped_in_folder(ImageSource(trojaned, None, labels), classifier, target)
    repaired = repair_runs.run_repair(
        classifier, parts, request, folder, path=model, source=str(source), attacked=attacked
    )
    seconds = time.monotonic() - started
    repaired = replace(repaired, trojan_images=str(card or trojaned or ""), seconds=seconds)
    show(repair_runs.report_of(repaired, command_line(), device, request), html, json)
    say(f"repaired model written to {folder}: scan it again, or guard it (`unhorse guard fit {folder}`)")
    return 0
