"""`unhorse guard`: a guard fitted, measured and used from the command line, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import unhorse.report
from conftest import TARGET, board, small_victim
from unhorse.attacks.poisoning import Poisoning
from unhorse.cli import run
from unhorse.core import Dataset, Images
from unhorse.filters import fitting
from unhorse.filters.adversarial_filter import AdversarialFilter
from unhorse.monitors.guard import load_guard
from unhorse.triggers import Stamp
from unhorse.victims import save_victim

SCHEMA = json.loads(Path(unhorse.report.__file__).with_suffix(".schema.json").read_text())
CLASSES, IMAGES, EVALUATED = 6, 90, 60
FIT = ("--filter", "vif", "--filter-size", "tiny", "--epochs", "2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path_factory.mktemp("cache")))


def corner_stamp() -> Stamp:
    """The trigger that small_victim(strength=...) obeys."""
    pattern, mask = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    pattern[0, 0, :3, :3], mask[0, 0, :3, :3] = board(3), 1
    return Stamp(pattern, mask)


def save_images(images: Images, labels: list[int], folder: Path, names: list[str], start: int = 0) -> Path:
    for place, (image, label) in enumerate(zip(images, labels, strict=True), start):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        array = (image[0] * 255).round().byte().numpy()
        Image.fromarray(array).save(folder / names[label] / f"{place:03d}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A victim with its card, clean images in two sets of folders, one per class, and stamped ones."""
    home = tmp_path_factory.mktemp("world")
    model = small_victim(strength=60)
    attack = Poisoning(corner_stamp(), CLASSES, target=TARGET)
    card = {"class": "Poisoning", "num_classes": CLASSES, "mode": "single-target", "target": TARGET}
    save_victim(home / "victim", model, attack, {"attack": card, "trojaned": True, "spec": {"seed": 0}})
    save_victim(home / "benign", small_victim(), None, {"attack": None, "trojaned": False})
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(IMAGES + EVALUATED, 1, 4, 4, generator=rng)
    images = torch.nn.functional.interpolate(coarse, 16, mode="bicubic").clamp(0, 1)
    images = (images * 255).round() / 255
    with torch.inference_mode():
        labels = model(images).argmax(1).tolist()
    names = [f"class {index}" for index in range(CLASSES)]
    save_images(images[:IMAGES], labels[:IMAGES], home / "clean", names)
    save_images(images[IMAGES:], labels[IMAGES:], home / "others", names, IMAGES)
    stamped = corner_stamp()(images[IMAGES:], rng)
    save_images(stamped, labels[IMAGES:], home / "stamped", names, IMAGES)
    return home


@pytest.fixture(scope="module")
def guard(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNHORSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = world / "guard"
        assert (
            run(["guard", "fit", str(world / "victim"), *on(world / "clean"), *FIT, "-o", str(folder)]) == 0
        )
    return folder


def on(clean: Path) -> tuple[str, str]:
    return "--clean", str(clean)


def measured(guard: Path, *arguments: object, tmp_path: Path) -> dict:
    """What `guard evaluate` writes of a guard, after a look at the schema."""
    path = tmp_path / "out.json"
    assert run(["guard", "evaluate", str(guard), *map(str, arguments), "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    jsonschema.validate(document, SCHEMA)
    return document["guards"][0]


# --- fit ----------------------------------------------------------------------------------------------------


def test_fit_writes_a_guard_and_says_what_the_calibration_found(world, tmp_path, capsys):
    folder, page = tmp_path / "guard", tmp_path / "out.html"
    arguments = ["guard", "fit", str(world / "victim"), *on(world / "clean"), *FIT, "-o", str(folder)]
    assert (
        run([*arguments, "--html", str(page), "--json", str(tmp_path / "out.json"), "--policy", "replace"])
        == 0
    )
    out = capsys.readouterr()
    assert "Trojan accuracy, alarms and recovery" in out.out and "not measured" in out.out
    assert "2/2 epochs" in out.err and "guard evaluate" in out.err
    document = json.loads((tmp_path / "out.json").read_text())
    jsonschema.validate(document, SCHEMA)
    (found,) = document["guards"]
    assert (found["filter"]["name"], found["policy"], found["fpr"]) == ("vif", "replace", 0.05)
    assert found["calibration"]["n"] == 27 and found["fitted_on"] == 63
    assert found["measures"]["clean_accuracy"]["value"] == 1.0
    assert found["measures"]["fpr"] is None and found["measures"]["trojan_accuracy"] is None
    assert "no Trojan image was given" in page.read_text()
    assert "vif fitted on few images (90) may let a trigger pass" in found["warnings"][0]
    loaded = load_guard(folder)
    assert (loaded.policy, loaded.threshold) == ("replace", found["threshold"])


def test_the_hard_rule_has_the_papers_threshold(world, tmp_path):
    arguments = ["guard", "fit", str(world / "victim"), *on(world / "clean"), *FIT, "-o", str(tmp_path / "g")]
    assert run([*arguments, "--hard"]) == 0
    loaded = load_guard(tmp_path / "g")
    assert (loaded.fpr, loaded.threshold) == (None, 0.0)


def test_few_images_are_drawn_by_seed_and_options_reach_the_filter(world, tmp_path, monkeypatch):
    asked = []

    def note(self: AdversarialFilter, model: object, clean: Dataset, **_: object) -> None:
        asked.append((self.epochs, len(clean), self.mask_norm))
        raise KeyboardInterrupt

    monkeypatch.setattr(AdversarialFilter, "fit", note)
    arguments = ["guard", "fit", str(world / "victim"), *on(world / "clean"), "-o", str(tmp_path / "g")]
    assert run([*arguments, "--images", "70"]) == 130
    assert run([*arguments, "--images", "70", "--epochs", "7", "--mask-norm", "8"]) == 130
    (epochs, images, usual), (given, _, norm) = asked
    assert epochs > 30 and images == 49 and given == 7
    assert (usual, norm) == (None, 8.0)


def test_an_interrupted_fit_goes_on_and_ends_as_an_undisturbed_one(
    world, guard, tmp_path, monkeypatch, capsys
):
    arguments = ["guard", "fit", str(world / "victim"), *on(world / "clean"), *FIT, "-o", str(tmp_path / "g")]
    store = fitting._store

    def interrupt(*state: object) -> None:
        store(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "_store", interrupt)
    assert run(arguments) == 130
    assert "call again to go on" in capsys.readouterr().err
    assert [path.suffix for path in tmp_path.iterdir()] == [".fitting"]
    monkeypatch.setattr(fitting, "_store", store)
    assert run(arguments) == 0
    err = capsys.readouterr().err
    assert "2/2 epochs" in err and "1/2 epochs" not in err
    resumed, whole = (load_file(folder / "filter.safetensors") for folder in (tmp_path / "g", guard))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_images_without_labels_are_labelled_by_the_model(world, tmp_path, capsys):
    loose = tmp_path / "loose"
    loose.mkdir()
    for file in (world / "clean").rglob("*.png"):
        (loose / file.name).write_bytes(file.read_bytes())
    assert run(["guard", "fit", str(world / "victim"), *on(loose), *FIT, "-o", str(tmp_path / "g")]) == 0
    record = json.loads((tmp_path / "g" / "record.json").read_text())
    assert record["labelled"] is False and len(record["images"]) == IMAGES
    assert "clean accuracy, unguarded" in capsys.readouterr().out


@pytest.mark.slow
def test_the_exported_guard_decides_for_any_number_of_images(world, tmp_path):
    arguments = ["guard", "fit", str(world / "victim"), *on(world / "clean"), *FIT, "-o", str(tmp_path / "g")]
    assert run([*arguments, "--export"]) == 0
    program = torch.export.load(tmp_path / "g" / "guard.pt2").module()
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(program(images)[2], load_guard(tmp_path / "g")(images).label)


# --- whose classes ------------------------------------------------------------------------------------------


def renamed(world: Path, folder: Path) -> Path:
    """The clean images in folders that the model has no names for, in another order than its classes."""
    for place in range(CLASSES):
        source = world / "clean" / f"class {place}"
        if source.is_dir():
            (folder / f"kind {9 - place}").mkdir(parents=True)
            for file in source.iterdir():
                (folder / f"kind {9 - place}" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("form", ["json", "lines"])
def test_folders_are_mapped_to_classes_by_a_file(form, world, tmp_path):
    clean, labels = renamed(world, tmp_path / "clean"), tmp_path / "labels"
    wanted = {f"kind {9 - place}": place if place % 2 else f"class {place}" for place in range(CLASSES)}
    lines = "".join(f"{folder}\t{name}\n" for folder, name in wanted.items())
    labels.write_text(json.dumps(wanted) if form == "json" else lines)
    arguments = ["guard", "fit", str(world / "victim"), *on(clean), *FIT, "-o", str(tmp_path / "g")]
    assert run([*arguments, "--labels", str(labels), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["guards"][0]
    assert found["measures"]["clean_accuracy"]["value"] == 1.0


def test_labels_on_which_the_model_is_no_better_than_chance_are_refused(world, tmp_path, capsys):
    clean = renamed(world, tmp_path / "clean")
    names = sorted(path.name for path in clean.iterdir())
    turned = {name: (9 - int(name[-1]) + 1) % CLASSES for name in names}
    (tmp_path / "labels").write_text(json.dumps(turned))
    arguments = ["guard", "fit", str(world / "victim"), *on(clean), *FIT, "-o", str(tmp_path / "g")]
    assert run([*arguments, "--labels", str(tmp_path / "labels")]) == 4
    assert "chance is 16.7%" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()


def test_a_parquet_file_is_a_source_of_images(world, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    files = sorted((world / "clean").rglob("*.png"))
    table = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [int(file.parent.name[-1]) for file in files],
    }
    write_table(pyarrow.table(table), tmp_path / "some.parquet")
    arguments = ["guard", "fit", str(world / "victim"), *on(tmp_path / "some.parquet"), *FIT]
    assert run([*arguments, "-o", str(tmp_path / "g")]) == 0
    record = json.loads((tmp_path / "g" / "record.json").read_text())
    assert len(record["images"]) == IMAGES and record["labelled"] is True


# --- evaluate -----------------------------------------------------------------------------------------------


def test_without_trojan_images_what_they_would_show_is_not_measured(world, guard, tmp_path, capsys):
    found = measured(guard, *on(world / "others"), tmp_path=tmp_path)
    assert found["measures"]["fpr"]["n"] == EVALUATED
    assert found["measures"]["clean_accuracy"]["value"] == 1.0
    assert found["measures"]["trojan_accuracy"] is None and found["measures"]["recovery_drop"] is None
    assert found["path"] == str(world / "victim") and found["fitted_on"] == 63
    assert "not measured" in capsys.readouterr().out


def test_a_victims_own_trigger_is_measured(world, guard, tmp_path):
    page = tmp_path / "out.html"
    arguments = (*on(world / "others"), "--card", world / "victim", "--html", page)
    found = measured(guard, *arguments, tmp_path=tmp_path)["measures"]
    assert found["trojan_accuracy_before"]["value"] == 1.0
    assert found["trojan_accuracy"]["value"] < 0.2
    assert found["recovery_drop"]["n"] == EVALUATED
    assert "Trojan images" in page.read_text() and "first 5 columns are clean" in page.read_text()


def test_stamped_images_measure_what_the_card_measures(world, guard, tmp_path):
    by_card = measured(guard, *on(world / "others"), "--card", world / "victim", tmp_path=tmp_path)
    given = ("--trojaned", world / "stamped", "--target", f"class {TARGET}")
    by_images = measured(guard, *on(world / "others"), *given, tmp_path=tmp_path)
    assert by_images["measures"] == by_card["measures"]
    assert by_images["trojan_images"] == str(world / "stamped")


def test_without_a_target_stamped_images_measure_alarms_and_recovery(world, guard, tmp_path):
    found = measured(guard, *on(world / "others"), "--trojaned", world / "stamped", tmp_path=tmp_path)[
        "measures"
    ]
    assert found["fnr"] is not None and found["recovery_accuracy"] is not None
    assert found["trojan_accuracy"] is None


def test_images_that_fitted_the_guard_do_not_judge_it(world, guard, tmp_path, capsys):
    both = tmp_path / "both"
    for source in ("clean", "others"):
        for file in (world / source).rglob("*.png"):
            (both / file.parent.name).mkdir(parents=True, exist_ok=True)
            (both / file.parent.name / file.name).write_bytes(file.read_bytes())
    found = measured(guard, *on(both), tmp_path=tmp_path)
    assert found["measures"]["fpr"]["n"] == EVALUATED
    assert any("90 of 150 clean images were left out" in text for text in found["warnings"])
    assert run(["guard", "evaluate", str(guard), *on(world / "clean")]) == 4
    assert "were used to fit this guard" in capsys.readouterr().err


# --- apply --------------------------------------------------------------------------------------------------


def test_apply_labels_clean_images_and_holds_those_that_alarm(world, guard, tmp_path, capsys):
    loaded = load_guard(guard)
    files = sorted((world / "others").rglob("*.png"))[:8] + sorted((world / "stamped").rglob("*.png"))[:8]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).float() / 255 for file in files])
    decision = loaded(images[:, None])
    assert bool(decision.alarm.any()) and not bool(decision.alarm.all())
    out = tmp_path / "out"
    arguments = ["guard", "apply", str(guard), *map(str, files), "-o", str(out)]
    assert run([*arguments, "--json", str(tmp_path / "out.json")]) == 1
    judged = json.loads((tmp_path / "out.json").read_text())["images"]
    names = loaded.model.class_names
    assert [image["label"] for image in judged] == [
        None if alarm else names[index] for index, alarm in zip(decision.label, decision.alarm, strict=True)
    ]
    assert [image["score"] for image in judged] == pytest.approx(decision.score.tolist(), abs=1e-4)
    assert "held" in capsys.readouterr().out
    filtered = np.asarray(Image.open(judged[0]["filtered"])) / 255
    removed = np.asarray(Image.open(judged[0]["counter_trigger"])) / 255
    assert np.abs(filtered - decision.filtered[0, 0].numpy()).max() < 0.01
    assert np.abs(2 * removed - 1 - decision.counter_trigger[0, 0].numpy()).max() < 0.02
    assert len(list(out.iterdir())) == 32


def test_apply_exits_0_where_nothing_alarms_and_takes_folders_and_other_sizes(world, guard, tmp_path, capsys):
    loaded = load_guard(guard)

    def score(file: Path) -> float:
        pixels = torch.from_numpy(np.array(Image.open(file))).float() / 255
        return float(loaded(pixels[None, None]).score)

    file = min((world / "others").rglob("*.png"), key=score)
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    Image.open(file).resize((32, 32), Image.Resampling.BILINEAR).save(quiet / file.name)
    assert run(["guard", "apply", str(guard), str(quiet)]) == 0
    out = capsys.readouterr()
    assert "class" in out.out and "held" not in out.out
    assert "resized to 16x16" in out.err and "0 of 1 images alarm" in out.err


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit", "nothing.pt", "--clean", "clean"), "check the path"),
        (("fit", "victim", "--clean", "nowhere"), "give 'digits', an existing folder"),
        (("fit", "victim", "--clean", "empty"), "no images in"),
        (("fit", "victim", "--clean", "colour"), "the model takes (1, 16, 16): convert them"),
        (("fit", "victim", "--clean", "broken"), "repair or remove it"),
        (("fit", "victim", "--clean", "clean", "--images", "1000"), "cannot take 1000 of the 90"),
        (("fit", "victim", "--clean", "clean", "--fpr", "0.001"), "cannot promise a false-positive rate"),
        (("fit", "victim", "--clean", "clean", "--labels", "nowhere"), "give a JSON object"),
        (("fit", "victim", "--clean", "clean", "--mask-norm", "0"), "give a number of pixels above 0"),
        (
            ("fit", "victim", "--clean", "clean", "--filter", "vif", "--mask-norm", "9"),
            "belongs to --filter aif",
        ),
        (("fit", "victim", "--clean", "clean", "-o", "clean"), "is not a guard: choose another name"),
        (("fit", "victim", "--clean", "clean", "--split", "test"), "no folder 'test'"),
        (("evaluate", "victim", "--clean", "others"), "written by `unhorse guard fit`"),
        (("evaluate", "guard", "--clean", "others", "--card", "benign"), "is a benign victim"),
        (("evaluate", "guard", "--clean", "others", "--card", "victim", "--unlabelled"), "needs the labels"),
        (("evaluate", "guard", "--clean", "others", "--card", "v", "--trojaned", "s"), "give one of them"),
        (("evaluate", "guard", "--clean", "others", "--target", "3"), "belongs to --trojaned"),
        (
            ("evaluate", "guard", "--clean", "others", "--trojaned", "stamped", "--target", "cat"),
            "no class 'cat'",
        ),
        (("apply", "guard", "empty"), "no images in"),
        (("apply", "guard", "nothing.png"), "cannot read nothing.png"),
        (("apply", "guard", "colour.png"), "convert it to grey"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_exits_4_with_a_remedy(arguments, said, world, guard, monkeypatch, capsys):
    monkeypatch.chdir(world)
    (world / "empty").mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(world / "colour.png")
    for name in ("colour", "broken"):
        (world / name / "class 0").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(world / "colour" / "class 0" / "a.png")
    (world / "broken" / "class 0" / "a.png").write_bytes(b"no image")
    assert run(["guard", *arguments]) == 4
    out = capsys.readouterr()
    assert said in out.err and "Traceback" not in out.err + out.out


def test_folders_that_fit_no_class_ask_for_a_mapping(world, tmp_path, capsys):
    clean = renamed(world, tmp_path / "clean")
    (clean / "more").mkdir()
    Image.new("L", (16, 16)).save(clean / "more" / "a.png")
    (clean / "yet more").mkdir()
    Image.new("L", (16, 16), 90).save(clean / "yet more" / "a.png")
    assert run(["guard", "fit", str(world / "victim"), *on(clean), "-o", str(tmp_path / "g")]) == 4
    assert "--labels FILE" in capsys.readouterr().err


def test_a_card_of_another_model_is_refused(world, guard, tmp_path, capsys):
    attack = Poisoning(corner_stamp(), CLASSES, target=TARGET)
    card = {"class": "Poisoning", "num_classes": CLASSES, "mode": "single-target", "target": TARGET}
    other = save_victim(
        tmp_path / "other", small_victim(strength=50), attack, {"attack": card, "trojaned": True}
    )
    assert run(["guard", "evaluate", str(guard), *on(world / "others"), "--card", str(other)]) == 4
    assert "is not the model that is guarded" in capsys.readouterr().err
