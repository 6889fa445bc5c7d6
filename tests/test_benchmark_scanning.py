"""Tables of model scanners: who is fitted on, who is judged, and that truth and scores meet in the right
rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from unhorse.benchmark import fitting, model_scores
from unhorse.benchmark.run import run_spec
from unhorse.benchmark.scanners import METHODS, Method, make
from unhorse.benchmark.scanning import ScanningSpec, Trial
from unhorse.benchmark.scanning_trials import _evenly
from unhorse.core import Classifier, ScanResult, Verdict
from unhorse.metrics import auroc, evaluation
from unhorse.models.classifier import load_classifier, read_card
from unhorse.populations import read_populations
from unhorse.zoo import build, members

RECIPE = """
recipe = { epochs = 1, batch_size = 32 }
acceptance = { clean_margin = 1.0, trojan = 0.0, attempts = 1, median_of = 1 }
options = { widths = [4, 8], hidden = 8 }
"""
PATCH, BLEND = '{ kind = "badnet", rate = 0.5 }', '{ kind = "blended", rate = 0.5 }'
TO_ALL = '{ kind = "badnet", mode = "all-target", rate = 0.5 }'
PLACEBO = '{ kind = "badnet", mode = "placebo" }'
Marks = dict[tuple[str, str], list[float]]

HOME: Marks = {
    ("fit", "benign"): [0.0, 0.1, 0.2, 0.3, 0.1, 0.2],
    ("fit", "patch"): [0.9, 0.8, 0.7],
    ("fit", "blended"): [0.6, 0.6, 0.6],
    ("held-back", "benign"): [0.1, 0.2, 0.3, 0.4, 0.6],
    ("held-back", "patch"): [0.35, 0.7, 0.9],
    ("held-back", "all-to-all"): [0.25, 0.8],
    ("held-back", "placebo"): [0.5],
}
AWAY: Marks = {("held-back", "benign"): [0.0, 0.4, 0.7], ("held-back", "patch"): [0.8, 0.3]}
ATTACKS = {"patch": PATCH, "blended": BLEND, "all-to-all": TO_ALL, "placebo": PLACEBO}


def mark_of(model: Classifier) -> float:
    """The number that a test wrote into a model: what stub scanners read."""
    return round(list(model.network.parameters())[-1][0].item(), 6)


def groups_of(marks: Marks) -> str:
    lines = [
        f'{{ name = "{group}", split = "{split}", count = {len(values)}'
        + (f", attack = {ATTACKS[group]} }}" if group in ATTACKS else " }")
        for (split, group), values in marks.items()
    ]
    return "groups = [" + ", ".join(lines) + "]\n"


def populate(folder: Path, marks: Marks) -> None:
    """Fills a population from one trained victim per group; copies differ by their mark alone."""
    for (split, group), values in marks.items():
        original = folder / split / f"{group}-0000"
        weights = load_file(original / "model.safetensors")
        last = list(load_classifier(original).network.state_dict())[-1]
        for index, mark in enumerate(values):
            copy = folder / split / f"{group}-{index:04d}"
            if index:
                shutil.copytree(original, copy)
            bias = weights[last].clone()
            bias[0] = mark
            save_file({**weights, last: bias}, copy / "model.safetensors")


def planted(place: Path, name: str, text: str, marks: dict[str, Marks]) -> None:
    """A zoo spec and what it builds, trained once per group and then copied."""
    path = place / f"{name}.toml"
    few = {folder: {key: values[:1] for key, values in some.items()} for folder, some in marks.items()}
    for counted in (few, marks):
        body = text
        for folder, some in counted.items():
            body = body.replace(f"GROUPS-{folder};", groups_of(some))
        path.write_text(body)
        if counted is few:
            for folder, zoo in read_populations(path, place / "work" / name).items():
                build(zoo, folder)
    for folder, some in marks.items():
        populate(place / "work" / name / folder, some)


@pytest.fixture(scope="module")
def planted_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scanning")
    data = "data = { source = 'digits', images = 64, test_images = 32 }\n"
    planted(place, "home", f'name = "home"\n{data}{RECIPE}GROUPS-;', {"": HOME})
    large = data.replace("64,", "64, size = [12, 12],")
    planted(place, "away", f'name = "away"\n{large}{RECIPE}GROUPS-;', {"": AWAY})
    tasks = "".join(f'[[tasks]]\nname = "{name}"\n{data}{RECIPE}GROUPS-{name};' for name in FAMILY)
    everyone = groups_of({("held-back", "benign"): [0.0]})
    planted(place, "family", f'name = "family"\n{everyone}{tasks}', FAMILY)
    return place


@pytest.fixture
def place(planted_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planted_once, tmp_path / "place"))


# benign marks of one population lie apart from another's: thresholds do not carry over by themselves
FAMILY: dict[str, Marks] = {
    name: {
        ("held-back", "benign"): [shift + 0.01 * index for index in range(count)],
        ("held-back", "patch"): [shift + 0.05, shift + 0.2],
        ("held-back", "blended"): [shift + 0.085],
        ("held-back", "placebo"): [shift],
    }
    for name, shift, count in (("low", 0.0, 12), ("middle", 0.0021, 10), ("high", 0.0043, 10))
}


# --- stub scanners ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """Needs no population: the score is the mark."""

    threshold: float = 0.5
    seed: int = 0

    calls: ClassVar[list[float]] = []

    def measure(self, model: Classifier) -> float:
        self.calls.append(mark_of(model))
        return mark_of(model)

    def scan(self, model: Classifier, clean: object = None) -> ScanResult:
        score = self.measure(model)
        verdict = Verdict.of(flagged=score >= self.threshold, demonstrated=False)
        return ScanResult(verdict, "marked", score=score, threshold=self.threshold, target=3)


@dataclass(frozen=True)
class Picky(Marked):
    """Judges images of 8x8 alone."""

    def measure(self, model: Classifier) -> float:
        if model.image_shape != (1, 8, 8):
            raise ValueError("images of 8x8 alone: give others to another scanner")
        return super().measure(model)


@dataclass
class Learner:
    """Learns from models: remembers whom it saw."""

    seed: int = 0
    threshold_: float = field(default=0.5, init=False)

    fits: ClassVar[list[list[Path]]] = []
    judged: ClassVar[list[list[Path]]] = []

    def fit(self, models: Sequence, trojaned: Sequence[bool], *, progress: object) -> Learner:
        assert any(trojaned) and not all(trojaned)
        self.shape_ = models[0].image_shape
        self.fits.append([model.folder for model in models])
        return self

    def scores(self, models: Sequence) -> torch.Tensor:
        if any(model.image_shape != self.shape_ for model in models):
            raise ValueError("another image shape: fit on models of that shape")
        self.judged.append([model.folder for model in models])
        return torch.tensor([mark_of(model) for model in models], dtype=torch.float64)


@dataclass
class Centred:
    """Learns from features: the score is the mark less the mean mark of the benign models fitted on."""

    center_: float = field(default=0.0, init=False)

    fits: ClassVar[list[set[float]]] = []

    def features(self, model: Classifier) -> list[float]:
        return [mark_of(model), 1.0]

    def fit(self, features: Sequence, trojaned: Sequence[bool], groups: Sequence[object]) -> Centred:
        assert len(groups) == len(trojaned)
        marks = torch.tensor(features)[:, 0].double()
        self.center_ = float(marks[~torch.tensor(trojaned)].mean())
        self.fits.append({round(mark, 4) for mark in marks.tolist()})
        return self

    def scores(self, features: Sequence) -> torch.Tensor:
        return torch.tensor(features)[:, 0].double() - self.center_


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "marked", Method("nothing", Marked))
    monkeypatch.setitem(METHODS, "picky", Method("nothing", Picky))
    monkeypatch.setitem(METHODS, "learner", Method("models", Learner))
    monkeypatch.setitem(METHODS, "centred", Method("features", Centred))

    def load(folder: Path) -> Classifier:
        model = load_classifier(folder)
        model.folder = folder  # so that a stub can say whom it saw
        return model

    monkeypatch.setattr(fitting, "load_classifier", load)
    for seen in (Marked.calls, Learner.fits, Learner.judged, Centred.fits):
        seen.clear()


def run(place: Path, text: str, name: str = "spec") -> list[dict]:
    (place / f"{name}.toml").write_text(f'table = "ours-{name}"\n{text}')
    rows = run_spec(place / f"{name}.toml", place / "work", place / "results")
    return [json.loads(row.model_dump_json()) for row in rows]


def value(rows: list[dict], **wanted: object) -> float:
    (row,) = of(rows, **wanted)
    return row["value"]


def of(rows: list[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


FITTED = 'fit = [{ population = "home.toml" }]\n'
BESIDE = 'judge = [{ population = "family.toml", groups = ["placebo", "patch"], beside = "placebo" }]\n'
JUDGED = 'judge = [{ population = "home.toml", groups = ["benign", "patch", "all-to-all"] }]\nseeds = [0]\n'


# --- rows ---------------------------------------------------------------------------------------------------


def test_each_group_and_all_of_them_are_measured_against_the_benign_models(place):
    rows = run(place, JUDGED + 'methods = [{ name = "marked" }]')
    patch, to_all, everything = (
        {"attack": "badnet", "mode": "single-target"},
        {"attack": "badnet", "mode": "all-target"},
        {"attack": "all", "mode": None},
    )
    assert value(rows, metric="auroc", **patch) == pytest.approx(13 / 15)
    assert value(rows, metric="auroc", **to_all) == pytest.approx(7 / 10)
    assert value(rows, metric="auroc", **everything) == pytest.approx(20 / 25)
    assert value(rows, metric="accuracy", **patch) == pytest.approx(6 / 8)
    assert value(rows, metric="accuracy", **everything) == pytest.approx(7 / 10)
    assert value(rows, metric="fpr", attack="benign") == pytest.approx(1 / 5)
    assert value(rows, metric="finding_rate", **everything) == pytest.approx(3 / 5)
    assert {row["n"] for row in of(rows, metric="auroc", **everything)} == {10}
    assert {(row["dataset"], row["split"], row["trained_on"]) for row in rows} == {
        ("digits", "held-back", None)
    }


def test_rows_of_a_learned_method_say_what_it_was_fitted_on(place):
    rows = run(place, FITTED + JUDGED + 'methods = [{ name = "learner" }]')
    (zoo,) = read_populations(place / "home.toml", place).values()
    assert {row["trained_on"] for row in rows} == {"blended+patch"}
    assert {row["population"] for row in rows} == {zoo.identity()}
    assert value(rows, metric="auroc", attack="all") == pytest.approx(20 / 25)


def test_two_groups_of_one_kind_keep_their_names(place):
    spec = (place / "home.toml").read_text()
    (place / "home.toml").write_text(spec.replace(TO_ALL, PATCH))
    for path in (place / "work" / "home").glob("population.json"):
        path.write_text(path.read_text().replace("all-target", "single-target"))
    rows = run(place, JUDGED + 'methods = [{ name = "marked" }]')
    found = {row["options"].get("group") for row in of(rows, metric="auroc", attack="badnet")}
    assert found == {"patch", "all-to-all"}


def test_another_population_is_judged_by_who_can_and_the_others_say_why_not(place, capsys):
    judge = 'judge = [{ population = "home.toml" }, { population = "away.toml" }]\nseeds = [0]\n'
    methods = 'methods = [{ name = "marked" }, { name = "picky", verdicts = false }, { name = "learner" }]'
    rows = run(place, FITTED + judge + methods)
    away = [row for row in rows if row["options"].get("judged") == "away"]
    assert {row["method"] for row in away} == {"marked"}
    assert value(away, metric="auroc", attack="badnet") == pytest.approx((3 + 1) / 6)
    home = {row["method"] for row in rows if "judged" not in row["options"]}
    assert home == {"marked", "picky", "learner"}
    said = capsys.readouterr().err
    assert "picky on away held-back: no row, images of 8x8 alone" in said
    assert "learner on away held-back: no row, another image shape" in said


def test_infected_models_beside_placebos_are_compared_with_those_alone(place):
    beside = ('["benign", "patch", "all-to-all"] }', '["patch", "all-to-all"], beside = "all-to-all" }')
    spec = (place / "home.toml").read_text()
    (place / "home.toml").write_text(spec.replace("all-target", "placebo"))
    home = place / "work" / "home"
    for path in (home / "population.json", *home.glob("held-back/all-to-all-*/card.json")):
        text = path.read_text().replace("all-target", "placebo")
        path.write_text(text.replace('"trojaned": true', '"trojaned": false'))
    rows = run(place, JUDGED.replace(*beside) + 'methods = [{ name = "marked" }]')
    marks = {group: torch.tensor(HOME["held-back", group]) for group in ("patch", "all-to-all")}
    wins = (marks["patch"][:, None] > marks["all-to-all"]).double()
    ties = (marks["patch"][:, None] == marks["all-to-all"]).double()
    wanted = (wins + ties / 2).mean().item()
    assert wanted != pytest.approx(13 / 15)  # what it is beside the benign models
    assert value(rows, metric="auroc", attack="badnet") == pytest.approx(wanted)
    assert {row["options"]["beside"] for row in rows} == {"all-to-all"}
    (alarms,) = of(rows, metric="fpr")
    assert (alarms["attack"], alarms["n"]) == ("benign", len(marks["all-to-all"]))


def test_pooled_rows_are_of_all_judged_populations_as_if_they_were_one(place):
    judge = (
        'judge = [{ population = "home.toml" }, { population = "away.toml" }]\nseeds = [0]\npooled = true\n'
    )
    rows = run(place, FITTED + judge + 'methods = [{ name = "marked" }, { name = "learner" }]')
    everywhere = [row for row in rows if row["dataset"] == "all"]
    marked = of(everywhere, method="marked", architecture="all")
    assert value(marked, metric="fpr", attack="benign") == pytest.approx(2 / 8)
    patches = {"attack": "badnet", "mode": "single-target"}
    assert value(marked, metric="auroc", **patches) == pytest.approx(31 / 40)
    assert value(marked, metric="finding_rate", **patches) == pytest.approx(3 / 5)
    assert of(marked, metric="auroc", attack="all")[0]["n"] == 8 + 5 + 2
    assert all("judged" not in row["options"] for row in everywhere)
    # the learner refuses the images of one population, and is pooled over the other
    (found,) = of(everywhere, method="learner", metric="auroc", attack="all")
    assert found["n"] == 5 + 3 + 2
    with pytest.raises(ValueError, match="leave_one_out has them by itself"):
        run(place, "pooled = true\n" + LEFT_OUT + 'methods = [{ name = "marked" }]')


def test_an_error_on_the_fitted_task_is_no_refusal(place, monkeypatch):
    def scores(self: Learner, models: Sequence) -> torch.Tensor:
        raise ValueError("a mistake")

    monkeypatch.setattr(Learner, "scores", scores)
    with pytest.raises(RuntimeError, match="a mistake"):
        run(place, FITTED + JUDGED + 'methods = [{ name = "learner" }]')


# --- who is seen --------------------------------------------------------------------------------------------


def test_a_learned_method_never_sees_a_judged_model(place):
    run(place, FITTED + JUDGED + 'methods = [{ name = "learner" }]')
    (fitted,), (judged,) = Learner.fits, Learner.judged
    assert len(fitted) == 12 and len(judged) == 10
    assert {folder.parent.name for folder in fitted} == {"fit"}
    assert {folder.parent.name for folder in judged} == {"held-back"}


def test_judging_what_was_fitted_on_is_refused(place):
    judge = 'judge = [{ population = "home.toml", split = "fit" }]\n'
    with pytest.raises(RuntimeError, match="is fitted on and judged"):
        run(place, FITTED + judge + 'methods = [{ name = "learner" }]')
    assert not Learner.fits


def test_a_limit_counts_the_models_of_each_group(place):
    fit = 'fit = [{ population = "home.toml", groups = ["benign", "patch"], limit = 2 }]\n'
    run(place, fit + JUDGED + 'methods = [{ name = "learner" }]')
    names = sorted(folder.name for folder in Learner.fits[0])
    assert names == ["benign-0000", "benign-0001", "patch-0000", "patch-0001"]


def test_smaller_fits_are_parts_of_larger_ones_and_half_trojaned(place, capsys):
    text = FITTED + JUDGED.replace("[0]", "[0, 1]") + "sizes = [4, 8, 12, 100]\n"
    rows = run(place, text + 'methods = [{ name = "learner" }, { name = "marked" }]')
    by_seed = [Learner.fits[:3], Learner.fits[3:]]
    for small, medium, large in by_seed:
        assert set(small) < set(medium) < set(large)
        for chosen in (small, medium, large):
            groups = [folder.name.rsplit("-", 1)[0] for folder in chosen]
            assert groups.count("benign") == len(chosen) / 2
            assert groups.count("patch") == groups.count("blended")
    assert set(by_seed[0][0]) != set(by_seed[1][0])
    sizes = [row["options"]["n_models"] for row in of(rows, method="learner", seed=0, metric="fpr")]
    assert sizes == [4, 8, 12]
    assert "100 models to fit on were asked for, 12 are there" in capsys.readouterr().err
    assert not any("n_models" in row["options"] for row in of(rows, method="marked"))


# --- nothing is done twice ----------------------------------------------------------------------------------


def test_a_model_is_measured_once_for_all_tables(place):
    run(place, JUDGED + 'methods = [{ name = "marked" }]')
    assert sorted(Marked.calls) == [0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.6, 0.7, 0.8, 0.9]
    Marked.calls.clear()
    everything = 'judge = [{ population = "home.toml" }]\nseeds = [0]\n'
    rows = run(place, everything + 'methods = [{ name = "marked" }]', "further")
    assert Marked.calls == [0.5]  # the placebo
    assert value(rows, metric="auroc", attack="placebo") == pytest.approx(4 / 5)


def test_another_seed_option_or_number_of_weights_is_measured_again(place):
    run(place, JUDGED + 'methods = [{ name = "marked" }]')
    Marked.calls.clear()
    run(place, JUDGED.replace("[0]", "[0, 1]") + 'methods = [{ name = "marked" }]')
    assert len(Marked.calls) == 10
    Marked.calls.clear()
    planned = {**HOME, ("held-back", "patch"): [0.35, 0.7, 0.95]}
    populate_again(place / "work" / "home" / "held-back" / "patch-0002", planned[("held-back", "patch")][2])
    shutil.rmtree(place / "work" / "ours-spec")
    rows = run(place, JUDGED + 'methods = [{ name = "marked" }]')
    assert Marked.calls == [0.95] and len(of(rows, metric="fpr")) == 1


def populate_again(folder: Path, mark: float) -> None:
    weights = load_file(folder / "model.safetensors")
    last = list(load_classifier(folder).network.state_dict())[-1]
    weights[last][0] = mark
    save_file(weights, folder / "model.safetensors")


def test_a_model_that_fails_costs_no_other_its_measurement(place, monkeypatch):
    whole = Marked.measure

    def unlucky(self: Marked, model: Classifier) -> float:
        if mark_of(model) == 0.7:
            raise OSError("out of luck")
        return whole(self, model)

    monkeypatch.setattr(Marked, "measure", unlucky)
    with pytest.raises(RuntimeError, match=r"failed on 1 of 10 models.*patch-0001"):
        run(place, JUDGED + 'methods = [{ name = "marked" }]')
    assert len(Marked.calls) == 9
    Marked.calls.clear()
    monkeypatch.setattr(Marked, "measure", whole)
    assert run(place, JUDGED + 'methods = [{ name = "marked" }]')
    assert Marked.calls == [0.7]


def test_a_fit_that_fails_keeps_the_finished_ones(place, monkeypatch):
    text = FITTED + JUDGED + 'sizes = [4, 8]\nmethods = [{ name = "learner" }]'
    whole = Learner.fit

    def unlucky(self: Learner, models: Sequence, trojaned: Sequence[bool], *, progress: object) -> Learner:
        if len(models) == 8:
            raise RuntimeError("out of luck")
        return whole(self, models, trojaned, progress=progress)

    monkeypatch.setattr(Learner, "fit", unlucky)
    with pytest.raises(RuntimeError, match="call again to go on"):
        run(place, text)
    monkeypatch.setattr(Learner, "fit", whole)
    assert [len(fitted) for fitted in Learner.fits] == [4]
    rows = run(place, text)
    assert [len(fitted) for fitted in Learner.fits] == [4, 8]
    assert len(of(rows, metric="auroc", attack="all")) == 2


def test_a_finished_table_runs_nothing_again(place, monkeypatch):
    text = FITTED + JUDGED + 'methods = [{ name = "learner" }, { name = "marked" }]'
    before = run(place, text)
    monkeypatch.setattr(Trial, "__call__", lambda self: pytest.fail("a finished trial ran again"))
    monkeypatch.setattr(
        model_scores.Measurement, "__call__", lambda self: pytest.fail("a model was measured again")
    )
    assert run(place, text) == before


# --- variants -----------------------------------------------------------------------------------------------


def judged_as(variant: str) -> str:
    return f'judge = [{{ population = "home.toml", groups = ["benign", "patch"], variant = {variant} }}]\n'


def copies(place: Path, kind: str) -> list[Path]:
    (folder,) = (place / "work").glob(f"home-{kind}-*")
    return [member.folder for member in members(folder, "held-back")]


def test_permuted_copies_answer_as_before_with_their_classes_in_another_order(place):
    rows = run(place, judged_as('"permuted"') + 'seeds = [0]\nmethods = [{ name = "marked" }]')
    assert {row["options"]["variant"] for row in rows} == {"permuted"}
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    orders = set()
    for folder in copies(place, "permuted"):
        original, copy = (load_classifier(each) for each in (twin(place, folder), folder))
        order = [original.class_names.index(name) for name in copy.class_names]
        orders.add(tuple(order))
        with evaluation(original), evaluation(copy):
            assert torch.allclose(copy(images), original(images)[:, order], atol=1e-5)
        before, after = (read_card(each)["attack"] for each in (twin(place, folder), folder))
        if before is not None:
            assert order[after["target"]] == before["target"]
    assert len(orders) == 8  # each copy in an order of its own


def twin(place: Path, copy: Path) -> Path:
    return place / "work" / "home" / "held-back" / copy.name


def test_pruned_copies_have_lost_their_smallest_weights_and_are_measured(place):
    rows = run(place, judged_as('{ kind = "pruned", share = 0.5 }') + 'methods = [{ name = "marked" }]')
    for folder in copies(place, "pruned"):
        original, copy = (load_file(each / "model.safetensors") for each in (twin(place, folder), folder))
        for name in (name for name in original if original[name].ndim > 1):
            gone, n = copy[name] == 0, copy[name].numel()
            assert int(gone.sum()) == round(0.5 * n)
            assert original[name][gone].abs().max() <= original[name][~gone].abs().min()
            assert torch.equal(original[name][~gone], copy[name][~gone])
    assert {row["options"]["variant_share"] for row in rows} == {0.5}
    cards = [read_card(folder) for folder in copies(place, "pruned")]
    mean = sum(card["metrics"]["trojan_accuracy"] for card in cards if card["trojaned"]) / 3
    assert value(rows, method="none", metric="trojan_accuracy") == pytest.approx(mean)


def test_fine_tuned_copies_are_made_once_and_never_change_the_originals(place, monkeypatch):
    before = {path: path.read_bytes() for path in (place / "work" / "home").rglob("*.safetensors")}
    variant = judged_as('{ kind = "fine-tuned", images = 40, epochs = 1 }')
    monkeypatch.setattr("unhorse.repairs.fine_tuning.check_recognised", lambda model, clean: None)
    run(place, variant + 'methods = [{ name = "marked" }]')
    made = {folder: (folder / "model.safetensors").read_bytes() for folder in copies(place, "fine-tuned")}
    assert len(made) == 8
    assert all(
        weights != before[twin(place, folder) / "model.safetensors"] for folder, weights in made.items()
    )
    lost = next(iter(made))
    shutil.rmtree(lost)
    saved = [folder.stat().st_mtime_ns for folder in made if folder != lost]
    run(place, variant + 'methods = [{ name = "marked" }]')
    assert saved == [folder.stat().st_mtime_ns for folder in made if folder != lost]
    assert (lost / "model.safetensors").read_bytes() == made[lost]
    assert {path: path.read_bytes() for path in before} == before


def test_copies_that_the_change_cured_are_not_judged_as_infected(place, capsys):
    path = place / "home.toml"
    path.write_text(path.read_text().replace("trojan = 0.0", "trojan = 1.1"))
    record = place / "work" / "home" / "population.json"
    record.write_text(record.read_text().replace('"trojan": 0.0', '"trojan": 1.1'))
    rows = run(place, judged_as('"pruned"') + 'methods = [{ name = "marked" }]')
    assert not of(rows, metric="auroc") and of(rows, metric="fpr")
    assert "3 of 3 of group patch are left out: the change cured them" in capsys.readouterr().err


# --- leave one out ------------------------------------------------------------------------------------------

LEFT_OUT = 'leave_one_out = true\njudge = [{ population = "family.toml" }]\nseeds = [0]\n'


def p_value(score: float, reference: list[float]) -> float:
    return (1 + sum(other >= score for other in reference)) / (1 + len(reference))


def marks(name: str, group: str) -> list[float]:
    return [round(mark, 6) for mark in FAMILY[name][("held-back", group)]]


def others_than(*names: str) -> list[str]:
    return [name for name in FAMILY if name not in names]


def check_left_out(rows: list[dict], scores: dict, reference: dict[str, list[float]]) -> None:
    """Rates and AUROCs, of each population and of all, worked out one model at a time."""
    flags: dict[str, list[bool]] = {"benign": [], "patch": [], "blended": [], "placebo": []}
    pooled: list[tuple[float, bool]] = []
    for name in FAMILY:
        for group in flags:
            p_values = [p_value(score, reference[name]) for score in scores[name, group]]
            found = [p <= 0.05 for p in p_values]
            flags[group] += found
            pooled += [(-p, group in ("patch", "blended")) for p in p_values if group != "placebo"]
            metric = "fpr_at_fpr05" if group in ("benign", "placebo") else "tpr_at_fpr05"
            wanted = {"split": f"family-{name}", "attack": "badnet" if group == "patch" else group}
            assert value(rows, metric=metric, **wanted) == pytest.approx(sum(found) / len(found))
        sides = [scores[name, group] for group in ("patch", "benign")]
        wins = sum((a > b) + 0.5 * (a == b) for a in sides[0] for b in sides[1])
        one = {"split": f"family-{name}", "attack": "badnet"}
        assert value(rows, metric="auroc", **one) == pytest.approx(wins / 2 / len(sides[1]))
    everywhere = {"split": "leave-one-out", "dataset": "all", "architecture": "all"}
    (fpr,) = of(rows, metric="fpr_at_fpr05", attack="benign", **everywhere)
    assert fpr["n"] == 32 and fpr["value"] == pytest.approx(sum(flags["benign"]) / 32)
    assert fpr["ci95"][0] <= fpr["value"] <= fpr["ci95"][1]
    caught = flags["patch"] + flags["blended"]
    assert value(rows, metric="tpr_at_fpr05", attack="all", **everywhere) == pytest.approx(sum(caught) / 9)
    over_all = auroc(*([float(part) for part in side] for side in zip(*pooled, strict=True)))
    assert value(rows, metric="auroc", attack="all", **everywhere) == pytest.approx(over_all)


def test_scores_are_compared_with_benign_models_of_the_other_populations(place, capsys):
    rows = run(place, LEFT_OUT + 'methods = [{ name = "marked", verdicts = false }]')
    groups = ("benign", "patch", "blended", "placebo")
    scores = {(name, group): marks(name, group) for name in FAMILY for group in groups}
    reference = {
        name: [mark for other in others_than(name) for mark in marks(other, "benign")[:10]] for name in FAMILY
    }
    check_left_out(rows, scores, reference)
    shares = [value(rows, metric="fpr_at_fpr05", attack="benign", split=f"family-{name}") for name in FAMILY]
    assert shares == [pytest.approx(1 / 6), 0.0, pytest.approx(0.1)]
    assert "20 benign references give no fpr_at_fpr01" in capsys.readouterr().err
    assert not of(rows, metric="fpr_at_fpr01")
    assert {row["trained_on"] for row in rows} == {None}


def test_no_large_population_outweighs_the_others_in_a_reference():
    assert _evenly([[1.0, 2.0, 3.0], [4.0], [5.0, 6.0]]) == [1.0, 4.0, 5.0]


def test_a_learned_method_is_fitted_and_calibrated_without_the_population_it_judges(place):
    rows = run(place, LEFT_OUT + 'methods = [{ name = "centred" }]')

    def mean(names: list[str]) -> float:
        calm = [mark for name in names for group in ("benign", "placebo") for mark in marks(name, group)]
        return sum(calm) / len(calm)

    groups = ("benign", "patch", "blended", "placebo")
    centres = {name: mean(others_than(name)) for name in FAMILY}
    scores = {
        (name, group): [mark - centres[name] for mark in marks(name, group)]
        for name in FAMILY
        for group in groups
    }
    reference = {
        name: [
            mark - mean(others_than(name, other))
            for other in others_than(name)
            for mark in marks(other, "benign")[:10]
        ]
        for name in FAMILY
    }
    check_left_out(rows, scores, reference)
    assert {row["trained_on"] for row in rows} == {"blended+patch+placebo"}


def test_many_small_populations_are_left_out_in_folds_with_rows_over_all_of_them_only(place):
    method = 'methods = [{ name = "centred" }]'
    apart = of(run(place, LEFT_OUT + method), dataset="all")
    folds = run(place, LEFT_OUT + "folds = 3\n" + method)  # three populations: each is a fold
    known = ("attack", "mode", "metric", "value", "n", "split", "trained_on")
    assert apart
    assert [[row[name] for name in known] for row in folds] == [
        [row[name] for name in known] for row in apart
    ]


def test_the_populations_of_a_fold_are_judged_together(place):
    run(
        place,
        LEFT_OUT.replace("family.toml", 'family.toml" }, { population = "home.toml", split = "held-back')
        + 'folds = 3\nmethods = [{ name = "learner" }]',
    )
    homes = [{folder.parent.parent.name for folder in folders} for folders in Learner.judged]
    assert max(len(names) for names in homes) == 2
    for fitted, judged in zip(Learner.fits, homes, strict=True):
        assert not {folder.parent.parent.name for folder in fitted} & judged


def test_no_fit_of_leave_one_out_sees_what_it_scores(place):
    run(place, LEFT_OUT + 'methods = [{ name = "learner" }]')
    assert len(Learner.fits) == len(Learner.judged) == 9
    for fitted, judged in zip(Learner.fits, Learner.judged, strict=True):
        homes = [{folder.parent.parent.name for folder in folders} for folders in (fitted, judged)]
        assert not homes[0] & homes[1]
    for start, left_out in zip((0, 3, 6), FAMILY, strict=True):
        seen = {folder.parent.parent.name for fit in Learner.fits[start : start + 3] for folder in fit}
        assert seen == set(FAMILY) - {left_out}


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('population = "home.toml"\njudge = [{ population = "home.toml" }]\nmethods = []', "name the models"),
        ('judge = [{ population = "home.toml" }]\nmethods = [{ name = "learner" }]', "name some in `fit`"),
        (JUDGED + 'methods = [{ name = "marker" }]', "unknown method 'marker'"),
        (JUDGED + 'methods = [{ name = "marked", options = { treshold = 1 } }]', "treshold"),
        (JUDGED + 'methods = [{ name = "marked", options = { seed = 1 } }]', "`seeds`"),
        (JUDGED + 'methods = [{ name = "neural-cleanse" }]', "give `images`"),
        (JUDGED + 'methods = [{ name = "marked", images = 20 }]', "leave out `images`"),
        (LEFT_OUT + 'sizes = [20]\nmethods = [{ name = "marked" }]', "leave out fit and sizes"),
        (judged_as('{ kind = "pruned", epochs = 3 }') + "methods = []", "pruned has no epochs"),
        (JUDGED.replace("patch", "pach") + 'methods = [{ name = "marked" }]', "no group 'pach'"),
        (JUDGED.replace('"benign", ', "") + 'methods = [{ name = "marked" }]', "no benign models"),
        ('leave_one_out = true\njudge = [{ population = "home.toml" }]\nmethods = []', "at least 3"),
        (JUDGED + "folds = 3\nmethods = []", "leave_one_out = true"),
        (JUDGED.replace("] }", '], beside = "patch" }') + "methods = []", "name a judged group of placebos"),
        (LEFT_OUT.replace(" }", ', beside = "placebo" }') + "methods = []", "not leave_one_out"),
        (BESIDE.replace('["placebo"', '["benign", "placebo"') + "methods = []", "leave the other out"),
        (JUDGED.replace("}]", "}, { population = 'home.toml' }]") + "methods = []", "judged twice"),
    ],
)
def test_a_mistake_is_refused_with_its_remedy(place, text, said):
    with pytest.raises(ValueError, match=said):
        run(place, text)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="jugde"):
        ScanningSpec.model_validate({"table": "t", "jugde": [], "methods": []})


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_made(name):
    scanner = make(name, {}, seed=7)
    assert getattr(scanner, "seed", 7) == 7
    wanted = {"nothing": ("scan",), "signatures": ("fit", "scores")}
    wanted |= {"models": ("fit", "scores"), "features": ("features", "fit", "scores")}
    assert all(hasattr(scanner, verb) for verb in wanted[METHODS[name].learns_from])
