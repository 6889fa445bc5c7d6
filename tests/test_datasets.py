import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from unhorse.core import Dataset
from unhorse.datasets import load_dataset, natural_images, of_classes, split_dataset, subset

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAMES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("UNHORSE_CACHE", str(folder))
    return folder


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path, images, labels=None, *, image_column="image", label_column="label", names=None):
    pa = pytest.importorskip("pyarrow")
    columns = {image_column: [{"bytes": image, "path": None} for image in images]}
    if labels is not None:
        columns[label_column] = labels
    table = pa.table(columns)
    if names:
        features = {label_column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table, path)


@pytest.fixture(autouse=True, scope="session")
def parquet():
    pytest.importorskip("pyarrow.parquet")


def grey(value, shape=(4, 5)):
    return encoded(np.full(shape, value))


def write_images(folder, values):
    folder.mkdir(parents=True)
    for number, value in enumerate(values):
        (folder / f"{number}.png").write_bytes(grey(value))


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_are_divided_two_to_one_with_all_classes():
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    assert (len(train), len(test)) == (1198, 599)
    assert train.images.dtype == torch.uint8
    assert train.image_shape == (1, 8, 8)
    assert train.class_names == tuple("0123456789")
    shares = train.labels.bincount() / torch.cat([train.labels, test.labels]).bincount()
    assert shares.sub(2 / 3).abs().max() < 0.01


def test_digits_are_scaled_to_the_whole_range():
    values = load_dataset("digits").images.unique()
    assert values.tolist() == [round(value * 255 / 16) for value in range(17)]


def test_digits_splits_share_no_image_with_each_other():
    from sklearn.datasets import load_digits

    train, test = (load_dataset("digits", split).images.flatten(1).tolist() for split in ("train", "test"))
    everything = np.rint(load_digits().images * 255 / 16).astype(int).reshape(1797, 64).tolist()
    assert sorted(train + test) == sorted(everything)


def test_digits_can_be_resized():
    assert load_dataset("digits", size=(16, 12)).image_shape == (1, 16, 12)


# --- parquet ------------------------------------------------------------------------------------------------


def test_parquet_gives_images_labels_and_the_names_of_its_schema(tmp_path):
    images = [grey(10), grey(20), grey(30)]
    write_parquet(tmp_path / "pets" / "train.parquet", images, [2, 0, 2], names=NAMES)
    data = load_dataset(str(tmp_path / "pets"))
    assert data.images.shape == (3, 1, 4, 5)
    assert data.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert data.labels.tolist() == [2, 0, 2]
    assert data.class_names == NAMES
    assert data.name == "pets"


def test_parquet_without_names_numbers_its_classes(tmp_path):
    write_parquet(tmp_path / "train.parquet", [grey(1), grey(2)], [0, 3])
    assert load_dataset(str(tmp_path)).class_names == ("0", "1", "2", "3")


def test_parquet_of_the_hub_is_read_from_all_files_of_the_split(tmp_path):
    for number in range(2):
        path = tmp_path / "plain_text" / f"train-0000{number}-of-00002.parquet"
        write_parquet(path, [grey(number)], [number], image_column="img", label_column="fine_label")
    write_parquet(tmp_path / "plain_text" / "test-00000-of-00001.parquet", [grey(9)], [0])
    data = load_dataset(str(tmp_path))
    assert data.images[:, 0, 0, 0].tolist() == [0, 1]
    assert data.labels.tolist() == [0, 1]


def test_parquet_validation_files_are_the_valid_split(tmp_path):
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [grey(7)], [0])
    assert load_dataset(str(tmp_path), "valid").images.max() == 7


@pytest.mark.parametrize("labels", [None, [-1, -1]])
def test_parquet_of_an_unlabelled_split_has_no_labels(tmp_path, labels):
    write_parquet(tmp_path / "test.parquet", [grey(1), grey(2)], labels)
    assert load_dataset(str(tmp_path), "test").labels is None


def test_grey_images_among_colour_ones_become_colour(tmp_path):
    colour = encoded(np.full((4, 5, 3), (1, 2, 3)))
    write_parquet(tmp_path / "train.parquet", [grey(9), colour], [0, 1])
    assert load_dataset(str(tmp_path)).images[:, :, 0, 0].tolist() == [[9, 9, 9], [1, 2, 3]]


def test_images_of_several_sizes_are_refused_unless_resized(tmp_path):
    write_parquet(tmp_path / "train.parquet", [grey(9), grey(8, (6, 6))], [0, 1])
    with pytest.raises(ValueError, match=r"2 sizes, \(4, 5\) to \(6, 6\): resize them by size="):
        load_dataset(str(tmp_path))
    assert load_dataset(str(tmp_path), size=(3, 2)).images.shape == (2, 1, 3, 2)


def test_a_missing_split_is_named_with_those_that_are_there(tmp_path):
    write_parquet(tmp_path / "train.parquet", [grey(9)], [0])
    with pytest.raises(ValueError, match="no parquet file of split 'test': choose among train.parquet"):
        load_dataset(str(tmp_path), "test")


def test_two_data_sets_in_one_folder_are_not_mixed(tmp_path):
    for config in ("fine", "coarse"):
        write_parquet(tmp_path / config / "train.parquet", [grey(9)], [0])
    with pytest.raises(ValueError, match="several data sets: give one of .*coarse"):
        load_dataset(str(tmp_path))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [grey(9), b"no image"], [0, 1])
    with pytest.raises(ValueError, match="cannot decode image 1 of .*train.parquet"):
        load_dataset(str(tmp_path))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match="train.parquet: not parquet"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("labels", [[0, -1], ["a", "b"], [0.0, 1.0]])
def test_labels_that_are_no_class_indices_are_refused(tmp_path, labels):
    write_parquet(tmp_path / "train.parquet", [grey(9), grey(8)], labels)
    with pytest.raises(ValueError, match=r"'label' of .*train.parquet.*: give class indices 0\.\.k-1"):
        load_dataset(str(tmp_path))


# --- image folders ------------------------------------------------------------------------------------------


def test_each_folder_of_images_is_a_class_in_alphabetical_order(tmp_path):
    write_images(tmp_path / "pets" / "owl", [1, 2])
    write_images(tmp_path / "pets" / "cat", [3])
    data = load_dataset(str(tmp_path / "pets"))
    assert data.class_names == ("cat", "owl")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [3, 1, 2]


def test_a_folder_of_loose_images_has_no_labels(tmp_path):
    write_images(tmp_path / "clean", [5, 6])
    data = load_dataset(str(tmp_path / "clean"))
    assert data.labels is None
    assert len(data) == 2


def test_folders_named_for_splits_are_splits(tmp_path):
    write_images(tmp_path / "pets" / "train" / "cat", [1, 2])
    write_images(tmp_path / "pets" / "val" / "cat", [3])
    assert load_dataset(str(tmp_path / "pets"), "valid").images.unique().tolist() == [3]
    with pytest.raises(ValueError, match="has splits train, val, not 'test'"):
        load_dataset(str(tmp_path / "pets"), "test")


def test_an_undivided_folder_is_not_passed_off_as_a_test_split(tmp_path):
    write_images(tmp_path / "pets" / "cat", [1])
    with pytest.raises(ValueError, match="no folder 'test'"):
        load_dataset(str(tmp_path / "pets"), "test")


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*nothing"):
        load_dataset(str(tmp_path / "nothing"))


def test_sixteen_bit_images_are_refused(tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(folder / "a.png")
    with pytest.raises(ValueError, match="save it with 8 bits"):
        load_dataset(str(folder))


# --- sources that are not there -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "no data set 'nowhere': give 'digits'"), ("hub:a b", "no hub name 'a b'")],
)
def test_an_unknown_source_is_refused_with_the_choices(source, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(source)


def test_an_unknown_split_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no split 'dev': give one of train, valid, test"):
        load_dataset("digits", "dev")


def hub_of(monkeypatch, files: dict[str, int | None], folder: Path | None = None) -> list[tuple]:
    """A hub with these files and sizes; gives the list of what was asked of it."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple] = []

    class Api:
        def __init__(self, token):
            asked.append(("api", token))

        def dataset_info(self, name, *, revision, files_metadata):
            asked.append(("info", name, revision, files_metadata))
            siblings = [SimpleNamespace(rfilename=file, size=size) for file, size in files.items()]
            return SimpleNamespace(sha="5eed", siblings=siblings)

    def download(name, *, repo_type, revision, allow_patterns, token):
        asked.append(("files", name, repo_type, revision, allow_patterns, token))
        return str(folder)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "HfApi", unreachable)
    with pytest.raises(
        ValueError, match=r"cannot fetch 'ylecun/mnist' .*no route.*check the name and the network"
    ):
        load_dataset("hub:ylecun/mnist")


def test_a_hub_data_set_is_fetched_by_split_pinned_and_without_a_token(tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "snapshot" / "mnist" / "test-00000-of-00001.parquet", [grey(4)], [0])
    parquet, code = "mnist/test-00000-of-00001.parquet", "mnist.py"
    asked = hub_of(monkeypatch, {parquet: 900, "mnist/train.parquet": 9, code: 5}, tmp_path / "snapshot")
    data = load_dataset("hub:ylecun/mnist@5eed", "test")
    assert data.name == "mnist" and data.images.max() == 4
    assert asked == [
        ("api", False),
        ("info", "ylecun/mnist", "5eed", True),
        ("files", "ylecun/mnist", "dataset", "5eed", [parquet], False),
    ]
    assert "ylecun/mnist at commit 5eed" in capsys.readouterr().err


def test_pictures_of_a_hub_are_fetched_where_there_is_no_parquet(tmp_path, monkeypatch):
    for name in ("train/cat/a.png", "train/dog/b.png"):
        (tmp_path / "snapshot" / name).parent.mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "snapshot" / name)
    files = {"train/cat/a.png": 70, "train/dog/b.png": 70, "train/run.py": 9, "model.pkl": 9}
    asked = hub_of(monkeypatch, files, tmp_path / "snapshot")
    assert load_dataset("hub:someone/pets").class_names == ("cat", "dog")
    assert asked[-1][4] == ["train/cat/a.png", "train/dog/b.png"]


@pytest.mark.parametrize("size", [None, 30 * 10**9])
def test_a_hub_data_set_that_is_too_large_or_does_not_say_so_is_not_fetched(size, monkeypatch):
    asked = hub_of(monkeypatch, {"train.parquet": size})
    with pytest.raises(ValueError, match="fetch what you need yourself"):
        load_dataset("hub:someone/large")
    assert [word for word, *_ in asked] == ["api", "info"]


def test_a_name_without_hub_before_it_goes_to_no_network(monkeypatch, tmp_path):
    asked = hub_of(monkeypatch, {"train.parquet": 9})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no data set 'ylecun/mnist'.*hub:ylecun/mnist, if you mean"):
        load_dataset("ylecun/mnist")
    assert asked == []


@pytest.mark.parametrize(
    ("module", "source"), [("huggingface_hub", "hub:ylecun/mnist"), ("pyarrow", "FOLDER")]
)
def test_a_missing_extra_names_its_command(tmp_path, monkeypatch, module, source):
    write_parquet(tmp_path / "train.parquet", [grey(9)], [0])
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install pyarrow huggingface-hub"):
        load_dataset(source.replace("FOLDER", str(tmp_path)))


# --- the cache ----------------------------------------------------------------------------------------------


def test_a_second_load_decodes_nothing(tmp_path, monkeypatch, cache):
    write_parquet(tmp_path / "train.parquet", [grey(9), grey(8)], [1, 0], names=NAMES)
    first = load_dataset(str(tmp_path))
    monkeypatch.setattr(Image, "open", None)
    second = load_dataset(str(tmp_path))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert (first.class_names, first.name) == (second.class_names, second.name)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_a_changed_source_is_decoded_again(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(path, [grey(9)], [0])
    assert load_dataset(str(tmp_path)).images.max() == 9
    write_parquet(path, [grey(8)], [0])
    os.utime(path, ns=(1, 1))
    assert load_dataset(str(tmp_path)).images.max() == 8


def test_sizes_and_splits_are_cached_apart(tmp_path):
    write_parquet(tmp_path / "train.parquet", [grey(9)], [0])
    write_parquet(tmp_path / "test.parquet", [grey(8)], [0])
    assert load_dataset(str(tmp_path)).images.max() == 9
    assert load_dataset(str(tmp_path), "test").images.max() == 8
    assert load_dataset(str(tmp_path), size=(2, 2)).image_shape == (1, 2, 2)


def test_a_failed_load_leaves_nothing_in_the_cache(tmp_path, cache):
    write_parquet(tmp_path / "train.parquet", [b"no image"], [0])
    with pytest.raises(ValueError, match="cannot decode"):
        load_dataset(str(tmp_path))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path):
    write_parquet(tmp_path / "train.parquet", [grey(9)], [0])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="set UNHORSE_CACHE to a writable folder"):
        load_dataset(str(tmp_path), cache=tmp_path / "file" / "below")


# --- splits -------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered():
    """A hundred images that hold their number: 70 of class 0, 20 of class 1, 10 of class 2."""
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    return Dataset(torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1), labels, NAMES, "numbered")


def test_parts_are_disjoint_and_keep_the_shares_of_classes(numbered):
    first, second = split_dataset(numbered, (0.7, 0.3), seed=0)
    assert first.labels.bincount().tolist() == [49, 14, 7]
    assert second.labels.bincount().tolist() == [21, 6, 3]
    assert sorted([*first.images.flatten().tolist(), *second.images.flatten().tolist()]) == list(range(100))


def test_images_keep_their_labels_when_divided(numbered):
    part = split_dataset(numbered, (0.5,), seed=0)[0]
    assert torch.equal(part.labels, numbered.labels[part.images.flatten().long()])


def test_what_fractions_leave_is_left_out(numbered):
    assert [len(part) for part in split_dataset(numbered, (0.2, 0.1), seed=0)] == [20, 10]


@pytest.mark.parametrize("fractions", [(), (0.5, 0.6), (0.5, 0.0)])
def test_impossible_fractions_are_refused(numbered, fractions):
    with pytest.raises(ValueError, match="give positive ones that sum to at most 1"):
        split_dataset(numbered, fractions, seed=0)


def test_a_subset_keeps_the_shares_of_classes(numbered):
    assert subset(numbered, 10, seed=3).labels.bincount().tolist() == [7, 2, 1]


def test_a_subset_that_is_not_stratified_follows_chance(numbered):
    counts = {tuple(subset(numbered, 10, seed=seed, stratified=False).labels.tolist()) for seed in range(5)}
    assert len(counts) > 1
    assert any(labels.count(0) != 7 for labels in counts)


def test_a_subset_repeats_with_its_seed_and_changes_with_another(numbered):
    first = subset(numbered, 30, seed=1).images
    assert torch.equal(first, subset(numbered, 30, seed=1).images)
    assert not torch.equal(first, subset(numbered, 30, seed=2).images)


def test_some_classes_alone_are_numbered_in_the_order_given(numbered):
    some = of_classes(numbered, (2, 0))
    assert some.class_names == (numbered.class_names[2], numbered.class_names[0])
    before = numbered.labels[torch.isin(numbered.labels, torch.tensor([0, 2]))]
    assert torch.equal(some.labels, (before == 0).long())
    assert torch.equal(some.images, numbered.images[torch.isin(numbered.labels, torch.tensor([0, 2]))])


@pytest.mark.parametrize("classes", [(0, 0), (0, 99), (-1, 0)])
def test_classes_that_are_not_there_are_refused(numbered, classes):
    with pytest.raises(ValueError, match="give different ones"):
        of_classes(numbered, classes)


def test_of_unlabelled_images_no_class_can_be_chosen(numbered):
    with pytest.raises(ValueError, match="no labels"):
        of_classes(replace(numbered, labels=None), (0, 1))


def test_unlabelled_images_are_divided_at_random(numbered):
    unlabelled = Dataset(numbered.images, None, (), "loose")
    assert len(subset(unlabelled, 7, seed=0).images.unique()) == 7


@pytest.mark.parametrize("n", [0, 101])
def test_a_subset_of_impossible_size_is_refused(numbered, n):
    with pytest.raises(ValueError, match=f"cannot take {n} of the 100 images of 'numbered'"):
        subset(numbered, n, seed=0)


# --- real data ----------------------------------------------------------------------------------------------


def test_importing_datasets_imports_no_extra():
    code = "import sys, unhorse.datasets; print({'pyarrow', 'huggingface_hub', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split", "shape", "classes"),
    [
        ("mnist", "train", (60000, 1, 28, 28), 10),
        ("cifar10", "test", (10000, 3, 32, 32), 10),
        ("gtsrb", "test", (12630, 3, 32, 32), 43),
        ("tiny-imagenet", "valid", (10000, 3, 64, 64), 200),
    ],
)
def test_real_data_sets_are_read_whole_and_fast_the_second_time(name, split, shape, classes):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    first = load_dataset(str(SHARED / name), split)
    start = time.perf_counter()
    second = load_dataset(str(SHARED / name), split)
    assert time.perf_counter() - start < 0.3
    assert tuple(first.images.shape) == shape
    assert len(first.labels.unique()) == len(first.class_names) == classes
    assert torch.equal(first.images, second.images)


# --- photographs for blends


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 24)])
def test_natural_images_have_the_shape_and_range_asked_for(shape):
    images = natural_images(5, shape, seed=1)
    assert images.shape == (5, *shape)
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert images.flatten(1).std(1).min() > 0.02  # pictures of something


def test_natural_images_are_grey_for_one_channel_and_coloured_for_three():
    grey, coloured = natural_images(4, (1, 16, 16), seed=1), natural_images(4, (3, 16, 16), seed=1)
    assert torch.allclose(grey, coloured.mean(1, keepdim=True))
    assert (coloured[:, 0] - coloured[:, 2]).abs().mean() > 0.02


def test_natural_images_follow_from_their_seed():
    first, again = natural_images(4, (3, 16, 16), seed=1), natural_images(4, (3, 16, 16), seed=1)
    other = natural_images(4, (3, 16, 16), seed=2)
    assert torch.equal(first, again)
    assert ((first - other).abs().mean((1, 2, 3)) > 0.02).all()
    assert ((first[:1] - first[1:]).abs().mean((1, 2, 3)) > 0.02).all()
