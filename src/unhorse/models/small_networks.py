"""Small classifiers, each a Sequential of `features` and `head`: our own, two MNIST networks, ULP's VGG."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from unhorse.models.registry import Architecture, ImageShape, Naming, Normal, Signs, State, assumed, fixed


def small_cnn(
    num_classes: int, image_shape: ImageShape, *, widths: Sequence[int] = (16, 32), hidden: int = 64
) -> nn.Module:
    """Two convolutions, two linear layers, images of 8x8 pixels and more: the classifier of our own zoos."""
    channels, height, width = image_shape
    if min(height, width) < 8:
        raise ValueError(f"small-cnn needs images of at least 8x8 pixels, got {height}x{width}: enlarge them")
    first, second = widths
    features = (
        *(nn.Conv2d(channels, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    )
    pixels = (height // 4) * (width // 4)
    return _classifier(
        features, (nn.Linear(second * pixels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    )


def input_aware_cnn(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """The MNIST classifier of Input-Aware Dynamic Backdoor Attack (Nguyen and Tran, NeurIPS 2020)."""
    channels = _channels_of(image_shape, "input-aware-cnn", sides=(28,))
    features: list[nn.Module] = []
    for wide_in, wide_out in ((channels, 32), (32, 64)):
        features += [nn.Conv2d(wide_in, wide_out, 5), nn.ReLU(), nn.Dropout(0.1), nn.MaxPool2d(2)]
    head = (nn.Linear(64 * 4 * 4, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, num_classes))
    return _classifier(features, head)


def wanet_cnn(num_classes: int, image_shape: ImageShape) -> nn.Module:
    """The MNIST classifier of WaNet (Nguyen and Tran, ICLR 2021): strided convolutions instead of pooling.

    Images of 28x28, or of 32x32, where the last convolution gives 4x4 maps as well.
    """
    channels = _channels_of(image_shape, "wanet-cnn", sides=(28, 32))
    features: list[nn.Module] = [nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.ReLU()]
    for width in (32, 64):
        features += [
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 64, 3, stride=2, padding=1, bias=False),
        ]
    head = (nn.Linear(64 * 4 * 4, 512), nn.ReLU(), nn.Dropout(0.3), nn.Linear(512, num_classes))
    return _classifier(features, head)


def ulp_vgg(num_classes: int, image_shape: ImageShape, *, width: int = 64) -> nn.Module:
    """The modified VGG of Universal Litmus Patterns (Kolouri et al., CVPR 2020), for 32x32 images.

    The published networks take pixels in 0..255: give the classifier mean 0 and std 1/255.
    """
    channels = _channels_of(image_shape, "ulp-vgg", sides=(32,))
    features: list[nn.Module] = []
    for index in range(6):
        wide_in = width if index else channels
        features += [nn.Conv2d(wide_in, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU()]
        if index % 2:
            features.append(nn.MaxPool2d(2))
    head: list[nn.Module] = []
    for wide_in, wide_out in ((width * 4 * 4, 384), (384, 192)):
        head += [nn.Linear(wide_in, wide_out), nn.BatchNorm1d(wide_out), nn.ReLU(), nn.Dropout(0.2)]
    return _classifier(features, [*head, nn.Linear(192, num_classes)])


def _classifier(features: Sequence[nn.Module], head: Sequence[nn.Module]) -> nn.Module:
    parts = {"features": nn.Sequential(*features), "head": nn.Sequential(nn.Flatten(), *head)}
    return nn.Sequential(OrderedDict[str, nn.Module](parts))


def _channels_of(image_shape: ImageShape, name: str, *, sides: Sequence[int]) -> int:
    channels, height, width = image_shape
    if height != width or height not in sides:
        taken = " or ".join(f"{side}x{side}" for side in sides)
        raise ValueError(f"{name} takes {taken} images, got {height}x{width}: resize them or take small-cnn")
    return channels


def _small_cnn_side(state: State) -> tuple[int, bool]:
    pixels = state["head.1.weight"].shape[1] // state["features.3.weight"].shape[0]
    # two poolings round down: 28 to 31 pixels leave the same 7x7 map
    return 4 * math.isqrt(pixels), False


def _small_cnn_options(state: State) -> dict[str, object]:
    widths = [state["features.0.weight"].shape[0], state["features.3.weight"].shape[0]]
    return {"widths": widths, "hidden": state["head.1.weight"].shape[0]}


def _ulp_options(state: State) -> dict[str, object]:
    width = len(state["features.0.weight"])
    return {} if width == 64 else {"width": width}


_INPUT_AWARE = Naming(
    (
        *((r"^conv1\.", "features.0."), (r"^conv5\.", "features.4.")),
        *((r"^linear6\.", "head.1."), (r"^linear9\.", "head.4.")),
    )
)
_WANET = Naming(
    (
        *((r"^conv1\.", "features.0."), (r"^layer2\.bn1\.", "features.2.")),
        *((r"^layer2\.conv1\.", "features.4."), (r"^layer3\.bn1\.", "features.5.")),
        *((r"^layer3\.conv1\.", "features.7."), (r"^linear6\.", "head.1."), (r"^linear9\.", "head.4.")),
    )
)
_ULP = Naming(tuple((rf"^fc\.{index}\.", f"head.{index + 1}.") for index in (0, 1, 4, 5, 8)))

SMALL_NETWORKS = {
    "small-cnn": Architecture(
        small_cnn,
        (1, 28, 28),
        Signs("features.0.weight", "head.3.weight", _small_cnn_side, _small_cnn_options),
        options=("widths", "hidden"),
    ),
    "input-aware-cnn": Architecture(
        input_aware_cnn,
        (1, 28, 28),
        Signs("features.0.weight", "head.4.weight", fixed(28), namings=(_INPUT_AWARE,)),
    ),
    "wanet-cnn": Architecture(
        wanet_cnn, (1, 28, 28), Signs("features.0.weight", "head.4.weight", assumed(28), namings=(_WANET,))
    ),
    "ulp-vgg": Architecture(
        ulp_vgg,
        (3, 32, 32),
        Signs("features.0.weight", "head.9.weight", fixed(32), _ulp_options, (_ULP,)),
        Normal(std=(1 / 255,)),
        ("width",),
    ),
}
