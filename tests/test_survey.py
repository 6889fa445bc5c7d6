"""A survey finds the models, scans each on its own, and reports what fails beside what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import TARGET, small_victim
from unhorse.core import Classifier, ScanResult, Verdict
from unhorse.doubts import doubts
from unhorse.model_files import find_models
from unhorse.models.classifier import save_classifier
from unhorse.report import ScannedModel
from unhorse.scanners.activation_outlier import EFFORTS, ActivationOutlier
from unhorse.scanners.generalist import Generalist
from unhorse.survey import (
    Request,
    build_reference,
    cache_folder,
    clean_images,
    environment,
    make_scanner,
    scan_models,
)

QUICK = Request(effort="quick", cached=False)


@pytest.fixture(scope="module")
def report(victims: Path, tmp_path_factory: pytest.TempPathFactory):
    """Two victims with a bad file between them."""
    bad = tmp_path_factory.mktemp("bad") / "notes.safetensors"
    bad.write_text("not a model")
    return scan_models([victims / "infected", bad, victims / "benign"], QUICK, command=("unhorse", "scan"))


def result_of(model: ScannedModel) -> ScanResult:
    assert model.result is not None, model.error
    return model.result


# --- finding models -----------------------------------------------------------------------------------------


def test_a_folder_gives_classifier_folders_and_model_files_below_it(victims, tmp_path):
    shutil.copytree(victims, tmp_path / "zoo" / "deep")
    for name in ("a.pt", "b.safetensors", "notes.txt", "deep/c.pth"):
        (tmp_path / "zoo" / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path / "zoo")) for path in find_models([tmp_path / "zoo"])]
    assert found == ["a.pt", "b.safetensors", "deep/benign", "deep/c.pth", "deep/infected"]


def test_what_is_named_is_taken_as_it_is(victims, tmp_path):
    (tmp_path / "anything.txt").write_text("no model")
    paths = [victims / "benign", tmp_path / "anything.txt"]
    assert find_models(paths) == paths
    with pytest.raises(ValueError, match="no such file"):
        find_models([tmp_path / "missing"])


def test_an_empty_folder_holds_no_models(tmp_path):
    assert find_models([tmp_path]) == []


# --- scanning -----------------------------------------------------------------------------------------------


def test_models_are_judged_in_the_order_given(report, victims):
    infected, _, benign = (model.result for model in report.models)
    assert (infected.verdict, infected.target) == (Verdict.INFECTED, TARGET)
    assert benign.verdict is Verdict.NO_SIGN_FOUND
    assert [Path(model.path).name for model in report.models] == ["infected", "notes.safetensors", "benign"]


def test_a_bad_file_is_reported_and_stops_nothing(report):
    failed = report.models[1]
    assert failed.verdict == "FAILED" and failed.error_rule == "LD202"
    assert "not a model file" in failed.error and len(failed.sha256) == 64


def test_a_model_is_described_with_its_hash_and_shape(report, victims):
    model = report.models[0]
    assert (model.architecture, model.image_shape) == ("small-cnn", (1, 16, 16))
    assert model.class_names[0] == "class 0" and len(model.sha256) == 64 and model.seconds > 0
    assert report.environment["effort"] == "quick" and report.command == ("unhorse", "scan")


def test_two_workers_give_what_one_gives(report, victims):
    # the same seed and one thread each, so the same score
    both = scan_models([victims / "infected", victims / "benign"], QUICK, workers=2)
    assert [model.verdict for model in both.models] == ["INFECTED", "NO SIGN FOUND"]
    assert result_of(both.models[0]).score == pytest.approx(result_of(report.models[0]).score, rel=1e-3)


def test_an_error_inside_a_scan_is_that_models_failure(victims, monkeypatch):
    def fail(self: ActivationOutlier, model: object, clean: object, on_step: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(ActivationOutlier, "scan", fail)
    (model,) = scan_models([victims / "benign"], QUICK).models
    assert model.verdict == "FAILED" and "out of luck" in model.error


# --- scanners, references, clean images ---------------------------------------------------------------------


def test_effort_and_seed_choose_the_scanner():
    def made(**request: Any) -> Any:
        return make_scanner(Request(**request), device=torch.device("cpu"))

    scanner = made(effort="deep", seed=7, timeout=60.0)
    assert isinstance(scanner, Generalist)
    assert (scanner.seed, scanner.budget, scanner.outlier.search) == (7, 60.0, EFFORTS["deep"].search)
    assert made() == made(scanner="generalist") == Generalist.shipped()
    named = {effort: made(scanner="activation-outlier", effort=effort) for effort in EFFORTS}
    assert named == EFFORTS


def test_a_reference_holds_the_sorted_scores_of_benign_models(victims, tmp_path):
    for index in range(2):
        model = small_victim()
        with torch.no_grad():
            model.network.head[-1].bias[0] += 4 * index
        save_classifier(model, tmp_path / str(index))
    reference = build_reference(Request(effort="quick", reference=tmp_path))
    alone = Generalist.shipped().measure(small_victim()).score
    assert len(reference.scores) == 2 and list(reference.scores) == sorted(reference.scores)
    assert min(abs(score - alone) for score in reference.scores) < 1e-3


def test_a_reference_model_that_cannot_be_scored_is_an_error(tmp_path):
    (tmp_path / "broken.pt").write_text("nothing")
    with pytest.raises(ValueError, match="broken.pt cannot be scored"):
        build_reference(Request(reference=tmp_path))


def test_a_reference_without_models_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no models"):
        build_reference(Request(reference=tmp_path))


def test_channels_need_a_size():
    with pytest.raises(ValueError, match="--channels goes with --size"):
        Request(loading={"channels": 1})


def images_below(folder: Path, mode: str) -> Path:
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index in range(12):
            Image.new(mode, (20, 20), 20 * index).save(folder / label / f"{index}.png")
    return folder


def test_clean_images_are_brought_to_the_models_size(tmp_path, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path / "cache"))
    data = clean_images(images_below(tmp_path / "test", "L"), small_victim())
    assert data is not None and data.images.shape == (24, 1, 16, 16)
    assert clean_images(None, small_victim()) is None


def test_clean_images_of_another_kind_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="convert them"):
        clean_images(images_below(tmp_path / "test", "RGB"), small_victim())


def test_the_environment_names_versions_and_threads():
    found = environment("cpu")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    json.dumps(found)


def test_the_cache_folder_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


# --- what was only assumed ----------------------------------------------------------------------------------


class Gauge:
    """Stands for a scanner whose score follows the deviation that it is told."""

    threshold = 0.7

    def __init__(self, scores: dict[float, float], seconds: float = 1.0) -> None:
        self.scores, self.seconds = scores, seconds

    def estimate(self, model: Classifier) -> float:
        return self.seconds

    def measure(self, model: Classifier) -> ScanResult:
        score = self.scores.get(round(float(model.std.flatten()[0]), 4), 0.1)
        return ScanResult(Verdict.UNDECIDED, "gauge", score=score)


def assumed(std: float = 1.0, line: str = "MD301 input normalisation assumed") -> Classifier:
    model = small_victim()
    return Classifier(
        model.network,
        image_shape=model.image_shape,
        class_names=model.class_names,
        std=(std,),
        assumptions=(line,),
    )


def test_a_verdict_that_hangs_on_an_assumed_normalisation_says_so():
    found = ScanResult(Verdict.NO_SIGN_FOUND, "gauge", score=0.2)
    (line,) = doubts(Gauge({0.0039: 0.9}), assumed(), found)
    assert "0.2 as assumed, 0.9 for pixels 0..255" in line and "--mean" in line


@pytest.mark.parametrize(
    ("gauge", "model"),
    [
        (Gauge({}), assumed()),  # the score stays on its side
        (Gauge({1.0: 0.9}), assumed()),  # what was assumed is not tried again
        (Gauge({0.0039: 0.9}), assumed(line="MD302 no names")),  # the file says it
        (Gauge({0.0039: 0.9}, seconds=1e4), assumed()),  # nobody waits for that
    ],
)
def test_a_verdict_that_does_not_is_not_doubted(gauge, model):
    assert doubts(gauge, model, ScanResult(Verdict.NO_SIGN_FOUND, "gauge", score=0.2)) == []
