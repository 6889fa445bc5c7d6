"""Tables: rows beside the published numbers, as Markdown. Defences against the five attacks of Do et al. are
matrices, everything else has a line per number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from unhorse.benchmark.matrix import is_matrix, matrix
from unhorse.benchmark.rows import (
    CLOSING,
    FURTHER,
    LEADING,
    Identity,
    Published,
    Row,
    append_rows,
    in_order,
    measured,
    printed,
    read_published,
    read_rows,
    spanned,
)
from unhorse.metrics import t_interval

__all__ = ["Published", "Row", "append_rows", "read_published", "read_rows", "render", "render_to"]

PREAMBLE = """# Results

Rendered from `results/*.jsonl` and `published/*.csv` by `unhorse benchmark --render`; edits here are lost.

"""
LEGEND = """
Rates are in %, their differences in percentage points. ± is the 95 % t interval over seeds; a number measured
with one seed has the 95 % interval over its n items in brackets. † marks numbers from uncommitted code.
"""


def render_to(folder: Path) -> None:
    """Writes README.md, a list of the tables, and tables/<name>.md, from `results` and `published` in the
    same folder; the list says of a table what the specs and speed scripts open with; the shortest counts.
    """
    pages = render(folder / "results", folder / "published")
    (folder / "tables").mkdir(exist_ok=True)
    for name, text in pages.items():
        _put(folder / "tables" / f"{name}.md", text)
    for path in (folder / "tables").glob("*.md"):
        if path.stem not in pages:
            path.unlink()
    _put(folder / "README.md", _contents(list(pages), folder))


def _put(path: Path, text: str) -> None:
    scratch = path.with_suffix(".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def render(results: Path, published: Path) -> dict[str, str]:
    """A page of Markdown per table that has rows in `results`, published numbers beside ours."""
    rows = [row for path in sorted(results.glob("*.jsonl")) for row in read_rows(path)]
    references = [cell for path in sorted(published.glob("*.csv")) for cell in read_published(path)]
    return {
        name: _page(
            name,
            [row for row in rows if row.table == name],
            [cell for cell in references if cell.table == name],
        )
        for name in sorted({row.table for row in rows})
    }


def _contents(names: Sequence[str], folder: Path) -> str:
    if not names:
        return f"{PREAMBLE}No rows yet.\n"
    sources = [*sorted((folder / "specs").glob("*.toml")), *sorted((folder / "speed").glob("*.py"))]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    lines = ["| table | what it shows | measured by |", "| --- | --- | --- |"]
    for name in names:
        makers = {path: text for path, text in texts.items() if re.search(rf'table"? ?[=:] "{name}"', text)}
        said = min(map(_opening, makers.values()), key=len, default="")
        links = [f"[{path.name}]({path.relative_to(folder).as_posix()})" for path in makers]
        lines.append(f"| [{name}](tables/{name}.md) | {said} | {', '.join(links)} |")
    return PREAMBLE + "\n".join(lines) + "\n" + LEGEND


def _opening(text: str) -> str:
    """The first sentence of the comment or docstring that opens a file."""
    lines = text.removeprefix('"""').splitlines()
    if not text.startswith("#"):
        return lines[0].removesuffix('"""')
    comment = " ".join(line[2:] for line in takewhile(lambda line: line.startswith("# "), lines))
    return re.split(r"(?<=\.) (?=[A-Z])", comment)[0]


def _page(name: str, rows: Sequence[Row], published: Sequence[Published]) -> str:
    """One table: our cells, and published ones that we lack on the data sets that we have."""
    form = matrix if is_matrix(rows) else _long
    body, columns = form(rows, published)
    return f"# {name}\n\n{body}\n\n{_caption(rows, published, columns)}\n{LEGEND}"


def _caption(rows: Sequence[Row], published: Sequence[Published], columns: Sequence[str]) -> str:
    """What is said once below a table: fields that are no column of it, and where its numbers are from."""
    facts = []
    for field in ("dataset", *FURTHER):
        values = sorted({getattr(row, field) for row in rows} - {None, ""})
        if values and field not in columns:
            facts.append(f"{field} {', '.join(values)}")
    if "n" not in columns:
        facts.append(f"n {spanned([row.n for row in rows])}")
    facts.append("commit " + ", ".join(sorted({row.commit[:10] for row in rows})))
    facts.append("device " + ", ".join(sorted({row.device for row in rows})))
    versions = sorted({f"{name} {version}" for row in rows for name, version in row.versions.items()})
    facts.append(", ".join(versions))
    sources = sorted({cell.source for cell in published})
    return "; ".join(facts) + "." + (f" Published: {'; '.join(sources)}." if sources else "")


# --- a line per number --------------------------------------------------------------------------------------


def _long(rows: Sequence[Row], published: Sequence[Published]) -> tuple[str, list[str]]:
    """(Markdown, columns): one line per (data set, method, options, attack, metric)."""
    varying = [field for field in FURTHER if len({getattr(row, field) for row in rows}) > 1]
    cells: dict[Identity, list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.cell].append(row)
    answered = [cell for cell in published if any(cell.answers(row) for row in rows)]
    lines = [_measured_line(group, varying, published) for cell in cells.values() for group in _by_size(cell)]
    datasets = {row.dataset for row in rows}
    lines += [
        _published_line(cell, varying)
        for cell in published
        if cell not in answered and cell.dataset in datasets
    ]
    columns = [*LEADING, *varying, *CLOSING, "ours", "seeds", "n", "published", "difference"]
    table = [
        columns,
        ["---"] * len(columns),
        *(line.cells for line in sorted(lines, key=lambda line: line.order)),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in table), columns


def _by_size(cell: Sequence[Row]) -> list[list[Row]]:
    """Rows to average: all of a cell, or those of one size each where one seed has runs of several sizes."""
    if len({(row.seed, row.n) for row in cell}) == len({row.seed for row in cell}):
        return [list(cell)]
    return [[row for row in cell if row.n == n] for n in sorted({row.n for row in cell})]


class _Line(NamedTuple):
    order: tuple[object, ...]
    cells: list[str]


def _measured_line(rows: Sequence[Row], varying: Sequence[str], published: Sequence[Published]) -> _Line:
    first, values = rows[0], [row.value for row in rows]
    ours = measured(first.metric, values, rows)
    reference = next((cell for cell in published if cell.answers(first)), None)
    theirs, difference = "", ""
    if reference is not None:
        theirs = printed(first.metric, reference.value)
        difference = printed(first.metric, t_interval(values).mean - reference.value, sign="+")
    n = spanned([row.n for row in rows])
    extra = [getattr(first, field) or "" for field in varying]
    return _line(first, extra, [ours, str(len(rows)), n, theirs, difference])


def _published_line(cell: Published, varying: Sequence[str]) -> _Line:
    extra = [cell.mode if field == "mode" else "" for field in varying]
    return _line(cell, extra, ["", "", "", printed(cell.metric, cell.value), ""])


def _line(cell: Row | Published, extra: list[str], numbers: list[str]) -> _Line:
    options = ", ".join(f"{name}={value}" for name, value in sorted(cell.options.items()))
    order = (
        cell.dataset,
        cell.method,
        in_order(cell.options),
        *extra,
        cell.attack != "benign",
        cell.attack,
        cell.metric,
    )
    return _Line(order, [cell.dataset, cell.method, options, *extra, cell.attack, cell.metric, *numbers])
