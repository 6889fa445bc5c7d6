"""The networks in a file are found whatever stands around them, and nothing of the file is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unhorse.core import Classifier
from unhorse.loading.containers import contents
from unhorse.loading.formats import load_model, open_networks
from unhorse.loading.prefixes import parts
from unhorse.models.classifier import new_classifier
from unhorse.rules import LoadRefused

SHAPE = (3, 8, 8)


def network(seed: int = 0, name: str = "small-cnn") -> nn.Module:
    return new_classifier(name, image_shape=SHAPE, class_names=list("abc"), seed=seed).network.eval()


def weights(seed: int = 0, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in network(seed).state_dict().items()}


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def loaded(content: object, folder: Path, **options: object) -> Classifier:
    return load_model(saved(content, folder / "checkpoint.pth"), **options)  # type: ignore[arg-type]


def agrees(model: Classifier, seed: int = 0) -> bool:
    images = torch.rand(4, *SHAPE)
    return torch.allclose(model.network(images), network(seed)(images), atol=1e-6)


def left_out(model: Classifier) -> str:
    return " ".join(line for line in model.assumptions if line.startswith("MD306"))


# --- one network, whatever stands around it -----------------------------------------------------------------

WRAPPERS = {
    "model_state": lambda state: {"model_state": state, "epoch": 1},
    "network": lambda state: {"network": state},
    "an unheard-of key": lambda state: {"die_gewichte": state, "date": "today"},
    "weights": lambda state: {"weights": state, "loss": 0.5},
    "only an average": lambda state: {"ema": state, "num_updates": torch.tensor(9)},
    "four levels": lambda state: {"run": {"best": {"ckpt": {"model": state}}}},
    "a list": lambda state: [state, {"lr": 0.1}],
    "a tuple in a dictionary": lambda state: {"result": ({"acc": 0.9}, state)},
    "keys that are numbers": lambda state: {0: {"acc": 0.9}, 1: state},
    "an epoch among the tensors": lambda state: {**state, "epoch": 3, "_extra_state": None},
    "Lightning": lambda state: {
        "epoch": 4,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4, 4)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"lr": 0.1},
    },
}


@pytest.mark.parametrize("wrapped", WRAPPERS.values(), ids=list(WRAPPERS))
def test_a_network_is_found_by_its_content_whatever_its_key(wrapped, tmp_path: Path) -> None:
    assert agrees(loaded(wrapped(weights()), tmp_path))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.module.",
        "model.",
        "network.net.",
        "backbone.",
        "classifier.",
        "model.encoder.cnn.",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_wrappers_come_off(prefix: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{suffix}"
    save_file(weights(prefix=prefix), path) if suffix == ".safetensors" else torch.save(
        weights(prefix=prefix), path
    )
    assert agrees(load_model(path))


def test_a_prefix_that_nobody_uses_comes_off_too(tmp_path: Path) -> None:
    assert agrees(loaded(weights(prefix="my_wonderful_net_2."), tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_opened_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    content = {"network": {name: tensor.to(dtype) for name, tensor in weights().items()}}
    model = loaded(content, tmp_path)
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    first = next(iter(weights().values()))
    assert torch.equal(next(iter(model.network.parameters())), first.to(dtype).float())


def test_an_averaged_model_opens_and_its_counter_is_named(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network())
    model = loaded(averaged.state_dict(), tmp_path)
    assert agrees(model) and "n_averaged (1 tensor, 8 B)" in left_out(model)


def test_losses_and_metrics_beside_a_prefix_are_named_with_their_size(tmp_path: Path) -> None:
    content = {**weights(prefix="model."), "criterion.weight": torch.ones(3), "train_acc.tp": torch.zeros(3)}
    model = loaded({"state_dict": content}, tmp_path)
    assert agrees(model)
    assert "criterion (1 tensor, 12 B)" in left_out(model) and "train_acc (1 tensor, 12 B)" in left_out(model)


def test_the_state_of_an_optimiser_is_named_with_its_size(tmp_path: Path) -> None:
    trained = network()
    optimizer = torch.optim.Adam(trained.parameters())
    trained(torch.rand(2, *SHAPE)).sum().backward()
    optimizer.step()
    model = loaded({"model": weights(), "optimizer": optimizer.state_dict()}, tmp_path)
    assert agrees(model) and "optimizer (24 tensors, " in left_out(model)


def test_a_tensor_before_the_network_is_never_dropped(tmp_path: Path) -> None:
    content = {**weights(prefix="model."), "first.weight": torch.ones(3), "first.running_mean": torch.ones(3)}
    with pytest.raises(LoadRefused) as refusal:
        loaded(content, tmp_path)
    assert refusal.value.rule == "LD210"


# --- normalisation inside -----------------------------------------------------------------------------------

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
NORMALISERS = {
    "mean and std": ("model.", "mean", "std", (3,)),
    "normalize.mean": ("model.", "normalize.mean", "normalize.std", (1, 3, 1, 1)),
    "a sequence": ("1.", "0.mean", "0.std", (3, 1, 1)),
    "in DataParallel": ("module.1.", "module.0.mean", "module.0.std", (1, 3, 1, 1)),
    "new_mean": ("module.model.", "module.normalizer.new_mean", "module.normalizer.new_std", (3, 1, 1)),
    "pixel_mean beside plain names": ("", "pixel_mean", "pixel_std", (3, 1, 1)),
    "means and stds": ("net.", "_means", "_stds", (3,)),
    "mu and sigma": ("net.", "mu", "sigma", (1, 3, 1, 1)),
}


@pytest.mark.parametrize("prefix, mean, std, shape", NORMALISERS.values(), ids=list(NORMALISERS))
@pytest.mark.parametrize("unit", [1, 255])
def test_the_normalisation_of_a_wrapper_is_used_and_said(
    prefix: str, mean: str, std: str, shape: tuple[int, ...], unit: int, tmp_path: Path
) -> None:
    values = {mean: unit * torch.tensor(MEAN).view(shape), std: unit * torch.tensor(STD).view(shape)}
    model = loaded({**values, **weights(prefix=prefix)}, tmp_path)
    assert agrees(model)
    assert torch.allclose(model.mean.flatten(), torch.tensor(MEAN))
    assert torch.allclose(model.std.flatten(), torch.tensor(STD))
    assert "mean 0.49/0.48/0.45, std 0.25/0.24/0.26" in left_out(model) and mean in left_out(model)
    assert ("0..255" in left_out(model)) == (unit == 255)
    assert not any("normalisation assumed" in line for line in model.assumptions)


def test_what_the_user_says_wins_over_the_normalisation_inside(tmp_path: Path) -> None:
    content = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD), **weights(prefix="model.")}
    model = loaded(content, tmp_path, mean=[0.5], std=[0.5])
    assert model.mean.flatten().tolist() == [0.5]


def test_statistics_of_a_layer_are_no_normalisation() -> None:
    bayesian = {
        "conv.weight": torch.ones(3, 3, 3, 3),
        "conv.bias_mu": torch.ones(3),
        "conv.bias_sigma": torch.ones(3),
    }
    (part,) = parts(bayesian)
    assert part.mean is None and part.tensors.keys() == bayesian.keys()
    (part,) = parts({"bn.running_mean": torch.ones(3), "fc.weight": torch.ones(3, 3)})
    assert part.mean is None and len(part.tensors) == 2


# --- several networks ---------------------------------------------------------------------------------------

SEVERAL = {
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict", "state_dict_ema"),
    "torchvision": (
        lambda a, b: {"model": a, "model_ema": {"n_averaged": torch.tensor(7), **under("module.", b)}},
        *("model", "model_ema"),
    ),
    "distillation": (lambda a, b: {"student": a, "teacher": b}, "student", "teacher"),
    "one state dict": (lambda a, b: {**under("model.", a), **under("model_ema.", b)}, "model", "model_ema"),
    "Lightning": (
        lambda a, b: {"state_dict": {**under("net.", a), **under("ema.module.", b)}},
        *("state_dict/net", "state_dict/ema"),
    ),
    "plain names and an average": (lambda a, b: {**a, **under("ema.", b)}, "features+head", "ema"),
    "an ensemble": (lambda a, b: [a, b], "0", "1"),
    "two of a kind": (lambda a, b: {**under("alpha.", a), **under("beta.", b)}, "alpha", "beta"),
}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("both, first, second", SEVERAL.values(), ids=list(SEVERAL))
def test_two_networks_are_told_apart_and_chosen_by_key(both, first: str, second: str, tmp_path: Path) -> None:
    path = saved(both(weights(0), weights(1)), tmp_path / "two.pth")
    found = open_networks(path).networks
    assert [one.key for one in found] == [first, second]
    assert agrees(found[0].model, 0) and agrees(found[1].model, 1)
    with pytest.raises(LoadRefused) as refusal:
        load_model(path)
    assert refusal.value.rule == "LD228" and first in refusal.value.reason and second in refusal.value.reason
    assert agrees(load_model(path, key=first), 0) and agrees(load_model(path, key=second), 1)


@pytest.mark.parametrize("both", [entry[0] for entry in SEVERAL.values()], ids=list(SEVERAL))
def test_copies_that_agree_bit_for_bit_count_once(both, tmp_path: Path) -> None:
    model = loaded(both(weights(0), weights(0)), tmp_path)
    assert agrees(model) and "twice, bit for bit" in left_out(model)


def test_a_key_that_the_file_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(LoadRefused, match="it has state_dict, other") as refusal:
        loaded({"state_dict": weights(0), "other": weights(1)}, tmp_path, key="ema")
    assert refusal.value.rule == "LD211"


def test_a_generator_beside_a_classifier_is_left_out_by_name(tmp_path: Path) -> None:
    generator = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)).state_dict()
    model = loaded({"netC": weights(), "netG": dict(generator)}, tmp_path)
    assert agrees(model) and "netG" in left_out(model)
    with pytest.raises(LoadRefused) as refusal:
        loaded({"netC": weights(), "unknown": dict(generator)}, tmp_path)
    assert refusal.value.rule == "LD228"


def test_body_and_head_saved_apart_are_one_network(tmp_path: Path) -> None:
    state = new_classifier(
        "resnet18", image_shape=SHAPE, class_names=list("abc"), seed=0
    ).network.state_dict()
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    head = {name.removeprefix("fc."): tensor for name, tensor in state.items() if name.startswith("fc.")}
    for content in ({"encoder": body, "classifier": head}, under("encoder.", body) | under("head.", head)):
        model = loaded(content, tmp_path)
        assert model.architecture["name"] == "resnet18" and "followed by" in left_out(model)


# --- what is no network -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        ({"lr": 0.1, "betas": [0.9, 0.99]}, "without tensors"),
        ([torch.ones(3, 3), torch.ones(3)], "list of tensors without names"),
        ({0: torch.ones(3, 3), 1: torch.ones(3)}, "list of tensors without names"),
        ({"a": {"b": {"c": {"d": {"e": {"fc.weight": torch.ones(3, 3)}}}}}}, "more than 4 dictionaries deep"),
        ({"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": []}, "no weight of a layer"),
        (torch.ones(3), "Tensor"),
        (3, "int"),
    ],
)
def test_a_file_without_a_network_says_what_it_holds(content: object, words: str) -> None:
    with pytest.raises(LoadRefused, match=words) as refusal:
        contents(content, 10**6)
    assert refusal.value.rule == "LD209"


def test_a_structure_that_holds_itself_comes_to_an_end() -> None:
    content: dict[object, object] = {"model": weights()}
    content["self"] = content
    many: list[object] = [content]
    for _ in range(60):
        many = [many, many]
    assert list(contents([many, content], 10**6).networks) == ["1/model"]
