"""Small networks from the libraries that people export from, with weights that make every layer matter."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unhorse.models.architectures import ARCHITECTURES, build

os.environ["KERAS_BACKEND"] = "torch"  # before anything imports Keras

CLASSES = 10
BATCH = 2
# of the families of large networks a few small members; tests/test_families.py has the others
_SMALL = {"resnet18", "resnet34", "resnet50", "resnext50-32x4d", "vgg16", "vit-b-16", "mobilenet-v2"}
_SMALL |= {"efficientnet-b0", "mobilenet-v3-small", "squeezenet1-1", "shufflenet-v2-x0-5", "regnet-x-400mf"}
SHAPES: dict[str, tuple[int, int, int]] = {
    name: (3, 64, 64) if known.image_shape[1] > 64 else known.image_shape
    for name, known in ARCHITECTURES.items()
    if name in _SMALL or known.family == "efficientnet-lite" or known.image_shape[1] < 224
} | {"vit-b-16": (3, 32, 32)}
LARGE = ("vgg16", "vit-b-16")  # 300 to 500 MB each
EXPORTED = ("small-cnn", "ulp-vgg", "preact-resnet18", "resnet18", "mobilenet-v2", "efficientnet-b0")


class Outputs(NamedTuple):
    """What a source network answers to `images` (in its own units): `values` (n, k), squashed or not.

    `tells_size` is whether the file says which image size it takes.
    """

    images: Tensor
    values: Tensor
    squashed: str = ""
    tells_size: bool = True


class Recipe(NamedTuple):
    """How to write one file (or folder) `name`; `write` is given its path."""

    name: str
    write: Callable[[Path], Outputs]
    large: bool = False


@torch.no_grad()
def outputs_of(network: nn.Module, shape: tuple[int, int, int], **said: Any) -> Outputs:
    """What a network answers to a few images."""
    images = torch.rand(BATCH, *shape, generator=torch.Generator().manual_seed(7))
    return Outputs(images, network.eval()(images), **said)


def torch_network(name: str) -> nn.Module:
    """One of unhorse's architectures with random weights, in eval mode; equal at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return lively(build(name, num_classes=CLASSES, image_shape=SHAPES[name]))


def lively(network: nn.Module) -> nn.Module:
    """Running statistics as after training, without which a lost batch normalisation would not show."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.7, 1.4)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def keras_network(name: str) -> Any:
    """A Keras model on the torch backend with random weights and statistics."""
    import keras
    import numpy

    keras.utils.set_random_seed(1)
    model = KERAS[name](keras)
    draw = numpy.random.default_rng(1)
    for layer in model._flatten_layers():
        if type(layer).__name__ == "BatchNormalization":
            count = layer.moving_mean.shape[0]
            layer.moving_mean.assign(draw.normal(0, 0.1, count))
            layer.moving_variance.assign(draw.uniform(0.7, 1.4, count))
    return model


def _digits(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *(layers.Conv2D(8, 3, activation="relu"), layers.MaxPooling2D()),
            *(layers.Flatten(), layers.Dense(16, activation="relu"), layers.Dropout(0.5)),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def _residual(keras: Any) -> Any:
    layers, images = keras.layers, keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x)))
    y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.Activation("relu")(layers.Add()([x, y]))
    x = layers.Concatenate()([x, layers.Conv2D(8, 1)(x)])
    return keras.Model(images, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


def _squeezing(keras: Any) -> Any:
    """A block as in EfficientNet: depthwise, squeeze and excitation, swish."""
    layers, images = keras.layers, keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(images)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = layers.DepthwiseConv2D(3, strides=2, padding="valid", use_bias=False)(x)
    gate = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv2D(8, 1, activation="sigmoid")(layers.Conv2D(2, 1, activation="swish")(gate))
    x = layers.LayerNormalization()(layers.Conv2D(16, 1)(layers.Multiply()([x, gate])))
    return keras.Model(images, layers.Dense(CLASSES, activation="softmax")(layers.GlobalMaxPooling2D()(x)))


def _separable(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.1, 0.2, 0.3]),
            *(layers.SeparableConv2D(8, 3, padding="same"), layers.LeakyReLU(), layers.AveragePooling2D(2)),
            *(layers.SpatialDropout2D(0.1), layers.PReLU(shared_axes=[1, 2]), layers.GroupNormalization(2)),
            *(layers.Flatten(), layers.Dense(CLASSES, activation="log_softmax")),
        ]
    )


def _upsampling(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            *(layers.Conv2DTranspose(4, 3), layers.UpSampling2D(), layers.Cropping2D(1), layers.ELU()),
            *(layers.GlobalAveragePooling2D(), layers.Dense(CLASSES)),
        ]
    )


def _augmenting(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            *(layers.RandomFlip(seed=1), layers.RandomRotation(0.1, seed=1)),
            *(layers.Conv2D(4, 3, strides=2, padding="same", kernel_regularizer="l2"), layers.Flatten()),
            *(layers.GaussianNoise(0.1), layers.Dense(CLASSES)),
        ]
    )


def _attending(keras: Any) -> Any:
    layers, images = keras.layers, keras.Input((16, 16, 3))
    x = layers.Reshape((16, 8))(layers.Conv2D(8, 4, strides=4)(images))
    y = layers.LayerNormalization()(x)
    x = layers.Dense(16, activation="gelu")(layers.Add()([x, layers.MultiHeadAttention(2, 4)(y, y)]))
    return keras.Model(images, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


def _mixed(keras: Any) -> Any:
    policy, layers, images = "mixed_float16", keras.layers, keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, activation="relu", dtype=policy)(images)
    x = layers.GlobalAveragePooling2D(dtype=policy)(layers.BatchNormalization(dtype=policy)(x))
    return keras.Model(images, layers.Dense(CLASSES, dtype="float32")(x))


def _nested(keras: Any) -> Any:
    return keras.Sequential([keras.Input((32, 32, 3)), _residual(keras), keras.layers.Softmax()])


def _application(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(keras: Any) -> Any:
        kind = getattr(keras.applications, name)
        return kind(input_shape=(32, 32, 3), weights=None, classes=CLASSES, **options)

    return make


KERAS: dict[str, Callable[[Any], Any]] = {
    **{"digits": _digits, "residual": _residual, "squeezing": _squeezing, "separable": _separable},
    **{"upsampling": _upsampling, "augmenting": _augmenting, "attending": _attending, "nested": _nested},
    "mixed": _mixed,
    "mobilenet-v2": _application("MobileNetV2", alpha=0.35),
    "efficientnet-b0": _application("EfficientNetB0"),
    "resnet50": _application("ResNet50"),
}

_TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTConfig", _TINY | {"intermediate_size": 32}),
    "deit": ("DeiTConfig", _TINY | {"intermediate_size": 32}),
    "beit": ("BeitConfig", _TINY | {"intermediate_size": 32, "use_relative_position_bias": True}),
    "data2vec-vision": ("Data2VecVisionConfig", _TINY | {"intermediate_size": 32}),
    "dinov2": ("Dinov2Config", _TINY),
    "resnet": ("ResNetConfig", _STAGES | {"embedding_size": 8, "layer_type": "basic"}),
    "regnet": ("RegNetConfig", _STAGES | {"embedding_size": 8, "groups_width": 4}),
    "convnext": ("ConvNextConfig", _STAGES | {"num_stages": 2}),
    "convnextv2": ("ConvNextV2Config", _STAGES | {"num_stages": 2}),
    "swin": ("SwinConfig", {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}),
    "swinv2": ("Swinv2Config", {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}),
    "mobilenet_v1": ("MobileNetV1Config", {"depth_multiplier": 0.25}),
    "mobilenet_v2": ("MobileNetV2Config", {"depth_multiplier": 0.35}),
    "efficientnet": (
        "EfficientNetConfig",
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    ),
    "bit": ("BitConfig", {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 8, "num_groups": 4}),
    "focalnet": ("FocalNetConfig", {"embed_dim": 8, "depths": [1, 1]}),
    "poolformer": ("PoolFormerConfig", _FOUR),
    "pvt": ("PvtConfig", _FOUR | {"num_labels": CLASSES, "num_attention_heads": [1, 1, 2, 2]}),
    "segformer": ("SegformerConfig", _FOUR | {"num_attention_heads": [1, 1, 2, 2]}),
    "levit": (
        "LevitConfig",
        {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]}
        | {"key_dim": [8, 8, 8], "image_size": 64},
    ),
}


def transformers_network(name: str) -> nn.Module:
    """A tiny image classifier of transformers, with a configuration that names its classes."""
    import transformers

    kind, options = TRANSFORMERS[name]
    names = {index: f"kind {index}" for index in range(CLASSES)}
    config = getattr(transformers, kind)(**{"image_size": 32, **options}, id2label=names)
    known: Any = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return lively((known[0] if isinstance(known, tuple) else known)(config))
