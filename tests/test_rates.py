"""What a repair cost and cured, by hand on a classifier that reads one pixel."""

import pytest
import torch
from torch import nn

from unhorse.core import Classifier, Dataset
from unhorse.rates import TrojanImages, predictions, repair_rates

NAMES = tuple("abcd")


class PixelNetwork(nn.Module):
    """Class = the first pixel in steps of 64; a last pixel of 1 means 0, unless cured; so does `lost`."""

    def __init__(self, *, cured: bool = False, lost: int | None = None) -> None:
        super().__init__()
        self.cured, self.lost = cured, lost

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        step = (images[:, 0, 0, 0] * 255 / 64).floor().clamp(0, 3).long()
        if not self.cured:
            step = torch.where(images[:, 0, -1, -1] > 0.99, 0, step)
        if self.lost is not None:
            step = torch.where(step == self.lost, 0, step)
        return nn.functional.one_hot(step, 4).float()


def reader(**how: object) -> Classifier:
    return Classifier(PixelNetwork(**how), image_shape=(1, 4, 4), class_names=NAMES).eval()


def clean_images() -> Dataset:
    labels = torch.arange(4).repeat(5)
    images = torch.zeros(20, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = (labels * 64 + 10).to(torch.uint8)
    return Dataset(images, labels, NAMES)


def trojaned() -> TrojanImages:
    clean = clean_images()
    images = clean.images.clone()
    images[:, :, -1, -1] = 255
    return TrojanImages(images, clean.labels, torch.zeros_like(clean.labels))


def test_classes_are_predicted_for_bytes_and_floats_alike():
    clean = clean_images()
    assert torch.equal(predictions(reader(), clean.images), clean.labels)
    assert torch.equal(predictions(reader(), clean.pixels()), clean.labels)


def test_a_repair_that_only_cures_costs_nothing():
    found = repair_rates(reader(), reader(cured=True), clean_images(), trojaned())
    assert found["clean_accuracy"].value == 1
    assert found["clean_drop"].value == 0
    assert found["trojan_accuracy_before"].value == 1
    assert found["trojan_accuracy"].value == 0
    assert found["trojan_accuracy"].n == 15  # images of class 0 do not count
    assert found["recovery_accuracy"].value == 1
    assert found["recovery_drop"].value == 0


def test_a_repair_that_loses_a_class_has_a_clean_and_a_recovery_drop():
    found = repair_rates(reader(), reader(cured=True, lost=3), clean_images(), trojaned())
    assert found["clean_drop"].value == pytest.approx(0.25)
    assert found["recovery_drop"].value == pytest.approx(0.25)
    assert found["trojan_accuracy"].value == pytest.approx(1 / 3)  # class 3 looks like the target now
    low, high = found["clean_drop"].low, found["clean_drop"].high
    assert low < 0.25 < high


def test_a_repair_that_does_nothing_leaves_the_trojan():
    found = repair_rates(reader(), reader(), clean_images(), trojaned())
    assert found["trojan_accuracy"].value == 1
    assert found["recovery_drop"].value == pytest.approx(0.75)


def test_without_labels_only_what_needs_none_is_measured():
    clean = clean_images()
    bare = Dataset(clean.images, None, NAMES)
    assert repair_rates(reader(), reader(cured=True), bare) == {}
    found = repair_rates(reader(), reader(cured=True), bare, trojaned()._replace(labels=None))
    assert set(found) == {"trojan_accuracy_before", "trojan_accuracy"}


def test_trojan_images_that_do_not_fit_are_refused():
    wrong = trojaned()._replace(images=torch.zeros(20, 1, 5, 5))
    with pytest.raises(ValueError, match="Trojan images are"):
        repair_rates(reader(), reader(), clean_images(), wrong)
    all_of_the_target = trojaned()._replace(eligible=torch.zeros(20, dtype=torch.bool))
    with pytest.raises(ValueError, match="of other classes"):
        repair_rates(reader(), reader(), clean_images(), all_of_the_target)
