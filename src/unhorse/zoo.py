"""Seeded populations of benign and trojaned victims: specs and resumable builds. Both kinds pass through one
training function.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from unhorse import jobs
from unhorse.models.training import Recipe
from unhorse.victims import AttackSpec, DataSpec, Spec, VictimSpec, save_victim, train_victim

# not below hidden folders: those are drafts, of which a killed build may leave some
CARDS = "[!.]*/[!.]*/card.json"


class GroupSpec(Spec):
    """`count` victims of one kind in one split; no attack means benign."""

    name: str = Field(pattern=r"^\w[\w-]*$")
    split: Literal["fit", "held-back"]
    count: int
    attack: AttackSpec | None = None


class AcceptanceSpec(Spec):
    """Who may enter: clean accuracy within `clean_margin` of the benign median, Trojan accuracy of at least
    `trojan`.
    """

    clean_margin: float = 0.01
    trojan: float = 0.9
    attempts: int = 3
    median_of: int = 16


class ZooSpec(Spec):
    """A population: one data set, architecture and recipe, and groups of victims."""

    name: str
    seed: int = 0
    data: DataSpec = DataSpec()
    architecture: str = "small-cnn"
    options: dict[str, Any] = {}
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    recipe: Recipe = Recipe()
    acceptance: AcceptanceSpec = AcceptanceSpec()
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
        """A hash of everything in the spec but the counts: a population may grow, not change."""
        settings = json.loads(self.model_dump_json())
        if settings["data"]["size"] is None:
            del settings["data"]["size"]  # younger than the first populations
        for group in settings["groups"]:
            del group["count"]
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


@dataclass(frozen=True)
class Member:
    """A line of a population's register: where a victim lies and what it is, without loading it."""

    folder: Path
    group: str
    trojaned: bool
    target: int | None


def build(spec: ZooSpec, folder: Path, *, workers: int = 1) -> dict[str, int]:
    """Builds what is missing of a population in `folder`; killed and called again, it goes on. Returns
    counts.

    First `median_of` benign victims are trained for the median clean accuracy (median.json) that all are held
    to. A victim is one folder <split>/<group>-<index>, renamed into place; one whose attempts all failed
    leaves <group>-<index>.rejected.json instead.
    """
    folder = Path(folder)
    _claim(spec, folder)
    _work(f"{spec.name}: benign median", _median_jobs(spec, folder), workers)
    paths = [_median_path(folder, index) for index in range(spec.acceptance.median_of)]
    accuracies = [json.loads(path.read_text())["clean_accuracy"] for path in paths]
    _write_json(folder / "median.json", {"clean_accuracy": median(accuracies), "of": accuracies})
    todo = [
        _Job(spec, folder, group, index)
        for group in spec.groups
        for index in range(group.count)
        if not _done(folder, group, index)
    ]
    _work(f"{spec.name}: victims", todo, workers)
    counts = {
        "accepted": len(list(folder.glob(CARDS))),
        "rejected": len(list(folder.glob("*/*.rejected.json"))),
    }
    return {**counts, "trained_now": len(todo)}


class _Job:
    """One victim to build: up to three seeds, the first acceptable one is kept."""

    def __init__(self, spec: ZooSpec, folder: Path, group: GroupSpec, index: int) -> None:
        self.spec, self.folder, self.group, self.index = spec, folder, group, index

    def __call__(self) -> None:
        required = self.spec.acceptance
        rejected: list[dict[str, Any]] = []
        benign_median = json.loads((self.folder / "median.json").read_text())["clean_accuracy"]
        for attempt in range(required.attempts):
            model, attack, card = train_victim(self.spec.victim(self.group, self.index, attempt))
            metrics = card["metrics"]
            reasons = []
            if abs(metrics["clean_accuracy"] - benign_median) > required.clean_margin:
                reasons.append("clean accuracy")
            if card["trojaned"] and metrics["trojan_accuracy"] < required.trojan:
                reasons.append("trojan accuracy")
            if not reasons:
                card |= {"group": self.group.name, "split": self.group.split, "rejected": rejected}
                save_victim(_place(self.folder, self.group, self.index), model, attack, card)
                return
            rejected.append({"attempt": attempt, "reasons": reasons, **metrics})
        _write_json(_place(self.folder, self.group, self.index).with_suffix(".rejected.json"), rejected)


class _MedianJob:
    """A benign victim trained for its clean accuracy only."""

    def __init__(self, spec: ZooSpec, folder: Path, index: int) -> None:
        self.spec, self.folder, self.index = spec, folder, index

    def __call__(self) -> None:
        benign = GroupSpec(name="median", split="fit", count=1)
        _, _, card = train_victim(self.spec.victim(benign, self.index, 0))
        _write_json(_median_path(self.folder, self.index), card["metrics"])


def _median_jobs(spec: ZooSpec, folder: Path) -> list[_MedianJob]:
    return [
        _MedianJob(spec, folder, index)
        for index in range(spec.acceptance.median_of)
        if not _median_path(folder, index).exists()
    ]


def _work(label: str, todo: list[Any], workers: int) -> None:
    failures = []
    for outcome in jobs.track(label, jobs.run(jobs.call, todo, workers=workers), len(todo)):
        if outcome.error is not None:
            failures.append(outcome.error)
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(todo)} jobs failed, call again to retry; first: {failures[0]!r}"
        )


def _place(folder: Path, group: GroupSpec, index: int) -> Path:
    return folder / group.split / f"{group.name}-{index:04d}"


def _median_path(folder: Path, index: int) -> Path:
    return folder / "median" / f"{index:04d}.json"


def _done(folder: Path, group: GroupSpec, index: int) -> bool:
    place = _place(folder, group, index)
    return (place / "card.json").exists() or place.with_suffix(".rejected.json").exists()


def _claim(spec: ZooSpec, folder: Path) -> None:
    """A folder holds one population: its spec is written first and never changes, but for larger counts."""
    path = folder / "population.json"
    wanted = {"identity": spec.identity(), "spec": json.loads(spec.model_dump_json())}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["identity"] != wanted["identity"]:
            raise ValueError(
                f"{folder} holds another population ({found['identity']}): choose another folder"
            )
    _write_json(path, wanted)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def members(folder: Path, split: str | None = None) -> list[Member]:
    """The register of a population built in `folder`, in a fixed order; all splits if `split` is None."""
    found = []
    for path in sorted(Path(folder).glob(CARDS.replace("[!.]*", split, 1) if split else CARDS)):
        card = json.loads(path.read_text(encoding="utf-8"))
        attack = card.get("attack") or {}
        single = card["trojaned"] and attack.get("mode", "single-target") != "all-target"
        target = attack.get("target") if single else None
        found.append(Member(path.parent, card["group"], card["trojaned"], target))
    if not found:
        raise ValueError(f"{folder} holds no population: build one with `unhorse zoo build SPEC -o {folder}`")
    return found


def rejections(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(group, attempt) of every rejected training of a population, from cards and from *.rejected.json."""
    for path in sorted(Path(folder).glob(CARDS)):
        card = json.loads(path.read_text(encoding="utf-8"))
        yield from ((card["group"], attempt) for attempt in card["rejected"])
    for path in sorted(Path(folder).glob("*/*.rejected.json")):
        group = path.name.rsplit("-", 1)[0]
        yield from ((group, attempt) for attempt in json.loads(path.read_text(encoding="utf-8")))
