"""`guard`: which inputs carry a trigger? Fitting, measuring and using an input filter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from unhorse.cli.options import AS_THE_FILE_SAYS, COMPUTE, OUTPUT, ModelOptions
from unhorse.cli.output import check_writable, command_line, show
from unhorse.jobs import say

Split = Literal["train", "valid", "test"]
Device = Annotated[str, Parameter(group=COMPUTE)]
Clean = Annotated[Path, Parameter(help="Clean images: a folder per class, parquet, or a data set's name.")]
Labels = Annotated[
    Path | None, Parameter(help="Maps folders to classes: JSON object, or lines folder TAB class.")
]
Html = Annotated[Path | None, Parameter(group=OUTPUT, help="Write a self-contained page.")]
Json = Annotated[Path | None, Parameter(group=OUTPUT, help="Write machine-readable results.")]

guard_app = App(name="guard", help="Filter the trigger out of the input: guarded models.")


@guard_app.command
def fit(  # noqa: PLR0913 - one parameter per flag
    model: Annotated[Path, Parameter(help="A model file or classifier folder, as `scan` takes it.")],
    /,
    *,
    clean: Clean,
    filter: Annotated[
        Literal["aif", "vif", "if"], Parameter(help="aif stands up to more triggers, vif is faster.")
    ] = "aif",
    output: Annotated[
        Path | None, Parameter(alias="-o", group=OUTPUT, help="Folder; runs/guard-MODEL if left out.")
    ] = None,
    split: Annotated[Split | None, Parameter(help="Which images; test, valid or train is tried.")] = None,
    images: Annotated[int | None, Parameter(help="Use so many of them, drawn by --seed.")] = None,
    labels: Labels = None,
    unlabelled: Annotated[
        bool, Parameter(negative=(), help="Take the model's own predictions for labels.")
    ] = False,
    filter_size: Annotated[
        Literal["auto", "tiny", "small", "base"], Parameter(help="Size of the filter's network.")
    ] = "auto",
    epochs: Annotated[int | None, Parameter(help="30, or more where images are few, if left out.")] = None,
    mask_norm: Annotated[
        float | None,
        Parameter(
            help="aif: the largest trigger to prepare for, as the side of an opaque patch in pixels; a fifth "
            "of the image's if left out."
        ),
    ] = None,
    fpr: Annotated[float, Parameter(help="Share of clean images that may alarm.")] = 0.05,
    hard: Annotated[
        bool, Parameter(negative=(), help="Alarm where filtering changes the class, whatever the rate.")
    ] = False,
    policy: Annotated[
        Literal["hold", "observe", "replace"],
        Parameter(help="On alarm: no label, the classifier's, or the filtered image's."),
    ] = "hold",
    options: ModelOptions = AS_THE_FILE_SAYS,
    device: Device = "auto",
    seed: Annotated[int, Parameter(group=COMPUTE)] = 0,
    export: Annotated[
        bool, Parameter(negative=(), group=OUTPUT, help="Also write guard.pt2, for torch.export.load.")
    ] = False,
    html: Html = None,
    json: Json = None,
) -> int:
    """Fit a filter on clean images, calibrate the alarm on others, and write the guarded model."""
    from unhorse import survey
    from unhorse.cli import guard_runs
    from unhorse.cli.clean_images import ImageSource
    from unhorse.datasets import subset

    started = time.monotonic()
    folder = Path("runs") / f"guard-{model.resolve().stem}" if output is None else output
    guard_runs.check_folder(folder)
    check_writable({"html": html, "json": json, "output": None if folder.exists() else folder})
    request = guard_runs.FitRequest(
        filter, filter_size, epochs, None if hard else fpr, policy, seed, mask_norm=mask_norm
    )
    source = ImageSource(clean, split, labels, unlabelled)
    loading = {**options.loading(), "clean": source.read}
    classifier = survey.load(model, loading).to(survey.choose_device(device))
    data = source.read(classifier)
    data = data if images is None else subset(data, images, seed=seed)
    guard = guard_runs.fit_guard(classifier, data, request, folder, source=str(source), path=model)
    if export:
        say(f"written: {guard_runs.export(guard, folder)}")
    guarded = guard_runs.describe(
        guard,
        guard_runs.read_record(folder),
        None,
        folder=str(folder),
        clean_images=f"those of the calibration, of {source}",
        exhibits=guard_runs.pictures(guard, data, None, None),
        warnings=guard_runs.warnings_of(request, len(data)),
        seconds=time.monotonic() - started,
    )
    show(guard_runs.report_of(guarded, command_line(), device, seed), html, json)
    say(f"guard written to {folder}: measure it with `unhorse guard evaluate {folder} --clean ...`")
    return 0


@guard_app.command
def evaluate(  # noqa: PLR0913 - one parameter per flag
    guard: Annotated[Path, Parameter(help="A folder written by `unhorse guard fit`.")],
    /,
    *,
    clean: Clean,
    card: Annotated[Path | None, Parameter(help="The victim's folder: its own trigger is measured.")] = None,
    trojaned: Annotated[
        Path | None, Parameter(help="Images that carry a trigger, in a folder per true class.")
    ] = None,
    target: Annotated[str | None, Parameter(help="The class that --trojaned images aim at.")] = None,
    split: Annotated[Split | None, Parameter(help="Which images; test, valid or train is tried.")] = None,
    labels: Labels = None,
    unlabelled: Annotated[bool, Parameter(negative=(), help="Leave the labels out.")] = False,
    device: Device = "auto",
    html: Html = None,
    json: Json = None,
) -> int:
    """Measure clean drop and alarms, and what the guard stops where Trojan images are given."""
    from unhorse import survey
    from unhorse.cli import guard_runs
    from unhorse.cli.clean_images import ImageSource, unused
    from unhorse.monitors.guard import load_guard

    if card is not None and trojaned is not None:
        raise ValueError("--card and --trojaned both give Trojan images: give one of them")
    if target is not None and trojaned is None:
        raise ValueError("--target belongs to --trojaned: a victim's card knows its own target")
    started = time.monotonic()
    check_writable({"html": html, "json": json})
    loaded, record = load_guard(guard), guard_runs.read_record(guard)
    loaded.model.to(survey.choose_device(device))
    source = ImageSource(clean, split, labels, unlabelled)
    data, warnings = unused(source.read(loaded.model), None if record is None else record.images)
    attacked = None
    if card is not None:
        attacked = guard_runs.stamped_by_victim(card, loaded, data)
    elif trojaned is not None:
        stamped = ImageSource(trojaned, None, labels)
        attacked = guard_runs.stamped_in_folder(stamped, loaded.model, target)
    guarded = guard_runs.measure(
        loaded,
        data,
        attacked,
        record=record,
        warnings=warnings,
        folder=str(guard),
        clean_images=str(source),
        trojan_images=str(card or trojaned or ""),
        seconds=time.monotonic() - started,
    )
    show(guard_runs.report_of(guarded, command_line(), device), html, json)
    return 0


@guard_app.command
def apply(
    guard: Annotated[Path, Parameter(help="A folder written by `unhorse guard fit`.")],
    images: Annotated[tuple[Path, ...], Parameter(help="Image files, or folders of them.")],
    /,
    *,
    output: Annotated[
        Path | None,
        Parameter(alias="-o", group=OUTPUT, help="Folder for filtered images and counter-triggers."),
    ] = None,
    device: Device = "auto",
    json: Json = None,
) -> int:
    """Label images by a guarded model; one that is held gets none. The exit code is 1 where any alarms."""
    from unhorse import survey
    from unhorse.cli import applying
    from unhorse.monitors.guard import load_guard

    check_writable({"json": json})
    loaded = load_guard(guard)
    loaded.model.to(survey.choose_device(device))
    judged = applying.judge(loaded, applying.image_files(images), output)
    applying.show(judged)
    if json is not None:
        applying.save(judged, json, guard=guard, policy=loaded.policy, threshold=loaded.threshold)
        say(f"written: {json}")
    return int(any(image.alarm for image in judged))
