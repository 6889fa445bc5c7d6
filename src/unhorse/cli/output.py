"""Where the commands' results go: the terminal, the page, the JSON; and lines for who waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from unhorse.jobs import say

if TYPE_CHECKING:
    from unhorse.cli.options import ReportOptions
    from unhorse.report import Report


def show(result: Report, html: Path | None, json: Path | None) -> None:
    """Prints the terminal's table and writes the page and the JSON where they are asked for."""
    from rich.console import Console

    from unhorse import report

    Console().print(report.to_terminal(result))
    report.save(result, html=html, json=json)
    for path in (html, json):
        if path is not None:
            say(f"written: {path}")


def delivery(options: ReportOptions) -> Callable[[Report], int]:
    """Gives a function that prints and writes a report and returns the exit code, what is suppressed not
    counted. Configuration and baseline are read at once: an error in them costs no scan.
    """
    from unhorse import suppression

    config = suppression.read_config(options.config)
    baseline = frozenset() if options.baseline is None else suppression.read_baseline(options.baseline)

    def deliver(result: Report) -> int:
        from rich.console import Console

        from unhorse import report

        result = suppression.apply(result, config, baseline)
        Console().print(report.to_terminal(result))
        report.save(result, **options.files())
        for path in options.files().values():
            if path is not None:
                say(f"written: {path}")
        return report.exit_code(result, options.fail_on)

    return deliver


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
