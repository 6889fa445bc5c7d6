"""Trials of model scanners: a method is fitted on some models and scores others that it was never shown."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from unhorse.benchmark.fitting import FittedScanner, Refused
from unhorse.benchmark.model_scores import Measurement, Options
from unhorse.benchmark.scanners import METHODS, make
from unhorse.benchmark.trials import provenance
from unhorse.zoo import Member


class Party(NamedTuple):
    """Models of one population that are judged together; which are `benign`, and not even placebos."""

    label: str
    members: tuple[Member, ...]
    benign: tuple[bool, ...]

    def benign_only(self) -> Party:
        kept = tuple(member for member, flag in zip(self.members, self.benign, strict=True) if flag)
        return Party(self.label, kept, (True,) * len(kept))


class Finding(NamedTuple):
    """What a method says of one party, in the order of its members; why it has no scores in `refused`.

    `origin` is the provenance of scores that were measured before, model by model.
    """

    scores: Sequence[float] = ()
    seconds: float = 0.0
    verdicts: Sequence[str] = ()
    targets: Sequence[int | None] = ()
    reference: Sequence[float] = ()
    refused: str = ""
    origin: dict[str, Any] | None = None


def together(several: Sequence[Finding]) -> Finding:
    """Findings of parties, one after the other, as one of them all."""
    return Finding(
        scores=[score for each in several for score in each.scores],
        seconds=sum(each.seconds for each in several),
        verdicts=[verdict for each in several for verdict in each.verdicts],
        targets=[target for each in several for target in each.targets],
    )


@dataclass(frozen=True)
class Trial:
    """One method with one seed over all judged models: the unit that is resumed.

    `fitted` is empty where the method needs no population. With `leave_one_out` the first party alone is
    judged, and the others are what the method learns from and what its scores are compared with.
    """

    method: str
    options: Options
    seed: int
    parties: tuple[Party, ...]
    fitted: tuple[Member, ...] = ()
    images: int | None = None
    whole: bool = True
    leave_one_out: bool = False

    @property
    def name(self) -> str:
        models: list[Any] = [(party.label, _names(party.members)) for party in self.parties]
        settings = [self.method, self.options, self.seed, self.images, self.whole, self.leave_one_out]
        text = json.dumps([*settings, _names(self.fitted), models])
        return f"{self.method}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def __call__(self) -> dict[str, Any]:
        started, origin = time.monotonic(), provenance()
        if self.leave_one_out:
            threshold, findings = 0.0, {self.parties[0].label: self._left_out()}
        elif METHODS[self.method].learns:
            threshold, findings = self._learned()
        else:
            threshold, findings = self._threshold(), self._measured(self.parties)
        scores = [score for finding in findings.values() for score in finding.scores]
        spent = time.monotonic() - started
        if not METHODS[self.method].learns:
            spent = sum(finding.seconds for finding in findings.values())  # some other time, and kept
        others = {
            label: {**finding._asdict(), "scores": len(finding.scores)} for label, finding in findings.items()
        }
        shared = {"threshold": threshold, "seconds": spent, "provenance": origin}
        return {"scores": scores, "findings": others, **shared}

    @property
    def models(self) -> tuple[Member, ...]:
        """All that is fitted on or judged."""
        judged = (member for party in self.parties for member in party.members)
        return tuple(dict.fromkeys((*self.fitted, *judged)))

    def measurements(self) -> list[Measurement]:
        """What must be known of each model alone."""
        if METHODS[self.method].learns_from not in ("nothing", "features"):
            return []
        return [self._measurement(member) for member in self.models]

    def _measurement(self, member: Member) -> Measurement:
        return Measurement(member.folder, self.method, self.options, self.seed, self.images, self.whole)

    # --- methods that need no population --------------------------------------------------------------------

    def _threshold(self) -> float:
        return float(make(self.method, dict(self.options), self.seed).threshold)

    def _measured(self, parties: Iterable[Party]) -> dict[str, Finding]:
        return {party.label: self._gathered(party) for party in parties}

    def _gathered(self, party: Party) -> Finding:
        """What was found in each model; a method that can judge none of them has no row, one that fails on
        some is an error: leaving them out would flatter it.
        """
        found = [self._measurement(member).read() for member in party.members]
        missed = [index for index, one in enumerate(found) if one["score"] is None]
        if missed:
            first = found[missed[0]]
            if len(missed) == len(found):
                return Finding(refused=first["reason"])
            folder = party.members[missed[0]].folder
            raise RuntimeError(f"{folder} is {first.get('verdict', 'UNDECIDED')}: {first['reason']}")
        dirty = any(one["provenance"]["dirty"] for one in found)
        finding = Finding(
            [one["score"] for one in found],
            sum(one["seconds"] for one in found),
            origin={**found[-1]["provenance"], "dirty": dirty},
        )
        if "verdict" not in found[0]:
            return finding
        verdicts, targets = ([one[name] for one in found] for name in ("verdict", "target"))
        return finding._replace(verdicts=verdicts, targets=targets)

    # --- methods that learn ---------------------------------------------------------------------------------

    def _learned(self) -> tuple[float, dict[str, Finding]]:
        seen = set(self.fitted)
        for party in self.parties:
            if both := [member for member in party.members if member in seen]:
                raise ValueError(f"{both[0].folder} is fitted on and judged: name other groups or splits")
        started = time.monotonic()
        try:
            scanner = FittedScanner(self.method, self.options, self.seed).fit(self.fitted)
        except Refused as reason:
            return 0.0, {party.label: Finding(refused=str(reason)) for party in self.parties}
        fitting = time.monotonic() - started
        return scanner.threshold, {party.label: _scored(scanner, party, fitting) for party in self.parties}

    # --- leave one out --------------------------------------------------------------------------------------

    def _left_out(self) -> Finding:
        """The first party's scores, and benign scores of the others, of each as many as of the smallest.

        Of a method that learns, each other party's benign models are scored by a fit that saw neither them
        nor the first party, as the first party is.
        """
        party, *others = self.parties
        if not METHODS[self.method].learns:
            found = self._gathered(party)
            return found._replace(
                reference=_evenly([self._gathered(other.benign_only()).scores for other in others])
            )
        started, calm = time.monotonic(), []
        try:
            for other in others:
                rest = [each for each in others if each is not other]
                calm.append(self._fitted_on(rest).scores(other.benign_only().members))
            scores = self._fitted_on(others).scores(party.members)
        except Refused as reason:
            return Finding(refused=str(reason))
        return Finding(scores, time.monotonic() - started, reference=_evenly(calm))

    def _fitted_on(self, parties: Sequence[Party]) -> FittedScanner:
        models = [member for party in parties for member in party.members]
        return FittedScanner(self.method, self.options, self.seed).fit(models)


def read_findings(outcome: Mapping[str, Any]) -> dict[str, Finding]:
    """The findings of a trial's file, by the labels of its parties."""
    scores, found = iter(outcome["scores"]), {}
    for label, finding in outcome["findings"].items():
        found[label] = Finding(**{**finding, "scores": [next(scores) for _ in range(finding["scores"])]})
    return found


def _evenly(several: Sequence[Sequence[float]]) -> list[float]:
    """The first of each list, as many as the shortest has, so that no large population outweighs others."""
    least = min(len(scores) for scores in several)
    return [score for scores in several for score in scores[:least]]


def _scored(scanner: FittedScanner, party: Party, fitting: float) -> Finding:
    started = time.monotonic()
    try:
        scores = scanner.scores(party.members)
    except Refused as reason:
        return Finding(refused=str(reason))
    return Finding(scores, fitting + time.monotonic() - started)


def _names(models: Iterable[Member]) -> list[str]:
    return ["/".join(member.folder.parts[-3:]) for member in models]
