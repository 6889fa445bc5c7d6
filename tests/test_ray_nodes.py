"""Jobs on a Ray cluster of several nodes, at its address: who gets a GPU, what a lost node takes along."""

import os
import signal
import time
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from unhorse import jobs

if find_spec("ray") is None:  # not importorskip: unhorse sets Ray's environment before it imports it
    pytest.skip("needs the extra unhorse[ray]", allow_module_level=True)
pytestmark = pytest.mark.slow


def node_of(folder: Path, number: int) -> tuple[str, int]:
    """The node and the process that a job ran on; it takes a while, and leaves a line where it begins and
    where it ends.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    with (folder / f"begun-{node}").open("a") as log:
        log.write(f"{number}\n")
    time.sleep(0.5)
    with (folder / "ended").open("a") as log:
        log.write(f"{number}\n")
    return node, os.getpid()


def at_work(folder: Path, node: str) -> bool:
    """Whether a job has begun on a node and not ended."""
    begun, ended = ((folder / name).read_text().split() for name in (f"begun-{node}", "ended"))
    return bool(set(begun) - set(ended))


def devices(_: int) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture
def cluster():
    """Three raylets: one for us, without a CPU, and two with one CPU each and a GPU that is only a name."""
    import_module("unhorse.ray_jobs")  # first: it sets Ray's environment
    made = import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0}
    )
    for _ in range(2):
        made.add_node(num_cpus=1, num_gpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def test_jobs_use_every_node_have_their_share_of_a_gpu_and_survive_the_loss_of_a_node(
    cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with jobs.engine("ray", gpus_per_job=0.25):
        assert {outcome.value for outcome in jobs.run(devices, range(4), workers=0)} == {"0"}

    with jobs.engine("ray"):
        assert {outcome.value for outcome in jobs.run(devices, range(4), workers=0)} == {""}
        (lost, *_), workers, done = cluster.worker_nodes, {}, []
        for outcome in jobs.run(partial(node_of, tmp_path), range(30), workers=0):
            done.append(outcome)
            node, process = outcome.value
            workers[node] = process
            if len(workers) == 2 and node != lost.node_id and lost in cluster.worker_nodes:
                while not at_work(tmp_path, lost.node_id):
                    time.sleep(0.01)
                # it ends as machines do: with all its processes
                os.kill(workers[lost.node_id], signal.SIGKILL)
                cluster.remove_node(lost, allow_graceful=False)
    assert sorted(outcome.item for outcome in done) == list(range(30))
    assert all(outcome.error is None for outcome in done)
    assert lost not in cluster.worker_nodes
    assert "are started again" in capsys.readouterr().err
    ended = (tmp_path / "ended").read_text().split()
    assert {int(number) for number in ended} == set(range(30))
    assert len(ended) <= 31  # at most one that was finished and not told
