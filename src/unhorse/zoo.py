"""Seeded populations of benign and trojaned victims: resumable builds and their registers. Both kinds pass
through one training function.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from unhorse import jobs
from unhorse.populations import GroupSpec, ZooSpec
from unhorse.victims import save_victim, train_victim

# not below hidden folders: those are drafts, of which a killed build may leave some
CARDS = "[!.]*/[!.]*/card.json"


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
            if not (reasons := self._misses(card["trojaned"], metrics, benign_median)):
                card |= {"group": self.group.name, "split": self.group.split, "rejected": rejected}
                save_victim(_place(self.folder, self.group, self.index), model, attack, card)
                return
            rejected.append({"attempt": attempt, "reasons": reasons, **metrics})
        _write_json(_place(self.folder, self.group, self.index).with_suffix(".rejected.json"), rejected)

    def _misses(self, trojaned: bool, metrics: dict[str, float], benign_median: float) -> list[str]:
        """What a victim is rejected for."""
        required, clean = self.spec.acceptance, metrics["clean_accuracy"]
        least, attack = required.trojan, self.group.attack
        if required.all_target is not None and attack is not None and attack.mode == "all-target":
            least = required.all_target * clean
        reasons = ["clean accuracy"] if abs(clean - benign_median) > required.clean_margin else []
        return reasons + ["trojan accuracy"] * (trojaned and metrics["trojan_accuracy"] < least)


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
        there = known.setdefault((group.split, group.name), group)
        if there.attack != group.attack:
            raise ValueError(
                f"{folder} has another group {group.split}/{group.name}: give this one another name"
            )
    _write_json(path, {"identity": spec.identity(), "spec": json.loads(spec.model_dump_json())})


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
