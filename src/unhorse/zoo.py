"""Seeded populations of benign and trojaned victims: resumable builds and their registers. Both kinds pass
through one training function.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from unhorse import jobs
from unhorse.core import Attack, Classifier
from unhorse.models.classifier import CARD_FILE
from unhorse.populations import GroupSpec, ZooSpec
from unhorse.victims import can_stack, save_victim, train_victim, train_victims

# not below hidden folders: those are drafts, of which a killed build may leave some
CARDS = "[!.]*/[!.]*/card.json"
Trained = tuple[Classifier, Attack | None, dict[str, Any]]


@dataclass(frozen=True)
class Member:
    """A line of a population's register: where a victim lies and what it is, without loading it."""

    folder: Path
    group: str
    trojaned: bool
    target: int | None


def build(spec: ZooSpec, folder: Path, *, workers: int = 1, stack: int | None = None) -> dict[str, int]:
    """Builds what is missing of a population in `folder`; killed and called again, it goes on. Returns
    counts.

    First `median_of` benign victims are trained for the median clean accuracy (median.json) that all are held
    to. A victim is one folder <split>/<group>-<index>, renamed into place; one whose attempts all failed
    leaves <group>-<index>.rejected.json instead. `stack` victims are trained at once, as one network; None is
    16 on an accelerator and one elsewhere, which is what is fast (docs/methods/stacking.md).
    """
    return build_all({Path(folder): spec}, workers=workers, stack=stack)[Path(folder)]


def build_all(
    populations: Mapping[Path, ZooSpec], *, workers: int = 1, stack: int | None = None
) -> dict[Path, dict[str, int]]:
    """As `build`, for several populations by their folders: their victims are the jobs of one queue."""
    size = stack or (16 if torch.cuda.is_available() else 1)
    names = [spec.name for spec in populations.values()]
    label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    medians: list[_Job] = []
    for folder, spec in populations.items():
        _claim(spec, folder)
        todo = [place for place in _median_places(spec) if not place.median(folder).exists()]
        medians += [_Median(spec, folder, part) for part in _parts(todo, size)]
    _work(f"{label}: benign median", medians, workers)
    victims: list[_Job] = []
    trained: dict[Path, int] = {}
    for folder, spec in populations.items():
        found = [json.loads(place.median(folder).read_text()) for place in _median_places(spec)]
        accuracies = [each["clean_accuracy"] for each in found]
        _write_json(folder / "median.json", {"clean_accuracy": median(accuracies), "of": accuracies})
        wanted = [_Place(group, index) for group in spec.groups for index in range(group.count)]
        todo = [place for place in wanted if not place.done(folder)]
        trained[folder] = len(todo)
        victims += [_Victims(spec, folder, part) for part in _parts(todo, size)]
    _work(f"{label}: victims", victims, workers)
    return {
        folder: {
            "accepted": len(list(folder.glob(CARDS))),
            "rejected": len(list(folder.glob("*/*.rejected.json"))),
            "trained_now": trained[folder],
        }
        for folder in populations
    }


@dataclass(frozen=True, eq=False)
class _Place:
    """A victim's place in a population."""

    group: GroupSpec
    index: int

    def folder(self, population: Path) -> Path:
        return population / self.group.split / f"{self.group.name}-{self.index:04d}"

    def rejected(self, population: Path) -> Path:
        return self.folder(population).with_suffix(".rejected.json")

    def median(self, population: Path) -> Path:
        return population / "median" / f"{self.index:04d}.json"

    def done(self, population: Path) -> bool:
        return (self.folder(population) / CARD_FILE).exists() or self.rejected(population).exists()


def _median_places(spec: ZooSpec) -> list[_Place]:
    """Of the benign victims that are trained for the median clean accuracy."""
    benign = GroupSpec(name="median", split="fit", count=spec.acceptance.median_of)
    return [_Place(benign, index) for index in range(benign.count)]


def _parts(places: Sequence[_Place], size: int) -> list[tuple[_Place, ...]]:
    """Places whose victims are trained at once: `size` of them, of attacks that stack."""
    kinds = [place.group.attack.kind if place.group.attack else None for place in places]
    alone = [
        (place,) for place, kind in zip(places, kinds, strict=True) if size == 1 or kind == "input-aware"
    ]
    rest = [place for place, kind in zip(places, kinds, strict=True) if size > 1 and kind != "input-aware"]
    return [*alone, *(tuple(rest[start : start + size]) for start in range(0, len(rest), size))]


class _Job:
    """Victims of one population that are trained at once."""

    def __init__(self, spec: ZooSpec, folder: Path, places: tuple[_Place, ...]) -> None:
        self.spec, self.folder, self.places = spec, folder, places

    def _trained(self, places: Sequence[_Place], attempt: int) -> list[Trained]:
        specs = [self.spec.victim(place.group, place.index, attempt) for place in places]
        device = torch.device("cuda") if torch.cuda.is_available() else None
        if len(specs) > 1 and can_stack(specs):
            return train_victims(specs, device=device)
        return [train_victim(spec, device=device) for spec in specs]


class _Victims(_Job):
    """Up to three seeds each, the first acceptable one is kept."""

    def __call__(self) -> None:
        benign_median = json.loads((self.folder / "median.json").read_text())["clean_accuracy"]
        rejected: dict[_Place, list[dict[str, Any]]] = {place: [] for place in self.places}
        for attempt in range(self.spec.acceptance.attempts):
            if not rejected:
                return
            places = list(rejected)
            for place, (model, attack, card) in zip(places, self._trained(places, attempt), strict=True):
                if reasons := self._misses(place, card, benign_median):
                    rejected[place].append({"attempt": attempt, "reasons": reasons, **card["metrics"]})
                    continue
                group = place.group
                card |= {"group": group.name, "split": group.split, "rejected": rejected.pop(place)}
                save_victim(place.folder(self.folder), model, attack, card)
        for place, attempts in rejected.items():
            _write_json(place.rejected(self.folder), attempts)

    def _misses(self, place: _Place, card: dict[str, Any], benign_median: float) -> list[str]:
        """What a victim is rejected for."""
        required, attack = self.spec.acceptance, place.group.attack
        clean, least = card["metrics"]["clean_accuracy"], required.trojan
        if required.all_target is not None and attack is not None and attack.mode == "all-target":
            least = required.all_target * clean
        reasons = ["clean accuracy"] if abs(clean - benign_median) > required.clean_margin else []
        if card["trojaned"] and card["metrics"]["trojan_accuracy"] < least:
            reasons.append("trojan accuracy")
        return reasons


class _Median(_Job):
    """Benign victims trained for their clean accuracy only."""

    def __call__(self) -> None:
        for place, (_, _, card) in zip(self.places, self._trained(self.places, 0), strict=True):
            _write_json(place.median(self.folder), card["metrics"])


def _work(label: str, todo: Sequence[Any], workers: int) -> None:
    failures = []
    for outcome in jobs.track(label, jobs.run(jobs.call, todo, workers=workers), len(todo)):
        if outcome.error is not None:
            failures.append(outcome.error)
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(todo)} jobs failed, call again to retry; first: {failures[0]!r}"
        )


def _claim(spec: ZooSpec, folder: Path) -> None:
    """A folder holds one population: its spec is written first and never changes, but for more groups and
    larger counts.
    """
    path = folder / "population.json"
    known: dict[tuple[str, str], GroupSpec] = {}
    if path.exists():
        found = ZooSpec.model_validate(json.loads(path.read_text(encoding="utf-8"))["spec"])
        if found.identity() != spec.identity():
            raise ValueError(f"{folder} holds another population ({found.identity()}): choose another folder")
        known = {(group.split, group.name): group for group in found.groups}
    for group in spec.groups:
        there = known.get((group.split, group.name), group)
        if there.attack != group.attack:
            raise ValueError(
                f"{folder} has another group {group.split}/{group.name}: give this one another name"
            )
        known[group.split, group.name] = max(there, group, key=lambda each: each.count)
    held = spec.model_copy(update={"groups": tuple(known.values())})  # a narrower spec forgets nothing
    _write_json(path, {"identity": spec.identity(), "spec": json.loads(held.model_dump_json())})


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
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
