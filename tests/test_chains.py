"""A plain network said in words opens as the class that it was saved from, or says what does not fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from copied_networks import NETWORKS, made, same_answers
from unhorse.cli import run
from unhorse.loading.chains import said_chain
from unhorse.loading.formats import load_model
from unhorse.models.architectures import build, outline
from unhorse.models.chains import CHAIN, read_words
from unhorse.models.classifier import classifier_from_card
from unhorse.rules import LoadRefused

PLAIN = "conv relu avgpool2 conv relu avgpool2 flatten linear relu linear"


UNTOLD = [("separable", "sorted by name")]  # two equally wide normalisations, no number in their names


def logits_of(name: str, words: str, state: dict[str, Tensor]) -> Tensor:
    """What the state dict answers as the chain that `words` say."""
    copied = NETWORKS[name]
    found = said_chain(state, words, image_shape=copied.image_shape if copied.sized else None)
    assert found.image_shape == copied.image_shape
    network = build(
        CHAIN, num_classes=found.num_classes, image_shape=found.image_shape, **found.options
    ).eval()
    network.load_state_dict(found.state)
    return network(images_for(name))


def images_for(name: str) -> Tensor:
    return torch.rand(4, *NETWORKS[name].image_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", ["as defined", "sorted by name"])
@pytest.mark.parametrize("name", NETWORKS)
def test_words_give_the_answers_of_the_class_that_was_saved(name: str, order: str) -> None:
    network = made(name)
    state = dict(network.state_dict())
    if order == "sorted by name":
        state = dict(sorted(state.items()))
    if (name, order) in UNTOLD:
        with pytest.raises(
            LoadRefused, match=r"LD210 the file has sorted its tensors, and depthwise_bn.weight"
        ):
            logits_of(name, NETWORKS[name].words, state)
        return
    assert same_answers(logits_of(name, NETWORKS[name].words, state), network(images_for(name)))


@pytest.mark.parametrize("wrong", [PLAIN.replace("avgpool", "maxpool"), PLAIN.replace("relu", "tanh")])
def test_other_words_give_other_answers(wrong: str) -> None:
    network = made("BadNet CNN")
    ours = logits_of("BadNet CNN", wrong, dict(network.state_dict()))
    assert not same_answers(ours, network(images_for("BadNet CNN")))


# --- what does not fit --------------------------------------------------------------------------------------


def refused(name: str, words: str, **options: object) -> LoadRefused:
    with pytest.raises(LoadRefused) as refusal:
        said_chain(made(name).state_dict(), words, **options)
    return refusal.value


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("conv relu maxpool2 conv relu maxpool2 linear", "no word takes fc2.0.weight (10x512), 1 in all"),
        (PLAIN + " relu linear", "layer 12 'linear' finds no linear layer left in the file"),
        (
            PLAIN.replace("conv ", "conv3 ", 1),
            "layer 1 'conv3' wants a convolution of 3x3, and the next in the",
        ),
        (PLAIN.replace("conv", "conv bn", 1), "layer 2 'bn' finds no batch normalisation left"),
        (
            PLAIN.replace("avgpool2", "avgpool9"),
            "would get without padding no pixel or with padding no pixel inputs",
        ),
        ("conv relu pool2", "layer 3 'pool2' is no word for a layer: take conv, linear, bn, maxpool"),
        ("flatten linear relu linear", "no word takes conv1.0.weight (16x1x5x5), 2 in all"),
        ("", "layer 1 '' is no word"),
    ],
)
def test_the_refusal_says_what_does_not_fit(words: str, reason: str) -> None:
    problem = refused("BadNet CNN", words)
    assert problem.rule == "LD211" and problem.reason.startswith("--layers: ") and problem.remedy
    assert reason in problem.reason


def test_a_convolution_of_other_channels_is_named_with_its_shape() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(9, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(
        LoadRefused, match=r"layer 2 'conv' wants a convolution for 8 channels, .* \(4x9x3x3\)"
    ):
        said_chain(network.state_dict(), "conv conv gap flatten linear")


def test_two_paddings_that_fit_are_asked_for_with_words_to_copy() -> None:
    words = "conv relu maxpool2 conv relu maxpool2 flatten linear relu linear relu linear"
    problem = refused("LeNet-5, ReLU", words)
    assert problem.rule == "LD210" and "2 readings fit" in problem.reason
    padded = words.replace("conv", "conv5s1p2", 1).replace("conv ", "conv5s1p0 ", 1)
    assert f'--layers "{padded}" --size 28 28 --channels 1' in problem.remedy
    found = said_chain(made("LeNet-5, ReLU").state_dict(), padded)
    assert found.image_shape == (1, 28, 28) and found.options["words"] == padded


def test_a_stride_is_proposed_and_never_guessed() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(196, 2)
    )
    with pytest.raises(LoadRefused) as refusal:
        said_chain(network.state_dict(), "conv conv flatten linear", image_shape=(1, 28, 28))
    assert "conv3s2p1 conv3s2p1" in refusal.value.remedy
    found = said_chain(network.state_dict(), "conv3s2p1 conv3s2p1 flatten linear")
    assert found.image_shape == (1, 28, 28)


@pytest.mark.parametrize(
    "tensor",
    [
        ("rnn.weight_ih_l0", torch.zeros(8, 4)),
        ("norm.weight", torch.zeros(8)),
        ("conv.weight", torch.zeros(8, 3, 1, 5)),
        ("conv.weight", torch.zeros(0, 3, 5, 5)),
        ("position", torch.zeros(1, 8)),
        ("bn.running_mean", torch.zeros(8)),
    ],
    ids=lambda tensor: tensor[0] if isinstance(tensor, tuple) else None,
)
def test_a_tensor_of_no_plain_layer_is_named(tensor: tuple[str, Tensor]) -> None:
    state = {**made("20-50").state_dict(), tensor[0]: tensor[1]}
    with pytest.raises(LoadRefused) as refusal:
        said_chain(state, NETWORKS["20-50"].words)
    assert refusal.value.rule == "LD210" and tensor[0] in refusal.value.reason


def test_many_equal_layers_end_the_search_in_a_refusal() -> None:
    layers = [nn.Linear(6, 6, bias=False) for _ in range(60)]
    state = nn.Sequential(nn.Linear(64, 6, bias=False), *layers, nn.Linear(7, 2)).state_dict()
    with pytest.raises(LoadRefused) as refusal:
        said_chain(state, "flatten " + "linear " * 62)
    assert refusal.value.rule == "LD211"


def test_a_last_sigmoid_is_cut_off_and_one_output_makes_two_classes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(576, 1))
    torch.save(network.state_dict(), tmp_path / "m.pth")
    words = "conv relu maxpool2 flatten linear sigmoid"
    model, images = load_model(tmp_path / "m.pth", layers=words, num_classes=2), torch.rand(3, 1, 28, 28)
    assert torch.allclose(model(images)[:, 1:], network(images), atol=1e-5)
    assert not model(images)[:, 0].any()


# --- words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Conv2d3p1 BatchNorm2d ReLU6 MaxPool3s2", "conv3p1 bn relu6 maxpool3s2"),
        ("conv5s2p1d2g4, lrelu0.2, avgpool, gap6", "conv5s2p1d2g4 leakyrelu0.2 avgpool2 gap6"),
        ("fc log_softmax dropout0.5", "linear logsoftmax dropout"),
    ],
)
def test_words_are_read_in_the_spellings_that_people_use(text: str, said: str) -> None:
    assert " ".join(map(str, read_words(text))) == said


@pytest.mark.parametrize(
    "text", ["relu7", "conv0", "conv5p9", "maxpool2p2", "linear5", "leakyrelu7", "conv99999", "x" * 9]
)
def test_what_is_no_word_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="layer 2"):
        read_words(f"conv {text}")


# --- cards and commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"words": "conv relu"},
        {"words": 7},
        {"words": "conv5s1p0 " * 500},
        {"words": "conv5s1p9 flatten linear"},
        {"widths": [16]},
        {"widths": [16, True]},
        {"widths": [-1, 10]},
        {"widths": [2**40, 10]},
        {"biased": [1, 0]},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_card_that_describes_no_chain_is_refused(change: dict[str, object]) -> None:
    options = {"words": "conv5s1p0 flatten linear", "widths": [16, 10], "biased": [True, True]}
    assert outline(CHAIN, num_classes=10, image_shape=(1, 28, 28), **options)
    card = {"architecture": {"name": CHAIN, "options": options | change}, "image_shape": [1, 28, 28]}
    card |= {"class_names": list("0123456789"), "mean": [0.0], "std": [1.0]}
    with pytest.raises(ValueError):
        classifier_from_card(card, {})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert_writes_a_file_that_opens_without_words(tmp_path: Path, suffix: str) -> None:
    network, path = made("LeNet-5"), tmp_path / f"m{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": network.state_dict(), "epoch": 3}, path)
    else:
        save_file(network.state_dict(), path)
    written = tmp_path / "out.safetensors"
    words = NETWORKS["LeNet-5"].words
    assert run(["convert", str(path), "-o", str(written), "--layers", words]) == 0
    again = load_model(written)
    assert any(
        line.startswith("MD305 network read as --layers says: conv5s1p2 tanh") for line in again.assumptions
    )
    assert same_answers(again(images_for("LeNet-5")), network(images_for("LeNet-5")))
    with pytest.raises(LoadRefused, match="LD211"):
        load_model(written, layers=words)


def test_inspect_tries_the_words_and_says_what_it_read(tmp_path: Path) -> None:
    torch.save(made("head first").state_dict(), tmp_path / "m.pth")
    words = NETWORKS["head first"].words
    assert (
        run(["inspect", str(tmp_path / "m.pth"), "--layers", words, "--json", str(tmp_path / "o.json")]) == 0
    )
    seen = json.loads((tmp_path / "o.json").read_text())["models"][0]
    assert (seen["architecture"], seen["image_shape"]) == (CHAIN, [1, 28, 28])
    assert any("in order, conv_a, conv_b, hidden, out" in line for line in seen["assumptions"])
    wrong = words.replace("linear sigmoid", "linear sigmoid linear sigmoid")
    assert run(["inspect", str(tmp_path / "m.pth"), "--layers", wrong]) == 2


def test_layers_beside_another_network_are_a_contradiction(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save(made("20-50").state_dict(), path)
    with pytest.raises(LoadRefused, match="LD211.*leave one out"):
        load_model(path, layers=PLAIN, architecture="small-cnn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(made("20-50"), torch.rand(1, 1, 28, 28)).save(tmp_path / "script.pt")
    with pytest.raises(LoadRefused, match="LD211.*leave --layers out"):
        load_model(tmp_path / "script.pt", layers=PLAIN)
