"""Which models a trial fits on and which it judges: named groups of populations on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator

from unhorse import jobs
from unhorse.benchmark.variants import VariantSpec, make_variants
from unhorse.models.classifier import read_card
from unhorse.populations import AcceptanceSpec, ZooSpec, read_populations
from unhorse.victims import AttackSpec, Spec
from unhorse.zoo import Member, build_all, members

Split = Literal["fit", "held-back"]
Kinds = Mapping[str, AttackSpec | None]


class FittedSpec(Spec):
    """Models to fit on: of the named `groups` (all if none) of one population, at most `limit` of each group.

    `population` is a zoo spec, its path relative to this spec.
    """

    population: str
    groups: tuple[str, ...] = ()
    split: Split | None = None
    limit: int | None = Field(default=None, ge=1)


class JudgedSpec(FittedSpec):
    """Models to judge; with a `variant` (its name, or a table with its options) changed copies of them.

    `beside` names a placebo group that takes the part of the benign models: then what tells an infected model
    is its Trojan, and not that it saw the trigger. Name its group and the infected ones in `groups`.
    """

    variant: VariantSpec | None = None
    beside: str | None = None

    @field_validator("variant", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Population:
    """A population on disk, and the spec that it is built from."""

    zoo: ZooSpec
    folder: Path

    @property
    def dataset(self) -> str:
        """The name of its data set in tables: the last part of the source."""
        return self.zoo.data.source.removeprefix("hub:").rstrip("/").rpartition("/")[2]

    @cached_property
    def register(self) -> dict[str, list[Member]]:
        """The members of each split; cards are read once."""
        return {
            split: members(self.folder, split)
            for split in sorted({group.split for group in self.zoo.groups})
            if any((self.folder / split).glob("[!.]*/card.json"))
        }

    def kinds(self, split: Split | None, names: Sequence[str] = ()) -> dict[str, AttackSpec | None]:
        """The attack of each named group (all if none are named) in one split, or in both."""
        there = [group for group in self.zoo.groups if split in (None, group.split)]
        if unknown := sorted(set(names) - {group.name for group in there}):
            known = ", ".join(dict.fromkeys(group.name for group in there)) or "none"
            raise ValueError(
                f"{self.zoo.name} has no group {unknown[0]!r} in {split or 'any split'}: name some of {known}"
            )
        return {group.name: group.attack for group in there if not names or group.name in names}

    def chosen(self, part: FittedSpec, split: Split | None) -> tuple[Member, ...]:
        """The members that `part` names, in the register's order."""
        kinds, found = self.kinds(split, part.groups), []
        for name in [split] if split else list(self.register):
            counts = dict.fromkeys(kinds, 0)
            for member in self.register.get(name, ()):
                if member.group in kinds and counts[member.group] != part.limit:
                    counts[member.group] += 1
                    found.append(member)
        return tuple(found)


class Selection(NamedTuple):
    """Chosen models of one population, and the attack of each of their groups."""

    population: Population
    split: Split | None
    kinds: Kinds
    members: tuple[Member, ...]
    variant: VariantSpec | None = None
    beside: str | None = None

    @property
    def label(self) -> str:
        variant = self.variant.name if self.variant else ""
        beside = f"beside {self.beside}" if self.beside else ""
        return " ".join(filter(None, (self.population.zoo.name, self.split, variant, beside)))

    @property
    def benign(self) -> tuple[bool, ...]:
        """Which members had no attack at all: placebos are neither benign nor trojaned, but for those that
        others are judged beside.
        """
        return tuple(self.kinds[member.group] is None for member in self.members)

    @property
    def attacks(self) -> set[str]:
        """The names of groups that are not benign."""
        return {name for name, attack in self.kinds.items() if attack is not None}


class Cast:
    """The populations of one benchmark spec, read and built once each."""

    def __init__(self, place: Path, work: Path) -> None:
        self.place, self.work = place, work
        self._known: dict[str, list[Population]] = {}

    def named(self, path: str) -> list[Population]:
        """The population that a spec describes, or those of a family, each in its folder below `work`."""
        if path not in self._known:
            source = self.place / path
            home = self.work / tomllib.loads(source.read_text(encoding="utf-8"))["name"]
            found = read_populations(source, home)
            self._known[path] = [Population(zoo, folder) for folder, zoo in found.items()]
        return self._known[path]

    def build(self, paths: Iterable[str], workers: int) -> None:
        for path in dict.fromkeys(paths):
            build_all({each.folder: each.zoo for each in self.named(path)}, workers=workers)

    def fitted(self, parts: Sequence[FittedSpec]) -> Iterator[Selection]:
        """What is fitted on, a population at a time."""
        for part in parts:
            for population in self.named(part.population):
                split = part.split or "fit"
                kinds = population.kinds(split, part.groups)
                yield Selection(population, split, kinds, population.chosen(part, split))

    def judged(self, parts: Sequence[JudgedSpec], split: Split | None, workers: int) -> Iterator[Selection]:
        """What is judged, a population at a time; variants that are missing are made."""
        for part in parts:
            for population in self.named(part.population):
                where = part.split or split
                chosen, kinds = population.chosen(part, where), population.kinds(where, part.groups)
                if part.variant is not None:
                    folder = population.folder.with_name(f"{population.folder.name}-{part.variant.name}")
                    chosen = make_variants(chosen, folder, part.variant, workers=workers)
                    chosen = _still_infected(chosen, kinds, population.zoo.acceptance, part.variant)
                if part.beside is not None:
                    kinds = _beside(kinds, part.beside)
                selection = Selection(population, where, kinds, chosen, part.variant, part.beside)
                if not any(selection.benign):
                    raise ValueError(
                        f"{selection.label}: no benign models among the judged ones, so no score can be "
                        "compared: name a group without an attack too"
                    )
                yield selection


def _beside(kinds: Kinds, placebo: str) -> dict[str, AttackSpec | None]:
    """The attacks of groups, where one of placebos counts as benign."""
    attack = kinds.get(placebo)
    if attack is None or attack.mode != "placebo":
        known = [name for name, each in kinds.items() if each is not None and each.mode == "placebo"]
        raise ValueError(f"beside {placebo!r}: name a judged group of placebos, {known or 'here none'}")
    if benign := [name for name, each in kinds.items() if each is None]:
        raise ValueError(
            f"beside {placebo!r} and benign models ({', '.join(benign)}): compare with one kind, so leave "
            "the other out of `groups`"
        )
    return {**kinds, placebo: None}


def _still_infected(
    copies: Sequence[Member], kinds: Kinds, required: AcceptanceSpec, variant: VariantSpec
) -> tuple[Member, ...]:
    """Without the trojaned ones that the change cured, by the rule of the population: judging them as
    infected would be wrong.
    """
    kept = [copy for copy in copies if not copy.trojaned or _infected(copy, kinds[copy.group], required)]
    for group in sorted({copy.group for copy in copies}):
        before, after = (sum(copy.group == group for copy in some) for some in (copies, kept))
        if before > after:
            jobs.say(
                f"{variant.name}: {before - after} of {before} of group {group} are left out: the change "
                "cured them, by the Trojan accuracy that the population asks for"
            )
    return tuple(kept)


def _infected(copy: Member, attack: AttackSpec | None, required: AcceptanceSpec) -> bool:
    metrics: dict[str, Any] = read_card(copy.folder)["metrics"]  # type: ignore[assignment]
    least = required.trojan
    if required.all_target is not None and attack is not None and attack.mode == "all-target":
        least = required.all_target * metrics["clean_accuracy"]
    return metrics["trojan_accuracy"] >= least


@functools.lru_cache(maxsize=100_000)
def task_of(folder: Path) -> tuple[str, ...]:
    """What a learned scanner may be tied to: image shape, number of classes, architecture."""
    card: dict[str, Any] = dict(read_card(folder))
    return str(card["image_shape"]), str(len(card["class_names"])), json.dumps(card["architecture"])


def identity_of(populations: Sequence[Population]) -> str:
    """The identity of the population fitted on; a hash of the identities where there are several."""
    identities = sorted({population.zoo.identity() for population in populations})
    if len(identities) == 1:
        return identities[0]
    return hashlib.sha256("+".join(identities).encode()).hexdigest()[:16]


def smaller(fitted: Sequence[Member], size: int, seed: int) -> tuple[Member, ...]:
    """`size` of the models to fit on, half of them trojaned, every group in its turn; fewer where there are
    not enough of one half.

    With one seed a smaller choice is part of every larger one.
    """
    trojaned, others = (
        _in_turns([member for member in fitted if member.trojaned == side], seed) for side in (True, False)
    )
    half = min(size // 2, len(trojaned), len(others))
    if half < 1:
        raise ValueError(
            f"{size} of {len(trojaned)} trojaned and {len(others)} other models: a scanner is fitted on at "
            "least one of each, so give sizes from 2 up and name groups of both"
        )
    return tuple(trojaned[:half] + others[:half])


def _in_turns(side: Sequence[Member], seed: int) -> list[Member]:
    """Members in a random order in which groups take turns."""
    queues: dict[str, list[Member]] = {}
    rng = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(side), generator=rng).tolist():
        queues.setdefault(side[index].group, []).append(side[index])
    places = [(rank, name, member) for name, queue in queues.items() for rank, member in enumerate(queue)]
    return [member for _, _, member in sorted(places, key=lambda place: place[:2])]
