"""What a report tells a user to do next must work as it stands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from safetensors.torch import load_file, save_file

from unhorse.cli import run
from unhorse.cli.options import AS_THE_FILE_SAYS, ModelOptions

INFECTED = Path(__file__).parent / "victims" / "infected" / "model.safetensors"


def test_flags_are_repeated_as_a_shell_takes_them():
    options = ModelOptions(layers="conv3p1 relu", size=(8, 8), channels=1, mean=(0.5,), trust_network=True)
    words = shlex.split(options.flags())
    assert words[:2] == ["--layers", "conv3p1 relu"] and words[-1] == "--trust-network"
    assert " ".join(words[2:-1]) == "--size 8 8 --channels 1 --mean 0.5"
    assert AS_THE_FILE_SAYS.flags() == ""


def test_a_remedy_repeats_the_flags_that_opened_the_model(tmp_path):
    bare, output = tmp_path / "digits.safetensors", tmp_path / "report.json"
    save_file(load_file(INFECTED), bare)
    flags = ["--size", "8", "8", "--channels", "1", "--arch", "small-cnn"]
    assert run(["scan", str(bare), *flags, "--effort", "quick", "--json", str(output)]) == 1
    (model,) = json.loads(output.read_text(encoding="utf-8"))["models"]
    (remedy,) = [finding["remedy"] for finding in model["findings"] if finding["rule"] == "BD101"]
    assert remedy.startswith(f"unhorse repair {bare} --arch small-cnn --size 8 8 --channels 1 --clean IMAGES")
