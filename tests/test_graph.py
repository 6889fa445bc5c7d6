"""A network as data: what is traced computes the same, and nothing off the list can be written down."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from unhorse.core import Classifier
from unhorse.loading.tracing import trace
from unhorse.models.classifier import (
    classifier_from_card,
    load_classifier,
    new_classifier,
    save_classifier,
    weights_hash,
)
from unhorse.models.graph import GraphNetwork, check_sizes
from unhorse.models.stages import convolution_stages
from unhorse.rules import LoadRefused

SHAPE = (3, 16, 16)


class Written(nn.Module):
    """A network from a function of (self, images), with one convolution and one linear layer."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.written = forward

    def forward(self, images):
        return self.written(self, images)


def pooled(self, images):
    return self.linear(self.convolution(images).relu().mean((2, 3)))


def rebuilt(traced, shape=SHAPE):
    card = {
        "architecture": {"name": "graph", "options": {"graph": json.loads(json.dumps(traced.graph))}},
        "image_shape": list(shape),
        "class_names": [str(index) for index in range(traced.num_classes)],
        "mean": [0.0],
        "std": [1.0],
    }
    return classifier_from_card(card, traced.tensors)


def assert_equal_answers(network, model, shape=SHAPE):
    for count in (1, 3, 8):
        images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            assert torch.allclose(model(images), network(images), atol=1e-5)


@pytest.mark.parametrize("name", ["small-cnn", "ulp-resnet18", "preact-resnet18", "mobilenet-v2"])
def test_a_known_network_and_its_graph_answer_alike_and_have_the_same_stages(name):
    shape = (3, 32, 32)
    original = new_classifier(name, image_shape=shape, class_names=list("0123456789"), seed=0).eval()
    model = rebuilt(trace(original.network, shape), shape)
    assert_equal_answers(original, model, shape)
    original_stages, stages = convolution_stages(original), convolution_stages(model)
    assert [stage[1:] for stage in stages] == [stage[1:] for stage in original_stages]


FORWARDS = {
    "in-place operators": lambda self, x: self.linear(
        self.convolution(x).relu_().add_(1).mul_(2).mean((2, 3))
    ),
    "view with the batch": lambda self, x: self.linear(
        functional.adaptive_avg_pool2d(self.convolution(x), 2).view(x.shape[0], 8, 4).sum(2)
    ),
    "view with minus one": lambda self, x: self.linear(self.convolution(x).amax((2, 3)).view(-1, 8)),
    "batch folded into another axis": lambda self, x: self.linear(
        self.convolution(x).permute(0, 2, 3, 1).reshape(x.shape[0] * 256, 8).reshape(-1, 256, 8).mean(1)
    ),
    "a token beside the patches": lambda self, x: self.linear(
        torch.cat(
            [self.token.expand(len(x), -1, -1), self.convolution(x).flatten(2).transpose(1, 2)], 1
        ).mean(1)
    ),
    "zeros as long as the batch": lambda self, x: pooled(self, x) + torch.zeros(x.shape[0], 1),
    "attention": lambda self, x: self.linear(
        functional.scaled_dot_product_attention(*[self.convolution(x).flatten(2).transpose(1, 2)] * 3).mean(1)
    ),
    "split and chosen": lambda self, x: self.linear(
        torch.cat(self.convolution(x).chunk(2, 1)[::-1], 1).mean((2, 3))
    ),
    "the same layer twice": lambda self, x: self.linear(
        (self.convolution(x) + self.convolution(x.flip(3)).flip(3)).mean((2, 3))
    ),
    "weights computed from weights": lambda self, x: functional.linear(
        self.convolution(x).mean((2, 3)), self.linear.weight / self.linear.weight.norm()
    ),
    "a dictionary": lambda self, x: {"features": self.convolution(x), "logits": pooled(self, x)},
    "logits on one pixel": lambda self, x: pooled(self, x)[:, :, None, None],
    "without gradient": lambda self, x: pooled(self, x.detach()),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_what_is_traced_computes_the_same_for_every_size_of_batch(case):
    network = Written(FORWARDS[case])
    model = rebuilt(trace(network, SHAPE))

    def answer(images):
        found = network(images)
        found = found["logits"] if isinstance(found, dict) else found
        return found.flatten(1)

    assert_equal_answers(answer, model)


def test_a_network_for_one_image_only_becomes_one_for_many():
    def fixed(self, images):
        assert images.shape[0] == 1
        return self.linear(self.convolution(images).reshape(1, 8, 256).mean(2))

    network = Written(fixed)
    model = rebuilt(trace(network, SHAPE, batch=1))
    images = torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.allclose(model(images), torch.cat([network(image[None]) for image in images]), atol=1e-5)


def test_a_network_whose_answers_depend_on_the_neighbours_is_refused():
    network = Written(lambda self, x: pooled(self, x) - pooled(self, x).mean(0, keepdim=True))
    with pytest.raises(LoadRefused, match="differs from the network") as refused:
        trace(network, SHAPE)
    assert refused.value.rule == "LD221"


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: pooled(self, x) + torch.rand(5), "rand, which is not on the list|differs"),
        (lambda self, x: pooled(self, functional.dropout(x, 0.5, True)), "random"),
        (lambda self, x: torch.ones(len(x), 5), "does not depend on the image"),
        (lambda self, x: pooled(self, x)[:, :1], "a single number per image"),
        (lambda self, x: pooled(self, x) if x.sum() > 0 else pooled(self, -x), "cannot be read as a graph"),
    ],
)
def test_what_is_no_fixed_classifier_of_images_is_refused(forward, words):
    with pytest.raises(LoadRefused, match=words) as refused:
        trace(Written(forward), SHAPE)
    assert refused.value.rule == "LD221"


@pytest.mark.parametrize(
    "squash", [lambda x: x.softmax(1), lambda x: functional.log_softmax(x, -1), torch.sigmoid]
)
def test_a_last_softmax_is_cut_off_so_that_logits_come_out(squash):
    network = Written(lambda self, x: squash(pooled(self, x)))
    traced = trace(network, SHAPE)
    assert traced.cut in ("softmax", "log_softmax", "sigmoid")
    assert_equal_answers(Written(pooled), rebuilt(traced))


def test_a_detached_input_still_gives_a_gradient():
    model = rebuilt(trace(Written(FORWARDS["without gradient"]), SHAPE))
    images = torch.rand(2, *SHAPE, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert float(gradient.abs().max()) > 0


def test_layers_with_weights_are_layers_again_and_shared_ones_are_one():
    traced = trace(Written(FORWARDS["the same layer twice"]), SHAPE)
    model = rebuilt(traced)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 1
    assert sum("use" in node for node in traced.graph["nodes"]) == 1
    assert {name.rpartition(".")[2] for name in traced.tensors} == {"weight", "bias"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["traced", "scripted", "exported"])
def test_torchscript_and_exported_programs_are_traced(kind):
    network = (
        Written(pooled) if kind != "scripted" else nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1))
    )
    network.eval()
    images, file = torch.rand(2, *SHAPE), io.BytesIO()
    if kind == "exported":
        program = torch.export.export(network, (images[:1],))
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module(check_guards=False)
    else:
        script = torch.jit.trace(network, images) if kind == "traced" else torch.jit.script(network)
        torch.jit.save(script, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        loaded(images), loaded(images)  # TorchScript rewrites itself when it runs again
    model = rebuilt(trace(loaded, SHAPE))
    assert_equal_answers(lambda x: network(x).flatten(1), model)


def test_a_graph_is_saved_loaded_copied_pickled_and_exported_like_any_network(tmp_path):
    model = rebuilt(trace(Written(pooled), SHAPE))
    images = torch.rand(2, *SHAPE)
    expected = model(images)
    loaded = load_classifier(save_classifier(model, tmp_path / "graph"))
    assert weights_hash(loaded) == weights_hash(model)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), exported.module()):
        assert torch.equal(other(images), expected)


def test_two_graphs_with_the_same_weights_have_different_hashes():
    plain = rebuilt(trace(Written(pooled), SHAPE))
    negated = rebuilt(trace(Written(lambda self, x: -pooled(self, x)), SHAPE))
    assert plain.network.state_dict().keys() == negated.network.state_dict().keys()
    assert weights_hash(plain) != weights_hash(negated)


GOOD = {"nodes": [{"call": "mean", "args": [{"input": 0}, [2, 3]]}], "output": {"node": 0}, "tensors": {}}


def test_a_good_graph_passes():
    network = GraphNetwork(3, SHAPE, graph=GOOD)
    check_sizes(network, SHAPE, 3)
    assert network(torch.rand(2, *SHAPE)).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": []}, "between 1 and"),
        ({"nodes": [{"call": "from_file", "args": []}]}, "not on the list"),
        ({"nodes": [{"call": "as_strided", "args": []}]}, "not on the list"),
        ({"nodes": [{"call": ["mean"], "args": []}]}, "not on the list"),
        ({"nodes": [{"call": "__class__", "args": []}]}, "not on the list"),
        ({"nodes": [{"call": "mean", "args": [{"node": 0}]}]}, "not there yet"),
        ({"nodes": [{"call": "mean", "args": [{"node": -1}]}]}, "not there yet"),
        ({"nodes": [{"call": "mean", "args": [{"tensor": "weight"}]}]}, "not there yet"),
        ({"nodes": [{"call": "mean", "args": [[[[[[[[1]]]]]]]]}]}, "nested too deeply"),
        ({"nodes": [{"call": "mean", "args": [{"dtype": "complex64"}]}]}, "not on the list"),
        ({"nodes": [{"call": "mean", "args": [{"lambda": 1}]}]}, "no kind of value"),
        ({"nodes": [{"call": "mean", "args": [2**70]}]}, "64 bits"),
        ({"nodes": [{"layer": "Bilinear", "args": []}]}, "not on the list"),
        ({"nodes": [{"layer": "Linear", "options": {"device": "cuda"}, "args": []}]}, "not on the list"),
        (
            {
                "nodes": [
                    {"layer": "Linear", "options": {"in_features": 2**30, "out_features": 3}, "args": []}
                ]
            },
            "size",
        ),
        ({"nodes": [{"use": 0, "args": []}]}, "not there"),
        ({"output": {"node": 7}}, "not there yet"),
        ({"tensors": {"a.b": ["float32", [1]]}}, "usable name"),
        ({"tensors": {"a": ["float32", [-1]]}}, "usable name"),
    ],
)
def test_a_graph_that_says_anything_else_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        GraphNetwork(3, SHAPE, graph=GOOD | change)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([{"call": "repeat", "args": [{"input": 0}, [1, 1, 10**6, 10**6]]}], "too large"),
        ([{"call": "full", "args": [[10**6, 10**6], 1.0]}], "too large"),
        ([{"call": "mean", "args": [{"input": 0}, [7]]}], "does not run"),
        ([{"call": "mean", "args": [{"input": 0}, [1, 2]]}], "not 3 logits"),
        ([{"call": "reshape", "args": [{"input": 0}]}], "does not run"),
    ],
)
def test_sizes_are_checked_before_memory_is_given(nodes, words):
    graph = {"nodes": nodes, "output": {"node": len(nodes) - 1}, "tensors": {}}
    with torch.device("meta"):
        network = GraphNetwork(3, SHAPE, graph=graph)
    with pytest.raises(ValueError, match=words):
        check_sizes(network, SHAPE, 3)


def test_a_size_that_explodes_with_the_second_image_is_found_too():
    rows = {"batch": [2**40, 1 - 2**40]}  # one for one image
    nodes = [
        {"call": "full", "args": [[rows, 3], 0.0]},
        {"call": "mean", "args": [{"input": 0}, [2, 3]]},
        {"call": "add", "args": [{"node": 1}, {"node": 0}]},
    ]
    graph = {"nodes": nodes, "output": {"node": 2}, "tensors": {}}
    with pytest.raises(ValueError, match="too large"):
        check_sizes(GraphNetwork(3, SHAPE, graph=graph), SHAPE, 3)


def test_a_graph_of_unknown_layers_is_trained_by_its_loose_tensors_too():
    model = rebuilt(trace(Written(FORWARDS["weights computed from weights"]), SHAPE))
    assert isinstance(model, Classifier)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(list(model.parameters())) >= 3
