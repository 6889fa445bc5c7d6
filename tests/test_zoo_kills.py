"""A population whose build is killed again and again, with all its processes, is that of a quiet build."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unhorse.models.classifier import load_classifier, weights_hash
from unhorse.populations import ZooSpec
from unhorse.zoo import build, members

pytestmark = pytest.mark.slow

KILLS = 10
TOML = """
name = "killed"
seed = 5
data = { source = "digits", images = 192, test_images = 150 }
options = { widths = [8, 8], hidden = 16 }
recipe = { epochs = 2, batch_size = 32, learning_rate = 1e-2 }
acceptance = { clean_margin = 1.0, trojan = 0.0, attempts = 2, median_of = 4 }

[[groups]]
name = "benign"
split = "fit"
count = 24

[[groups]]
name = "patch"
split = "fit"
count = 24
attack = { kind = "badnet", rate = 0.5, trigger = { size = 3, placement = "corner" } }

[[groups]]
name = "blended"
split = "held-back"
count = 24
attack = { kind = "blended", rate = 0.5 }
"""
EXPECTED = {
    f"{split}/{group}-{index:04d}"
    for split, group in (("fit", "benign"), ("fit", "patch"), ("held-back", "blended"))
    for index in range(24)
}


def start(spec: Path, folder: Path) -> subprocess.Popen:
    """`unhorse zoo build` and its workers, in a process group of their own."""
    command = [
        sys.executable,
        "-m",
        "unhorse.cli",
        "zoo",
        "build",
        str(spec),
        "-o",
        str(folder),
        "--jobs",
        "2",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, **quiet)


def entries(folder: Path) -> set[str]:
    """Everything in the population's folder, drafts and finished victims."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def wait_until(sign: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not sign() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> bool:
    """SIGKILL to the whole group; whether there was anything left to kill."""
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


@pytest.mark.timeout(900)
def test_ten_kills_lose_no_victim_double_none_and_change_no_weight(tmp_path):
    spec, folder = tmp_path / "killed.toml", tmp_path / "killed"
    spec.write_text(TOML)
    folder.mkdir()
    draw = random.Random(17)
    killed, finished = 0, []
    for _ in range(KILLS):
        before = entries(folder)
        process = start(spec, folder)
        wait_until(lambda: entries(folder) > before, process)  # noqa: B023 - called before the next round
        time.sleep(draw.uniform(0.0, 1.2))
        killed += kill(process)
        finished.append(sum(1 for _ in folder.glob("[!.]*/[!.]*/card.json")))
    assert killed == KILLS
    assert finished == sorted(finished)
    assert 0 < finished[-1] < len(EXPECTED)
    assert len(set(finished)) > 3  # they hit the build in different places

    counts = build(ZooSpec.read(spec), folder)
    assert counts == {
        "accepted": len(EXPECTED),
        "rejected": 0,
        "trained_now": len(EXPECTED) - finished[-1],
    }
    assert found(folder).keys() == EXPECTED
    whole = tmp_path / "undisturbed"
    build(ZooSpec.read(spec), whole)
    assert found(folder) == found(whole)


def found(folder: Path) -> dict[str, str]:
    """Every victim with the hash of its weights; each folder is whole, its card written for those weights."""
    hashes = {}
    for member in members(folder):
        card = json.loads((member.folder / "card.json").read_text())
        files = {path.name for path in member.folder.iterdir()}
        assert files == {"model.safetensors", "card.json"} | (
            {"trigger.safetensors"} if card["trojaned"] else set()
        )
        model = load_classifier(member.folder)
        assert (card["group"], card["weights_hash"]) == (member.group, weights_hash(model))
        name = str(member.folder.relative_to(folder))
        assert name not in hashes
        hashes[name] = weights_hash(model)
    return hashes
