"""`unhorse repair`: a model repaired and measured from the command line, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import unhorse
import unhorse.report
from conftest import TARGET, template_victim
from unhorse import survey
from unhorse.cli import repair_runs, run
from unhorse.cli.clean_images import fingerprints
from unhorse.core import Bars, Classifier, Dataset, ReconstructedTrigger, RepairResult, ScanResult, Verdict
from unhorse.datasets import load_dataset, subset
from unhorse.models import training
from unhorse.models.classifier import load_classifier, read_card, weights_hash
from unhorse.rates import predictions
from unhorse.repairs.registry import REPAIRS
from unhorse.scanners import named
from unhorse.scanners.neural_cleanse import NeuralCleanse
from unhorse.victims import load_victim

SCHEMA = json.loads(Path(unhorse.report.__file__).with_suffix(".schema.json").read_text())
VICTIM = Path(__file__).parent / "victims" / "infected"
BENIGN = Path(__file__).parent / "victims" / "benign"
QUICK = ("--clean", "digits", "--effort", "quick")
SHORT = ("--epochs", "8")
REPAIRING, HELD_OUT = 419, 180


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path_factory.mktemp("cache")))


def repaired(*arguments: object, tmp_path: Path, model: Path = VICTIM) -> dict:
    """What `repair` writes of a model, after a look at the schema; the cured one is in `tmp_path`/cured."""
    path, folder = tmp_path / "out.json", tmp_path / "cured"
    given = [*QUICK, *map(str, arguments), "-o", str(folder), "--json", str(path)]
    assert run(["repair", str(model), *given]) == 0
    document = json.loads(path.read_text())
    jsonschema.validate(document, SCHEMA)
    return document["repairs"][0]


def corner_trigger() -> ReconstructedTrigger:
    """The trigger of VICTIM, as a scanner might have found it."""
    attack = load_victim(VICTIM).attack
    assert attack is not None
    stamp = attack.probes()["trojan"]
    return ReconstructedTrigger(stamp.masks[0, :1], stamp.patterns[0], 1.0)


@dataclass
class Scripted:
    """A scanner that knows its answer, and keeps the images that it was given."""

    name: str
    triggers: dict[int, ReconstructedTrigger]
    seen: list[Dataset]

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        assert clean is not None
        self.seen.append(clean)
        verdict = Verdict.INFECTED if self.triggers else Verdict.NO_SIGN_FOUND
        bars = Bars("Index", ("a", "b"), (float(len(self.seen)), 0.0))
        target = next(iter(self.triggers), None)
        return ScanResult(verdict, self.name, target=target, triggers=self.triggers, exhibits=(bars,))


def script(
    monkeypatch: pytest.MonkeyPatch, **triggers: dict[int, ReconstructedTrigger]
) -> dict[str, Scripted]:
    """Puts scripted scanners in the place of the real ones, by their names."""
    scanners = {
        name.replace("_", "-"): Scripted(name.replace("_", "-"), found, [])
        for name, found in triggers.items()
    }
    monkeypatch.setattr(
        repair_runs, "make_scanner", lambda request, device: scanners[request.scanner or "generalist"]
    )
    return scanners


# --- what it does -------------------------------------------------------------------------------------------


def test_a_simulated_victim_is_cured_and_both_are_measured(tmp_path, monkeypatch, capsys):
    script(monkeypatch, generalist={TARGET: corner_trigger()})
    page = tmp_path / "out.html"
    found = repaired("--card", VICTIM, *SHORT, "--html", page, tmp_path=tmp_path)
    measures = found["measures"]
    assert measures["trojan_accuracy"]["before"]["value"] > 0.95
    assert measures["trojan_accuracy"]["after"]["value"] < 0.2
    assert measures["recovery_accuracy"]["after"]["value"] > 0.7
    assert measures["clean_accuracy"]["drop"]["value"] < 0.05
    assert measures["clean_accuracy"]["after"]["n"] == measures["recovery_accuracy"]["after"]["n"] == HELD_OUT
    # the scripted trigger is the victim's own, and the same one is measured before and after
    assert measures["reversed_trigger"] == measures["trojan_accuracy"]
    assert found["target"] == {"index": TARGET, "name": "3"}
    out = capsys.readouterr()
    assert "recovery accuracy" in out.out and "not measured" not in out.out
    assert "repairing by unlearning: 8/8 epochs" in out.err and "s left" in out.err
    html = page.read_text()
    assert "INFECTED → INFECTED" in html  # the script says so
    assert "class before → after the repair" in html and "another trigger may still work" in html


def test_a_file_is_judged_without_an_attack(tmp_path, capsys):
    page = tmp_path / "out.html"
    weights = VICTIM / "model.safetensors"
    found = repaired(*SHORT, "--html", page, tmp_path=tmp_path, model=weights)
    assert found["measures"]["trojan_accuracy"] is None and found["measures"]["recovery_accuracy"] is None
    assert (found["before"]["verdict"], found["before"]["target"]["index"]) == ("INFECTED", TARGET)
    reversed_trigger = found["measures"]["reversed_trigger"]
    assert reversed_trigger["before"]["value"] > 0.7 and reversed_trigger["after"]["value"] < 0.3
    assert found["after"]["class_scores"] != found["before"]["class_scores"]
    assert "not measured" in capsys.readouterr().out
    html = page.read_text()
    assert f"INFECTED → {found['after']['verdict']}" in html
    assert "the reversed trigger is not the attacker's own" in html


def test_the_cured_classifier_is_written_with_what_was_done_to_it(tmp_path, monkeypatch):
    script(monkeypatch, generalist={TARGET: corner_trigger()})
    found = repaired("--method", "unlearning", "--epochs", "4", tmp_path=tmp_path)
    card, cured = read_card(tmp_path / "cured"), load_classifier(tmp_path / "cured")
    done = card["repair"]
    assert isinstance(done, dict)
    assert (done["method"], done["options"]["epochs"], done["repaired_on"]) == ("unlearning", 4, REPAIRING)
    assert done["source"] == str(VICTIM) and done["source_sha256"] == found["sha256"]
    assert done["source_weights"] == weights_hash(load_victim(VICTIM).model) != weights_hash(cured)
    assert found["repaired_sha256"] == card["weights_hash"] == weights_hash(cured)
    data = load_dataset("digits", "test")
    held_out = repair_runs.divide(cured, data).held_out
    right = (predictions(cured, held_out.images) == held_out.labels).float().mean()
    assert float(right) == pytest.approx(found["measures"]["clean_accuracy"]["after"]["value"])
    assert "attack" not in card and "trojaned" not in card


def test_without_labels_agreement_takes_the_place_of_accuracy(tmp_path, monkeypatch):
    script(monkeypatch, generalist={TARGET: corner_trigger()})
    found = repaired("--unlabelled", "--images", "200", *SHORT, tmp_path=tmp_path)
    assert found["measures"]["clean_accuracy"] is None
    agreement = found["measures"]["agreement"]
    assert agreement["before"] is None and 0.8 < agreement["after"]["value"] < 1
    assert found["repaired_on"] == 140 and agreement["after"]["n"] == 60
    assert any("only agreement" in text for text in found["warnings"])
    assert any("60 held-out images are few" in text for text in found["warnings"])


def test_the_images_that_measure_are_seen_by_neither_repair_nor_scan(tmp_path, monkeypatch):
    scanners = script(monkeypatch, generalist={TARGET: corner_trigger()})
    given: list[Dataset] = []

    @dataclass(frozen=True)
    class Note:
        seed: int = 0

        def __call__(self, model, clean, finding=None, *, on_epoch=None, checkpoint=None):
            given.append(clean)
            return RepairResult("note", model)

    monkeypatch.setattr(repair_runs, "REPAIRS", {**REPAIRS, "pruning": Note})
    found = repaired("--method", "pruning", tmp_path=tmp_path)
    assert (found["repaired_on"], found["held_out"]) == (REPAIRING, HELD_OUT)
    whole, seen = set(fingerprints(load_dataset("digits", "test"))), scanners["generalist"].seen
    assert len(seen) == 2 and len(given) == 1
    for part in (*seen, *given):
        assert fingerprints(part) == fingerprints(given[0]) and len(part) == REPAIRING
    assert len(whole - set(fingerprints(given[0]))) == HELD_OUT


def test_neural_cleanse_looks_for_the_trigger_where_the_scan_demonstrates_none(tmp_path, monkeypatch, capsys):
    scanners = script(monkeypatch, generalist={}, neural_cleanse={TARGET: corner_trigger()})
    page = tmp_path / "out.html"
    found = repaired(*SHORT, "--html", page, tmp_path=tmp_path)
    assert found["trigger_found_by"] == "neural-cleanse"
    assert (len(scanners["generalist"].seen), len(scanners["neural-cleanse"].seen)) == (2, 1)
    assert found["before"]["scanner"] == found["after"]["scanner"] == "generalist"
    assert "neural-cleanse searches for one" in capsys.readouterr().err
    assert any("the one found by neural-cleanse was used" in text for text in found["warnings"])
    assert "Before the repair: Index" in page.read_text() and "After the repair: Index" in page.read_text()


def test_a_method_that_needs_no_trigger_does_without(tmp_path, monkeypatch):
    scanners = script(monkeypatch, generalist={}, neural_cleanse={TARGET: corner_trigger()})
    page = tmp_path / "out.html"
    found = repaired("--method", "pruning", "--html", page, tmp_path=tmp_path)
    assert not scanners["neural-cleanse"].seen
    assert found["target"] is None and found["measures"]["reversed_trigger"] is None
    assert any("may have been nothing to cure" in text for text in found["warnings"])
    html = page.read_text()
    assert "whether an attack still works is not known" in html and "Clean accuracy while pruning" in html


def test_without_any_trigger_the_error_names_a_method_that_needs_none(tmp_path, monkeypatch, capsys):
    script(monkeypatch, generalist={}, neural_cleanse={})
    assert run(["repair", str(VICTIM), *QUICK, "-o", str(tmp_path / "cured")]) == 4
    assert "no trigger was found" in (err := capsys.readouterr().err) and "--method fine-pruning" in err
    assert not (tmp_path / "cured").exists()


def test_trojan_images_in_a_folder_are_measured(tmp_path, monkeypatch):
    script(monkeypatch, generalist={})
    data = subset(load_dataset("digits", "test"), 40, seed=0)
    assert data.labels is not None
    stamped = corner_trigger()(data.pixels(), torch.Generator())
    for place, (image, label) in enumerate(zip(stamped, data.labels.tolist(), strict=True)):
        (tmp_path / "stamped" / str(label)).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((image[0] * 255).round().byte().numpy())
        picture.save(tmp_path / "stamped" / str(label) / f"{place}.png")
    arguments = ("--trojaned", tmp_path / "stamped", "--target", "3", "--method", "pruning")
    measures = repaired(*arguments, tmp_path=tmp_path)["measures"]
    assert measures["recovery_accuracy"]["after"]["n"] == 40
    others = int((data.labels != TARGET).sum())
    assert measures["trojan_accuracy"]["before"]["n"] == others
    assert measures["trojan_accuracy"]["before"]["value"] > 0.95


def test_an_interrupted_repair_goes_on_and_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capsys):
    script(monkeypatch, generalist={TARGET: corner_trigger()})
    repaired("--epochs", "3", tmp_path=tmp_path)
    home = tmp_path / "again"
    arguments = ["repair", str(VICTIM), *QUICK, "--epochs", "3", "-o", str(home / "cured")]
    store = training._State.store

    def interrupt(*state: object) -> None:
        store(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(training._State, "store", interrupt)
    assert run(arguments) == 130
    assert [path.suffix for path in home.iterdir()] == [".repairing"]
    monkeypatch.setattr(training._State, "store", store)
    capsys.readouterr()
    assert run(arguments) == 0
    assert "3/3 epochs" in (err := capsys.readouterr().err) and "1/3 epochs" not in err
    resumed, whole = (load_file(folder / "cured" / "model.safetensors") for folder in (home, tmp_path))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [path.name for path in home.iterdir()] == ["cured"]


def test_few_images_get_more_epochs_and_methods_without_any_get_none():
    request = repair_runs.RepairRequest("unlearning", seed=7)
    assert (request.make_repair(100).epochs, request.make_repair(10_000).epochs) == (100, 2)
    assert request.make_repair(100).seed == 7
    assert repair_runs.RepairRequest("fine-pruning", epochs=3).make_repair(100).fine_tune_epochs == 3
    assert repair_runs.RepairRequest("pruning").make_repair(100).fine_tune_epochs == 0


@pytest.mark.parametrize("method", ["fine-pruning", "fine-tuning", "neuron-pruning"])
def test_every_method_writes_a_model_that_can_be_loaded_again(method, tmp_path, monkeypatch):
    script(monkeypatch, generalist={TARGET: corner_trigger()})
    epochs = () if method == "neuron-pruning" else ("--epochs", "2")
    found = repaired("--method", method, *epochs, tmp_path=tmp_path)
    assert found["method"]["name"] == method
    cured = load_classifier(tmp_path / "cured")
    assert weights_hash(cured) == found["repaired_sha256"] != weights_hash(load_victim(VICTIM).model)


def test_the_public_function_repairs_with_options():
    model, clean = load_victim(VICTIM).model, subset(load_dataset("digits", "test"), 200, seed=0)
    finding = ScanResult(Verdict.INFECTED, "by hand", target=TARGET, triggers={TARGET: corner_trigger()})
    result = unhorse.repair(model, clean, finding=finding, epochs=12)
    under = corner_trigger()(clean.pixels(), torch.Generator())
    others = clean.labels != TARGET
    assert (predictions(model, under)[others] == TARGET).float().mean() > 0.95
    assert (predictions(result.model, under)[others] == TARGET).float().mean() < 0.1
    with pytest.raises(ValueError, match="neural-cleanse"):
        unhorse.repair(model, clean)
    with pytest.raises(ValueError, match="'prayer': take one of"):
        unhorse.repair(model, clean, "prayer")


def test_neural_cleanse_scans_by_its_name_with_progress(tmp_path, monkeypatch, capsys):
    few = NeuralCleanse(samples_per_step=32, steps=6, success=0.5, patience=2)
    monkeypatch.setitem(named.CLEANSE_EFFORTS, "quick", few)
    monkeypatch.setattr(survey, "INTERVAL", 0.0)
    arguments = [
        "scan",
        str(VICTIM),
        "--scanner",
        "neural-cleanse",
        *QUICK,
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert run([*arguments, "--fail-on", "none"]) in (0, 2)
    (model,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert model["scanner"] == "neural-cleanse" and len(model["class_scores"]) == 10
    assert "step 3 of at most 6, 10 of 10 classes still searched, at most" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--clean", "digits", "--reference", str(VICTIM))])
def test_neural_cleanse_wants_clean_images_and_no_reference(more, capsys):
    assert run(["scan", str(VICTIM), "--scanner", "neural-cleanse", *more]) == 4
    assert "give --clean alone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_neural_cleanses_own_finding_repairs(tmp_path):
    page = tmp_path / "out.html"
    found = repaired("--scanner", "neural-cleanse", "--card", VICTIM, "--html", page, tmp_path=tmp_path)
    assert found["trigger_found_by"] == found["before"]["scanner"] == "neural-cleanse"
    assert found["target"]["index"] == TARGET
    assert found["measures"]["trojan_accuracy"]["after"]["value"] < 0.4
    html = page.read_text()
    assert "Before the repair: Masks" in html and "After the repair: Size of the smallest mask" in html


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing.pt", "--clean", "digits"), "check the path"),
        (("victim", "--clean", "nowhere"), "give 'digits', an existing folder"),
        (("victim", "--clean", "digits", "-o", "full"), "is not a repaired model: choose another name"),
        (("victim", "--clean", "digits", "-o", "victim"), "is not a repaired model: choose another name"),
        (("victim", "--clean", "digits", "--images", "20"), "20 clean images: give at least 30"),
        (("victim", "--clean", "digits", "--images", "1000"), "cannot take 1000"),
        (("victim", "--clean", "digits", "--method", "pruning", "--epochs", "2"), "leave --epochs out"),
        (("victim", "--clean", "digits", "--method", "prayer"), "--method"),
        (("victim", "--clean", "digits", "--card", "victim", "--trojaned", "x"), "give one of them"),
        (("victim", "--clean", "digits", "--target", "3"), "belongs to --trojaned"),
        (("victim", "--clean", "digits", "--card", "benign"), "is a benign victim"),
        (("benign", "--clean", "digits", "--card", "victim"), "is not the model to repair"),
        (("victim", "--clean", "digits", "--card", "victim", "--unlabelled"), "needs the labels"),
        (("victim", "--clean", "digits", "--labels", "turned"), "chance is 10.0%"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_exits_4_with_a_remedy(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").symlink_to(VICTIM)
    (tmp_path / "benign").symlink_to(BENIGN)
    (tmp_path / "full").mkdir()
    (tmp_path / "turned").write_text(json.dumps({str(label): (label + 1) % 10 for label in range(10)}))
    assert run(["repair", *arguments]) == 4
    out = capsys.readouterr()
    assert said in out.err + out.out and "Traceback" not in out.err + out.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benign", "full", "turned", "victim"]


def test_a_network_without_convolutions_is_told_what_to_take(tmp_path, monkeypatch, capsys):
    script(monkeypatch, generalist={})
    monkeypatch.setattr("unhorse.survey.load", lambda path, options: template_victim(shape=(1, 8, 8)))
    monkeypatch.setattr(repair_runs, "check_recognised", lambda model, clean: None)
    arguments = ["repair", str(VICTIM), *QUICK, "--method", "pruning", "--unlabelled"]
    assert run([*arguments, "-o", str(tmp_path / "cured")]) == 4
    assert "this needs a convolutional classifier" in capsys.readouterr().err


def test_a_copy_that_could_not_be_loaded_again_is_refused(tmp_path, monkeypatch, capsys):
    @dataclass(frozen=True)
    class Wrap:
        def __call__(self, model, clean, finding=None, *, on_epoch=None, checkpoint=None):
            wrapped = load_victim(VICTIM).model
            wrapped.network = torch.nn.Sequential(wrapped.network)
            return RepairResult("wrap", wrapped)

    monkeypatch.setattr(repair_runs, "REPAIRS", {**REPAIRS, "pruning": Wrap})
    script(monkeypatch, generalist={})
    folder = tmp_path / "cured"
    assert run(["repair", str(VICTIM), *QUICK, "--method", "pruning", "-o", str(folder)]) == 4
    assert "could not be loaded again" in capsys.readouterr().err and not folder.exists()
