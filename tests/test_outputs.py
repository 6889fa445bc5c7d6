"""The logits are found: behind softmax, scales and clamps, among several outputs, in one number per image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Verdict
from unhorse.loading.assembly import graph_classifier
from unhorse.loading.formats import load_model
from unhorse.loading.outputs import Wanted, choose
from unhorse.loading.readouts import Facts, LogitsOf
from unhorse.loading.tracing import trace
from unhorse.rules import LoadRefused
from unhorse.scanners.generalist import Generalist

SHAPE = (1, 8, 8)
VICTIM = Path(__file__).parent / "victims" / "infected"


class Wrapped(nn.Module):
    """The infected digits network with something behind its logits."""

    def __init__(self, written, network=None):
        super().__init__()
        self.network = network or load_model(VICTIM).network.eval()
        self.written = written

    def forward(self, images):
        return self.written(self.network(images))


class Several(nn.Module):
    """Its features, logits and both, as `written` arranges them."""

    def __init__(self, written):
        super().__init__()
        self.network = load_model(VICTIM).network.eval()
        self.other = nn.Linear(64, 7)
        self.written = written

    def forward(self, images):
        head = self.network.head
        features = head[2](head[1](self.network.features(images).flatten(1)))
        return self.written(features, head[3](features), self.other(features))


def images(count: int = 16) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def model_of(traced):
    """The classifier that comes home from the child."""
    document = {"graph": json.loads(json.dumps(traced.graph)), "num_classes": traced.num_classes}
    return graph_classifier(document, dict(traced.tensors), Facts(image_shape=SHAPE), traced.notes)


@torch.no_grad()
def answers(network) -> Tensor:
    return network(images())


UNDONE = {
    "percent": lambda z: 100 * z.softmax(1),
    "of 255, rounded": lambda z: (255 * z.softmax(1)).round(),
    "clamped": lambda z: z.softmax(1).clamp(1e-7, 1 - 1e-7),
    "clamped from below": lambda z: z.softmax(1).clamp(min=1e-6),
    "sharpened and clamped": lambda z: (z / 0.05).softmax(1).clamp(1e-6, 1),
    "logarithm with a floor": lambda z: (z.softmax(1) + 1e-9).log(),
    "affine": lambda z: 3 * z.softmax(1) - 7,
    "tanh": torch.tanh,
    "sigmoids": torch.sigmoid,
    "decisions": lambda z: (z.softmax(1) > 0.5).float(),
    "unit length": functional.normalize,
    "softmax by hand": lambda z: z.exp() / z.exp().sum(1, keepdim=True),
    "complement of the complement": lambda z: 1 - (1 - z.softmax(1)),
    "minus the energy": lambda z: z.softmax(1).log().neg().neg(),
    "squares": lambda z: z.softmax(1) ** 2,
    "a layer that scales": lambda z: functional.linear(z.softmax(1), 50 * torch.eye(10) + 1, torch.ones(10)),
    "on a map of one pixel": lambda z: z[:, :, None, None].softmax(1).flatten(1),
    "dropped out": lambda z: functional.dropout(z.softmax(1), 0.5, training=False),
    "logits a hundredfold": lambda z: 100 * z,
}


@pytest.mark.parametrize("case", UNDONE)
def test_what_comes_after_the_logits_is_undone(case):
    bare = answers(load_model(VICTIM).network)
    traced = trace(Wrapped(UNDONE[case]), SHAPE)
    assert torch.allclose(answers(model_of(traced)), bare, atol=1e-4)
    assert traced.notes[0].startswith(("MD307", "MD303"))


def test_an_order_that_is_turned_round_is_turned_back():
    bare = answers(load_model(VICTIM).network)
    assert torch.allclose(
        answers(model_of(trace(Wrapped(lambda z: 1 - z.softmax(1)), SHAPE))), -bare, atol=1e-4
    )


def test_a_class_that_is_left_out_or_moved_is_left_out_of_the_logits():
    bare = answers(load_model(VICTIM).network)
    fewer = model_of(trace(Wrapped(lambda z: z.softmax(1)[:, 1:]), SHAPE))
    assert fewer.num_classes == 9 and torch.allclose(answers(fewer), bare[:, 1:], atol=1e-4)
    turned = model_of(trace(Wrapped(lambda z: z.softmax(1).flip(1)), SHAPE))
    assert torch.allclose(answers(turned), bare.flip(1), atol=1e-4)


def test_an_ensemble_of_probabilities_becomes_their_logarithm():
    def average(z):
        return (z.softmax(1) + (0.5 * z).softmax(1)) / 2

    traced = trace(Wrapped(average), SHAPE)
    wanted = average(answers(load_model(VICTIM).network)).log()
    found = answers(model_of(traced))
    assert torch.allclose(
        found - found.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True), atol=1e-3
    )
    assert traced.notes[0].startswith("MD307") and "logarithm" in traced.notes[0]


@pytest.mark.parametrize(
    "written",
    [
        lambda z: functional.linear(z.softmax(1), torch.linspace(-1, 1, 100).view(10, 10).sin()),
        lambda z: (z.sigmoid() + (2 * z).sigmoid()) / 2,
    ],
    ids=["a layer behind a softmax", "sigmoids mixed"],
)
def test_probabilities_that_cannot_be_undone_leave_the_verdict_open(written):
    traced = trace(Wrapped(written), SHAPE)
    result = Generalist.shipped().scan(model_of(traced))
    assert result.verdict is Verdict.UNDECIDED
    assert "probabilities" in result.reason and "logits" in result.reason


def test_a_network_with_hidden_sigmoids_is_no_probability():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 5)
    )
    assert trace(network.eval(), SHAPE).notes == ()


# --- one number per image -----------------------------------------------------------------------------------

TWO = {
    "sigmoid": lambda z: (z[:, 1:2] - z[:, :1]).sigmoid(),
    "one of two probabilities": lambda z: z[:, :2].softmax(1)[:, 1],
    "the other one": lambda z: 1 - z[:, :2].softmax(1)[:, 0],
    "p beside 1 - p": lambda z: torch.cat(
        [1 - (z[:, 1:2] - z[:, :1]).sigmoid(), (z[:, 1:2] - z[:, :1]).sigmoid()], 1
    ),
    "p before 1 - p": lambda z: torch.stack(
        [(z[:, 0] - z[:, 1]).sigmoid(), 1 - (z[:, 0] - z[:, 1]).sigmoid()], 1
    ),
}


@pytest.mark.parametrize("case", TWO)
def test_the_probability_of_one_of_two_classes_becomes_two_logits(case):
    bare = answers(load_model(VICTIM).network)
    model = model_of(trace(Wrapped(TWO[case]), SHAPE))
    lead = answers(model).diff(dim=1)
    assert model.num_classes == 2
    assert torch.allclose(lead, bare[:, 1:2] - bare[:, :1], atol=1e-4)


@pytest.mark.parametrize(
    "written", [lambda z: z[:, :1], lambda z: 100 * z[:, 0].sigmoid()], ids=["logit", "age"]
)
def test_a_number_that_may_be_no_class_is_taken_only_where_two_classes_are_said(written):
    with pytest.raises(LoadRefused, match="--classes 2") as refused:
        trace(Wrapped(written), SHAPE)
    assert refused.value.rule == "LD221"
    lead = answers(model_of(trace(Wrapped(written), SHAPE, classes=2))).diff(dim=1)
    assert torch.allclose(lead, answers(load_model(VICTIM).network)[:, :1], atol=1e-4)


def test_a_state_dict_of_one_logit_is_one_of_two_classes(tmp_path: Path):
    network = load_model(VICTIM).network
    network.head[3] = nn.Linear(64, 1)
    torch.save(network.state_dict(), tmp_path / "binary.pth")
    with pytest.raises(LoadRefused, match="--classes 2"):
        load_model(tmp_path / "binary.pth", image_shape=SHAPE)
    model = load_model(tmp_path / "binary.pth", image_shape=SHAPE, num_classes=2)
    found = answers(model.network)
    assert torch.allclose(found[:, 1:], answers(network), atol=1e-6) and not found[:, 0].any()


# --- several outputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "said", "width"),
    [
        (lambda f, z, o: (f, z), {}, 10),
        (lambda f, z, o: (z, f), {}, 10),
        (lambda f, z, o: {"embedding": f, "out": z.softmax(1)}, {}, 10),
        (lambda f, z, o: {"logits": z, "other": o}, {}, 10),
        (lambda f, z, o: (f, (o, z)), {"num_classes": 7}, 7),
        (lambda f, z, o: (f, (o, z)), {"num_classes": 10}, 10),
        (lambda f, z, o: {"a": o, "b": z}, {"output": "b"}, 10),
        (lambda f, z, o: (f, z, o), {"output": "2"}, 7),
        (lambda f, z, o: (z, z * 2), {}, 10),
    ],
)
def test_the_logits_are_found_among_several_outputs(written, said, width):
    network = LogitsOf(Several(written), options=said)
    assert network(images()).shape == (16, width)
    assert network.notes[0].startswith("MD307") and "--output-name" in network.notes[0]


def test_two_outputs_that_could_be_the_logits_are_refused_with_their_widths():
    with pytest.raises(LoadRefused) as refused:
        LogitsOf(Several(lambda f, z, o: {"kind": o, "digit": z}))(images())
    assert refused.value.rule == "LD239"
    assert "'kind' (7 wide), 'digit' (10 wide)" in str(refused.value) and "--classes" in refused.value.remedy


@pytest.mark.parametrize(
    ("said", "words"), [({"output": "c"}, "take one of a, b"), ({"num_classes": 3}, "no output is 3 wide")]
)
def test_an_output_that_is_not_there_is_named_with_those_that_are(said, words):
    with pytest.raises(LoadRefused, match=words) as refused:
        LogitsOf(Several(lambda f, z, o: {"a": o, "b": z}), options=said)(images())
    assert refused.value.rule == "LD239"


def test_names_of_a_file_name_its_outputs():
    found = [torch.zeros(2, 5), torch.zeros(2, 8)]
    chosen = choose(nn.Identity(), torch.zeros(2, *SHAPE), found, ("scores", "logits"), Wanted())
    assert chosen.place == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_file_with_features_first_is_scanned_by_its_logits(tmp_path: Path):
    path = tmp_path / "two.pt"
    torch.jit.trace(Several(lambda f, z, o: (f, 100 * z.softmax(1))), images(2)).save(path)
    model = load_model(path, image_shape=SHAPE)
    assert torch.allclose(answers(model.network), answers(load_model(VICTIM).network), atol=1e-4)
    assert sum(line.startswith("MD307") for line in model.assumptions) == 2
    assert load_model(path, image_shape=SHAPE, output=0).num_classes == 64


def test_an_onnx_file_is_compared_by_the_output_that_is_taken(tmp_path: Path):
    onnx = pytest.importorskip("onnx", reason="needs onnx, which an extra installs")
    from onnx import TensorProto, helper, numpy_helper

    rng = torch.Generator().manual_seed(0)
    first, second = torch.randn(64, 6, generator=rng), torch.randn(6, 4, generator=rng)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "first"], ["embedding"]),
            helper.make_node("Relu", ["embedding"], ["active"]),
            helper.make_node("MatMul", ["active", "second"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["p"], axis=1),
            helper.make_node("Mul", ["p", "hundred"], ["percent"]),
        ],
        "two outputs",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", *SHAPE])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", k])
            for name, k in (("embedding", 6), ("percent", 4))
        ],
        [
            numpy_helper.from_array(first.numpy(), "first"),
            numpy_helper.from_array(second.numpy(), "second"),
            numpy_helper.from_array(torch.tensor(100.0).numpy(), "hundred"),
        ],
    )
    path = tmp_path / "two.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    model = load_model(path)
    wanted = (images().flatten(1) @ first).relu() @ second
    assert model.num_classes == 4 and torch.allclose(answers(model.network), wanted, atol=1e-3)
    assert load_model(path, output="embedding").num_classes == 6
