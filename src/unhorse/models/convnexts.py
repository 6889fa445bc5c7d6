"""ConvNeXt (Liu et al., CVPR 2022), named as in torchvision."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from unhorse.models.layers import LayerNorm2d, Permute, require_depths, require_widths
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Naming, Signs, State, assumed


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution and two layers over the channels, scaled and added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(nn.Conv2d(width, width, 7, padding=3, groups=width), Permute(0, 2, 3, 1)),
            *(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU()),
            *(nn.Linear(4 * width, width), Permute(0, 3, 1, 2)),
        )
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layer_scale * self.block(maps)


class ConvNeXt(nn.Module):
    """Four stages of `depths` blocks, of `width`, twice, four and eight times that."""

    def __init__(
        self, num_classes: int, image_shape: ImageShape, *, depths: tuple[int, ...], width: int
    ) -> None:
        super().__init__()
        stem = nn.Conv2d(image_shape[0], width, 4, stride=4)
        layers: list[nn.Module] = [nn.Sequential(stem, LayerNorm2d(width, eps=1e-6))]
        for place, depth in enumerate(depths):
            if place:
                halving = nn.Conv2d(width, 2 * width, 2, stride=2)
                layers.append(nn.Sequential(LayerNorm2d(width, eps=1e-6), halving))
                width *= 2
            layers.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            LayerNorm2d(width, eps=1e-6), nn.Flatten(), nn.Linear(width, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3), keepdim=True))


def _reader(depths: tuple[int, ...], width: int) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        stages = enumerate(depths)
        require_depths(
            state, {f"features.{2 * place + 1}.{{}}.block.0.weight": depth for place, depth in stages}
        )
        require_widths(state, {"features.0.0.weight": width})
        return {}

    return read


def _scaled(state: State) -> State:
    """The stages in the odd places, what halves between them, and the scale as maps of one pixel."""
    renamed = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(stage|halving)(\d)\.(.+)", name):
            name = f"features.{2 * int(match[2]) + (match[1] == 'stage')}.{match[3]}"
        renamed[name] = (
            tensor[:, None, None] if name.endswith("layer_scale") and tensor.dim() == 1 else tensor
        )
    return renamed


_TIMM = Naming(
    (
        *((r"^stem\.", "halving0."), (r"^stages\.(\d)\.downsample\.", r"halving\1.")),
        *((r"^stages\.(\d)\.blocks\.", r"stage\1."), (r"\.gamma$", ".layer_scale")),
        *((r"\.conv_dw\.", ".block.0."), (r"(stage\d\.\d+)\.norm\.", r"\1.block.2.")),
        *((r"\.mlp\.fc1\.", ".block.3."), (r"\.mlp\.fc2\.", ".block.5.")),
        *((r"^head\.norm\.", "classifier.0."), (r"^head\.fc\.", "classifier.2.")),
    ),
    _scaled,
)
_PAPER = Naming(
    (
        *(
            (r"^downsample_layers\.", "halving"),
            (r"^stages\.(\d)\.", r"stage\1."),
            (r"\.gamma$", ".layer_scale"),
        ),
        *((r"\.dwconv\.", ".block.0."), (r"(stage\d\.\d+)\.norm\.", r"\1.block.2.")),
        *((r"\.pwconv1\.", ".block.3."), (r"\.pwconv2\.", ".block.5.")),
        *((r"^norm\.", "classifier.0."), (r"^head\.", "classifier.2.")),
    ),
    _scaled,
)


def _convnext(width: int, *depths: int) -> Architecture:
    signs = Signs(
        *("features.0.0.weight", "classifier.2.weight", assumed(224), _reader(depths, width)),
        *((_TIMM, _PAPER), ("features.7.0.layer_scale",)),
    )
    network = partial(ConvNeXt, depths=depths, width=width)
    return Architecture(network, (3, 224, 224), signs, IMAGENET, family="convnext")


CONVNEXTS = {
    "convnext-tiny": _convnext(96, 3, 3, 9, 3),
    "convnext-small": _convnext(96, 3, 3, 27, 3),
    "convnext-base": _convnext(128, 3, 3, 27, 3),
    "convnext-large": _convnext(192, 3, 3, 27, 3),
    "convnext-xlarge": _convnext(256, 3, 3, 27, 3),
}
