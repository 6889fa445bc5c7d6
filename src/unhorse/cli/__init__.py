"""The command line. Nothing heavy is imported before a command needs it: --help answers at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from unhorse.cli.diagnosing import doctor
from unhorse.cli.explaining import explain
from unhorse.cli.guarding import guard_app
from unhorse.cli.inspecting import convert, inspect
from unhorse.cli.output import INTERRUPTED, command_line
from unhorse.cli.populations import benchmark, simulate, zoo_app
from unhorse.cli.repairing import repair
from unhorse.cli.scanning import scan, scanner_app
from unhorse.jobs import say
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.wording import PROSE_LENGTH, plain

app = App(
    name="unhorse",
    help="Find Trojans (backdoors) in image classifiers, guard or repair those you must run. Exit codes: 0 "
    "nothing at or above --fail-on, 1 finding, 2 failed, incomplete or undecided, 3 nothing scannable, 4 "
    "usage, 130 interrupted.",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # run() says what an interruption leaves
)
for command in (
    inspect,
    scan,
    convert,
    explain,
    scanner_app,
    guard_app,
    repair,
    zoo_app,
    simulate,
    benchmark,
    doctor,
):
    app.command(command)


@app.command
def demo(
    *,
    output: Annotated[Path, Parameter(alias="-o")] = Path("runs/demo"),
    seed: int = 0,
) -> int:
    """Train an infected and a benign digits model, scan both, guard and repair one, and write the report."""
    from unhorse.demo import run_demo

    return run_demo(output, seed=seed, command=command_line())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; no error of a user's making ends in a stack trace."""
    try:
        code = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        return 4
    except KeyboardInterrupt:
        say(INTERRUPTED)
        return 130
    except (LoadRefused, LoadFailed) as error:  # their words may come from a hostile file
        say(f"error: {plain(error, PROSE_LENGTH)}")
        return 4
    except ValueError as error:
        say(f"error: {error}")
        return 4
    except (OSError, RuntimeError) as error:
        say(f"error: {error}")
        return 2
    return int(code or 0)


def main() -> None:
    """The entry point of the `unhorse` command; SIGTERM interrupts it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run())
