import importlib.util
import json
import re
from pathlib import Path

import pytest

from unhorse.benchmark import tables
from unhorse.benchmark.tables import Row, append_rows, read_published, read_rows, render_to

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


def render(results, published):
    return "\n".join(tables.render(results, published).values())


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


# --- rendering: a line per number ---------------------------------------------------------------------------


def scanner_row(**changes):
    """A model scanner's number, for which the paper has 99.3 %."""
    values = {"table": "hussein2023-table2", "dataset": "cifar10", "method": "signature-convolution"}
    values |= {"attack": "badnet", "mode": None, "options": {"maps": "max", "epochs": 20}}
    return row(**(values | {"metric": "auroc", "value": 0.9876, "ci95": None} | changes))


def test_one_seed_is_printed_with_its_interval_beside_the_published_value(results):
    folder = results(scanner_row(metric="accuracy", value=0.9, ci95=(0.885, 0.913)))
    line = line_of(render(folder, PUBLISHED), "epochs=20, maps=max")
    assert line[-5:] == ["90.00 [88.50, 91.30]", "1", "2700", "95.50", "-5.50"]
    assert line[:2] == ["cifar10", "signature-convolution"]


def test_seeds_are_averaged_with_their_t_interval(results):
    seeds = enumerate((0.01, 0.02, 0.03))
    folder = results(*(scanner_row(metric="fpr", seed=seed, value=value) for seed, value in seeds))
    # 2 ± 4.303 * 1 / sqrt(3)
    assert line_of(render(folder, PUBLISHED), "fpr")[-5:] == ["2.00 ± 2.48", "3", "2700", "", ""]


def test_runs_of_different_size_are_not_taken_for_seeds(results):
    small, large = (scanner_row(metric="fpr", n=n, value=n / 1000, ci95=(0, 0.5)) for n in (100, 200))
    markdown = render(results(small, large), PUBLISHED)
    assert line_of(markdown, "100")[-5] == "10.00 [0.00, 50.00]"
    assert line_of(markdown, "200")[-5] == "20.00 [0.00, 50.00]"


def test_aurocs_are_printed_with_three_decimals(results):
    line = line_of(render(results(scanner_row()), PUBLISHED), "epochs=20, maps=max")
    assert line[-5:] == ["0.988", "1", "2700", "0.993", "-0.005"]


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("seconds_per_model", "0.123"),
        ("seconds_per_image_ratio", "0.123"),
        ("step_ratio", "0.123"),
        ("trigger_norm", "0.123"),
        ("auroc", "0.123"),
        ("recovery_accuracy", "12.34"),
        ("noise_accuracy", "12.34"),
        ("fnr_at_target", "12.34"),
        ("tpr_at_fpr01", "12.34"),
        ("success_rate", "12.34"),
    ],
)
def test_rates_are_percentages_and_everything_else_a_number(results, metric, text):
    folder = results(scanner_row(table="ours-speed", metric=metric, value=0.1234))
    assert line_of(render(folder, PUBLISHED), metric)[-5:] == [text, "1", "2700", "", ""]


def test_a_difference_of_nothing_has_no_minus(results):
    folder = results(scanner_row(metric="auroc", value=0.9929999))
    assert line_of(render(folder, PUBLISHED), "epochs=20, maps=max")[-1] == "+0.000"


def test_published_cells_that_we_lack_are_shown_for_our_data_sets_only(results):
    markdown = render(results(scanner_row()), PUBLISHED)
    assert line_of(markdown, "cifar10", "litmus-patterns", "auroc")[-5:] == ["", "", "", "1.000", ""]
    assert "| tiny-imagenet |" not in markdown


def test_tables_without_rows_are_not_rendered(results):
    assert re.findall("^# (.*)$", render(results(row()), PUBLISHED), re.MULTILINE) == ["do2022-table2"]


def test_numbers_of_uncommitted_code_are_marked(results):
    assert line_of(render(results(scanner_row(dirty=True)), PUBLISHED), "2700")[-5].endswith("†")


def test_a_column_appears_where_its_values_differ_and_is_stated_once_where_not(results):
    markdown = render(results(scanner_row(split="0"), scanner_row(split="1", value=0.5)), PUBLISHED)
    header = line_of(markdown, "dataset", "method")
    assert "split" in header
    assert "architecture" not in header
    assert "architecture input-aware-cnn" in markdown
    assert "commit 0123456789" in markdown


def test_lines_are_ordered_by_the_value_of_an_option(results):
    rows = [scanner_row(metric="fpr", options={"epochs": epochs}) for epochs in (100, 5, 20)]
    markdown = render(results(*rows), PUBLISHED)
    assert re.findall(r"epochs=(\d+)", markdown) == ["5", "20", "100"]


def test_a_folder_gets_a_page_per_table_and_a_list_that_says_what_each_is(results, tmp_path):
    results(row(), row(table="ours-cost"))
    for name, text in {
        "published/none.csv": None,
        "specs/t2.toml": '# Table 2: a thing.\n# More.\ntable = "do2022-table2"\n',
        "speed/cost.py": '"""What it costs."""\nrows = {"table": "ours-cost"}\n',
        "tables/gone.md": "of a table that has no rows any more",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if text is not None:
            (tmp_path / name).write_text(text)
    render_to(tmp_path)
    pages = tables.render(tmp_path / "results", tmp_path / "published")
    assert {path.stem: path.read_text() for path in (tmp_path / "tables").iterdir()} == pages
    contents = (tmp_path / "README.md").read_text()
    assert (
        "| [do2022-table2](tables/do2022-table2.md) | Table 2: a thing. | [t2.toml](specs/t2.toml) |"
        in contents
    )
    assert "| [ours-cost](tables/ours-cost.md) | What it costs. | [cost.py](speed/cost.py) |" in contents


def test_a_folder_without_rows_says_so(tmp_path):
    render_to(tmp_path)
    assert "No rows yet." in (tmp_path / "README.md").read_text()


def test_the_committed_pages_are_the_rendered_ones(tmp_path):
    for name in ("results", "published", "specs", "speed"):
        (tmp_path / name).symlink_to(ROOT / "benchmarks" / name)
    render_to(tmp_path)
    for path in [tmp_path / "README.md", *(tmp_path / "tables").iterdir()]:
        committed = ROOT / "benchmarks" / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), path.name
    assert len(list((ROOT / "benchmarks" / "tables").iterdir())) == len(list((tmp_path / "tables").iterdir()))


# --- rendering: defences against the five attacks -----------------------------------------------------------

FIVE = ("badnet-plus", "noise-blend-plus", "image-blend-plus", "input-aware", "wanet")


def sub_table(markdown, metric):
    """The lines of one metric's sub-table as lists of cells, the header first."""
    part = markdown.split(f"**{metric}**")[1].split("**")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def no_papers(tmp_path):
    return tmp_path / "nothing-published"


def five_attacks(results):
    """VIF on three seeds and on a benign victim; AIF on two seeds and chance on one, for WaNet alone."""
    values = [[0.00, 0.01, 0.02, 0.03, 0.04], [0.01, 0.02, 0.03, 0.04, 0.05], [0.06, 0.03, 0.04, 0.05, 0.02]]
    vif = [
        row(seed=seed, attack=attack, value=value)
        for seed, of_seed in enumerate(values)
        for attack, value in zip(FIVE, of_seed, strict=True)
    ]
    aif = [row(method="aif", attack="wanet", seed=seed, value=0.02, options={}) for seed in (0, 1)]
    chance = row(method="chance", attack="wanet", value=0.1, options={}, ci95=None)
    benign = row(attack="benign", mode=None, metric="clean_drop", n=3000, value=-0.001, ci95=(-0.003, 0.001))
    return results(*vif, *aif, chance, benign)


def published_for(tmp_path, methods):
    """The committed Table 2, MNIST only, of some methods and of two metrics."""
    header, *lines = (PUBLISHED / "do2022-table2.csv").read_text().splitlines()
    metrics = ("trojan_accuracy", "clean_drop")
    kept = [
        line
        for line in lines
        if line.split(",")[2] in methods and ",mnist," in line and line.split(",")[6] in metrics
        if line.split(",")[6] == "trojan_accuracy" or line.split(",")[4] == "benign"
    ]
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "a.csv").write_text("\n".join([header, *kept]) + "\n")
    return tmp_path / "published"


def test_a_table_of_filters_is_a_matrix_of_methods_and_attacks(results, tmp_path):
    # By hand. Per cell: badnet-plus (0, 1, 6): 7 / 3 = 2.33 ± 4.3027 * 3.2146 / sqrt(3) = 7.99; wanet
    # (4, 5, 2): 3.67 ± 4.3027 * 1.5275 / sqrt(3) = 3.79. Per seed over attacks: 2, 3 and 4, so
    # 3 ± 4.3027 / sqrt(3) = 2.48. Published: (2.36 + 0.04 + 0.11 + 1.25 + 0.48) / 5 = 0.848.
    markdown = render(five_attacks(results), published_for(tmp_path, {"vif", "nad"}))
    assert markdown.removesuffix(tables.LEGEND) == EXPECTED


EXPECTED = """# do2022-table2

**clean_drop**: clean accuracy of the undefended classifier minus that of the defended one

| method | seeds | benign |
| --- | --- | --- |
| nad |  | – / 0.45 |
| vif | 1 | -0.10 [-0.30, 0.10] / 0.13 (-0.23) |

**trojan_accuracy**: Trojan images classified as the attack wants

| method | seeds | badnet-plus | noise-blend-plus | image-blend-plus | input-aware | wanet | mean of 5 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| aif | 2 |  |  |  |  | 2.00 ± 0.00 |  |
| nad |  | – / 35.72 | – / 84.83 | – / 88.34 | – / 4.46 | – / 0.44 | – / 42.76 |
| vif | 3 | 2.33 ± 7.99 / 2.36 (-0.03) | 2.00 ± 2.48 / 0.04 (+1.96) | 3.00 ± 2.48 / 0.11 (+2.89) | \
4.00 ± 2.48 / 1.25 (+2.75) | 3.67 ± 3.79 / 0.48 (+3.19) | 3.00 ± 2.48 / 0.85 (+2.15) |
| chance | 1 |  |  |  |  | 10.00 |  |

Cells are ours / paper (difference).

mean of 5: the mean over the five attacks is taken per seed, then its t interval over the seeds.

chance: a filter whose output says nothing about its input, so that each class is as likely; computed, \
not measured.

Options of every line:

- `vif`: lambda2=0.003, n_clean=7000

dataset mnist; architecture input-aware-cnn; split 0; mode single-target; n 2700 to 3000; \
commit 0123456789; device cpu; torch 2.13.0. Published: Do et al., ECCV 2022, Table 2.
"""


def test_the_mean_of_five_is_taken_per_seed_first(results, tmp_path):
    # Attacks of unequal seeds: only seed 0 has all five, so the mean has no interval.
    rows = [row(attack=attack, value=0.01 * place) for place, attack in enumerate(FIVE)]
    rows += [row(attack=attack, seed=1, value=0.5) for attack in FIVE[:4]]
    header, line = sub_table(render(results(*rows), no_papers(tmp_path)), "trojan_accuracy")
    assert header == ["method", "seeds", *FIVE, "mean of 5"]
    assert line[1] == "1 to 2"
    assert line[-1] == "2.00"


def test_without_all_five_attacks_there_is_no_mean(results, tmp_path):
    rows = [row(attack=attack) for attack in FIVE[:4]]
    markdown = render(results(*rows), no_papers(tmp_path))
    assert sub_table(markdown, "trojan_accuracy")[0] == ["method", "seeds", *FIVE[:4]]
    assert "mean of 5" not in markdown


def test_undefended_victims_come_first_and_chance_last(results, tmp_path):
    rows = [row(method=method) for method in ("chance", "vif", "none", "aif")]
    _, *lines = sub_table(render(results(*rows), no_papers(tmp_path)), "trojan_accuracy")
    assert [cells[0] for cells in lines] == ["none", "aif", "vif", "chance"]


def test_only_options_that_tell_lines_apart_are_repeated_in_order_of_their_value(results, tmp_path):
    weights = (0.3, 0.0003, 0.03, 0.003)
    rows = [row(options={"epochs": 30, "kl_weight": weight}) for weight in weights]
    markdown = render(results(*rows), no_papers(tmp_path))
    _, *lines = sub_table(markdown, "trojan_accuracy")
    assert [cells[1] for cells in lines] == [f"kl_weight={weight}" for weight in sorted(weights)]
    assert "- `vif`: epochs=30\n" in markdown


def test_both_modes_stand_apart_and_share_the_benign_victim(results):
    benign = row(attack="benign", mode=None, metric="clean_drop", value=0.002, ci95=None)
    single = row(metric="clean_drop", value=0.003, ci95=None)
    both = row(metric="clean_drop", value=0.004, ci95=None, mode="all-target")
    header, *lines = sub_table(render(results(benign, single, both), PUBLISHED), "clean_drop")
    assert header[:3] == ["method", "mode", "seeds"]
    ours = {cells[1]: cells[3:5] for cells in lines if cells[0] == "vif"}
    # the paper's Table 2 is single-target: 0.13 for the benign victim, 0.17 for BadNet+
    assert ours == {
        "all-target": ["0.20 / 0.13 (+0.07)", "0.40"],
        "single-target": ["0.20 / 0.13 (+0.07)", "0.30 / 0.17 (+0.13)"],
    }


def test_an_all_target_table_is_not_compared_with_a_single_target_one(results):
    _, *lines = sub_table(render(results(row(mode="all-target", ci95=None)), PUBLISHED), "trojan_accuracy")
    ours = [cells for cells in lines if cells[:2] == ["vif", "all-target"]]
    assert [cells[3:] for cells in ours] == [["1.00", "", "", "", "", ""]]


def test_an_architecture_that_goes_with_the_attack_splits_no_line(results, tmp_path):
    rows = [row(), row(attack="wanet", architecture="wanet-cnn")]
    markdown = render(results(*rows), no_papers(tmp_path))
    assert len(sub_table(markdown, "trojan_accuracy")) == 2
    assert "architecture input-aware-cnn, wanet-cnn" in markdown


@pytest.mark.parametrize("change", [{"split": "test"}, {"architecture": "small-cnn"}, {"n": 100}])
def test_numbers_of_different_protocols_are_never_averaged(results, tmp_path, change):
    markdown = render(results(row(ci95=None), row(value=0.5, ci95=None, **change)), no_papers(tmp_path))
    header, *lines = sub_table(markdown, "trojan_accuracy")
    assert next(iter(change)) in header
    assert sorted(cells[-1] for cells in lines) == ["1.00", "50.00"]


def test_seeds_whose_sizes_differ_a_little_are_averaged(results, tmp_path):
    markdown = render(results(row(n=2700), row(n=2712, seed=1, value=0.03)), no_papers(tmp_path))
    header, line = sub_table(markdown, "trojan_accuracy")
    assert header == ["method", "seeds", "badnet-plus"]
    assert line == ["vif", "2", "2.00 ± 12.71"]  # 12.7062 * 1.4142 / sqrt(2)
    assert "n 2700 to 2712" in markdown


def test_data_sets_get_a_column_when_there_are_several(results, tmp_path):
    markdown = render(results(row(), row(dataset="gtsrb")), no_papers(tmp_path))
    assert [cells[0] for cells in sub_table(markdown, "trojan_accuracy")] == ["dataset", "gtsrb", "mnist"]


def test_chance_is_explained_where_it_is_shown(results, tmp_path):
    assert "chance:" not in render(results(row()), no_papers(tmp_path))
    assert "chance: a filter whose output says nothing" in render(
        results(row(method="chance")), no_papers(tmp_path)
    )


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
