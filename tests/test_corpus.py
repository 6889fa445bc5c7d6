"""The whole hostile corpus through the whole loader: refused or contained, however often it is opened."""

import json
import socket
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

import pytest

from hostile_files import Harm, corpus, write
from unhorse.cli import run
from unhorse.loading.formats import load_model
from unhorse.rules import LoadFailed, LoadRefused

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
CORPUS = corpus()
CONTAINED = {"LD230", "LD231"}
"""Damaged, or stopped by a limit: what a hostile file may also come to."""


@pytest.fixture
def harmed(tmp_path):
    """A harm, and a function that says whether it was done."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        harm = Harm(tmp_path / "marker", server.getsockname()[1])

        def done() -> bool:
            try:
                server.accept()[0].close()
            except TimeoutError:
                return harm.marker.exists()
            return True

        yield harm, done


def test_every_hostile_file_is_refused_by_the_loader_and_runs_nothing(tmp_path, harmed):
    for library in ("onnx2fx", "h5py", "keras", "transformers"):
        if find_spec(library) is None:
            pytest.skip(f"loading every format needs {library}")
    harm, done = harmed
    wrong = {}
    for name, hostile in CORPUS.items():
        path = write(hostile, tmp_path / "files", harm)
        try:
            load_model(path.parent if hostile.format == "huggingface" else path)
            rule = ""
        except (LoadRefused, LoadFailed) as error:
            rule = error.rule
        # a card that is no card leaves an unknown network; a report's file may be no network at all
        expected = {hostile.rule, *CONTAINED} | ({"LD210"} if hostile.rule == "LD212" else set())
        if hostile.rule and rule not in expected:
            wrong[name] = (rule, hostile.rule)
    assert wrong == {}
    assert not done()


def test_inspect_of_the_corpus_reports_every_file_escaped(tmp_path, harmed, capsys):
    harm, done = harmed
    for hostile in CORPUS.values():
        write(hostile, tmp_path / "files", harm)
    outputs = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    assert run(["inspect", str(tmp_path / "files"), *outputs]) in (1, 2)
    models = json.loads((tmp_path / "a.json").read_text())["models"]
    assert all(model["verdict"] in ("NOT SCANNED", "FAILED") for model in models)
    assert "\x1b]" not in capsys.readouterr().out
    assert (tmp_path / "a.html").stat().st_size < 3_000_000
    assert not done()


def resident() -> int:
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def test_a_thousand_hostile_files_leave_the_parent_as_it_was(tmp_path, harmed):
    harm, done = harmed
    files = [write(hostile, tmp_path / "files", harm) for hostile in CORPUS.values() if hostile.rule]
    small = [path for path in files if path.is_symlink() or not path.is_file() or path.stat().st_size < 2**20]

    def open_all(paths):
        for path in paths:
            with pytest.raises((LoadRefused, LoadFailed)):
                load_model(path)

    open_all(small)
    before = resident()
    open_all(islice(cycle(small), 1000))
    assert resident() - before < 50 * 2**20
    assert not done()
