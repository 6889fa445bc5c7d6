"""Independent jobs, here, in worker processes or on a Ray cluster, with progress and an ETA. Durable results
are the job's own, atomically renamed files: any engine goes on where another was stopped.
"""

from __future__ import annotations

import copy
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol


class Outcome(NamedTuple):
    """One finished job: its item, and either its value or its error."""

    item: Any
    value: Any
    error: BaseException | None


Job = Callable[[Any], Any]
Round = Callable[[Job, Sequence[Any], int], Generator[Outcome, None, list[Outcome]]]
"""(function, items, workers): yields outcomes; returns those whose worker died, each with what is known of
its death.
"""

_elsewhere: ContextVar[Round | None] = ContextVar("elsewhere", default=None)


@contextmanager
def engine(
    name: Literal["local", "ray"] = "local",
    *,
    address: str | None = None,
    cpus_per_job: float = 1,
    gpus_per_job: float = 0,
) -> Iterator[None]:
    """Where every `run` inside takes its jobs: to processes of this machine, or to a Ray cluster.

    `address` is a cluster's host:port, "auto" (one that runs here) or "local" (one of its own, as large as
    `workers`, that ends with the context); None is the environment's RAY_ADDRESS, else "local". A job is
    given that many CPUs (so many threads) and GPUs (fractions share one; at 0 it sees none). The nodes of a
    cluster need the folders that jobs read and write. ValueError where Ray is not installed, ConnectionError
    where no cluster answers.
    """
    if name not in ("local", "ray"):
        raise ValueError(f"unknown engine {name!r}: local or ray")
    if name == "local":
        if address is not None or gpus_per_job:
            raise ValueError("an address and GPUs per job are for Ray: choose the engine ray")
        opened: Any = nullcontext()
    else:
        from unhorse.ray_jobs import cluster  # late: Ray is large, and few ask for it

        opened = cluster(address, cpus_per_job=cpus_per_job, gpus_per_job=gpus_per_job)
    with opened as elsewhere:
        token = _elsewhere.set(elsewhere)
        try:
            yield
        finally:
            _elsewhere.reset(token)


def run(function: Job, items: Sequence[Any], *, workers: int = 1, attempts: int = 3) -> Iterator[Outcome]:
    """Yields outcomes as they come. With one worker the jobs run here; with more, in processes of one thread
    each; inside `engine("ray")` always there, at most `workers` at a time, or what fits if that is 0.

    An exception of `function` is that job's outcome. When a worker dies (killed, out of memory, its node
    lost) the jobs that it took down are started again; after `attempts` rounds in a row that finish nothing,
    what is left is given up, each with an error.
    """
    elsewhere = _elsewhere.get()
    if elsewhere is None and (workers <= 1 or len(items) <= 1):
        return (_attempt(function, item) for item in items)
    return _rounds(elsewhere or _round, function, items, workers, attempts)


def _rounds(
    one_round: Round, function: Job, items: Sequence[Any], workers: int, attempts: int
) -> Iterator[Outcome]:
    remaining, undone, fruitless = list(items), [], 0
    while remaining and fruitless < attempts:
        undone = yield from one_round(function, remaining, workers)
        fruitless = fruitless + 1 if len(undone) == len(remaining) else 0
        remaining = [outcome.item for outcome in undone]
        if undone and fruitless < attempts:
            say(f"{len(undone)} of {len(items)} jobs are started again; of the first, {undone[0].error}")
    yield from undone


def _round(function: Job, items: Sequence[Any], workers: int) -> Generator[Outcome, None, list[Outcome]]:
    """One pool of processes here: when a worker dies, all that were not finished are undone."""
    from joblib.externals.loky import ProcessPoolExecutor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    executor = ProcessPoolExecutor(max_workers=min(workers, len(items)), initializer=_single_thread)
    undone = []
    try:
        futures: dict[Future[Outcome], Any] = {
            executor.submit(attempt_away, function, item): item for item in items
        }
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                died = WorkerDied("its worker process died (killed or out of memory)")
                undone.append(Outcome(futures[future], None, died))
    finally:
        executor.shutdown(wait=False, kill_workers=True)
    return undone


def call(job: Callable[[], Any]) -> Any:
    """`function` for items that are callables themselves."""
    return job()


def _attempt(function: Job, item: Any) -> Outcome:
    try:
        return Outcome(item, function(item), None)
    except Exception as error:  # whatever a job raises is its outcome, and the others go on
        return Outcome(item, None, error)


def attempt_away(function: Job, item: Any) -> Outcome:
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


class FileJob(Protocol):
    """A job about one file."""

    @property
    def path(self) -> Path: ...

    def __call__(self) -> Any: ...


class Gathered(NamedTuple):
    """What jobs came to, by path: a value or, in words, an error; and whether a signal ended them early."""

    values: dict[Path, Any]
    errors: dict[Path, str]
    interrupted: bool


def gather(what: str, todo: Sequence[FileJob], *, workers: int = 1) -> Gathered:
    """Runs jobs about files, with progress if they are several; a signal (SIGINT, SIGTERM) ends them.

    `what` names them in errors: "the scan".
    """
    values: dict[Path, Any] = {}
    errors = {job.path: f"{what} was interrupted before it came to an end here" for job in todo}
    outcomes: Iterable[Outcome] = run(call, todo, workers=workers)
    try:
        for outcome in outcomes if len(todo) == 1 else track(what, outcomes, len(todo)):
            if outcome.error is None:
                values[outcome.item.path] = outcome.value
            else:
                errors[outcome.item.path] = internal_error(what, outcome.error)
    except KeyboardInterrupt:
        return Gathered(values, errors, True)
    return Gathered(values, errors, False)


class WorkerDied(RuntimeError):
    """The process or node that ran a job is gone, and with it what it knew."""


def internal_error(what: str, error: BaseException | None) -> str:
    """Words for an error that `what` ended with: it is ours, so no model is blamed, and our file is named."""
    if isinstance(error, WorkerDied):
        return f"{what} broke off: {error}"
    package = Path(__file__).parent
    frames = traceback.extract_tb(None if error is None else error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    where = f", at {Path(ours[-1].filename).relative_to(package.parent)}:{ours[-1].lineno}" if ours else ""
    return (
        f"{what} broke off by a fault of unhorse or its installation, not of the model "
        f"({type(error).__name__}: {error}{where}): install it again, or report this line"
    )


def say(text: str) -> None:
    """A line for the person who waits, on stderr: what a program reads is on stdout."""
    print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"
