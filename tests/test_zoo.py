"""Populations: what decides them, that they survive anything, and that their victims are judged from disk."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import unhorse.zoo
from unhorse.attacks.input_aware import InputAware
from unhorse.attacks.poisoning import CleanLabelPoisoning, Poisoning
from unhorse.attacks.wanet import WaNet
from unhorse.datasets import load_dataset, subset
from unhorse.metrics import accuracy, trojan_accuracy
from unhorse.models.classifier import read_card, weights_hash
from unhorse.populations import ZooSpec, read_populations
from unhorse.victims import AttackSpec, VictimSpec, load_victim, save_victim, train_victim
from unhorse.zoo import build, build_all, members, rejections

TOML = """
name = "tiny"
seed = 3
data = { source = "digits", images = 192, test_images = 150 }
options = { widths = [8, 8], hidden = 16 }
recipe = { epochs = 1, batch_size = 32, learning_rate = 1e-2, augmentation = { crop = 1 } }
acceptance = { clean_margin = 1.0, trojan = 0.0, attempts = 2, median_of = 1 }

[[groups]]
name = "benign"
split = "fit"
count = 2

[[groups]]
name = "patch"
split = "held-back"
count = 2
attack = { kind = "badnet", rate = 0.5, trigger = { size = 3, placement = "corner" } }
"""


def spec(**changes: object) -> ZooSpec:
    """The population above, with some of its settings changed."""
    settings = json.loads(ZooSpec.model_validate(parsed(TOML)).model_dump_json())
    return ZooSpec.model_validate(settings | changes)


def parsed(text: str) -> dict:
    return tomllib.loads(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The population above, built once; a test that changes it takes a copy."""
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    assert build(spec(), folder) == {"accepted": 4, "rejected": 0, "trained_now": 4}
    return folder


@pytest.fixture
def population(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "tiny"))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(member.folder.relative_to(folder)): weights_hash(load_victim(member.folder).model)
        for member in members(folder)
    }


# --- the spec


def test_a_spec_is_read_from_toml(tmp_path):
    (tmp_path / "tiny.toml").write_text(TOML)
    read = ZooSpec.read(tmp_path / "tiny.toml")
    assert read == spec()
    assert read.recipe.augmentation.crop == 1
    assert [(group.name, group.split, group.count) for group in read.groups] == [
        ("benign", "fit", 2),
        ("patch", "held-back", 2),
    ]
    assert read.groups[1].attack.trigger == {"size": 3, "placement": "corner"}


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed = 3", "sead = 3", "sead"),
        ("images = 192", "image = 192", "data.image"),
        ("epochs = 1", "epoch = 1", "recipe.epoch"),
        ("crop = 1", "crops = 1", "recipe.augmentation.crops"),
        ("clean_margin", "margin", "acceptance.margin"),
        ("count = 2", "number = 2", "groups.0.number"),
        ("rate = 0.5", "share = 0.5", "groups.1.attack.share"),
        ('split = "fit"', 'split = "test"', "groups.0.split"),
        ('name = "patch"', 'name = "../patch"', "groups.1.name"),
        ('name = "patch"\nsplit = "held-back"', 'name = "benign"\nsplit = "fit"', "two groups are called"),
    ],
)
def test_a_spec_with_a_mistake_is_refused_by_name(old, new, named):
    assert old in TOML
    with pytest.raises(ValueError, match=named):
        ZooSpec.model_validate(parsed(TOML.replace(old, new)))


def test_the_identity_ignores_groups_and_their_counts():
    assert spec(groups=[]).identity() == spec().identity()
    groups = [group | {"count": 50} for group in json.loads(spec().model_dump_json())["groups"]]
    assert spec(groups=groups).identity() == spec().identity()
    assert spec().scaled(10).identity() == spec().identity()


def settings_of(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every single setting below `value`."""
    if isinstance(value, dict) and value:
        return [found for key in value for found in settings_of(value[key], (*path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [found for index, item in enumerate(value) for found in settings_of(item, (*path, index))]
    return [path]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # "changed" is of the wrong type for most
def test_the_identity_ignores_nothing_else():
    text = spec().model_dump_json()
    paths = [path for path in settings_of(json.loads(text)) if path[0] != "groups"]
    assert len(paths) > 25
    for path in paths:
        settings = json.loads(text)
        place = settings
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = "changed"
        changed = ZooSpec.model_construct(**settings)
        assert changed.identity() != spec().identity(), path


def test_scaling_keeps_at_least_one_victim_of_each_group():
    assert [group.count for group in spec().scaled(1.5).groups] == [3, 3]
    assert [group.count for group in spec().scaled(0.01).groups] == [1, 1]


def test_every_victim_of_a_population_has_a_seed_of_its_own():
    whole = spec()
    seeds = {
        whole.victim(group, index, attempt).seed
        for group in whole.groups
        for index in range(9)
        for attempt in range(3)
    }
    assert len(seeds) == 54
    assert whole.victim(whole.groups[0], 4, 1) == spec().victim(whole.groups[0], 4, 1)


# --- building


def test_a_population_holds_what_its_spec_asks_for(built):
    assert [(member.group, member.trojaned, member.folder.name) for member in members(built)] == [
        ("benign", False, "benign-0000"),
        ("benign", False, "benign-0001"),
        ("patch", True, "patch-0000"),
        ("patch", True, "patch-0001"),
    ]
    assert {member.group for member in members(built, "held-back")} == {"patch"}
    assert all((member.target in range(10)) == member.trojaned for member in members(built))
    files = {path.name for path in (built / "held-back" / "patch-0000").iterdir()}
    assert files == {"model.safetensors", "card.json", "trigger.safetensors"}


def test_a_finished_population_is_not_trained_again(population, monkeypatch):
    monkeypatch.setattr(unhorse.zoo, "train_victim", None)
    assert build(spec(), population) == {"accepted": 4, "rejected": 0, "trained_now": 0}


def test_a_build_that_was_interrupted_trains_only_what_is_missing(built, tmp_path, monkeypatch):
    trained: list[VictimSpec] = []

    def interrupted(victim, **options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(victim)
        return train_victim(victim, **options)

    monkeypatch.setattr(unhorse.zoo, "train_victim", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(spec(), tmp_path / "tiny")  # one for the median, two victims
    monkeypatch.setattr(unhorse.zoo, "train_victim", train_victim)
    assert build(spec(), tmp_path / "tiny") == {"accepted": 4, "rejected": 0, "trained_now": 2}
    assert hashes(tmp_path / "tiny") == hashes(built)


def test_a_lost_victim_is_rebuilt_with_identical_weights(population):
    before = hashes(population)
    shutil.rmtree(population / "held-back" / "patch-0001")
    assert build(spec(), population)["trained_now"] == 1
    assert hashes(population) == before


def test_a_population_may_grow_and_keeps_its_members(population):
    before = hashes(population)
    assert build(spec().scaled(1.5), population)["trained_now"] == 2
    after = hashes(population)
    assert len(after) == 6
    assert before.items() < after.items()


def test_stacked_victims_fill_the_same_places_with_the_same_seeds(built, tmp_path):
    counts = build(spec(), tmp_path, stack=3)
    assert (counts["accepted"], counts["trained_now"]) == (4, 4)
    for member in members(tmp_path):
        card, alone = read_card(member.folder), read_card(built / member.folder.relative_to(tmp_path))
        assert card["spec"] == alone["spec"] and card["attack"] == alone["attack"]
        assert card["metrics"] == pytest.approx(alone["metrics"], abs=0.05)
    assert {read_card(member.folder).get("stacked") for member in members(tmp_path)} == {3, None}


def test_a_folder_refuses_another_population(population):
    before = (population / "population.json").read_text()
    with pytest.raises(ValueError, match="another population"):
        build(spec(seed=4), population)
    assert (population / "population.json").read_text() == before


def test_a_population_may_get_further_groups_but_no_other_ones_of_the_same_name(population):
    before = hashes(population)
    groups = json.loads(spec().model_dump_json())["groups"]
    further = groups[0] | {"name": "placebo", "count": 1, "attack": {"kind": "badnet", "mode": "placebo"}}
    assert build(spec(groups=[*groups, further]), population)["trained_now"] == 1
    assert before.items() < hashes(population).items()
    narrower = [groups[0] | {"count": 1}]
    assert build(spec(groups=narrower), population)["trained_now"] == 0
    record = json.loads((population / "population.json").read_text())["spec"]["groups"]
    assert [(group["name"], group["count"]) for group in record] == [
        ("benign", 2),
        ("patch", 2),
        ("placebo", 1),
    ]
    with pytest.raises(ValueError, match="another group"):
        build(spec(groups=[further | {"attack": None}]), population)


FAMILY = """
name = "family"
seed = 3
groups = [{ name = "benign", split = "held-back", count = 2 }]

[[tasks]]
name = "digits"
recipe = { epochs = 1 }

[[tasks]]
name = "larger"
data = { size = [16, 16] }
groups = [{ name = "benign", split = "fit", count = 1 }]
"""


def test_a_family_is_a_population_per_task_with_the_familys_groups_or_its_own(tmp_path):
    (tmp_path / "family.toml").write_text(FAMILY)
    found = read_populations(tmp_path / "family.toml", tmp_path / "out")
    assert list(found) == [tmp_path / "out" / "digits", tmp_path / "out" / "larger"]
    digits, larger = found.values()
    assert (digits.name, digits.seed, digits.recipe.epochs) == ("family-digits", 3, 1)
    assert [(group.split, group.count) for group in digits.groups] == [("held-back", 2)]
    assert larger.data.size == (16, 16) and [group.split for group in larger.groups] == ["fit"]
    assert digits.identity() != larger.identity()


DRAWN = """
name = "drawn"
seed = 5
count = 12
attacks_each = 1
images = [60, 90]
epochs = [1, 2]
acceptance = { clean_margin = 1.0, trojan = 0.0, median_of = 1 }
groups = [
    { name = "benign", split = "held-back", count = 1 },
    { name = "patch", split = "held-back", count = 1, attack = { kind = "badnet" } },
    { name = "blended", split = "held-back", count = 1, attack = { kind = "blended" } },
]
data = [
    { source = "digits", test_images = 50, all_classes = 10, fewest_classes = 4, most_classes = 10 },
    { source = "digits", size = [28, 28], all_classes = 10, most_classes = 6 },
]

[[architectures]]
architecture = "small-cnn"
options = { widths = [[8, 8], [8, 16]] }
learning_rate = [1e-3, 4e-3]

[[architectures]]
architecture = "wanet-cnn"
sides = [28]
learning_rate = [1e-3, 1e-3]
"""


def drawn(folder: Path, text: str = DRAWN) -> list[ZooSpec]:
    (folder / "drawn.toml").write_text(text)
    return list(read_populations(folder / "drawn.toml", folder / "out").values())


def test_drawn_populations_differ_in_all_that_is_drawn_and_stay_within_bounds(tmp_path):
    found = drawn(tmp_path)
    assert len({spec.identity() for spec in found}) == len({spec.seed for spec in found}) == 12
    assert {spec.architecture for spec in found} == {"small-cnn", "wanet-cnn"}
    for spec in found:
        assert [group.name for group in spec.groups] in (["benign", "patch"], ["benign", "blended"])
        assert 60 <= spec.data.images <= 90 and 1 <= spec.recipe.epochs <= 2
        assert 1e-3 <= spec.recipe.learning_rate <= 4e-3
        assert spec.data.size == (28, 28) or spec.architecture == "small-cnn"
        count = len(spec.data.classes or range(10))
        assert 4 <= count <= (10 if spec.data.size is None else 6)
    assert {len(spec.groups) for spec in found} == {2}
    assert {spec.groups[1].name for spec in found} == {"patch", "blended"}


def test_a_drawn_family_grows_without_changing_what_is_there(tmp_path):
    assert drawn(tmp_path, DRAWN.replace("count = 12", "count = 15"))[:12] == drawn(tmp_path)


def test_a_drawn_population_knows_its_classes_only(tmp_path):
    spec = next(each for each in drawn(tmp_path) if each.data.classes and each.architecture == "small-cnn")
    assert build(spec, tmp_path / "one")["accepted"] == 2
    for member in members(tmp_path / "one"):
        victim = load_victim(member.folder)
        assert victim.model.class_names == tuple(str(one) for one in spec.data.classes)


def test_several_populations_are_built_as_one_queue(tmp_path):
    first, second = spec(), spec(name="other", seed=4)
    folders = {tmp_path / "a": first, tmp_path / "b": second}
    counts = build_all(folders, workers=1)
    assert counts == {folder: {"accepted": 4, "rejected": 0, "trained_now": 4} for folder in folders}
    assert build(second, tmp_path / "alone")["accepted"] == 4
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "b") != hashes(tmp_path / "a")


def test_a_population_file_is_one_population_in_the_folder_that_was_asked_for(tmp_path):
    (tmp_path / "zoo.toml").write_text(TOML)
    assert read_populations(tmp_path / "zoo.toml", tmp_path / "out") == {
        tmp_path / "out": ZooSpec.read(tmp_path / "zoo.toml")
    }


def test_an_all_target_victim_is_held_to_a_share_of_its_clean_accuracy(tmp_path):
    attack = {"kind": "badnet", "mode": "all-target"}
    groups = [{"name": "all", "split": "fit", "count": 1, "attack": attack}]
    for share, accepted in ((0.0, 1), (2.0, 0)):
        acceptance = {"clean_margin": 1.0, "trojan": 1.1, "all_target": share, "attempts": 1, "median_of": 1}
        counts = build(spec(acceptance=acceptance, groups=groups), tmp_path / str(share))
        assert counts["accepted"] == accepted


def test_a_draft_that_a_killed_build_left_behind_is_no_member(population):
    draft = population / "fit" / ".benign-0001.0123abcd"
    shutil.copytree(population / "fit" / "benign-0001", draft)
    assert len(members(population)) == len(members(population, "fit")) + 2 == 4
    assert build(spec(), population)["accepted"] == 4


def test_a_victim_that_learns_no_trojan_is_rejected_and_logged_by_kind(tmp_path):
    acceptance = {"clean_margin": 1.0, "trojan": 1.1, "attempts": 2, "median_of": 1}
    impossible = spec(acceptance=acceptance).scaled(0.5)
    assert build(impossible, tmp_path) == {"accepted": 1, "rejected": 1, "trained_now": 2}
    assert [member.group for member in members(tmp_path)] == ["benign"]
    logged = list(rejections(tmp_path))
    assert [(group, attempt["attempt"], attempt["reasons"]) for group, attempt in logged] == [
        ("patch", 0, ["trojan accuracy"]),
        ("patch", 1, ["trojan accuracy"]),
    ]
    assert build(impossible, tmp_path)["trained_now"] == 0


def test_a_victim_far_from_the_benign_median_is_rejected(tmp_path):
    (tmp_path / "median").mkdir()
    (tmp_path / "median" / "0000.json").write_text('{"clean_accuracy": 2.0}')
    acceptance = {"clean_margin": 0.9, "trojan": 0.0, "attempts": 1, "median_of": 1}
    benign = json.loads(spec().model_dump_json())["groups"][:1]
    build(spec(acceptance=acceptance, groups=benign).scaled(0.5), tmp_path)
    ((group, attempt),) = rejections(tmp_path)
    assert (group, attempt["reasons"]) == ("benign", ["clean accuracy"])


def test_a_rejected_training_is_followed_by_one_with_the_next_seed(tmp_path, monkeypatch):
    seeds = []

    def weak_at_first(victim, **options):
        model, attack, card = train_victim(victim, **options)
        if attack is not None:
            seeds.append(victim.seed)
            card["metrics"]["trojan_accuracy"] = 0.2 * len(seeds)
        return model, attack, card

    monkeypatch.setattr(unhorse.zoo, "train_victim", weak_at_first)
    acceptance = {"clean_margin": 1.0, "trojan": 0.4, "attempts": 3, "median_of": 1}
    assert build(spec(acceptance=acceptance).scaled(0.5), tmp_path)["accepted"] == 2
    assert len(set(seeds)) == 2
    (accepted,) = members(tmp_path, "held-back")
    assert load_victim(accepted.folder).card["spec"]["seed"] == seeds[1]
    assert [(group, attempt["trojan_accuracy"]) for group, attempt in rejections(tmp_path)] == [
        ("patch", 0.2)
    ]


def test_a_job_that_fails_is_reported_after_the_others_are_done(tmp_path, monkeypatch):
    def failing(victim, **options):
        if victim.attack is not None:
            raise MemoryError("no memory")
        return train_victim(victim, **options)

    monkeypatch.setattr(unhorse.zoo, "train_victim", failing)
    with pytest.raises(RuntimeError, match=r"2 of 4 jobs failed.*no memory"):
        build(spec(), tmp_path)
    assert len(members(tmp_path)) == 2


def test_an_empty_folder_is_no_population(tmp_path):
    with pytest.raises(ValueError, match="zoo build"):
        members(tmp_path)


# --- victims from disk


def test_a_victim_is_judged_again_from_disk_as_its_card_says(built):
    test = subset(load_dataset("digits", "test"), 150, seed=0)
    for member in members(built, "held-back"):
        victim = load_victim(member.folder)
        rng = torch.Generator().manual_seed(victim.card["spec"]["seed"])
        assert accuracy(victim.model, test) == victim.card["metrics"]["clean_accuracy"]
        assert (
            trojan_accuracy(victim.model, test, victim.attack, rng=rng)
            == victim.card["metrics"]["trojan_accuracy"]
        )


def test_a_benign_victim_has_no_attack(built):
    victim = load_victim(built / "fit" / "benign-0000")
    assert victim.attack is None
    assert victim.card["metrics"]["trojan_accuracy"] is None


@pytest.mark.parametrize(
    ("attack", "kind", "trojaned"),
    [
        ({"kind": "badnet-plus", "mode": "all-target", "rate": 0.5, "trigger": {"size": 5}}, Poisoning, True),
        ({"kind": "noise-blend-plus"}, Poisoning, True),
        ({"kind": "blended", "mode": "source-target", "target": 4}, Poisoning, True),
        ({"kind": "clean-label", "options": {"epsilon": 0.2, "steps": 2}}, CleanLabelPoisoning, True),
        ({"kind": "badnet", "mode": "placebo"}, Poisoning, False),
        ({"kind": "wanet", "mode": "placebo"}, WaNet, False),
        (
            {"kind": "input-aware", "mode": "placebo", "options": {"mask_epochs": 1, "widths": [4]}},
            InputAware,
            False,
        ),
    ],
)
def test_every_kind_of_victim_comes_back_from_its_folder(tmp_path, attack, kind, trojaned):
    asked = spec().victim(spec().groups[0], 0, 0).model_copy(update={"attack": AttackSpec(**attack)})
    model, made, card = train_victim(asked)
    back = load_victim(save_victim(tmp_path / "victim", model, made, card))
    images, labels = load_dataset("digits", "test")[:50].pixels(), torch.arange(10)
    stamped = [
        each.probes()["trojan"](images, torch.Generator().manual_seed(1)) for each in (made, back.attack)
    ]
    assert type(back.attack) is kind
    assert back.card["trojaned"] is trojaned
    assert (back.card["metrics"]["trojan_accuracy"] is not None) is trojaned
    assert torch.equal(*stamped)
    assert torch.equal(back.attack.relabel(labels), made.relabel(labels))
    assert torch.equal(back.attack.eligible(labels), made.eligible(labels))
    assert torch.equal(back.model(images), model(images))
    if trojaned:
        test = subset(load_dataset("digits", "test"), 150, seed=0)
        rng = torch.Generator().manual_seed(asked.seed)
        assert trojan_accuracy(back.model, test, back.attack, rng=rng) == card["metrics"]["trojan_accuracy"]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("clean-label", "placebo"), ("clean-label", "all-target"), ("wanet", "source-target")],
)
def test_a_mode_that_an_attack_does_not_have_is_refused(kind, mode):
    with pytest.raises(ValueError, match=f"{kind} knows single-target.*not mode '{mode}'"):
        AttackSpec(kind=kind, mode=mode)


def test_an_unknown_attack_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="badnets.*badnet, blended"):
        AttackSpec(kind="badnets")


@pytest.mark.parametrize("wrong", [{"trigger": {"sise": 4}}, {"options": {"epsilon": 0.1}}])
def test_settings_that_an_attack_does_not_have_are_refused_when_the_spec_is_read(wrong):
    with pytest.raises(ValueError, match="sise.*size|epsilon.*rate"):
        AttackSpec(kind="badnet", **wrong)
