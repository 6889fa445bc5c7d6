"""Where the commands' results go: the terminal, the page, the JSON; and lines for who waits."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unhorse.jobs import say

if TYPE_CHECKING:
    from unhorse.cli.options import FileOptions, ReportOptions
    from unhorse.loading.listing import Listing
    from unhorse.report import Report


INTERRUPTED = "interrupted; what was finished is kept, call again to go on"


def check_writable(files: Mapping[str, Path | None]) -> None:
    """ValueError for the first file, by its flag, that could not be written: to be called before any work."""
    for flag, path in files.items():
        if path is None:
            continue
        remedy = f"choose another place for --{flag}"
        if path.is_dir():
            raise ValueError(f"{path} is a folder: {remedy}")
        try:
            # folders that are missing are made when there is something to write, and not before
            present = next(folder for folder in path.absolute().parents if folder.exists())
            with tempfile.NamedTemporaryFile(dir=present):
                pass
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror or error}): {remedy}") from error


def show(result: Report, html: Path | None, json: Path | None) -> None:
    """Prints the terminal's table and writes the page and the JSON where they are asked for."""
    _print_and_save(result, {"html": html, "json": json})


def _print_and_save(result: Report, files: Mapping[str, Path | None]) -> None:
    from rich.console import Console

    from unhorse import report

    Console().print(report.to_terminal(result))
    problems = ""
    try:
        report.save(result, **files)
    except OSError as error:
        problems = str(error)
        say(f"warning: {problems}")
    for path in files.values():
        if path is not None and f"{path} is not written" not in problems:
            say(f"written: {path}")


def delivery(options: ReportOptions, flags: str = "") -> Callable[[Report], int]:
    """Gives a function that prints and writes a report and returns the exit code, what is suppressed not
    counted. `flags` said how the models were opened: remedies repeat them. Configuration, baseline and places
    to write to are tried at once: an error costs no scan.
    """
    from unhorse import suppression

    check_writable(options.files())

    config = suppression.read_config(options.config)
    baseline = frozenset() if options.baseline is None else suppression.read_baseline(options.baseline)

    def deliver(result: Report) -> int:
        from unhorse import report

        models = tuple(replace(model, flags=flags) for model in result.models)
        result = suppression.apply(replace(result, models=models), config, baseline)
        _print_and_save(result, options.files())
        if result.interrupted:
            say(INTERRUPTED)
        return report.exit_code(result, options.fail_on)

    return deliver


def interrupted(models: Sequence[Path]) -> Report:
    """The report of a command that a signal ended before it came to the first of its models."""
    from unhorse.report import Report, ScannedModel

    error = "interrupted before this model was opened"
    unseen = tuple(ScannedModel(str(path), error=error) for path in models)
    return Report(unseen, command=command_line(), interrupted=True)


def listing(paths: Sequence[Path], files: FileOptions, output: ReportOptions) -> Listing:
    """What is to be done with each file of the paths, as the flags and the configuration say."""
    from unhorse import suppression
    from unhorse.loading.folders import list_files
    from unhorse.loading.listing import Patterns

    config = suppression.read_config(output.config)
    return list_files(paths, Patterns((*files.exclude, *config.exclude), files.include or config.include))


def command_line() -> tuple[str, ...]:
    """The command as a report repeats it."""
    return ("unhorse", *sys.argv[1:])


def epochs_progress(label: str, interval: float = 10.0) -> Callable[[int, int, str], None]:
    """Gives a function to call with (epochs done, of how many, words on the last): lines with an ETA, which
    leaves out what an earlier run has done.
    """
    started = spoken = time.monotonic()
    before: int | None = None

    def step(done: int, total: int, words: str) -> None:
        nonlocal before, spoken
        before = done - 1 if before is None else before
        now = time.monotonic()
        if now - spoken >= interval or done == total:
            spoken = now
            left = (now - started) / (done - before) * (total - done)
            say(f"{label}: {done}/{total} epochs, {words}, {left:.0f} s left")

    return step
