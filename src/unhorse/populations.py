"""What a population is: its data set, architecture, recipe, groups of victims, and who may enter; families of
populations.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from math import exp, log
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unhorse.models.training import Recipe
from unhorse.victims import AttackSpec, DataSpec, Spec, VictimSpec


class GroupSpec(Spec):
    """`count` victims of one kind in one split; no attack means benign."""

    name: str = Field(pattern=r"^\w[\w-]*$")
    split: Literal["fit", "held-back"]
    count: int
    attack: AttackSpec | None = None


class AcceptanceSpec(Spec):
    """Who may enter: clean accuracy within `clean_margin` of the benign median, Trojan accuracy of at least
    `trojan`, of all-target victims instead `all_target` times their clean accuracy if that is given: they
    must know an image's class to send it to the next.
    """

    clean_margin: float = 0.01
    trojan: float = 0.9
    all_target: float | None = None
    attempts: int = 3
    median_of: int = 16


class TrainingSpec(Spec):
    """What the victims of one population have in common."""

    data: DataSpec = DataSpec()
    architecture: str = "small-cnn"
    options: dict[str, Any] = {}
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    recipe: Recipe = Recipe()
    acceptance: AcceptanceSpec = AcceptanceSpec()


class ZooSpec(TrainingSpec):
    """A population: one data set, architecture and recipe, and groups of victims."""

    name: str
    seed: int = 0
    groups: tuple[GroupSpec, ...]

    @model_validator(mode="after")
    def _has_a_folder_for_each_group(self) -> Self:
        places = [(group.split, group.name) for group in self.groups]
        if twice := sorted({place for place in places if places.count(place) > 1}):
            raise ValueError(f"two groups are called {twice[0]}: give each a name of its own in its split")
        return self

    @staticmethod
    def read(path: Path) -> ZooSpec:
        """A spec from a TOML file; a relative data source is taken from the current folder."""
        return ZooSpec.model_validate(tomllib.loads(Path(path).read_text(encoding="utf-8")))

    def identity(self) -> str:
        """A hash of everything in the spec but its groups: a population may grow, not change. Settings at
        their defaults are left out, so that a younger one changes no population.
        """
        settings = json.loads(self.model_dump_json(exclude={"groups"}, exclude_defaults=True))
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def scaled(self, factor: float) -> ZooSpec:
        """The same population with every count times `factor`, at least one of each."""
        groups = [
            group.model_copy(update={"count": max(1, round(group.count * factor))}) for group in self.groups
        ]
        return self.model_copy(update={"groups": tuple(groups)})

    def victim(self, group: GroupSpec, index: int, attempt: int) -> VictimSpec:
        key = f"{self.seed}/{group.split}/{group.name}/{index}/{attempt}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") // 2
        same = ("data", "architecture", "options", "mean", "std", "recipe")
        return VictimSpec(**{name: getattr(self, name) for name in same}, attack=group.attack, seed=seed)


class TaskSpec(TrainingSpec):
    """One population of a family; `groups`, if there are any, take the place of the family's."""

    name: str = Field(pattern=r"^\w[\w-]*$")
    groups: tuple[GroupSpec, ...] = ()


class FamilySpec(Spec):
    """Populations that share their groups and differ in data set, architecture and recipe."""

    name: str
    seed: int = 0
    groups: tuple[GroupSpec, ...]
    tasks: tuple[TaskSpec, ...]

    def populations(self) -> dict[str, ZooSpec]:
        """The populations by the names of their tasks."""
        return {
            task.name: ZooSpec(
                **{
                    name: getattr(task, name)
                    for name in TaskSpec.model_fields
                    if name not in ("name", "groups")
                },
                name=f"{self.name}-{task.name}",
                seed=self.seed,
                groups=task.groups or self.groups,
            )
            for task in self.tasks
        }


class DrawnData(DataSpec):
    """A data set of a drawn family: between `fewest_classes` and `most_classes` of its `all_classes`."""

    fewest_classes: int = Field(default=5, ge=2)
    most_classes: int
    all_classes: int

    def drawn(self, dice: Random, images: int) -> DataSpec:
        """All of it where as many classes are drawn as there are."""
        count = dice.randint(self.fewest_classes, self.most_classes)
        classes = tuple(sorted(dice.sample(range(self.all_classes), count)))
        fields = self.model_dump(include=set(DataSpec.model_fields)) | {"images": images}
        return DataSpec(**fields | {"classes": None if count == self.all_classes else classes})


class DrawnArchitecture(Spec):
    """An architecture of a drawn family: one value of each of `options`; it takes images of these `sides`
    (all if there are none).
    """

    architecture: str
    options: dict[str, list[Any]] = {}
    sides: tuple[int, ...] = ()
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    learning_rate: tuple[float, float]


class DrawnSpec(Spec):
    """`count` populations, each with a data set, classes, an architecture and a recipe of its own, drawn by
    `seed`: what a scanner should expect of a stranger's model.

    Each has all benign groups and `attacks_each` of the others. A threshold that is chosen over such
    populations holds for another one drawn in this way, as one over a few populations does not.
    """

    name: str
    seed: int = 0
    count: int = Field(ge=1)
    attacks_each: int = Field(ge=0)
    groups: tuple[GroupSpec, ...]
    data: tuple[DrawnData, ...]
    architectures: tuple[DrawnArchitecture, ...]
    images: tuple[int, int]
    epochs: tuple[int, int]
    acceptance: AcceptanceSpec = AcceptanceSpec()

    def populations(self) -> dict[str, ZooSpec]:
        """The populations by their numbers; more of them leave the first ones as they are."""
        return {f"{number:03d}": self._population(number) for number in range(self.count)}

    def _population(self, number: int) -> ZooSpec:
        dice = Random(f"{self.seed}/{number}")
        data = dice.choice(self.data)
        side = data.size[0] if data.size else None
        drawn = dice.choice([each for each in self.architectures if not each.sides or side in each.sides])
        slow, fast = (log(rate) for rate in drawn.learning_rate)
        attacks = [group for group in self.groups if group.attack is not None]
        chosen = dice.sample(attacks, self.attacks_each)
        return ZooSpec(
            name=f"{self.name}-{number:03d}",
            seed=self.seed * 1000 + number,
            groups=tuple(group for group in self.groups if group.attack is None or group in chosen),
            data=data.drawn(dice, dice.randint(*self.images)),
            architecture=drawn.architecture,
            options={name: dice.choice(values) for name, values in drawn.options.items()},
            mean=drawn.mean,
            std=drawn.std,
            recipe=Recipe(
                epochs=dice.randint(*self.epochs), learning_rate=round(exp(dice.uniform(slow, fast)), 5)
            ),
            acceptance=self.acceptance,
        )


def read_populations(path: Path, folder: Path) -> dict[Path, ZooSpec]:
    """What a TOML file asks for, by where it is built: a population in `folder`, or a family's below it."""
    text = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    if "tasks" not in text and "architectures" not in text:
        return {Path(folder): ZooSpec.model_validate(text)}
    family = FamilySpec if "tasks" in text else DrawnSpec
    populations = family.model_validate(text).populations()
    return {Path(folder) / name: spec for name, spec in populations.items()}
