"""Rows of tables of model scanners: here truth meets scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unhorse import jobs
from unhorse.benchmark.populations import Selection
from unhorse.benchmark.rows import Row
from unhorse.benchmark.scanning_trials import Finding
from unhorse.core import Reference
from unhorse.metrics import (
    accuracy_at_threshold,
    auroc,
    auroc_interval,
    paired_auroc_difference,
    tpr_at_fpr,
    wilson_interval,
)
from unhorse.victims import AttackSpec
from unhorse.zoo import Member

Shared = dict[str, Any]
NOMINAL = {"01": 0.01, "05": 0.05}
BENIGN = "benign"


class Arm(NamedTuple):
    """The models of a table's cell: those under one attack and mode, or the benign ones."""

    attack: str
    mode: str | None
    picked: Tensor
    group: str = ""

    @property
    def key(self) -> Shared:
        return {"attack": self.attack, "mode": self.mode}


def arms_of(selection: Selection, *, pooled: bool) -> list[Arm]:
    """One arm per group, and if `pooled` one of all trojaned models; benign groups are one arm together.

    A group without models is left out, with a line; one that shares its attack and mode with another keeps
    its name.
    """
    found, infected = {}, torch.tensor([member.trojaned for member in selection.members])
    twins = Counter(_kind(attack) for attack in selection.kinds.values() if attack is not None)
    for group, attack in selection.kinds.items():
        named = [member.group == group for member in selection.members]
        if attack is None:
            found[BENIGN] = Arm(BENIGN, None, torch.tensor(selection.benign))
        elif any(named):
            label = group if twins[_kind(attack)] > 1 else ""
            found[group] = Arm(*_kind(attack), torch.tensor(named), label)
        else:
            jobs.say(f"{selection.label}: group {group} has no models, so no row")
    if pooled and infected.any():
        found["all"] = Arm("all", None, infected)
    return list(found.values())


def _kind(attack: AttackSpec) -> tuple[str, str | None]:
    placebo = attack.mode == "placebo"
    return ("placebo", None) if placebo else (attack.kind, attack.mode)


# --- against benign models of the same population -----------------------------------------------------------


def finding_rows(
    shared: Shared, selection: Selection, finding: Finding, threshold: float, *, pooled: bool
) -> Iterator[Row]:
    """AUROC, accuracy at the threshold and more, of every arm against the benign models beside it."""
    scores, benign = torch.tensor(finding.scores, dtype=torch.float64), torch.tensor(selection.benign)
    for arm in arms_of(selection, pooled=pooled):
        row = {**shared, **arm.key}
        if arm.group:
            row["options"] = {**shared["options"], "group": arm.group}
        if arm.attack == BENIGN:
            n = int(benign.sum())
            yield _rate(row, "fpr", int((scores[benign] >= threshold).sum()), n)
            yield from _verdict_rows(row, finding, selection.members, arm)
            each = finding.seconds / len(selection.members)
            yield Row(**row, metric="seconds_per_model", value=each, n=len(selection.members))
            continue
        among = arm.picked | benign
        chosen, positive, n = scores[among], arm.picked[among], int(among.sum())
        yield Row(
            **row,
            metric="auroc",
            value=auroc(chosen, positive),
            ci95=auroc_interval(chosen, positive),
            n=n,
        )
        yield Row(**row, metric="tpr_at_fpr01", value=tpr_at_fpr(chosen, positive, 0.01), n=n)
        right = accuracy_at_threshold(chosen, positive, threshold)
        yield Row(**row, metric="accuracy", value=right, ci95=_around(right, n) if pooled else None, n=n)
        yield from _verdict_rows(row, finding, selection.members, arm)


def _verdict_rows(row: Shared, finding: Finding, members: Sequence[Member], arm: Arm) -> Iterator[Row]:
    """The share of an arm's models that the whole scan reports (INFECTED, and INFECTED or SUSPICIOUS)."""
    if not finding.verdicts:
        return
    places = arm.picked.nonzero().flatten().tolist()
    verdicts = [finding.verdicts[place] for place in places]
    for metric, words in (("infected_rate", {"INFECTED"}), ("finding_rate", {"INFECTED", "SUSPICIOUS"})):
        yield _rate(row, metric, sum(verdict in words for verdict in verdicts), len(verdicts))
    known = [place for place in places if members[place].target is not None]
    if known:
        hits = sum(finding.targets[place] == members[place].target for place in known)
        yield _rate(row, "target_found", hits, len(known))


def difference_rows(shared: Shared, selection: Selection, ours: Finding, theirs: Finding) -> Iterator[Row]:
    """The AUROC of one way of scoring minus that of another, on the same models."""
    benign = torch.tensor(selection.benign)
    for arm in arms_of(selection, pooled=False):
        if arm.attack == BENIGN:
            continue
        among = arm.picked | benign
        found = paired_auroc_difference(
            torch.tensor(ours.scores)[among], torch.tensor(theirs.scores)[among], arm.picked[among]
        )
        interval = (found.low, found.high)
        yield Row(
            **{**shared, **arm.key},
            metric="auroc_difference",
            value=found.difference,
            ci95=interval,
            n=int(among.sum()),
        )


def victim_rows(shared: Shared, selection: Selection, metrics: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """What the changed copies of a variant still are: their mean accuracies, from their cards."""
    for arm in arms_of(selection, pooled=False):
        row = {**shared, **arm.key}
        for metric in ("clean_accuracy", "trojan_accuracy"):
            values = [metrics[place].get(metric) for place in arm.picked.nonzero().flatten().tolist()]
            known = [value for value in values if value is not None]
            if known:
                yield Row(**row, metric=metric, value=sum(known) / len(known), n=len(known))


# --- leave one out: against benign models of other populations ----------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """One population, its scores, and their p-values against benign models of the others."""

    selection: Selection
    finding: Finding

    @property
    def p_values(self) -> list[float]:
        reference = Reference("benign models of the other populations", tuple(self.finding.reference))
        return [reference.p_value(score) for score in self.finding.scores]


def left_out_rows(shared: Shared, left: LeftOut) -> Iterator[Row]:
    """Rows of one population: AUROC within it, and rates at thresholds that the others' benign models set."""
    scores = torch.tensor(left.finding.scores, dtype=torch.float64)
    case = _Case(scores, left.p_values, torch.tensor(left.selection.benign), [len(left.finding.reference)])
    for arm in _merged([left.selection]):
        yield from case.rows({**shared, **arm.key}, arm)
        yield from _verdict_rows({**shared, **arm.key}, left.finding, left.selection.members, arm)
    each = left.finding.seconds / len(left.selection.members)
    row = {**shared, "attack": BENIGN, "mode": None}
    yield Row(**row, metric="seconds_per_model", value=each, n=len(left.selection.members))


def pooled_rows(shared: Shared, several: Sequence[LeftOut]) -> Iterator[Row]:
    """Rows over the models of all populations, whose scores are comparable as p-values."""
    p_values = [value for left in several for value in left.p_values]
    benign = torch.tensor([flag for left in several for flag in left.selection.benign])
    counts = [len(left.finding.reference) for left in several]
    case = _Case(-torch.tensor(p_values, dtype=torch.float64), p_values, benign, counts)
    for arm in _merged([left.selection for left in several]):
        yield from case.rows({**shared, **arm.key}, arm)


class _Case(NamedTuple):
    scores: Tensor
    p_values: Sequence[float]
    benign: Tensor
    references: Sequence[int]

    def rows(self, row: Shared, arm: Arm) -> Iterator[Row]:
        calm, n = arm.attack in (BENIGN, "placebo"), int(arm.picked.sum())
        flagged = torch.tensor(self.p_values, dtype=torch.float64)[arm.picked]
        for name, alpha in NOMINAL.items():
            metric = f"{'fpr' if calm else 'tpr'}_at_fpr{name}"
            if min(self.references) < round(1 / alpha) - 1:
                least = min(self.references)
                jobs.say(f"{row['method']}: {least} benign references give no {metric}, so no row")
                continue
            yield _rate(row, metric, int((flagged <= alpha).sum()), n)
        if arm.attack != BENIGN and self.benign.any():
            among = arm.picked | self.benign
            chosen, positive = self.scores[among], arm.picked[among]
            interval = auroc_interval(chosen, positive)
            yield Row(**row, metric="auroc", value=auroc(chosen, positive), ci95=interval, n=int(among.sum()))


def _merged(several: Sequence[Selection]) -> list[Arm]:
    """Arms over the members of several populations, one after the other: groups of one kind together."""
    kinds: list[tuple[str, str | None]] = []
    infected: list[bool] = []
    for selection in several:
        named = {
            name: (BENIGN, None) if kind is None else _kind(kind) for name, kind in selection.kinds.items()
        }
        kinds += [named[member.group] for member in selection.members]
        infected += [member.trojaned for member in selection.members]
    arms = [Arm(*wanted, torch.tensor([kind == wanted for kind in kinds])) for wanted in dict.fromkeys(kinds)]
    return [*arms, Arm("all", None, torch.tensor(infected))] if any(infected) else arms


# --- numbers ------------------------------------------------------------------------------------------------


def _rate(row: Shared, metric: str, count: int, n: int) -> Row:
    return Row(**row, metric=metric, value=count / n, ci95=wilson_interval(count, n), n=n)


def _around(share: float, n: int) -> tuple[float, float]:
    return wilson_interval(round(share * n), n)
