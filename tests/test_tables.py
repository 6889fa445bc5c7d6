import importlib.util
import json
import re
from pathlib import Path

import pytest

from unhorse.benchmark.tables import Row, append_rows, read_published, read_rows, render, render_to

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "benchmarks" / "published"
TRANSCRIPTS = ROOT.parent / "shared" / "published"


def row(**changes):
    values = {
        "table": "do2022-table2",
        "dataset": "mnist",
        "architecture": "input-aware-cnn",
        "split": "0",
        "method": "vif",
        "options": {"n_clean": 7000, "lambda2": 0.003},
        "attack": "badnet-plus",
        "mode": "single-target",
        "seed": 0,
        "metric": "trojan_accuracy",
        "value": 0.01,
        "ci95": (0.007, 0.0144),
        "n": 2700,
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "seconds": 1.5,
    }
    return Row(**(values | changes))


@pytest.fixture
def results(tmp_path):
    def write(*rows):
        append_rows(tmp_path / "results" / "table.jsonl", rows)
        return tmp_path / "results"

    return write


def line_of(markdown, *words):
    """Cells of the one table line that holds all words as cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    found = [cells for cells in lines if set(words) <= set(cells)]
    assert len(found) == 1, found
    return found[0]


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row(), row(seed=1, population="ab12", ci95=None)]
    append_rows(tmp_path / "a.jsonl", rows)
    assert read_rows(tmp_path / "a.jsonl") == rows


def test_a_line_has_just_the_columns_of_the_schema_and_sorted_options(tmp_path):
    append_rows(tmp_path / "a.jsonl", [row()])
    line = json.loads((tmp_path / "a.jsonl").read_text())
    assert ", ".join(line) == (
        "table, dataset, architecture, population, trained_on, split, method, options, attack, mode, seed, "
        "metric, value, ci95, n, commit, dirty, versions, device, seconds"
    )
    assert list(line["options"]) == ["lambda2", "n_clean"]


def test_appending_leaves_what_is_there(tmp_path):
    path = tmp_path / "a.jsonl"
    append_rows(path, [row(seed=0)])
    before = path.read_bytes()
    append_rows(path, [row(seed=1)])
    assert path.read_bytes().startswith(before)
    assert [each.seed for each in read_rows(path)] == [0, 1]


def test_the_newest_row_of_a_key_counts(tmp_path):
    append_rows(
        tmp_path / "a.jsonl", [row(value=0.1), row(value=0.2, commit="ffff", seconds=9.0), row(seed=1)]
    )
    assert [each.value for each in read_rows(tmp_path / "a.jsonl")] == [0.2, 0.01]


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_row_of_uncommitted_code_never_replaces_one_of_committed_code(tmp_path, order):
    append_rows(tmp_path / "a.jsonl", [row(value=0.5 if dirty else 0.1, dirty=dirty) for dirty in order])
    assert [each.value for each in read_rows(tmp_path / "a.jsonl")] == [0.1]


@pytest.mark.parametrize(
    "change", [{"n": 1}, {"options": {}}, {"mode": None}, {"population": "x"}, {"seed": 7}]
)
def test_rows_that_measure_something_else_are_kept_apart(tmp_path, change):
    append_rows(tmp_path / "a.jsonl", [row(), row(**change)])
    assert len(read_rows(tmp_path / "a.jsonl")) == 2


def test_a_line_cut_off_by_a_kill_is_named_and_harms_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"table": "do2022')
    append_rows(path, [row()])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*remove that line and measure again"):
        read_rows(path)
    path.write_text(path.read_text().split("\n", 1)[1])
    assert read_rows(path) == [row()]


@pytest.mark.parametrize("change", [{"value": float("nan")}, {"colour": "red"}, {"seed": None}])
def test_rows_outside_the_schema_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        row(**change)


# --- rendering ----------------------------------------------------------------------------------------------


def test_one_seed_is_printed_with_its_interval_beside_the_published_value(results):
    markdown = render(results(row()), PUBLISHED)
    line = line_of(markdown, "vif", "badnet-plus", "trojan_accuracy", "2700")
    published = next(
        cell
        for cell in read_published(PUBLISHED / "do2022-table2.csv")
        if (cell.dataset, cell.method, cell.attack, cell.metric)
        == ("mnist", "vif", "badnet-plus", "trojan_accuracy")
    )
    theirs = 100 * published.value
    assert line[-5:] == ["1.00 [0.70, 1.44]", "1", "2700", f"{theirs:.2f}", f"{1 - theirs:+.2f}"]
    assert line[2] == "lambda2=0.003, n_clean=7000"


def test_seeds_are_averaged_with_their_t_interval(results):
    folder = results(*(row(seed=seed, value=value) for seed, value in enumerate((0.01, 0.02, 0.03))))
    line = line_of(render(folder, PUBLISHED), "trojan_accuracy", "2700")
    assert line[-5:-2] == ["2.00 ± 2.48", "3", "2700"]


def test_runs_of_different_size_are_not_taken_for_seeds(results):
    markdown = render(results(row(n=100, value=0.1), row(n=200, value=0.2)), PUBLISHED)
    assert line_of(markdown, "100")[-5] == "10.00 [0.70, 1.44]"
    assert line_of(markdown, "200")[-5] == "20.00 [0.70, 1.44]"


def test_aurocs_are_printed_with_three_decimals(results):
    signature = {"table": "hussein2023-table2", "dataset": "cifar10", "method": "signature-convolution"}
    options = {"maps": "max", "epochs": 20}
    folder = results(
        row(**signature, options=options, attack="badnet", metric="auroc", value=0.9876, ci95=None)
    )
    line = line_of(render(folder, PUBLISHED), "epochs=20, maps=max")
    assert line[-5:] == ["0.988", "1", "2700", "0.993", "-0.005"]


def test_other_metrics_are_printed_as_numbers(results):
    folder = results(row(table="ours-speed", metric="seconds_per_model", value=1.2345, ci95=None))
    assert line_of(render(folder, PUBLISHED), "seconds_per_model")[-5:] == ["1.23", "1", "2700", "", ""]


def test_published_cells_that_we_lack_are_shown_for_our_data_sets_only(results):
    markdown = render(results(row()), PUBLISHED)
    assert line_of(markdown, "mnist", "februus", "wanet", "trojan_accuracy")[-5] == ""
    assert "| gtsrb |" not in markdown


def test_tables_without_rows_are_not_rendered(results):
    assert re.findall("^## (.*)$", render(results(row()), PUBLISHED), re.MULTILINE) == ["do2022-table2"]


def test_an_all_target_attack_is_not_compared_with_a_single_target_one(results):
    assert line_of(render(results(row(mode="all-target")), PUBLISHED), "2700")[-2:] == ["", ""]


def test_numbers_of_uncommitted_code_are_marked(results):
    assert line_of(render(results(row(dirty=True)), PUBLISHED), "2700")[-5].endswith("†")


def test_a_column_appears_where_its_values_differ_and_is_stated_once_where_not(results):
    markdown = render(results(row(split="0"), row(split="1", value=0.5)), PUBLISHED)
    header = line_of(markdown, "dataset", "method")
    assert "split" in header
    assert "architecture" not in header
    assert "architecture input-aware-cnn" in markdown
    assert "commit 0123456789" in markdown


def test_a_page_is_rendered_from_the_folders_beside_it(results, tmp_path):
    results(row())
    (tmp_path / "published").mkdir()
    render_to(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == render(tmp_path / "results", tmp_path / "published")


def test_the_committed_page_is_the_rendered_one():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert page == render(ROOT / "benchmarks" / "results", PUBLISHED)


# --- published values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "cell", "value"),
    [
        ("do2022-table1", ("mnist", "none", "benign", "clean_accuracy"), 0.9956),
        ("do2022-table1", ("mnist", "none", "badnet-plus", "trojan_accuracy"), 0.9996),
        ("do2022-table2", ("mnist", "februus", "badnet-plus", "recovery_drop"), 0.8632),
        ("do2022-table2", ("gtsrb", "nad", "benign", "clean_drop"), -0.0013),
        ("do2022-table3", ("mnist", "if-contrast", "badnet-plus", "fnr"), 0.0221),
        ("do2022-table3", ("gtsrb", "if-contrast", "noise-blend-plus", "fpr"), 0.0024),
    ],
)
def test_published_cells_are_fractions_under_our_names(table, cell, value):
    cells = {
        (each.dataset, each.method, each.attack, each.metric): each.value
        for each in read_published(PUBLISHED / f"{table}.csv")
    }
    assert cells[cell] == pytest.approx(value, abs=1e-9)


def test_published_signatures_differ_by_their_maps():
    cells = read_published(PUBLISHED / "hussein2023-table2.csv")
    aurocs = {
        cell.options["maps"]: cell.value
        for cell in cells
        if (cell.dataset, cell.method, cell.metric) == ("tiny-imagenet", "signature-transformer", "auroc")
    }
    assert aurocs == {"min": 1.0, "max": 1.0, "both": 0.997}


def test_every_published_cell_is_there_once_and_is_a_fraction():
    counts = {path.stem: read_published(path) for path in PUBLISHED.glob("*.csv")}
    assert {name: len(cells) for name, cells in counts.items()} == {
        "do2022-table1": 52,
        "do2022-table2": 320,
        "do2022-table3": 132,
        "hussein2023-table2": 26,
    }
    for cells in counts.values():
        assert len({str(cell[:7]) for cell in cells}) == len(cells)
        assert all(-0.05 < cell.value <= 1 for cell in cells)


def test_conversion_reproduces_the_committed_values(tmp_path):
    if not TRANSCRIPTS.is_dir():
        pytest.skip(f"{TRANSCRIPTS} is not there")
    specification = importlib.util.spec_from_file_location(
        "convert_published", ROOT / "benchmarks" / "convert_published.py"
    )
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    script.convert(TRANSCRIPTS, tmp_path)
    committed = {path.name: path.read_text() for path in PUBLISHED.glob("*.csv")}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == committed
