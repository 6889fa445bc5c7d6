"""A finding is scanned for once, and is the same from its file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unhorse.benchmark import findings
from unhorse.benchmark.findings import finding_of, read_finding, write_finding
from unhorse.core import ReconstructedTrigger, ScanResult, Verdict
from unhorse.datasets import load_dataset, subset
from unhorse.scanners.neural_cleanse import NeuralCleanse

QUICK = NeuralCleanse(steps=3)


def test_a_finding_comes_back_from_its_file_as_it_was(tmp_path):
    trigger = ReconstructedTrigger(torch.rand(1, 8, 8), torch.rand(1, 8, 8), 0.9)
    found = ScanResult(
        Verdict.INFECTED,
        "neural-cleanse",
        score=4.5,
        threshold=2.0,
        class_scores=(0.1, 4.5),
        target=1,
        triggers={1: trigger},
    )
    write_finding(found, tmp_path / "kept.safetensors")
    again = read_finding(tmp_path / "kept.safetensors")
    assert torch.equal(again.triggers[1].mask, trigger.mask)
    assert torch.equal(again.triggers[1].pattern, trigger.pattern)
    assert again.triggers[1].flip_rate == 0.9
    assert replace(again, triggers={}) == replace(found, triggers={})


def test_a_second_question_is_answered_from_the_file(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(findings, "NEURAL_CLEANSE", {"neural-cleanse": QUICK})
    model, clean = trained["infected"].model, subset(load_dataset("digits", "test"), 200, seed=0)
    first = finding_of(model, clean, tmp_path, seed=0)
    monkeypatch.setattr(NeuralCleanse, "scan", None)
    second = finding_of(model, clean, tmp_path, seed=0)
    assert second.class_scores == first.class_scores
    with pytest.raises(TypeError):  # other images are another question
        finding_of(model, clean[:100], tmp_path, seed=0)
