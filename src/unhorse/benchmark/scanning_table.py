"""One table of model scanners over populations that are built: what is run, and what its rows say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from unhorse import jobs
from unhorse.benchmark.populations import Cast, Selection, identity_of, smaller
from unhorse.benchmark.rows import Row
from unhorse.benchmark.scanners import METHODS
from unhorse.benchmark.scanning_rows import (
    LeftOut,
    difference_rows,
    finding_rows,
    left_out_rows,
    pooled_rows,
    victim_rows,
)
from unhorse.benchmark.scanning_specs import MethodSpec, ScanningSpec
from unhorse.benchmark.scanning_trials import Finding, Party, Trial, read_findings, together
from unhorse.benchmark.trials import provenance
from unhorse.benchmark.variants import VariantSpec
from unhorse.models.classifier import read_card
from unhorse.zoo import Member

Shared = dict[str, Any]
Outcomes = dict[str, dict[str, Any]]
LEAST_POPULATIONS = 3
"""To leave out: one is judged, one calibrates, and what learns needs a third."""


class Run(NamedTuple):
    """A trial, the options of its rows, and what it judges."""

    trial: Trial
    options: dict[str, Any]
    judged: tuple[Selection, ...]


class ScanningTable:
    """The runs of a spec, and the rows of what they found."""

    def __init__(self, spec: ScanningSpec, cast: Cast, workers: int) -> None:
        self.spec = spec
        split = None if spec.leave_one_out else "held-back"
        self.judged = list(cast.judged(spec.judged_parts, split, workers))  # type: ignore[arg-type]
        if spec.folds is not None:
            parts = [self.judged[first :: spec.folds] for first in range(min(spec.folds, len(self.judged)))]
            self.judged = [_together(part, number) for number, part in enumerate(parts)]
        self.fitted = list(cast.fitted(spec.fitted_parts))
        labels = Counter(selection.label for selection in self.judged)
        if twice := [label for label, count in labels.items() if count > 1]:
            raise ValueError(f"{twice[0]} is judged twice: name all its groups in one entry of `judge`")
        if spec.leave_one_out and len(self.judged) < LEAST_POPULATIONS:
            raise ValueError(
                f"leave_one_out of {len(self.judged)} populations: give at least {LEAST_POPULATIONS}"
            )

    # --- runs -----------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """Every trial of the table."""
        return [
            run
            for method in self.spec.methods
            for options, seed in method.runs(self.spec.seeds)
            for run in self._runs_of(method, Trial(method.name, options, seed, ()))
        ]

    def _runs_of(self, method: MethodSpec, trial: Trial) -> Iterator[Run]:
        trial = replace(trial, images=method.images, whole=method.verdicts)
        said = dict(trial.options) | ({} if method.images is None else {"n_clean": method.images})
        parties, everything = tuple(_party(selection) for selection in self.judged), tuple(self.judged)
        if self.spec.leave_one_out:
            for index, selection in enumerate(everything):
                ordered = (parties[index], *parties[:index], *parties[index + 1 :])
                yield Run(replace(trial, parties=ordered, leave_one_out=True), said, (selection,))
        elif not METHODS[trial.method].learns:
            yield Run(replace(trial, parties=parties), said, everything)
        else:
            for extra, fitted in self._fits(trial.seed):
                yield Run(replace(trial, parties=parties, fitted=fitted), said | extra, everything)

    def _fits(self, seed: int) -> list[tuple[dict[str, Any], tuple[Member, ...]]]:
        """(further options, models to fit on): all of them, or so many as a learning curve asks for."""
        models = tuple(dict.fromkeys(member for selection in self.fitted for member in selection.members))
        if not self.spec.sizes:
            return [({}, models)]
        choices = {}
        for size in self.spec.sizes:
            chosen = smaller(models, size, seed)
            choices[len(chosen)] = chosen
            if len(chosen) != size:
                jobs.say(
                    f"{self.spec.table}: {size} models to fit on were asked for, {len(chosen)} are there "
                    "(half of them trojaned)"
                )
        return [({"n_models": count}, chosen) for count, chosen in choices.items()]

    # --- rows -----------------------------------------------------------------------------------------------

    def rows(self, runs: Sequence[Run], outcomes: Outcomes) -> Iterator[Row]:
        """The rows of finished runs; `outcomes` are their files, by the names of the trials."""
        for selection in self.judged:
            if selection.variant is not None:
                yield from self._variant_rows(selection)
        left_out: dict[tuple[Any, ...], list[tuple[Shared, LeftOut]]] = {}
        for run in runs:
            outcome = outcomes[run.trial.name]
            for selection in run.judged:
                finding = read_findings(outcome)[selection.label]
                shared = self._shared(run, outcome, selection) | (finding.origin or {})
                if finding.refused:
                    jobs.say(f"{run.trial.method} on {selection.label}: no row, {finding.refused}")
                elif self.spec.leave_one_out:
                    found = LeftOut(selection, finding)
                    key = (run.trial.method, run.trial.options, run.trial.seed)
                    left_out.setdefault(key, []).append((shared, found))
                    if self.spec.folds is None:
                        yield from left_out_rows(shared, found)
                else:
                    pooled = self.spec.population is None
                    yield from finding_rows(shared, selection, finding, outcome["threshold"], pooled=pooled)
                    yield from self._against_fp32(run, outcomes, selection, finding)
            if self.spec.pooled:
                yield from self._pooled(run, outcome)
        for several in left_out.values():
            yield from self._over_all(several)

    def _pooled(self, run: Run, outcome: dict[str, Any]) -> Iterator[Row]:
        """As if the populations that are judged were one."""
        findings = read_findings(outcome)
        found = [(each, findings[each.label]) for each in run.judged if not findings[each.label].refused]
        if not found:
            return
        selection = _together([each for each, _ in found], 0)
        origin = identity_of([each.population for each, _ in found])
        everywhere = {"dataset": "all", "architecture": "all", "options": run.options, "population": origin}
        shared = self._shared(run, outcome, selection) | (found[0][1].origin or {}) | everywhere
        shared["dirty"] = any((each.origin or shared)["dirty"] for _, each in found)
        finding = together([each for _, each in found])
        yield from finding_rows(shared, selection, finding, outcome["threshold"], pooled=True)

    def _over_all(self, several: Sequence[tuple[Shared, LeftOut]]) -> Iterator[Row]:
        if len(several) < len(self.judged):
            jobs.say(
                f"{several[0][0]['method']}: pooled over {len(several)} of {len(self.judged)} populations"
            )
        everywhere = {"dataset": "all", "architecture": "all", "split": "leave-one-out"}
        origin = identity_of([found.selection.population for _, found in several])
        seconds = sum(shared["seconds"] for shared, _ in several)
        trained_on = several[0][0]["trained_on"] and "+".join(
            sorted({name for _, found in several for name in found.selection.attacks})
        )
        shared = {**several[-1][0], **everywhere, "population": origin, "trained_on": trained_on}
        shared["dirty"] = any(each["dirty"] for each, _ in several)
        yield from pooled_rows({**shared, "seconds": seconds}, [found for _, found in several])

    def _against_fp32(
        self, run: Run, outcomes: Outcomes, selection: Selection, finding: Finding
    ) -> Iterator[Row]:
        if dict(run.trial.options).get("precision") != "bf16":
            return
        options = tuple(sorted((dict(run.trial.options) | {"precision": "fp32"}).items()))
        twin = outcomes.get(replace(run.trial, options=options).name)
        if twin is not None:
            shared = self._shared(run, outcomes[run.trial.name], selection) | (finding.origin or {})
            shared["options"] = shared["options"] | {"against": "fp32"}
            yield from difference_rows(shared, selection, finding, read_findings(twin)[selection.label])

    def _variant_rows(self, selection: Selection) -> Iterator[Row]:
        assert selection.variant is not None
        metrics: list[Any] = [read_card(member.folder)["metrics"] for member in selection.members]
        options = _variant_options(selection.variant)
        shared = {**self._place(selection), "population": selection.population.zoo.identity(), **provenance()}
        shared |= {"method": "none", "options": options, "seed": selection.variant.seed, "seconds": 0.0}
        yield from victim_rows(shared, selection, metrics)

    # --- what a row is of -----------------------------------------------------------------------------------

    def _shared(self, run: Run, outcome: dict[str, Any], selection: Selection) -> Shared:
        learned_from = [selection]
        if METHODS[run.trial.method].learns:
            rest = [other for other in self.judged if other.label != selection.label]
            learned_from = rest if self.spec.leave_one_out else self.fitted
        attacks = "+".join(sorted({name for each in learned_from for name in each.attacks}))
        return {
            **self._place(selection),
            "population": identity_of([each.population for each in learned_from]),
            "trained_on": (self.spec.trained_on or attacks) if METHODS[run.trial.method].learns else None,
            "method": run.trial.method,
            "options": run.options | self._which(selection),
            "seed": run.trial.seed,
            "seconds": round(outcome["seconds"], 2),
            **outcome["provenance"],
        }

    def _place(self, selection: Selection) -> Shared:
        population = selection.population
        return {
            "table": self.spec.table,
            "dataset": self.spec.dataset or population.dataset,
            "architecture": population.zoo.architecture,
            "split": population.zoo.name if self.spec.leave_one_out else selection.split,
        }

    def _which(self, selection: Selection) -> dict[str, Any]:
        """Options that say which of several populations is judged, how it was changed, and beside what."""
        name = selection.population.zoo.name
        home = {each.population.zoo.name for each in self.fitted}
        others = {each.population.zoo.name for each in self.judged} - {name}
        elsewhere = not self.spec.leave_one_out and name not in home and bool(home or others)
        beside = {"beside": selection.beside} if selection.beside else {}
        return ({"judged": name} if elsewhere else {}) | beside | _variant_options(selection.variant)


def _together(several: Sequence[Selection], number: int) -> Selection:
    """The models of several populations as one, which is called after the first and its number."""
    first = several[0].population
    name = f"{first.zoo.name} and {len(several) - 1} more, fold {number}"
    kinds = {group: kind for selection in several for group, kind in selection.kinds.items()}
    members = tuple(member for selection in several for member in selection.members)
    named = replace(first, zoo=first.zoo.model_copy(update={"name": name}))
    return Selection(named, several[0].split, kinds, members)


def _party(selection: Selection) -> Party:
    return Party(selection.label, selection.members, selection.benign)


def _variant_options(variant: VariantSpec | None) -> dict[str, Any]:
    """The kind of a variant, and its options that are not the usual ones."""
    if variant is None:
        return {}
    usual = VariantSpec(kind=variant.kind).settings
    unusual = {f"variant_{name}": value for name, value in variant.settings.items() if value != usual[name]}
    return {"variant": variant.kind, **unusual}
