"""Networks have the published sizes and names, and classifiers survive the way to disk and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from unhorse.core import Classifier
from unhorse.loading.identification import identify
from unhorse.models.architectures import ARCHITECTURES, build, outline
from unhorse.models.classifier import (
    load_classifier,
    new_classifier,
    read_card,
    save_classifier,
    weights_hash,
)

# torchvision's documentation; PyPI's efficientnet-lite-pytorch for the lite ones; Universal Litmus Patterns'
# published models for the ulp networks
PUBLISHED_SIZES = [
    ("resnet18", 1000, {}, 11_689_512),
    ("resnet34", 1000, {}, 21_797_672),
    ("resnet50", 1000, {}, 25_557_032),
    ("resnext50-32x4d", 1000, {}, 25_028_904),
    ("vgg16", 1000, {}, 138_357_544),
    ("vgg16", 1000, {"batch_norm": True}, 138_365_992),
    ("mobilenet-v2", 1000, {}, 3_504_872),
    ("efficientnet-b0", 1000, {}, 5_288_548),
    ("efficientnet-lite0", 1000, {}, 4_652_008),
    ("efficientnet-lite1", 1000, {}, 5_416_680),
    ("efficientnet-lite2", 1000, {}, 6_092_072),
    ("efficientnet-lite3", 1000, {}, 8_197_096),
    ("efficientnet-lite4", 1000, {}, 13_006_568),
    ("vit-b-16", 1000, {}, 86_567_656),
    ("resnet101", 1000, {}, 44_549_160),
    ("resnet152", 1000, {}, 60_192_808),
    ("wide-resnet50-2", 1000, {}, 68_883_240),
    ("wide-resnet101-2", 1000, {}, 126_886_696),
    ("resnext101-32x8d", 1000, {}, 88_791_336),
    ("resnext101-64x4d", 1000, {}, 83_455_272),
    ("vgg11", 1000, {}, 132_863_336),
    ("vgg13", 1000, {}, 133_047_848),
    ("vgg19", 1000, {}, 143_667_240),
    ("vgg11", 1000, {"batch_norm": True}, 132_868_840),
    ("alexnet", 1000, {}, 61_100_840),
    ("densenet121", 1000, {}, 7_978_856),
    ("densenet161", 1000, {}, 28_681_000),
    ("densenet169", 1000, {}, 14_149_480),
    ("densenet201", 1000, {}, 20_013_928),
    ("googlenet", 1000, {}, 6_624_904),
    ("inception-v3", 1000, {}, 27_161_264 - 3_326_696),  # without the auxiliary head
    ("squeezenet1-0", 1000, {}, 1_248_424),
    ("squeezenet1-1", 1000, {}, 1_235_496),
    ("shufflenet-v2-x0-5", 1000, {}, 1_366_792),
    ("shufflenet-v2-x1-0", 1000, {}, 2_278_604),
    ("shufflenet-v2-x1-5", 1000, {}, 3_503_624),
    ("shufflenet-v2-x2-0", 1000, {}, 7_393_996),
    ("regnet-x-400mf", 1000, {}, 5_495_976),
    ("regnet-x-800mf", 1000, {}, 7_259_656),
    ("regnet-x-1-6gf", 1000, {}, 9_190_136),
    ("regnet-x-3-2gf", 1000, {}, 15_296_552),
    ("regnet-x-8gf", 1000, {}, 39_572_648),
    ("regnet-x-16gf", 1000, {}, 54_278_536),
    ("regnet-x-32gf", 1000, {}, 107_811_560),
    ("regnet-y-400mf", 1000, {}, 4_344_144),
    ("regnet-y-800mf", 1000, {}, 6_432_512),
    ("regnet-y-1-6gf", 1000, {}, 11_202_430),
    ("regnet-y-3-2gf", 1000, {}, 19_436_338),
    ("regnet-y-8gf", 1000, {}, 39_381_472),
    ("regnet-y-16gf", 1000, {}, 83_590_140),
    ("regnet-y-32gf", 1000, {}, 145_046_770),
    ("regnet-y-128gf", 1000, {}, 644_812_894),
    ("mobilenet-v3-large", 1000, {}, 5_483_032),
    ("mobilenet-v3-small", 1000, {}, 2_542_856),
    ("mnasnet0-5", 1000, {}, 2_218_512),
    ("mnasnet0-75", 1000, {}, 3_170_208),
    ("mnasnet1-0", 1000, {}, 4_383_312),
    ("mnasnet1-3", 1000, {}, 6_282_256),
    ("efficientnet-b1", 1000, {}, 7_794_184),
    ("efficientnet-b2", 1000, {}, 9_109_994),
    ("efficientnet-b3", 1000, {}, 12_233_232),
    ("efficientnet-b4", 1000, {}, 19_341_616),
    ("efficientnet-b5", 1000, {}, 30_389_784),
    ("efficientnet-b6", 1000, {}, 43_040_704),
    ("efficientnet-b7", 1000, {}, 66_347_960),
    ("efficientnet-v2-s", 1000, {}, 21_458_488),
    ("efficientnet-v2-m", 1000, {}, 54_139_356),
    ("efficientnet-v2-l", 1000, {}, 118_515_272),
    ("convnext-tiny", 1000, {}, 28_589_128),
    ("convnext-small", 1000, {}, 50_223_688),
    ("convnext-base", 1000, {}, 88_591_464),
    ("convnext-large", 1000, {}, 197_767_336),
    ("swin-t", 1000, {}, 28_288_354),
    ("swin-s", 1000, {}, 49_606_258),
    ("swin-b", 1000, {}, 87_768_224),
    ("swin-v2-t", 1000, {}, 28_351_570),
    ("swin-v2-s", 1000, {}, 49_737_442),
    ("swin-v2-b", 1000, {}, 87_930_848),
    ("vit-b-32", 1000, {}, 88_224_232),
    ("vit-l-16", 1000, {}, 304_326_632),
    ("vit-l-32", 1000, {}, 306_535_400),
    ("vit-h-14", 1000, {}, 632_045_800),
    ("deit-ti-16", 1000, {}, 5_717_416),
    ("deit-s-16", 1000, {}, 22_050_664),
    ("deit-s-16-distilled", 1000, {}, 22_436_432),
    ("deit-b-16-distilled", 1000, {}, 87_338_192),
    ("ulp-vgg", 10, {}, 988_554),
    ("ulp-resnet18", 200, {}, 5_000_712),
    ("preact-resnet18", 10, {}, 11_171_146),
    ("input-aware-cnn", 10, {}, 582_026),
]

PUBLISHED_NAMES = {
    "resnet18": (
        122,
        ("conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight"),
    ),
    "resnet50": (320, ("layer1.0.conv3.weight", "layer4.2.bn3.num_batches_tracked", "fc.bias")),
    "resnext50-32x4d": (320, ("layer1.0.downsample.1.running_mean", "fc.weight")),
    "vgg16": (32, ("features.0.weight", "features.28.bias", "classifier.0.weight", "classifier.6.bias")),
    "mobilenet-v2": (
        314,
        (
            "features.0.0.weight",
            "features.1.conv.0.0.weight",
            "features.1.conv.1.weight",
            "features.1.conv.2.bias",
        )
        + (
            "features.2.conv.1.0.weight",
            "features.17.conv.3.running_var",
            "features.18.1.bias",
            "classifier.1.bias",
        ),
    ),
    "efficientnet-b0": (
        360,
        ("features.0.0.weight", "features.1.0.block.0.0.weight", "features.1.0.block.1.fc1.weight")
        + ("features.2.0.block.2.fc2.bias", "features.7.0.block.3.1.running_mean", "classifier.1.weight"),
    ),
    "vit-b-16": (
        152,
        ("class_token", "conv_proj.bias", "encoder.pos_embedding", "encoder.ln.weight", "heads.head.weight")
        + (
            "encoder.layers.encoder_layer_0.ln_1.weight",
            "encoder.layers.encoder_layer_3.self_attention.in_proj_bias",
        )
        + ("encoder.layers.encoder_layer_11.self_attention.out_proj.weight",)
        + ("encoder.layers.encoder_layer_11.mlp.0.weight", "encoder.layers.encoder_layer_11.mlp.3.bias"),
    ),
}


def small_classifier(seed: int = 0, **options: object) -> Classifier:
    return new_classifier(
        "small-cnn",
        image_shape=(1, 8, 8),
        class_names=("a", "b", "c"),
        mean=[0.3],
        std=[0.2],
        options=options,
        seed=seed,
    )


@pytest.mark.parametrize(("name", "num_classes", "options", "size"), PUBLISHED_SIZES)
def test_network_has_the_published_number_of_parameters(
    name: str, num_classes: int, options: dict[str, object], size: int
) -> None:
    network = outline(name, num_classes=num_classes, image_shape=ARCHITECTURES[name].image_shape, **options)
    assert sum(parameter.numel() for parameter in network.parameters()) == size


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_state_dict_has_torchvision_names(name: str) -> None:
    count, names = PUBLISHED_NAMES[name]
    state = outline(name, num_classes=1000, image_shape=(3, 224, 224)).state_dict()
    assert len(state) == count
    assert set(names) <= state.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_maps_images_to_one_logit_per_class(name: str) -> None:
    shape = ARCHITECTURES[name].image_shape
    network = outline(name, num_classes=7, image_shape=shape).eval()
    assert network(torch.empty(2, *shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 30), (1, 28, 28)])
def test_small_cnn_takes_any_image_from_8x8(shape: tuple[int, int, int]) -> None:
    assert build("small-cnn", num_classes=4, image_shape=shape)(torch.rand(2, *shape)).shape == (2, 4)


def test_small_cnn_refuses_7x7_images() -> None:
    with pytest.raises(ValueError, match="at least 8x8 pixels, got 7x7"):
        build("small-cnn", num_classes=4, image_shape=(1, 7, 7))


def test_grouped_stem_gives_every_map_its_own_filters() -> None:
    stem = nn.Conv2d(12, 4, 3, padding=1, groups=4, bias=False)
    network = build("resnext50-32x4d", num_classes=2, image_shape=(12, 32, 32), stem=stem).eval()
    maps = torch.rand(1, 12, 32, 32)
    changed = maps.clone()
    changed[:, :3] = 0
    difference = (network.conv1(maps) - network.conv1(changed)).abs().amax((0, 2, 3))
    assert difference[0] > 0 and not difference[1:].any()
    assert network(maps).shape == (1, 2)


def test_preactivation_shortcut_starts_after_the_first_normalisation() -> None:
    network = build("preact-resnet18", num_classes=2, image_shape=(3, 32, 32))
    block = network.layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    images = torch.randn(1, 64, 8, 8)
    expected = block.downsample(torch.relu(images / (1 + 1e-5) ** 0.5))
    assert torch.allclose(block(images), expected, atol=1e-6)


def test_mobilenet_adds_the_input_only_where_shapes_stay() -> None:
    features = outline("mobilenet-v2", num_classes=2, image_shape=(3, 224, 224)).features
    assert [index for index in range(1, 18) if features[index].skip] == [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]


def test_efficientnet_lite_pads_like_tensorflow_below_and_right_first() -> None:
    network = build("efficientnet-lite0", num_classes=2, image_shape=(3, 8, 8))
    nn.init.ones_(network._conv_stem.weight)
    counted = network._conv_stem(torch.ones(1, 3, 8, 8))[0, 0] / 3  # pixels under each 3x3 window
    assert counted.tolist() == [[9, 9, 9, 6]] * 3 + [[6, 6, 6, 4]]
    assert network._conv_stem(torch.ones(1, 3, 9, 9))[0, 0, 0].tolist() == [12, 18, 18, 18, 12]


def test_efficientnet_lite_weights_are_recognised_by_their_blocks() -> None:
    for size, side in enumerate((224, 240, 260, 280, 300)):
        name = f"efficientnet-lite{size}"
        found = identify(outline(name, num_classes=9, image_shape=(3, 64, 64)).state_dict())
        assert (found.name, found.num_classes, found.image_shape) == (name, 9, (3, side, side))


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'lenin': take one of small-cnn"):
        build("lenin", num_classes=2, image_shape=(3, 32, 32))


def test_options_outside_the_list_are_refused() -> None:
    with pytest.raises(ValueError, match=r"resnet18 has no options \['layers'\]"):
        build("resnet18", num_classes=2, image_shape=(3, 32, 32), layers=[9, 9, 9, 9])


def test_same_seed_gives_same_weights_and_leaves_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = small_classifier(3), small_classifier(3), small_classifier(4)
    assert weights_hash(first) == weights_hash(second) != weights_hash(other)
    assert torch.equal(torch.get_rng_state(), before)


def test_classifier_comes_back_from_its_folder(tmp_path: Path) -> None:
    model = small_classifier(widths=[4, 6], hidden=5).eval()
    loaded = load_classifier(save_classifier(model, tmp_path / "deep" / "model", trojaned=True))
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert loaded.class_names == ("a", "b", "c") and loaded.image_shape == (1, 8, 8)
    assert loaded.architecture == {"name": "small-cnn", "options": {"widths": [4, 6], "hidden": 5}}
    assert weights_hash(loaded) == weights_hash(model) and not loaded.training


def test_answer_on_the_card_does_not_reach_the_classifier(tmp_path: Path) -> None:
    folder = save_classifier(small_classifier(), tmp_path / "m", attack={"target": 2}, trojan_accuracy=0.99)
    assert read_card(folder)["attack"] == {"target": 2}
    assert "target" not in str(vars(load_classifier(folder)))


def test_saving_replaces_the_classifier_that_was_there(tmp_path: Path) -> None:
    triggers = {"trigger.safetensors": {"mask": torch.rand(1, 4).expand(3, 4)}}
    save_classifier(small_classifier(0), tmp_path / "m", extra_tensors=triggers)
    assert (tmp_path / "m" / "trigger.safetensors").is_file()
    save_classifier(small_classifier(1), tmp_path / "m")
    assert weights_hash(load_classifier(tmp_path / "m")) == weights_hash(small_classifier(1))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["card.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_failed_save_leaves_the_old_classifier(tmp_path: Path) -> None:
    save_classifier(small_classifier(0), tmp_path / "m")
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_classifier(small_classifier(1), tmp_path / "m", metrics=torch.rand(2))
    assert weights_hash(load_classifier(tmp_path / "m")) == weights_hash(small_classifier(0))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_saving_never_overwrites_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="is not a classifier folder"):
        save_classifier(small_classifier(), tmp_path / "photos")


@pytest.mark.parametrize(
    "change", ["weight", "mean", "name"], ids=["one weight", "the normalisation", "the name of a tensor"]
)
def test_weights_hash_sees(change: str) -> None:
    model, changed = small_classifier(), small_classifier()
    if change == "weight":
        with torch.no_grad():
            changed.network.head[3].bias[0] += 1e-3
    elif change == "mean":
        changed.mean += 0.1
    else:
        changed.network.add_module("tail", changed.network.head)
        del changed.network.head
    assert weights_hash(changed) != weights_hash(model)


def test_weights_hash_ignores_the_memory_layout() -> None:
    model, other = small_classifier(), small_classifier()
    assert weights_hash(other.to(memory_format=torch.channels_last)) == weights_hash(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", ["a", "b"]),
        ("class_names", "abc"),
        ("image_shape", [1, 16, 16]),
        ("image_shape", [1, 8]),
        ("image_shape", [1, 8, "8"]),
        ("mean", [float("nan")]),
        ("std", [0.0]),
        ("architecture", {"name": "resnet18"}),
        ("architecture", {"name": "small-cnn", "options": {"hidden": "many"}}),
        ("architecture", ["small-cnn"]),
    ],
)
def test_card_that_does_not_fit_its_weights_is_an_error(tmp_path: Path, key: str, value: object) -> None:
    folder = save_classifier(small_classifier(), tmp_path / "m")
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {key: value}))
    with pytest.raises(ValueError, match="card does not describe|std must be positive|unpack"):
        load_classifier(folder)
