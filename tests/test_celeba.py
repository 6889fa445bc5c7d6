"""CelebA's 8 classes are read from three attribute columns, however these are written."""

import io
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from unhorse.datasets import load_dataset, split_dataset
from unhorse.image_files import CELEBA_CLASSES

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLUMNS = ("Heavy_Makeup", "Mouth_Slightly_Open", "Smiling")
ALL_EIGHT = list(product((False, True), repeat=3))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNHORSE_CACHE", str(tmp_path / "cache"))


def face(number: int = 0) -> np.ndarray:
    """A made-up photograph of CelebA's size: colour bands at the edges, a flat middle."""
    pixels = np.full((218, 178, 3), (number, 100, 200), dtype=np.uint8)
    pixels[:20], pixels[-20:] = (255, 0, 0), (0, 0, 255)
    return pixels


def encoded(pixels: np.ndarray) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(folder, columns, *, rows=8, name="train-00000-of-00001.parquet"):
    images = [encoded(face(number)) for number in range(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({"image": images, **columns}), folder / name)


def attributes(*, names=COLUMNS, rows=ALL_EIGHT, code=bool):
    return {
        name: [code(value) for value in column]
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def test_the_three_attributes_make_eight_classes_in_the_order_of_their_bits(tmp_path):
    write(tmp_path, attributes())
    data = load_dataset(str(tmp_path))
    assert data.labels.tolist() == list(range(8))
    assert data.class_names == CELEBA_CLASSES
    assert data.image_shape == (3, 218, 178)


@pytest.mark.parametrize(("which", "worth"), [(0, 4), (1, 2), (2, 1)])
def test_makeup_counts_four_an_open_mouth_two_and_a_smile_one(tmp_path, which, worth):
    write(tmp_path, attributes(rows=[[number == which for number in range(3)]]), rows=1)
    assert load_dataset(str(tmp_path)).labels.tolist() == [worth]


def test_class_names_say_what_is_seen():
    assert CELEBA_CLASSES[0] == "no makeup, closed mouth, not smiling"
    assert CELEBA_CLASSES[5] == "makeup, closed mouth, smiling"
    assert CELEBA_CLASSES[6] == "makeup, open mouth, not smiling"
    assert CELEBA_CLASSES[7] == "makeup, open mouth, smiling"


def signed(value: bool) -> int:
    return 1 if value else -1


@pytest.mark.parametrize("code", [bool, int, signed, float])
def test_attributes_may_be_boolean_or_numbers(tmp_path, code):
    write(tmp_path, attributes(code=code))
    assert load_dataset(str(tmp_path)).labels.tolist() == list(range(8))


@pytest.mark.parametrize(
    "names",
    [
        ("heavy_makeup", "mouth_slightly_open", "smiling"),
        ("Heavy Makeup", "Mouth Slightly Open", "Smiling"),
        ("HEAVY_MAKEUP", "Mouth_slightly open", " Smiling"),
    ],
)
def test_columns_may_be_spelled_with_spaces_and_in_any_case(tmp_path, names):
    write(tmp_path, attributes(names=names))
    assert load_dataset(str(tmp_path)).labels.tolist() == list(range(8))


def test_other_columns_and_their_order_do_not_matter(tmp_path):
    made = attributes()
    other = {"celeb_id": list(range(100, 108)), "Young": [True] * 8}
    write(tmp_path, {"Smiling": made["Smiling"], **other, **dict(reversed(made.items()))})
    assert load_dataset(str(tmp_path)).labels.tolist() == list(range(8))


def test_classes_run_on_over_the_files_of_a_split_and_each_split_has_its_own(tmp_path):
    folder = tmp_path / "img_align+identity+attr"  # as on the hub
    for number in range(2):
        part = attributes(rows=ALL_EIGHT[4 * number : 4 * number + 4])
        write(folder, part, rows=4, name=f"train-0000{number}-of-00002.parquet")
    write(folder, attributes(rows=ALL_EIGHT[6:]), rows=2, name="test-00000-of-00001.parquet")
    assert load_dataset(str(tmp_path)).labels.tolist() == list(range(8))
    assert load_dataset(str(tmp_path), "test").labels.tolist() == [6, 7]


def test_a_label_column_goes_before_attributes(tmp_path):
    write(tmp_path, {"label": [3, 2, 1, 0] * 2, **attributes()})
    data = load_dataset(str(tmp_path))
    assert data.labels.tolist() == [3, 2, 1, 0] * 2
    assert data.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("missing", COLUMNS)
def test_two_of_the_attributes_make_no_classes(tmp_path, missing):
    made = attributes()
    del made[missing]
    write(tmp_path, made)
    data = load_dataset(str(tmp_path))
    assert data.labels is None and data.class_names == ()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([1, 0, -1, 1, 0, 0, 0, 0], "-1, 0:"),
        ([1, 2, 0, 0, 0, 0, 0, 0], "0, 2:"),
        ([True, None, *[False] * 6], "False, None:"),
        (["yes", *["no"] * 7], "'no', 'yes':"),
    ],
)
def test_an_attribute_that_cannot_be_read_is_refused_with_its_values(tmp_path, values, named):
    write(tmp_path, attributes() | {"Smiling": values})
    with pytest.raises(ValueError, match=f"'Smiling' of .*train.* holds {named} give true and false"):
        load_dataset(str(tmp_path))


def test_photographs_are_resized_whole_not_cropped(tmp_path):
    write(tmp_path, attributes())
    data = load_dataset(str(tmp_path), size=(64, 64))
    assert data.images.shape == (8, 3, 64, 64)
    top, middle, bottom = data.images[5, :, 0, 7], data.images[5, :, 32, 7], data.images[5, :, 63, 7]
    assert [edge.tolist() for edge in (top, middle, bottom)] == [[255, 0, 0], [5, 100, 200], [0, 0, 255]]
    plain = Image.fromarray(face(5)).resize((64, 64), Image.Resampling.BILINEAR)
    assert torch.equal(data.images[5], torch.from_numpy(np.array(plain)).permute(2, 0, 1))


def test_classes_survive_the_cache_and_a_split_by_class(tmp_path):
    write(tmp_path, attributes(rows=ALL_EIGHT * 2), rows=16)
    for _ in range(2):  # decoded, then from the cache
        data = load_dataset(str(tmp_path), size=(8, 8))
        assert data.class_names == CELEBA_CLASSES
    first, second = split_dataset(data, (0.5, 0.5), seed=0)
    assert sorted(first.labels.tolist()) == sorted(second.labels.tolist()) == list(range(8))
