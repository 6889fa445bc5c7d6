"""ResNets of three stages for images of 32 pixels: the narrow ones of the ResNet paper, and wide ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from unhorse.models.registry import Architecture, ImageShape, Naming, Signs, State, assumed, numbered

MOST_BLOCKS = 400


def check_blocks(blocks: Sequence[int], stages: int) -> None:
    """ValueError where a card asks for more stages or blocks than any network has."""
    if len(blocks) != stages or min(blocks) < 1 or max(blocks) > MOST_BLOCKS:
        raise ValueError(f"{blocks!r:.80} are not the blocks of {stages} stages, 1 to {MOST_BLOCKS} each")


class _NarrowBlock(nn.Module):
    """Two 3x3 convolutions.

    Where it widens, the shortcut leaves out pixels and adds channels of zeros (option A) or is a 1x1
    convolution (option B).
    """

    def __init__(self, wide: int, width: int, stride: int, *, projected: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, width - wide
        self.downsample: nn.Module | None = None
        if projected and (stride > 1 or wide != width):
            projection = nn.Conv2d(wide, width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images)))))
        if self.downsample is not None:
            return F.relu(out + self.downsample(images))
        below = images[:, :, :: self.stride, :: self.stride]
        before = self.added // 2
        return F.relu(out + F.pad(below, (0, 0, 0, 0, before, self.added - before)))


class NarrowResNet(nn.Module):
    """ResNet-20, 32, 44, 56 and 110 of the paper's CIFAR section (He et al., CVPR 2016)."""

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        blocks: Sequence[int] = (3, 3, 3),
        width: int = 16,
        projected: bool = False,
    ) -> None:
        super().__init__()
        check_blocks(blocks, 3)
        self.conv1 = nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, wide = [], width
        for stage, count in enumerate(blocks):
            after, made = width * 2**stage, []
            for index in range(count):
                stride = 2 if stage and not index else 1
                made.append(_NarrowBlock(wide, after, stride, projected=projected))
                wide = after
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(wide, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        return self.fc(self.layer3(self.layer2(self.layer1(out))).mean((2, 3)))


class WideBlock(nn.Module):
    """Normalisation and ReLU before each of two convolutions; a shortcut that widens starts behind them."""

    def __init__(self, wide: int, width: int, stride: int) -> None:
        super().__init__()
        if stride > 1 and wide == width:
            raise ValueError(f"a block of stride {stride} with {wide} channels on both sides has no shortcut")
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv1 = nn.Conv2d(wide, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = None
        if wide != width:
            self.convShortcut = nn.Conv2d(wide, width, 1, stride=stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        active = F.relu(self.bn1(images))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (images if self.convShortcut is None else self.convShortcut(active))


class _Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


class WideResNet(nn.Module):
    """WRN-depth-widen (Zagoruyko and Komodakis, BMVC 2016); `blocks` of a stage are (depth - 4) / 6."""

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        blocks: int = 2,
        widths: Sequence[int] = (16, 16, 32, 64),
    ) -> None:
        super().__init__()
        check_blocks([blocks] * 3, 3)
        self.conv1 = nn.Conv2d(image_shape[0], widths[0], 3, padding=1, bias=False)
        stages = []
        for stage in range(3):
            wide, width = widths[stage], widths[stage + 1]
            first = WideBlock(wide, width, 2 if stage else 1)
            stages.append(_Stage(first, *(WideBlock(width, width, 1) for _ in range(blocks - 1))))
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(F.relu(self.bn1(out)).mean((2, 3)))


def _narrow(state: State) -> dict[str, object]:
    if "layer4.0.conv1.weight" in state:
        raise ValueError("this ResNet has three stages")
    return {
        "blocks": [numbered(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3)],
        "width": len(state["conv1.weight"]),
        "projected": "layer2.0.downsample.0.weight" in state,
    }


def _wide(state: State) -> dict[str, object]:
    names = ["conv1.weight", *(f"block{stage}.layer.0.conv1.weight" for stage in (1, 2, 3))]
    return {
        "blocks": numbered(state, r"block1\.layer\.(\d+)\."),
        "widths": [len(state[name]) for name in names],
    }


_OTHER_NAMES = Naming(((r"\bshortcut\.", "downsample."), (r"^linear\.", "fc.")))

NARROW_RESNETS = {
    "cifar-resnet": Architecture(
        NarrowResNet,
        (3, 32, 32),
        Signs("conv1.weight", "fc.weight", assumed(32), _narrow, (_OTHER_NAMES,)),
        options=("blocks", "width", "projected"),
    ),
    "cifar-wide-resnet": Architecture(
        WideResNet,
        (3, 32, 32),
        Signs("conv1.weight", "fc.weight", assumed(32), _wide, marks=("block1.layer.0.bn1.weight",)),
        options=("blocks", "widths"),
    ),
}
