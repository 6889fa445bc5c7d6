"""Pickles are read, never run: what runs code is named and high, what harms nobody is low."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from peer_pickles import CALLS, calling, harmless_files, keras_model, split, tricks
from unhorse.checks.inspection import check_task
from unhorse.checks.pickle_machine import follow
from unhorse.checks.pickle_values import UNRESOLVED, Global
from unhorse.cli import run
from unhorse.rulebook import RULES
from unhorse.rules import LoadFailed, LoadRefused, Severity

HARMLESS = harmless_files()


def refusal_of(data: bytes, name: str = "file") -> LoadRefused | LoadFailed:
    with pytest.raises((LoadRefused, LoadFailed)) as refusal:
        check_task([io.BytesIO(data)], {"name": name})
    assert refusal.value.remedy
    return refusal.value


@pytest.mark.parametrize("name", CALLS)
def test_a_hostile_call_is_high_and_named_at_every_protocol(name: str) -> None:
    for protocol in (0, 2, 3, 4, 5):
        refusal = refusal_of(calling(name, protocol))
        assert refusal.rule == "LD205", (protocol, refusal.reason)
        assert ".".join(split(name)) in refusal.reason


@pytest.mark.parametrize("name", CALLS)
def test_a_hostile_call_beside_weights_is_high_and_named(name: str) -> None:
    from hostile_pickles import state, tensor, torch_zip

    evil = calling(name, 2)[2:-1]
    refusal = refusal_of(torch_zip(state(tensor(), evil)))
    assert refusal.rule == "LD205" and ".".join(split(name)) in refusal.reason


@pytest.mark.parametrize("name", tricks())
def test_a_hidden_call_is_found(name: str) -> None:
    refusal = refusal_of(tricks()[name])
    assert refusal.rule == "LD205", refusal.reason
    assert "os.system" in refusal.reason or name == "getattr-of-a-module"


@pytest.mark.parametrize("name", ["memo", "memo-with-gaps", "instance", "object", "frame-first"])
def test_names_are_put_together_as_an_unpickler_does(name: str) -> None:
    reading = follow(tricks()[name])
    assert reading.uses[Global("os", "system")] >= {"call"} and UNRESOLVED not in reading.uses


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_pickle_is_low(name: str) -> None:
    refusal = refusal_of(HARMLESS[name])
    assert RULES[refusal.rule].severity is Severity.LOW, refusal.reason
    assert refusal.rule in ("LD201", "LD235")


def test_a_pickled_keras_model_is_looked_into_for_code() -> None:
    assert refusal_of(keras_model("Dense", "ReLU")).rule == "LD201"
    lambdas = refusal_of(keras_model("Dense", "Lambda"))
    assert lambdas.rule == "LD218" and "Lambda" in lambdas.reason


def test_a_function_of_an_unknown_package_is_medium_and_a_class_of_one_low() -> None:
    called = refusal_of(b"\x80\x02cmypackage.build\nmake\nX\1\0\0\0a\x85R.")
    assert called.rule == "LD240" and "calls mypackage.build.make" in called.reason
    assert RULES["LD240"].severity is Severity.MEDIUM
    built = refusal_of(b"\x80\x02cmypackage.models\nResNet\n)\x81}b.")
    assert built.rule == "LD201" and "names mypackage.models.ResNet" in built.reason


def test_what_is_called_out_of_sight_is_high() -> None:
    for pickled in (
        b"\x80\x02\x82\1)R.",  # an extension code
        b"\x80\x04K\1K\2\x93)R.",  # a name that is no text
        b"\x80\x02cmypackage\nFactory\n)R)R.",  # what another call returned
        b"\x80\x02cmypackage\nFactory\n}X\1\0\0\0aK\1sb.",  # a class is changed
    ):
        assert refusal_of(pickled).rule == "LD205"


def test_a_cut_pickle_is_damaged_and_a_call_before_the_cut_is_named() -> None:
    whole = calling("os.system", 4)
    assert refusal_of(whole[:-1]).rule == "LD205"
    assert refusal_of(HARMLESS["numpy-4"][:-10]).rule == "LD230"


def test_a_whole_pickled_network_is_named_by_its_class(tmp_path: Path) -> None:
    from peer_pickles import Net

    torch.save(Net(), tmp_path / "net.pt")
    refusal = refusal_of((tmp_path / "net.pt").read_bytes())
    assert refusal.rule == "LD209" and "a whole pickled network, peer_pickles.Net" in refusal.reason
    assert "--network" in refusal.remedy
    assert "a pickled network, peer_pickles.Net" in refusal_of(HARMLESS["module-4"]).reason


def test_hostile_files_in_a_folder_or_alone_never_pass_and_harmless_ones_never_fail(tmp_path: Path) -> None:
    few = {"os.system": calling("os.system", 4), "eval": calling("builtins.eval", 0), **tricks()}
    for number, content in enumerate(few.values()):
        (tmp_path / f"hostile-{number}.pkl").write_bytes(content)
    for number, name in enumerate(sorted(HARMLESS)[::9]):
        (tmp_path / f"harmless-{number}.pkl").write_bytes(HARMLESS[name])
    assert run(["inspect", str(tmp_path), "--json", str(tmp_path / "report.json")]) == 1
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    severities = {
        Path(model["path"]).name: {found["severity"] for found in model["findings"]} for model in models
    }
    assert len(severities) == len(few) + len(sorted(HARMLESS)[::9])
    for name, found in severities.items():
        assert found == ({"high"} if name.startswith("hostile") else {"low"}), name
