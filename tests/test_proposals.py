"""A plain network under names of its own is proposed from shapes, and used where something confirms it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from copied_networks import drawn, same_answers
from unhorse.core import Classifier, Dataset
from unhorse.loading import confirmation
from unhorse.loading import drawn_images as drawing
from unhorse.loading.formats import load_model
from unhorse.loading.proposals import proposals
from unhorse.loading.recognition import recognised
from unhorse.model_files import load
from unhorse.models.architectures import build
from unhorse.rules import LoadRefused
from unhorse.survey import Request, _Scan

GREY = (1, 28, 28)
POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "leakyrelu0.1": lambda: nn.LeakyReLU(0.1),  # type: ignore[dict-item]
}


class Named(nn.Module):
    """Three blocks of convolution, normalisation, activation and pooling, with names of nobody else's."""

    def __init__(self, activation: str, pool: str, *, normed: bool = True, late: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Conv2d(1, 8, 3, 1, 1),
            nn.Conv2d(8, 12, 3, 1, 1),
            nn.Conv2d(12, 16, 3, 1, 1),
        )
        if normed:
            self.norm_a, self.norm_b, self.norm_c = nn.BatchNorm2d(8), nn.BatchNorm2d(12), nn.BatchNorm2d(16)
        self.hidden, self.answer = nn.Linear(16 * 9, 20), nn.Linear(20, 5)
        self.activation, self.pool = ACTIVATIONS[activation](), POOLS[pool](2)
        self.normed, self.late = normed, late

    def forward(self, x: Tensor) -> Tensor:
        layers = ((self.first, "norm_a"), (self.second, "norm_b"), (self.third, "norm_c"))
        for layer, name in layers:
            x = layer(x)
            norm = getattr(self, name) if self.normed else nn.Identity()
            x = norm(self.activation(x)) if self.late else self.activation(norm(x))
            x = self.pool(x)
        return self.answer(self.activation(self.hidden(x.flatten(1))))


class Deep(nn.Module):
    """Six convolutions in a Sequential, whose numbers show where the poolings are, and a mean at the end."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (8, 12, 16):
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.trunk = nn.Sequential(*layers)
        self.top = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.trunk(x).mean((2, 3)))


def pictures(count: int = 160, shape: tuple[int, int, int] = GREY, seed: int = 3) -> Tensor:
    """Bright bars and discs on dark ramps, as bytes."""
    rng = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    images = []
    for _ in range(count):
        slope, centre, size = (torch.randn(2, generator=rng) for _ in range(3))
        ramp = 0.2 + 0.1 * (slope[0] * rows + slope[1] * columns)
        disc = ((rows - centre[0] / 2) ** 2 + (columns - centre[1] / 2) ** 2).sqrt() < size.abs()[0] / 2
        bar = (rows - centre[1] / 3).abs() < 0.15 * size.abs()[1]
        picture = torch.where(disc | bar, 0.6 + 0.4 * torch.rand((), generator=rng), ramp)
        images.append(picture * (0.6 + 0.4 * torch.rand(channels, 1, 1, generator=rng)))
    return (torch.stack(images).clamp(0, 1) * 255).round().byte()


def trained(network: nn.Module, images: Tensor) -> nn.Module:
    """The network with the statistics that it would learn from these images."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    with torch.no_grad():
        network(images)
    return network.eval()


def own(images: Tensor, labels: Tensor | None = None) -> Callable[[Classifier], Dataset | None]:
    def read(model: Classifier) -> Dataset:
        if tuple(images.shape[1:]) != model.image_shape:
            raise ValueError("other images")
        return Dataset(images, labels, tuple("01234"))

    return read


def standard(images: Tensor) -> Tensor:
    return (images.float() - images.float().mean()) / images.float().std()


def answers(
    network: nn.Module, state: dict[str, Tensor], **options: object
) -> tuple[Tensor, Tensor, list[str]]:
    """Ours and the bare network's, and what the report says."""
    found = recognised(state, **options)
    built = build(found.name, num_classes=found.num_classes, image_shape=found.image_shape, **found.options)
    built.load_state_dict(found.state)
    images = torch.rand(4, *found.image_shape, generator=torch.Generator().manual_seed(2))
    return built.eval()(images), network(images), list(found.assumptions)


def refused(state: dict[str, Tensor], **options: object) -> LoadRefused:
    with pytest.raises(LoadRefused) as refusal:
        recognised(state, **options)
    return refusal.value


# --- what is proposed ---------------------------------------------------------------------------------------


def test_the_right_structure_is_among_the_proposals_and_few_others() -> None:
    found = [str(one.reading) for one in proposals(Named("relu", "max", normed=False).state_dict())]
    assert "conv3s1p1 relu maxpool2 " * 3 + "flatten linear relu linear" in found and len(found) <= 4


def test_numbers_in_names_leave_one_placement_of_the_poolings() -> None:
    found = {one.reading for one in proposals(Deep().state_dict())}
    block = "conv3s1p1 bn relu conv3s1p1 bn relu maxpool2 "
    assert any(str(one) == block * 3 + "gap flatten linear" for one in found)
    assert len({re.sub(r"p\d", "", str(one)) for one in found}) <= 2


@pytest.mark.parametrize(
    "change",
    [
        {"rnn.weight_ih_l0": torch.zeros(4, 4)},
        {"extra.weight": torch.zeros(7, 3)},
        {"norm.weight": torch.ones(3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_chain_is_not_proposed(change: dict[str, Tensor]) -> None:
    state = {**Named("relu", "max", normed=False).state_dict(), **change}
    assert proposals(state) == []
    assert "--layers" not in refused(state).remedy


# --- what confirms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "pool", "late"),
    [
        ("relu", "max", False),
        ("relu", "avg", False),
        ("relu", "max", True),
        ("elu", "max", False),
        ("tanh", "avg", False),
        ("gelu", "max", False),
        ("leakyrelu0.1", "avg", True),
    ],
)
def test_statistics_on_the_users_images_tell_activation_pooling_and_order(
    activation: str, pool: str, late: bool
) -> None:
    images = pictures()
    network = trained(drawn(lambda: Named(activation, pool, late=late)), standard(images))
    ours, bare, said = answers(network, dict(network.state_dict()), own=own(images))
    assert same_answers(ours, bare)
    assert said[0].startswith(
        "MD305 network proposed from shapes and confirmed by its batch-norm statistics on your clean images"
    )


def test_statistics_confirm_on_drawn_images_where_nothing_comes_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_SEED", 1)
    learnt = drawing.drawn_images(GREY, 128)
    monkeypatch.undo()
    network = trained(drawn(lambda: Named("elu", "max")), learnt)
    ours, bare, said = answers(network, dict(network.state_dict()))
    assert same_answers(ours, bare) and "confirmed by its batch-norm statistics on drawn images" in said[0]


def test_a_pooling_behind_the_last_normalisation_is_not_confirmed_by_statistics() -> None:
    images = pictures(shape=(3, 32, 32))
    network = trained(drawn(Deep), standard(images))
    assert "--layers" in refused(dict(network.state_dict()), own=own(images)).remedy


def test_statistics_that_fit_no_reading_confirm_none() -> None:
    state = dict(drawn(lambda: Named("relu", "max")).state_dict())  # drawn at random, learnt from nothing
    assert refused(state).rule == refused(state, own=own(pictures())).rule == "LD210"


@pytest.mark.parametrize(("activation", "pool"), [("relu", "max"), ("tanh", "avg")])
def test_labels_tell_the_reading_of_a_network_without_statistics(activation: str, pool: str) -> None:
    images = pictures(256)
    network = drawn(lambda: Named(activation, pool, normed=False))
    with torch.no_grad():
        logits = network(images.float() / 255)
        network.answer.bias -= logits.mean(0)
        network.answer.weight /= logits.std()
        labels = network(images.float() / 255).argmax(1)
    ours, bare, said = answers(network, dict(network.state_dict()), own=own(images, labels))
    assert "confirmed by your clean images (100% right" in said[0]
    assert same_answers(ours, bare)


def test_labels_that_no_reading_gives_confirm_none() -> None:
    images = pictures(256)
    labels = torch.randint(5, (256,), generator=torch.Generator().manual_seed(0))
    state = dict(drawn(lambda: Named("relu", "max", normed=False)).state_dict())
    assert refused(state, own=own(images, labels)).rule == "LD210"


def test_a_network_that_would_keep_us_busy_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        **{"a.weight": torch.zeros(1024, 3, 7, 7), "b.weight": torch.zeros(1024, 1024, 7, 7)},
        **{"fc.weight": torch.zeros(10, 1024)},
    }
    for name in ("norm_a", "norm_b"):
        norm = nn.BatchNorm2d(1024).state_dict()
        state |= {f"{name}.{key}": tensor for key, tensor in norm.items()}
    monkeypatch.setattr(confirmation, "mismatch", lambda *_: pytest.fail("it was tried"))
    assert proposals(state) and refused(state).rule == "LD210"


# --- what is said where nothing confirms --------------------------------------------------------------------


def test_the_refusal_gives_the_way_out_first_and_its_words_open_the_file(tmp_path: Path) -> None:
    network = drawn(lambda: Named("relu", "max", normed=False))
    torch.save(network.state_dict(), tmp_path / "m.pth")
    with pytest.raises(LoadRefused) as refusal:
        load_model(tmp_path / "m.pth")
    remedy = refusal.value.remedy
    places = [
        remedy.index(part) for part in ("--network FILE.py:NAME", "--layers", "torch.onnx.export(", "--arch")
    ]
    assert places == sorted(places) and "1, 1, 28, 28" in remedy
    words = re.findall(r'--layers "([^"]+)" --size 28 28 --channels 1', remedy)[0]
    model = load_model(tmp_path / "m.pth", layers=words)
    images = torch.rand(3, *GREY)
    assert same_answers(model(images), network(images))


def test_a_command_hands_its_clean_images_to_the_loader(tmp_path: Path) -> None:
    images = pictures()
    network = trained(drawn(lambda: Named("elu", "avg")), standard(images))
    torch.save(network.state_dict(), tmp_path / "m.pth")
    model = load(tmp_path / "m.pth", {"clean": own(images)}).model
    assert any("on your clean images" in line for line in model.assumptions)
    scan = _Scan(tmp_path / "m.pth", Request(clean=tmp_path), None)
    assert scan._loading()["clean"].args == (tmp_path,)
    assert _Scan(tmp_path / "m.pth", Request(), None)._loading()["clean"] is None
