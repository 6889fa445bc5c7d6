"""Jobs as tasks of a Ray cluster. Ray is imported by this file alone, and this file only when Ray is asked
for.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from unhorse.extras import install_line
from unhorse.jobs import Job, Outcome, Round, say

# Ray reads these when it is imported: a death is an outcome, not forty lines on stdout; and a job is no
# nicer than on the other engine (at Ray's 15 it starves beside anything else)
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "worker died or was killed|has been marked dead|^Raylet is terminated"
)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as missing:
    raise ValueError(f"Ray is not installed: {install_line('ray')}") from missing

PATIENCE = 5.0
"""Seconds for an address to answer: Ray itself would ask for minutes before it gave up."""
LOOK_AGAIN = 10.0
"""Seconds after which the cluster is counted again, when no job ends before."""


@contextmanager
def cluster(address: str | None, *, cpus_per_job: float = 1, gpus_per_job: float = 0) -> Iterator[Round]:
    """Rounds of jobs on the cluster at `address` (see jobs.engine); one started for them ends with the
    context.

    A Ray that the calling program is already connected to is used and left as it is, whatever the address.
    """
    if cpus_per_job <= 0 or gpus_per_job < 0 or (gpus_per_job > 1 and gpus_per_job % 1):
        raise ValueError(
            f"a job cannot have {cpus_per_job} CPUs and {gpus_per_job} GPUs: give it more than 0 CPUs, and a "
            "fraction of a GPU or whole ones"
        )
    found = ray.is_initialized()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own = address == "local" and not found
    if not found and not own:
        _connect(address)
    try:
        yield _Cluster(cpus_per_job, gpus_per_job, own).round
    finally:
        if not found:
            ray.shutdown()


@dataclass
class _Cluster:
    """What a job is given; `size`: for how many jobs at a time a cluster of our own was started."""

    cpus_per_job: float
    gpus_per_job: float
    own: bool
    size: int = 0

    def round(
        self, function: Job, items: Sequence[Any], workers: int
    ) -> Generator[Outcome, None, list[Outcome]]:
        """Each item once, a bounded number at a time; a worker that dies takes its own job down only."""
        if self.own:
            self._start(workers or os.cpu_count() or 1)
        self._look_for_room()
        task = ray.remote(
            num_cpus=self.cpus_per_job,
            num_gpus=self.gpus_per_job,
            max_retries=0,  # rounds are the retries, and count alike on every engine
        )(_attempt_there())
        place = (str(Path.cwd()), _code(), self._environment())
        waiting, undone = list(reversed(items)), []
        flying: dict[Any, Any] = {}
        try:
            while waiting or flying:
                limit = workers or 2 * self._room() or 1  # twice, so that a node finds its next job waiting
                for item in [waiting.pop() for _ in range(min(len(waiting), limit - len(flying)))]:
                    flying[task.remote(*place, [ray.put((function, item))])] = item
                for reference in ray.wait(list(flying), timeout=LOOK_AGAIN)[0]:
                    outcome, finished = _landed(reference, flying.pop(reference))
                    if finished:
                        yield outcome
                    else:
                        undone.append(outcome)
        finally:
            if ray.is_initialized():
                for reference in flying:  # interrupted, or nobody asks for the rest
                    ray.cancel(reference, force=True)
        return undone

    def _start(self, size: int) -> None:
        """A cluster of our own for `size` jobs at a time, unless there is one as large."""
        if size <= self.size:
            return
        ray.shutdown()
        _initialise(address="local", num_cpus=ceil(size * self.cpus_per_job), include_dashboard=False)
        self.size = size

    def _room(self) -> int:
        """How many jobs fit on the nodes that are alive."""
        needs = {"CPU": self.cpus_per_job, "GPU": self.gpus_per_job}
        return sum(
            min(int(node["Resources"].get(name, 0) / need) for name, need in needs.items() if need)
            for node in ray.nodes()
            if node["Alive"]
        )

    def _look_for_room(self) -> None:
        if self._room():
            return
        needed = f"{self.cpus_per_job:g} CPUs and {self.gpus_per_job:g} GPUs"
        if self.own:
            raise RuntimeError(f"this machine has no room for a job of {needed}: give a job less")
        say(f"no node of the cluster has {needed} for a job: waiting for one that does")

    def _environment(self) -> dict[str, str]:
        """Our settings, the threads of a job, and no GPU that is not its own."""
        ours = {name: value for name, value in os.environ.items() if name.startswith("UNHORSE_")}
        hidden = {} if self.gpus_per_job else {"CUDA_VISIBLE_DEVICES": ""}
        return {**ours, **hidden, "OMP_NUM_THREADS": str(max(1, int(self.cpus_per_job)))}


def _code() -> list[str]:
    """Where this process finds code outside its installation: a source checkout, the folder of a script."""
    installed = (sys.prefix, sys.base_prefix)
    folders = [Path(entry).absolute() for entry in sys.path if Path(entry).is_dir()]
    return [str(path) for path in folders if not any(path.is_relative_to(prefix) for prefix in installed)]


def _attempt_there() -> Callable[..., Outcome]:
    """An attempt on a node, as a function that travels by value: what it needs of ours is found only once it
    has looked where this process does. It works in our working folder, for paths may be relative.
    """

    def attempt(folder: str, code: list[str], environment: dict[str, str], parcel: list[Any]) -> Outcome:
        import os
        import socket
        import sys

        import ray

        sys.path[:0] = [path for path in code if path not in sys.path]
        os.environ.update(environment)
        if "torch" in sys.modules:  # else it reads the environment when it is imported
            sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
        from unhorse.jobs import Outcome, attempt_away

        try:
            os.chdir(folder)
        except OSError as error:
            reason = f"node {socket.gethostname()} cannot enter {folder} ({error.strerror})"
            return Outcome(None, None, RuntimeError(f"{reason}: the nodes must share the file system"))
        function, item = ray.get(parcel[0])  # in a list it was left packed until our code can be found
        return attempt_away(function, item)._replace(item=None)

    return attempt


def _landed(reference: Any, item: Any) -> tuple[Outcome, bool]:
    """What became of a task, and whether it finished: not where its worker or node died."""
    try:
        return ray.get(reference)._replace(item=item), True
    except RayTaskError as error:  # around the job: what it returned cannot be pickled, say
        return Outcome(item, None, error.cause or error), True
    except RayError as error:
        return Outcome(item, None, RuntimeError(f"its worker process died ({type(error).__name__})")), False


def _connect(address: str) -> None:
    """Joins the cluster at an address, having knocked first."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not host or not port.isdigit():
            raise ValueError(f"{address!r} is no address of a cluster: give host:port, auto or local")
        try:
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        except OSError as error:
            raise ConnectionError(
                f"no Ray cluster answers at {address} ({error}): start one with `ray start --head --port "
                f"{port}`, or give another address"
            ) from error
    _initialise(address=address)


def _initialise(**settings: Any) -> None:
    """ray.init, without its chatter."""
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
