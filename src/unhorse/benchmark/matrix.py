"""Tables of defences against several attacks, as papers print them: one sub-table per metric, a line per
defence, a column per attack.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from unhorse.benchmark.rows import FURTHER, Option, Published, Row, in_order, measured, printed, spanned
from unhorse.metrics import t_interval

FIVE = ("badnet-plus", "noise-blend-plus", "image-blend-plus", "input-aware", "wanet")
"""The attacks of Do et al. (ECCV 2022), Sec. 5.1, over which the paper's tables are averaged here."""
MEAN = "mean of 5"
NOTHING = "–"
MEANINGS = {
    "clean_accuracy": "clean images classified as their label",
    "clean_drop": "clean accuracy of the undefended classifier minus that of the defended one",
    "trojan_accuracy": "Trojan images classified as the attack wants",
    "recovery_accuracy": "Trojan images classified as their own label",
    "recovery_drop": "clean accuracy of the undefended classifier minus the defended one's share of Trojan "
    "images classified as their own label",
    "cross_accuracy": "images with the trigger of another image, classified as their own label",
    "noise_accuracy": "randomly warped images, classified as their own label",
    "fpr": "clean images that raise an alarm",
    "fnr": "Trojan images that raise none",
    "fnr_at_fpr01": "Trojan images that raise no alarm, the threshold being set for 1 % of clean images",
    "fnr_at_fpr05": "the same for 5 %",
    "fnr_at_fpr10": "the same for 10 %",
    "fpr_at_fpr01": "clean images that raise an alarm, the threshold being set for 1 % of other ones",
    "fpr_at_fpr05": "the same for 5 %",
    "fpr_at_fpr10": "the same for 10 %",
    "anomaly_index": "how many deviations the smallest reversed trigger lies below the median, 2 is flagged",
    "finding_rate": "models that are flagged",
    "target_found": "models that are flagged for the class that they were infected for",
    "auroc": "probability that a Trojan image scores higher than a clean one",
    "success_rate": "images that the synthetic trigger for the attack's target class turns into that class",
    "other_success_rate": "the same for a class that is not the attack's target",
    "trigger_norm": "mean L2 norm of the synthetic mask, or of the change where there is no mask",
    "other_trigger_norm": "the same for a class that is not the attack's target",
}
COMPARISON = "Cells are ours / paper (difference)."
MEANING_OF_MEAN = (
    f"{MEAN}: the mean over the five attacks is taken per seed, then its t interval over the seeds."
)
CHANCE = (
    "chance: a filter whose output says nothing about its input, so that each class is as likely; computed, "
    "not measured."
)


class _Line(NamedTuple):
    """What a line of a sub-table is about; `options` is JSON, `mode` is empty where there is but one."""

    dataset: str
    method: str
    options: str
    mode: str
    further: tuple[tuple[str, object], ...]

    @property
    def order(self) -> tuple[object, ...]:
        """Undefended victims first, chance last, options by their values."""
        last = {"none": -1, "chance": 1}.get(self.method, 0)
        options = in_order(json.loads(self.options))
        return self.dataset, last, self.method, options, self.mode, in_order(dict(self.further))


class _Shape(NamedTuple):
    """What the sub-tables of a table share: the columns before the numbers, and per data set and method the
    options that tell its lines apart.
    """

    columns: tuple[str, ...]
    varying: Mapping[tuple[str, str], Collection[str]]

    @staticmethod
    def of(rows: Sequence[Row], published: Sequence[Published]) -> _Shape:
        varying = {
            key: {name for name, values in options.items() if len(values) > 1}
            for key, options in _options(rows).items()
        }
        for cell in published:
            varying.setdefault((cell.dataset, cell.method), set(cell.options))
        modes = ({row.mode for row in rows} | {cell.mode for cell in published}) - {None, ""}
        needed = {
            "dataset": len({row.dataset for row in rows}) > 1,
            "method": True,
            "options": any(varying.values()),
            "mode": len(modes) > 1,
            **{field: _tells_apart(field, rows) for field in (*FURTHER, "n") if field != "mode"},
        }
        return _Shape(tuple(name for name, shown in needed.items() if shown), varying)

    def line(self, row: Row) -> _Line:
        mode = (row.mode or "") if "mode" in self.columns else ""
        fields = [name for name in self.columns if name not in _Line._fields]
        further = tuple((name, getattr(row, name) or "") for name in fields)
        return _Line(row.dataset, row.method, json.dumps(row.options), mode, further)

    def published_line(self, cell: Published) -> _Line:
        mode = cell.mode if "mode" in self.columns else ""
        return _Line(cell.dataset, cell.method, json.dumps(cell.options), mode, ())

    def answers(self, cell: Published, line: _Line) -> bool:
        options = json.loads(line.options)
        same = (cell.dataset, cell.method) == (line.dataset, line.method)
        mode = "mode" not in self.columns or cell.mode in {"", line.mode}
        return same and mode and cell.options.items() <= options.items()

    def named(self, line: _Line) -> list[str]:
        """The cells of a line before its numbers."""
        names, options = self.varying[line.dataset, line.method], json.loads(line.options)
        told = ", ".join(f"{name}={value}" for name, value in options.items() if name in names)
        cells = line._asdict() | {"options": told} | dict(line.further)
        return [str(cells.get(column, "")) for column in self.columns]


def is_matrix(rows: Sequence[Row]) -> bool:
    """Whether some row is about one of the five attacks that are compared side by side."""
    return any(row.attack in FIVE for row in rows)


def matrix(rows: Sequence[Row], published: Sequence[Published]) -> tuple[str, list[str]]:
    """(Markdown, columns): one sub-table per metric, and below them what all lines of a method share."""
    datasets = {row.dataset for row in rows}
    published = [cell for cell in published if cell.dataset in datasets]
    shape = _Shape.of(rows, published)
    metrics = {row.metric for row in rows} | {cell.metric for cell in published}
    known = [*MEANINGS, *sorted(metrics - set(MEANINGS))]
    parts = []
    for metric in sorted(metrics, key=known.index):
        ours = [row for row in rows if row.metric == metric]
        theirs = [cell for cell in published if cell.metric == metric]
        title = f"**{metric}**" + (f": {MEANINGS[metric]}" if metric in MEANINGS else "")
        parts += [title, _sub_table(metric, ours, theirs, shape)]
    if published:
        parts.append(COMPARISON)
    if {row.attack for row in rows} >= set(FIVE):
        parts.append(MEANING_OF_MEAN)
    if any(row.method == "chance" for row in rows):
        parts.append(CHANCE)
    return "\n\n".join([*parts, *_shared_options(rows)]), list(shape.columns)


def _tells_apart(field: str, rows: Sequence[Row]) -> bool:
    """Whether numbers of one cell differ in `field`; an architecture that goes with the attack does not.

    Runs of different size count as two only where one seed has both.
    """
    cells: dict[tuple[object, ...], set[object]] = defaultdict(set)
    for row in rows:
        seed = row.seed if field == "n" else 0
        options = json.dumps(row.options)
        cell = (row.dataset, row.method, options, row.attack, row.mode, row.metric, seed)
        cells[cell].add(getattr(row, field))
    return any(len(values) > 1 for values in cells.values())


# --- one sub-table ------------------------------------------------------------------------------------------


def _sub_table(metric: str, rows: Sequence[Row], published: Sequence[Published], shape: _Shape) -> str:
    lines = _lines(rows, published, shape)
    papers = {
        line: {cell.attack: cell.value for cell in published if shape.answers(cell, line)} for line in lines
    }
    there = {attack for line in lines for attack in (*lines[line], *papers[line])}
    attacks = [attack for attack in ("benign", *FIVE) if attack in there]
    attacks += sorted(there - set(attacks))
    body = [
        [
            *shape.named(line),
            spanned([len(cell) for cell in ours.values()]),
            *_numbers(metric, ours, papers[line], attacks),
        ]
        for line, ours in sorted(lines.items(), key=lambda item: item[0].order)
    ]
    header = [*shape.columns, "seeds", *attacks, MEAN]
    if not any(cells[-1] for cells in body):
        header, body = header[:-1], [cells[:-1] for cells in body]
    table = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def _lines(
    rows: Sequence[Row], published: Sequence[Published], shape: _Shape
) -> dict[_Line, dict[str, list[Row]]]:
    """Our rows per line and attack; published cells that no line of ours answers get an empty line."""
    lines: dict[_Line, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row.mode is None):
        line, homes = shape.line(row), []
        if row.mode is None:  # a benign victim stands beside the attacked ones of every mode
            homes = [other for other in lines if other._replace(mode="") == line]
        for home in homes or [line]:
            lines.setdefault(home, {}).setdefault(row.attack, []).append(row)
    for cell in sorted(published, key=lambda cell: cell.mode == ""):
        if not any(shape.answers(cell, line) for line in lines):
            lines[shape.published_line(cell)] = {}
    return lines


def _numbers(
    metric: str, ours: Mapping[str, Sequence[Row]], paper: Mapping[str, float], attacks: Sequence[str]
) -> list[str]:
    """A line's cells, one per attack and the mean of five; empty where there is nothing."""
    cells = []
    for attack in attacks:
        rows = ours.get(attack, [])
        cells.append(_cell(metric, [row.value for row in rows], rows, paper.get(attack)))
    by_attack = [{row.seed: row for row in ours.get(attack, [])} for attack in FIVE]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in by_attack)))
    means = [sum(by_seed[seed].value for by_seed in by_attack) / len(FIVE) for seed in seeds]
    used = [by_seed[seed] for by_seed in by_attack for seed in seeds]
    five = [paper[attack] for attack in FIVE if attack in paper]
    published = sum(five) / len(FIVE) if len(five) == len(FIVE) else None
    return [*cells, _cell(metric, means, used, published)]


def _cell(metric: str, values: Sequence[float], rows: Sequence[Row], paper: float | None) -> str:
    ours = measured(metric, values, rows) if values else NOTHING
    if paper is None:
        return ours if values else ""
    difference = f" ({printed(metric, t_interval(values).mean - paper, sign='+')})" if values else ""
    return f"{ours} / {printed(metric, paper)}{difference}"


# --- options ------------------------------------------------------------------------------------------------


def _options(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, set[Any]]]:
    """The values of every option, None where a row has none, per (data set, method)."""
    sets: dict[tuple[str, str], list[dict[str, Option]]] = defaultdict(list)
    for row in rows:
        sets[row.dataset, row.method].append(row.options)
    return {
        key: {name: {of.get(name) for of in several} for name in sorted(set().union(*several))}
        for key, several in sorted(sets.items())
    }


def _shared_options(rows: Sequence[Row]) -> list[str]:
    """A list of the options that no line repeats, because all lines of a method have them."""
    many = len({row.dataset for row in rows}) > 1
    methods: dict[str, list[str]] = defaultdict(list)
    for (dataset, method), of in _options(rows).items():
        told = [f"{name}={value}" for name, values in of.items() if len(values) == 1 for value in values]
        methods[", ".join(told)].append(f"`{method}`" + (f" on {dataset}" if many else ""))
    items = [f"- {', '.join(names)}: {told}" for told, names in methods.items() if told]
    return ["\n".join(["Options of every line:", "", *items])] if items else []
