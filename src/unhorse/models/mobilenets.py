"""MobileNetV2 (Sandler et al., 2018), V3 (Howard et al., 2019), MNASNet (Tan et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from unhorse.models.layers import Residual, SqueezeExcitation, convolution, multiple_of_8, require_widths
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Naming, Signs, State, assumed
from unhorse.models.timm_blocks import staged_blocks

# expansion, width, repeats and stride of the stages
_SECOND = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
# kernel size, inner width, width, squeeze-excitation, hard swish and stride of the blocks
_LARGE = (
    *((3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1)),
    *((5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1)),
    *((3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1)),
    *((3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1)),
    *((5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
)
_SMALL = (
    *((3, 16, 16, True, False, 2), (3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1)),
    *((5, 96, 40, True, True, 2), (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1)),
    *((5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1), (5, 288, 96, True, True, 2)),
    *((5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1)),
)
# kernel size, stride, expansion, width and repeats of MNASNet's stages
_MNAS = (
    *((3, 2, 3, 24, 3), (5, 2, 3, 40, 3), (5, 2, 6, 80, 3)),
    *((3, 1, 6, 96, 2), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)


class MobileNetV2(nn.Module):
    """MobileNetV2 of the usual width."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(image_shape[0], 32, 3, stride=2, activation=nn.ReLU6)]
        wide = 32
        for expansion, width, repeats, stride in _SECOND:
            for index in range(repeats):
                layers.append(self._block(wide, width, stride=1 if index else stride, expansion=expansion))
                wide = width
        layers.append(convolution(wide, 1280, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    @staticmethod
    def _block(wide: int, width: int, *, stride: int, expansion: int) -> nn.Module:
        inner = wide * expansion
        layers = [convolution(wide, inner, 1, activation=nn.ReLU6)] if expansion > 1 else []
        layers.append(convolution(inner, inner, 3, stride=stride, groups=inner, activation=nn.ReLU6))
        # torchvision keeps the projection and its normalisation as two entries of this list
        projection = (nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        return Residual("conv", nn.Sequential(*layers, *projection), skip=stride == 1 and wide == width)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class MobileNetV3(nn.Module):
    """MobileNetV3 of the usual width; `eps` is of the batch normalisations, `same` TensorFlow's padding."""

    def __init__(  # noqa: PLR0913 (one class for the whole family)
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        blocks: tuple[tuple[int, int, int, bool, bool, int], ...],
        hidden: int,
        eps: float = 1e-3,
        same: bool = False,
    ) -> None:
        super().__init__()
        convolve = partial(convolution, eps=float(eps), same=bool(same))
        layers: list[nn.Module] = [convolve(image_shape[0], 16, 3, stride=2, activation=nn.Hardswish)]
        wide = 16
        for size, inner, width, squeeze, swish, stride in blocks:
            kind = nn.Hardswish if swish else nn.ReLU
            block = [convolve(wide, inner, 1, activation=kind)] if inner != wide else []
            block.append(convolve(inner, inner, size, stride=stride, groups=inner, activation=kind))
            parts: list[nn.Module] = [
                *block,
                *([_squeeze(inner)] if squeeze else []),
                convolve(inner, width, 1),
            ]
            layers.append(Residual("block", nn.Sequential(*parts), skip=stride == 1 and wide == width))
            wide = width
        layers.append(convolve(wide, 6 * wide, 1, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            *(nn.Linear(6 * wide, hidden), nn.Hardswish(), nn.Dropout(0.2)), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def _squeeze(width: int) -> nn.Module:
    squeezed = multiple_of_8(width // 4)
    return SqueezeExcitation(width, squeezed, activation=nn.ReLU, gate=nn.Hardsigmoid)


class MNASNet(nn.Module):
    """MNASNet-A1 without squeeze-excitation; `wide` scales all widths but the last."""

    def __init__(self, num_classes: int, image_shape: ImageShape, *, wide: float) -> None:
        super().__init__()
        stem, first = multiple_of_8(32 * wide), multiple_of_8(16 * wide)
        layers: list[nn.Module] = [
            *convolution(image_shape[0], stem, 3, stride=2, activation=nn.ReLU),
            *convolution(stem, stem, 3, groups=stem, activation=nn.ReLU),
            *convolution(stem, first, 1),
        ]
        before = first
        for size, stride, expansion, width, repeats in _MNAS:
            after, blocks = multiple_of_8(width * wide), []
            for index in range(repeats):
                blocks.append(
                    self._block(before, after, size, stride=1 if index else stride, expansion=expansion)
                )
                before = after
            layers.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*layers, *convolution(before, 1280, 1, activation=nn.ReLU))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    @staticmethod
    def _block(before: int, after: int, size: int, *, stride: int, expansion: int) -> nn.Module:
        inner = before * expansion
        parts = (
            *convolution(before, inner, 1, activation=nn.ReLU),
            *convolution(inner, inner, size, stride=stride, groups=inner, activation=nn.ReLU),
            *convolution(inner, after, 1),
        )
        return Residual("layers", nn.Sequential(*parts), skip=stride == 1 and before == after)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.layers(images).mean((2, 3)))


def _timm_second(state: State) -> State:
    blocks = [block for _, _, block in staged_blocks(state)]
    renamed = {}
    for number, block in enumerate(blocks, 1):
        last = max(int(name.partition(".")[0]) for name in block)
        for name, tensor in block.items():
            entry, kind, leaf = name.split(".")
            place = f"{entry}.{kind}" if int(entry) < last else str(last + int(kind))
            renamed[f"features.{number}.conv.{place}.{leaf}"] = tensor
    head = len(blocks) + 1
    rest = {"conv_head": f"features.{head}.0", "bn2": f"features.{head}.1", "classifier": "classifier.1"}
    return {**renamed, **_outside(state, rest)}


def _timm_third(state: State) -> State:
    blocks = [block for _, _, block in staged_blocks(state)]
    renamed = {}
    for number, block in enumerate(blocks, 1):
        inside = "block." if number < len(blocks) else ""
        for name, tensor in block.items():
            # the last is one convolution, which torchvision does not wrap into a block
            renamed[f"features.{number}.{inside}{name if inside else name[2:]}"] = tensor
    rest = _outside(state, {"conv_head": "classifier.0", "classifier": "classifier.3"})
    rest["classifier.0.weight"] = rest["classifier.0.weight"].flatten(1)
    return {**renamed, **rest}


def _outside(state: State, names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors outside the blocks; KeyError where one has no place."""
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1", **names}
    parted = (
        (*name.rpartition(".")[::2], tensor)
        for name, tensor in state.items()
        if not name.startswith("blocks.")
    )
    return {f"{names[layer]}.{leaf}": tensor for layer, leaf, tensor in parted}


def _widths(**widths: int) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        require_widths(state, {name.replace("_", ".") + ".weight": width for name, width in widths.items()})
        return {}

    return read


def _third(blocks: tuple[tuple[int, int, int, bool, bool, int], ...], hidden: int) -> Architecture:
    namings = (Naming(change=_timm_third, options=(("eps", 1e-5),), notes=(_LIKE_TIMM,)),)
    marks = (f"features.{len(blocks) + 1}.0.weight",)
    signs = Signs(
        *("features.0.0.weight", "classifier.3.weight", assumed(224), _widths(classifier_0=hidden)),
        *(namings, marks),
    )
    network = partial(MobileNetV3, blocks=blocks, hidden=hidden)
    return Architecture(network, (3, 224, 224), signs, IMAGENET, ("eps", "same"), "mobilenet")


def _mnas(wide: float) -> Architecture:
    widths = _widths(layers_0=multiple_of_8(32 * wide), layers_6=multiple_of_8(16 * wide))
    marks = ("layers.14.weight", "layers.8.0.layers.0.weight")
    signs = Signs("layers.0.weight", "classifier.1.weight", assumed(224), widths, marks=marks)
    return Architecture(partial(MNASNet, wide=wide), (3, 224, 224), signs, IMAGENET, family="mnasnet")


_LIKE_TIMM = "MD301 padding and eps assumed as in timm's mobilenetv3_*_100, not as in its tf_mobilenetv3_*"
_SIGNS = Signs(
    *("features.0.0.weight", "classifier.1.weight", assumed(224)),
    namings=(Naming(change=_timm_second),),
    marks=("features.18.0.weight", "features.1.conv.0.0.weight"),
)
MOBILENETS = {
    "mobilenet-v2": Architecture(MobileNetV2, (3, 224, 224), _SIGNS, IMAGENET, family="mobilenet"),
    "mobilenet-v3-large": _third(_LARGE, 1280),
    "mobilenet-v3-small": _third(_SMALL, 1024),
}
MNASNETS = {f"mnasnet{wide}".replace(".", "-"): _mnas(wide) for wide in (0.5, 0.75, 1.0, 1.3)}
