"""Networks for images of 32 pixels, written again in the manner of the code bases that everybody copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """A basic block whose shortcut is nothing, zeros (A) or a projection (B)."""

    def __init__(self, before: int, planes: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.option, self.planes = option, planes
        self.changes = stride != 1 or before != planes
        self.shortcut = nn.Sequential()
        if self.changes and option == "B":
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.changes and self.option == "A":
            quarter = self.planes // 4
            return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter), "constant", 0))
        return F.relu(y + self.shortcut(x))


class PaperResNet(nn.Module):
    """ResNet-20 and its kin; `linear` at the end."""

    def __init__(self, count: int, option: str = "A", classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.make(16, 16, count, 1, option)
        self.layer2 = self.make(16, 32, count, 2, option)
        self.layer3 = self.make(32, 64, count, 2, option)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def make(before: int, planes: int, count: int, stride: int, option: str) -> nn.Sequential:
        first = PlainBlock(before, planes, stride, option)
        return nn.Sequential(first, *(PlainBlock(planes, planes, 1, option) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class FirstBlock(nn.Module):
    """Pre-activation, optionally as a bottleneck or with squeeze-and-excitation."""

    def __init__(self, before: int, planes: int, stride: int, kind: str) -> None:
        super().__init__()
        after = planes * (4 if kind == "bottleneck" else 1)
        self.bn1 = nn.BatchNorm2d(before)
        if kind == "bottleneck":
            self.conv1 = nn.Conv2d(before, planes, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(planes)
            self.conv3 = nn.Conv2d(planes, after, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False))
        if kind == "squeezed":
            self.fc1 = nn.Conv2d(planes, planes // 16, 1)
            self.fc2 = nn.Conv2d(planes // 16, planes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = self.shortcut(y) if hasattr(self, "shortcut") else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        if hasattr(self, "conv3"):
            y = self.conv3(F.relu(self.bn3(y)))
        if hasattr(self, "fc1"):
            y = y * torch.sigmoid(self.fc2(F.relu(self.fc1(F.avg_pool2d(y, y.size(2))))))
        return y + shortcut


class FirstResNet(nn.Module):
    """Pre-activation ResNets and SENet-18."""

    def __init__(self, counts: tuple[int, ...], kind: str, *, stem: bool = False, last: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        if stem:
            self.bn1 = nn.BatchNorm2d(64)
        before, expansion = 64, 4 if kind == "bottleneck" else 1
        for stage, count in enumerate(counts):
            blocks = []
            for index in range(count):
                blocks.append(FirstBlock(before, 64 << stage, 1 if index or not stage else 2, kind))
                before = (64 << stage) * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        if last:
            self.bn = nn.BatchNorm2d(before)
        self.linear = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.relu(self.bn1(x)) if hasattr(self, "bn1") else x
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.relu(self.bn(x)) if hasattr(self, "bn") else x
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class WideUnit(nn.Module):
    """The block of attention-transfer and distillation code."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, stride=1, padding=1, bias=False)
        self.same = before == after
        self.convShortcut = None if self.same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(x))
        x = x if self.same else self.convShortcut(y)
        return x + self.conv2(self.relu2(self.bn2(self.conv1(y))))


class WideGroup(nn.Module):
    def __init__(self, count: int, before: int, after: int, stride: int) -> None:
        super().__init__()
        units = [WideUnit(before, after, stride), *(WideUnit(after, after, 1) for _ in range(count - 1))]
        self.layer = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideNet(nn.Module):
    """WRN-depth-widen."""

    def __init__(self, depth: int, widen: int) -> None:
        super().__init__()
        widths, count = [16, 16 * widen, 32 * widen, 64 * widen], (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideGroup(count, widths[0], widths[1], 1)
        self.block2 = WideGroup(count, widths[1], widths[2], 2)
        self.block3 = WideGroup(count, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(F.avg_pool2d(x, 8).view(len(x), -1))


class Growing(nn.Module):
    def __init__(self, planes: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(planes, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))), x), dim=1)


class Halving(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(planes)
        self.conv = nn.Conv2d(planes, planes // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class GrowingNet(nn.Module):
    """DenseNet for small images."""

    def __init__(self, counts: tuple[int, int, int, int], growth: int) -> None:
        super().__init__()
        planes = 2 * growth
        self.conv1 = nn.Conv2d(3, planes, 3, padding=1, bias=False)
        for stage, count in enumerate(counts, start=1):
            units = [Growing(planes + index * growth, growth) for index in range(count)]
            setattr(self, f"dense{stage}", nn.Sequential(*units))
            planes += count * growth
            if stage < 4:
                setattr(self, f"trans{stage}", Halving(planes))
                planes //= 2
        self.bn = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense4(self.trans3(self.dense3(self.trans2(self.dense2(x)))))
        return self.linear(F.avg_pool2d(F.relu(self.bn(x)), 4).flatten(1))


class Branches(nn.Module):
    def __init__(self, before: int, a: int, b: tuple[int, int], c: tuple[int, int], d: int) -> None:
        super().__init__()
        self.b1 = self.units((before, a, 1))
        self.b2 = self.units((before, b[0], 1), (b[0], b[1], 3))
        self.b3 = self.units((before, c[0], 1), (c[0], c[1], 3), (c[1], c[1], 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *self.units((before, d, 1)))
        self.after = a + b[1] + c[1] + d

    @staticmethod
    def units(*sizes: tuple[int, int, int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after, side in sizes:
            layers += [
                nn.Conv2d(before, after, side, padding=side // 2),
                nn.BatchNorm2d(after),
                nn.ReLU(True),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


class BranchNet(nn.Module):
    """GoogLeNet for small images."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_layers = Branches.units((3, 192, 3))
        self.a3 = Branches(192, 64, (96, 128), (16, 32), 32)
        self.b3 = Branches(256, 128, (128, 192), (32, 96), 64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.a4 = Branches(480, 192, (96, 208), (16, 48), 64)
        self.b4 = Branches(512, 160, (112, 224), (24, 64), 64)
        self.c4 = Branches(512, 128, (128, 256), (24, 64), 64)
        self.d4 = Branches(512, 112, (144, 288), (32, 64), 64)
        self.e4 = Branches(528, 256, (160, 320), (32, 128), 128)
        self.a5 = Branches(832, 256, (160, 320), (32, 128), 128)
        self.b5 = Branches(832, 384, (192, 384), (48, 128), 128)
        self.linear = nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.b3(self.a3(self.pre_layers(x))))
        x = self.maxpool(self.e4(self.d4(self.c4(self.b4(self.a4(x))))))
        return self.linear(F.avg_pool2d(self.b5(self.a5(x)), 8).flatten(1))


VGGS = {
    "VGG-11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "VGG-13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "VGG-19": (
        *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
        *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
    ),
}


class SmallImageVgg(nn.Module):
    """`features` and one linear layer; an average over one pixel does nothing."""

    def __init__(self, plan: tuple[int | str, ...], *, normed: bool = True, scale: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for entry in plan:
            if entry == "M":
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            width = int(entry) // scale
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU(True)] if normed else [nn.ReLU(True)]
            before = width
        layers.append(nn.AvgPool2d(1, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class ThreeLayerVgg(SmallImageVgg):
    """The same with three linear layers and dropout."""

    def __init__(self) -> None:
        super().__init__(VGGS["VGG-11"], normed=False, scale=8)
        head = (
            nn.Dropout(),
            nn.Linear(64, 48),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(48, 48),
            nn.ReLU(True),
        )
        self.classifier = nn.Sequential(*head, nn.Linear(48, 10))


class DroppedVgg(nn.Module):
    """Three blocks of ELU, dropout behind each pooling."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, rate in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                layers += [nn.Conv2d(before, width, kernel_size=3, padding=1), nn.BatchNorm2d(width)]
                layers += [nn.ELU(inplace=True)]
                before = width
            layers += [nn.MaxPool2d(2, 2), nn.Dropout(rate)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class DepthPoint(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.conv2 = nn.Conv2d(before, after, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class SmallMobileNet(nn.Module):
    """MobileNet for small images; a quarter as wide, so that the test is fast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        plan = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *(((128, 1),) * 5), (256, 2), (256, 1))
        blocks, before = [], 8
        for after, stride in plan:
            blocks.append(DepthPoint(before, after, stride))
            before = after
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.layers(F.relu(self.bn1(self.conv1(x)))), 2)
        return self.linear(x.view(x.size(0), -1))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    **{f"ResNet-{6 * count + 2}": lambda count=count: PaperResNet(count) for count in (3, 5, 9)},
    "ResNet-20 with projections": lambda: PaperResNet(3, "B"),
    "ResNet-44, 100 classes": lambda: PaperResNet(7, classes=100),
    "PreActResNet-18": lambda: FirstResNet((2, 2, 2, 2), "basic"),
    "PreActResNet-18 with a last norm": lambda: FirstResNet((2, 2, 2, 2), "basic", last=True),
    "PreActResNet-34": lambda: FirstResNet((3, 4, 6, 3), "basic"),
    "PreActResNet-50": lambda: FirstResNet((3, 4, 6, 3), "bottleneck"),
    "SENet-18": lambda: FirstResNet((2, 2, 2, 2), "squeezed", stem=True),
    "WRN-16-1": lambda: WideNet(16, 1),
    "WRN-28-2": lambda: WideNet(28, 2),
    "DenseNet": lambda: GrowingNet((6, 12, 24, 16), 12),
    "DenseNet, narrow": lambda: GrowingNet((2, 3, 4, 2), 8),
    "GoogLeNet": BranchNet,
    **{name: lambda plan=plan: SmallImageVgg(plan, scale=8) for name, plan in VGGS.items()},
    "VGG-13 without norms": lambda: SmallImageVgg(VGGS["VGG-13"], normed=False, scale=8),
    "VGG-11 with three linear layers": ThreeLayerVgg,
    "small VGG with ELU": DroppedVgg,
    "small VGG with ELU, 43 classes": lambda: DroppedVgg(43),
    "MobileNet": SmallMobileNet,
}
