"""Pickles are read, never run: what runs code is named and high, what harms nobody is low."""

from __future__ import annotations

import io

import pytest

from peer_pickles import CALLS, calling, harmless_files, split, tricks
from unhorse.checks.inspection import check_task
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


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_pickle_is_low(name: str) -> None:
    refusal = refusal_of(HARMLESS[name])
    assert RULES[refusal.rule].severity is Severity.LOW, refusal.reason
    assert refusal.rule in ("LD201", "LD235")
