"""Independent jobs in worker processes, with progress and an ETA. Durable results are the job's own,
atomically renamed files.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """One finished job: its item, and either its value or its error."""

    item: Any
    value: Any
    error: BaseException | None


def run(
    function: Callable[[Any], Any], items: Sequence[Any], *, workers: int = 1, attempts: int = 3
) -> Iterator[Outcome]:
    """Yields outcomes as they come. With one worker the jobs run here; with more, in processes of one thread
    each.

    An exception of `function` is that job's outcome. When a worker dies (killed, out of memory) the jobs that
    it took down are started again; after `attempts` rounds in a row that finish nothing, what is left is
    given up, each with an error.
    """
    if workers <= 1 or len(items) <= 1:
        for item in items:
            yield _attempt(function, item)
        return
    remaining, fruitless = list(items), 0
    while remaining and fruitless < attempts:
        before = len(remaining)
        remaining = yield from _round(function, remaining, min(workers, before))
        fruitless = fruitless + 1 if len(remaining) == before else 0
    for item in remaining:
        yield Outcome(item, None, RuntimeError("its worker process died (killed or out of memory)"))


def _round(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int
) -> Generator[Outcome, None, list[Any]]:
    """Yields the outcomes of one pool; returns the items that a dying worker left undone."""
    from joblib.externals.loky import ProcessPoolExecutor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    executor = ProcessPoolExecutor(max_workers=workers, initializer=_single_thread)
    undone = []
    try:
        futures: dict[Future[Outcome], Any] = {
            executor.submit(_attempt_away, function, item): item for item in items
        }
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                undone.append(futures[future])
    finally:
        executor.shutdown(wait=False, kill_workers=True)
    return undone


def call(job: Callable[[], Any]) -> Any:
    """`function` for items that are callables themselves."""
    return job()


def _attempt(function: Callable[[Any], Any], item: Any) -> Outcome:
    try:
        return Outcome(item, function(item), None)
    except Exception as error:  # whatever a job raises is its outcome, and the others go on
        return Outcome(item, None, error)


def _attempt_away(function: Callable[[Any], Any], item: Any) -> Outcome:
    """An attempt whose error can be sent home: one that cannot be rebuilt there would break the pool."""
    outcome = _attempt(function, item)
    error = outcome.error
    if error is not None and _attempt(copy.deepcopy, error).error is not None:
        return outcome._replace(error=RuntimeError(f"{type(error).__name__}: {error}"))
    return outcome


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


@contextmanager
def progress(label: str, total: int, *, interval: float = 20.0) -> Iterator[Callable[[], None]]:
    """Gives a function to call once per finished step: a bar with an ETA on a terminal, else a line now and
    then, on stderr.
    """
    if sys.stderr.isatty():
        from rich.console import Console  # late: --help does not wait for it
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(
            *columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True)
        ) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
        return
    started = spoken = time.monotonic()
    done = 0

    def step() -> None:
        nonlocal done, spoken
        done += 1
        now = time.monotonic()
        if now - spoken >= interval or done == total:
            spoken = now
            rate = done / max(now - started, 1e-9)
            left = (total - done) / rate
            say(f"{label}: {done}/{total}, {60 * rate:.1f} a minute, ETA {_clock(left)}")

    yield step


def track(label: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """The items, with progress."""
    with progress(label, total) as step:
        for item in items:
            yield item
            step()


def say(text: str) -> None:
    """A line for the person who waits, on stderr: what a program reads is on stdout."""
    print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"
