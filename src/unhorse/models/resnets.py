"""The ResNet family (He et al., CVPR 2016), with the state-dict names of torchvision, and a small one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from unhorse.models.layers import require_depths
from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Naming, Signs, State, assumed


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1
    pre_activation = False

    def __init__(
        self, wide_in: int, width: int, stride: int, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(wide_in, width, stride)

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        return F.relu(out + (images if self.downsample is None else self.downsample(images)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt; it carries the stride) and 1x1 convolutions."""

    expansion = 4
    pre_activation = False

    def __init__(
        self, wide_in: int, width: int, stride: int, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        inner, wide_out = width * width_per_group // 64 * groups, width * self.expansion
        self.conv1 = nn.Conv2d(wide_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, wide_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide_out)
        self.downsample = _shortcut(wide_in, wide_out, stride)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (images if self.downsample is None else self.downsample(images)))


class PreActBlock(nn.Module):
    """A basic block with normalisation and ReLU before each convolution (He et al., ECCV 2016)."""

    expansion = 1
    pre_activation = True

    def __init__(
        self, wide_in: int, width: int, stride: int, groups: int = 1, width_per_group: int = 64
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(wide_in)
        self.conv1 = nn.Conv2d(wide_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        shortcut = _shortcut(wide_in, width, stride)
        self.downsample = None if shortcut is None else shortcut[:1]

    def forward(self, images: Tensor) -> Tensor:
        active = F.relu(self.bn1(images))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (images if self.downsample is None else self.downsample(active))


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, average pool, linear layer.

    `stem` replaces the first convolution (signature scanners give one that is grouped by map); without it
    `small_stem` chooses 3x3 stride 1 over 7x7 stride 2. `pool_to` is the side of the pooled map.
    """

    def __init__(  # noqa: PLR0913 (one class for the whole family)
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        block: type[BasicBlock] | type[Bottleneck] | type[PreActBlock],
        layers: Sequence[int],
        groups: int = 1,
        width_per_group: int = 64,
        stem: nn.Conv2d | None = None,
        small_stem: bool = False,
        max_pool: bool = True,
        pool_to: int = 1,
    ) -> None:
        super().__init__()
        size, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = stem or nn.Conv2d(image_shape[0], 64, size, stride=stride, padding=size // 2, bias=False)
        wide = self.conv1.out_channels
        self.bn1 = nn.Identity() if block.pre_activation else nn.BatchNorm2d(wide)
        self.relu = nn.Identity() if block.pre_activation else nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if max_pool else nn.Identity()
        stages = []
        for stage, depth in enumerate(layers):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(block(wide, 64 * 2**stage, stride, groups, width_per_group))
                wide = 64 * 2**stage * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(pool_to)
        self.fc = nn.Linear(wide * pool_to**2, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        out = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(self.avgpool(out).flatten(1))


def small_resnet(
    num_classes: int, image_shape: ImageShape, *, widths: Sequence[int] = (16, 32, 64)
) -> nn.Module:
    """A strided convolution, a basic block per width, each after the first halving the image, and one linear
    layer behind the mean: 3.1 MMAC for 32x32 images.
    """
    before = (widths[0], *widths)
    blocks = [
        BasicBlock(wide_in, width, 1 + (index > 0))
        for index, (wide_in, width) in enumerate(zip(before, widths, strict=False))
    ]
    stem = nn.Conv2d(image_shape[0], widths[0], 3, stride=2, padding=1, bias=False)
    features = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(), *blocks)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
    return nn.Sequential(OrderedDict[str, nn.Module](features=features, head=head))


def _shortcut(wide_in: int, wide_out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and wide_in == wide_out:
        return None
    return nn.Sequential(nn.Conv2d(wide_in, wide_out, 1, stride=stride, bias=False), nn.BatchNorm2d(wide_out))


def _side(state: State) -> tuple[int, bool]:
    return (32 if _has_small_stem(state) else 224), False


def _options(state: State) -> dict[str, object]:
    return {"small_stem": True, "max_pool": False} if _has_small_stem(state) else {}


def _has_small_stem(state: State) -> bool:
    return state["conv1.weight"].shape[-1] == 3


def _small_resnet_options(state: State) -> dict[str, object]:
    blocks = [name for name in state if name.endswith(".conv2.weight")]
    return {"widths": [len(state[name]) for name in sorted(blocks)]}


# The networks of the small-image code bases call torchvision's downsample "shortcut" and its fc "linear".
_CIFAR = Naming(((r"\bshortcut\.", "downsample."), (r"^linear\.", "fc.")))
_RESNET18 = partial(ResNet, block=BasicBlock, layers=(2, 2, 2, 2))
_RESNET50 = partial(ResNet, block=Bottleneck, layers=(3, 4, 6, 3))
_RESNET101 = partial(ResNet, block=Bottleneck, layers=(3, 4, 23, 3))
# for images of 32 and 64 pixels, of which the ImageNet stem would leave too little
_NO_REDUCTION: dict[str, Any] = {"small_stem": True, "max_pool": False}


def _signs(side: int, *namings: Naming) -> Signs:
    return Signs("conv1.weight", "fc.weight", assumed(side), namings=namings)


def _reader(network: partial[ResNet]) -> Callable[[State], dict[str, object]]:
    """Reads the options; ValueError where the blocks are others than those of the network."""
    bottleneck = network.keywords["block"] is Bottleneck

    def read(state: State) -> dict[str, object]:
        depths = enumerate(network.keywords["layers"], 1)
        require_depths(state, {f"layer{place}.{{}}.conv1.weight": depth for place, depth in depths})
        if ("layer1.0.conv3.weight" in state) != bottleneck:
            raise ValueError("the blocks are of the other kind")
        return _options(state)

    return read


def _torchvision(network: partial[ResNet]) -> Architecture:
    signs = Signs("conv1.weight", "fc.weight", _side, _reader(network), (_CIFAR,), ("layer4.0.conv1.weight",))
    return Architecture(network, (3, 224, 224), signs, IMAGENET, ("small_stem", "max_pool"), "resnet")


def _wide(network: partial[ResNet], family: str, **widths: int) -> Architecture:
    signs = Signs("conv1.weight", "fc.weight", _side, _reader(network), (_CIFAR,), ("layer4.0.conv1.weight",))
    options = ("stem", "small_stem", "max_pool")
    return Architecture(partial(network, **widths), (3, 224, 224), signs, IMAGENET, options, family)


RESNETS = {
    "small-resnet": Architecture(
        small_resnet,
        (3, 32, 32),
        Signs("features.0.weight", "head.2.weight", assumed(32), _small_resnet_options),
        options=("widths",),
    ),
    "ulp-resnet18": Architecture(
        partial(ResNet, block=BasicBlock, layers=(1, 1, 1, 1), small_stem=True),
        (3, 64, 64),
        _signs(64),
        IMAGENET,
    ),
    "preact-resnet18": Architecture(
        partial(_RESNET18, block=PreActBlock, **_NO_REDUCTION), (3, 32, 32), _signs(32, _CIFAR)
    ),
    "resnet18-64": Architecture(
        partial(_RESNET18, pool_to=2, **_NO_REDUCTION), (3, 64, 64), _signs(64, _CIFAR)
    ),
    "resnet18": _torchvision(_RESNET18),
    "resnet34": _torchvision(partial(ResNet, block=BasicBlock, layers=(3, 4, 6, 3))),
    "resnet50": _torchvision(_RESNET50),
    "resnet101": _torchvision(_RESNET101),
    "resnet152": _torchvision(partial(ResNet, block=Bottleneck, layers=(3, 8, 36, 3))),
    "resnext50-32x4d": _wide(_RESNET50, "resnext", groups=32, width_per_group=4),
    "resnext101-32x8d": _wide(_RESNET101, "resnext", groups=32, width_per_group=8),
    "resnext101-64x4d": _wide(_RESNET101, "resnext", groups=64, width_per_group=4),
    "wide-resnet50-2": _wide(_RESNET50, "wide-resnet", width_per_group=128),
    "wide-resnet101-2": _wide(_RESNET101, "wide-resnet", width_per_group=128),
}
