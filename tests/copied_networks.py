"""Small networks written in the manner of published code: what people save the state dicts of.

Each is a class of its own, with the names, the order of definitions and the functional calls that such code
has; none is copied. `NETWORKS` says what to build, the shape of its images, its layers in words,
whether the words need --size beside them, and whether it is known without words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TutorialNet(nn.Module):
    """The first network of everybody who learns on CIFAR-10."""

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class MnistExample(nn.Module):
    """Two 3x3 convolutions, one pooling, dropouts, log-probabilities."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = self.dropout2(F.relu(self.fc1(torch.flatten(x, 1))))
        return F.log_softmax(self.fc2(x), dim=1)


class OldMnistExample(nn.Module):
    """Pools before its ReLU, drops whole channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = F.dropout(F.relu(self.fc1(x.view(-1, 320))), training=self.training)
        return F.log_softmax(self.fc2(x), 1)


class BadNetCnn(nn.Module):
    """Averages in place of maxima, blocks in Sequentials, probabilities."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 16, 5, 1), nn.ReLU(), nn.AvgPool2d(2, 2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5, 1), nn.ReLU(), nn.AvgPool2d(2, 2))
        flat = 800 if channels == 3 else 512
        self.fc1 = nn.Sequential(nn.Linear(flat, 512), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(512, classes), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return self.fc2(self.fc1(x.view(-1, x.shape[1] * x.shape[2] * x.shape[3])))


class TwentyFifty(nn.Module):
    """The convolutional network of federated learning code."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 2)
        return self.fc2(F.relu(self.fc1(x.view(-1, 800))))


class LeNet5(nn.Module):
    """For 28x28 images, padded to 32x32 by the first convolution; the classic activations unless told."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh, pool: type[nn.Module] = nn.AvgPool2d) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), activation(), pool(2)),
            *(nn.Conv2d(6, 16, 5), activation(), pool(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(400, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class EluVgg(nn.Module):
    """Six convolutions in three blocks, ELU before batch normalisation."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        wide = 3
        for width in (32, 64, 128):
            for _ in range(2):
                layers += [nn.Conv2d(wide, width, 3, padding=1), nn.ELU(), nn.BatchNorm2d(width)]
                wide = width
            layers += [nn.MaxPool2d(2), nn.Dropout(0.3)]
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.fc(self.flatten(self.features(x))), 1)


class Perceptron(nn.Module):
    """No convolution at all."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.input = nn.Linear(28 * 28, 200)
        self.hidden = nn.Linear(200, 80)
        self.output = nn.Linear(80, 10)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.input(x.view(x.size(0), -1)))
        return self.output(self.activation(self.hidden(x)))


class NormsLast(nn.Module):
    """Defines its convolutions first and their normalisations behind them, some equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 24, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24 * 16, 7)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.max_pool2d(F.relu(bn(conv(x))), 2)
        return self.fc(x.reshape(len(x), -1))


class HeadFirst(nn.Module):
    """Its output layer is defined before all others; file order does not fit, shapes do."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(30, 5)
        self.conv_b = nn.Conv2d(8, 12, 3)
        self.conv_a = nn.Conv2d(1, 8, 3)
        self.hidden = nn.Linear(12 * 25, 30)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.sigmoid(self.conv_a(x)), 2)
        x = F.avg_pool2d(torch.sigmoid(self.conv_b(x)), 2)
        return self.out(torch.sigmoid(self.hidden(x.flatten(1))))


class AllConvolutional(nn.Module):
    """Strides in place of poolings, the classes are channels, averaged at the end."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 24, 3, padding=1), nn.LeakyReLU(0.1)),
            *(nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.LeakyReLU(0.1)),
            *(nn.Conv2d(24, 48, 3), nn.LeakyReLU(0.1), nn.Conv2d(48, classes, 1)),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).view(-1, self.body[6].out_channels)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(32)
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_bn(self.stem(x)))
        x = F.relu6(self.depthwise_bn(self.depthwise(x)))
        x = F.relu6(self.pointwise_bn(self.pointwise(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


class SmallAlexNet(nn.Module):
    """Overlapping poolings and a stem of stride 2, for 64x64 images."""

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 11, stride=2, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(3)),
        )
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(48 * 9, 64), nn.ReLU(inplace=True), nn.Linear(64, classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Normalised(nn.Module):
    """Batch normalisation in the head, too, and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2)),
        )
        self.fc = nn.Sequential(nn.Linear(8 * 49, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(start_dim=1))


class TwoSequentials(nn.Module):
    """Two convolutions with padding in Sequentials, one output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(1, 16, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(kernel_size=2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2))
        self.out = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return self.out(x.view(x.size(0), -1))


class TwoLayers(nn.Module):
    """Two layers with normalisation and one linear layer, or without it and two."""

    def __init__(self, *, normed: bool = True) -> None:
        super().__init__()
        self.layer1 = self.layer(1, 16 if normed else 32, normed=normed)
        self.layer2 = self.layer(16 if normed else 32, 32 if normed else 64, normed=normed)
        if normed:
            self.fc = nn.Linear(7 * 7 * 32, 10)
        else:
            self.drop_out = nn.Dropout()
            self.fc1, self.fc2 = nn.Linear(7 * 7 * 64, 1000), nn.Linear(1000, 10)

    @staticmethod
    def layer(before: int, after: int, *, normed: bool) -> nn.Sequential:
        norm = [nn.BatchNorm2d(after)] if normed else []
        conv = nn.Conv2d(before, after, kernel_size=5, stride=1, padding=2)
        return nn.Sequential(conv, *norm, nn.ReLU(), nn.MaxPool2d(kernel_size=2, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(x))
        x = x.reshape(x.size(0), -1)
        return self.fc(x) if hasattr(self, "fc") else self.fc2(self.fc1(self.drop_out(x)))


class Quickstart(nn.Module):
    """The first network of PyTorch's quickstart."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(
            *(nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_relu_stack(self.flatten(x))


class FedAvgCnn(nn.Module):
    """Two padded 5x5 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5, padding="same")
        self.conv2 = nn.Conv2d(8, 12, 5, padding="same")
        self.fc1, self.fc2 = nn.Linear(12 * 49, 64), nn.Linear(64, 62)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, start_dim=1))))


class SmallCnn(nn.Module):
    """Two 3x3 convolutions, each pooled, with or without padding."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=padding)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=padding)
        self.fc1 = nn.Linear(24 * (64 if padding else 36), 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class ThirdConvolution(nn.Module):
    """LeNet-5 as its paper draws it: the third convolution sees all of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1, self.fc2 = nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x)).view(-1, 120)
        return self.fc2(F.relu(self.fc1(x)))


class NumberedPerceptron(nn.Module):
    """fc1, fc2 and so on."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.count = len(sizes) - 1
        for index, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
            setattr(self, f"fc{index}", nn.Linear(before, after))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for index in range(1, self.count):
            x = F.relu(getattr(self, f"fc{index}")(x))
        return getattr(self, f"fc{self.count}")(x)


class Copied(NamedTuple):
    """A network, its images, and its layers in words.

    `sized` where the words need --size beside them, `known` where names and shapes are enough.
    """

    build: Callable[[], nn.Module]
    image_shape: tuple[int, int, int]
    words: str
    sized: bool = False
    known: bool = False


LENET = "flatten linear {0} linear {0} linear"
NETWORKS: dict[str, Copied] = {
    "tutorial": Copied(
        TutorialNet,
        (3, 32, 32),
        "conv relu maxpool2 conv relu maxpool2 flatten linear relu linear relu linear",
        known=True,
    ),
    "tutorial, 100 classes": Copied(
        lambda: TutorialNet(100),
        (3, 32, 32),
        "conv relu maxpool conv relu maxpool fc relu fc relu fc",
        known=True,
    ),
    "tutorial, grey": Copied(
        lambda: TutorialNet(channels=1),
        (1, 32, 32),
        "conv5p0 relu maxpool2 conv5p0 relu maxpool2 flatten linear relu linear relu linear",
    ),
    "MNIST example": Copied(
        MnistExample,
        (1, 28, 28),
        "conv relu conv relu maxpool2 dropout linear relu linear logsoftmax",
        known=True,
    ),
    "MNIST example, 47 classes": Copied(
        lambda: MnistExample(47),
        (1, 28, 28),
        "conv relu conv relu maxpool2 flatten linear relu linear",
        known=True,
    ),
    "old MNIST example": Copied(
        OldMnistExample,
        (1, 28, 28),
        "conv maxpool2 relu conv dropout maxpool2 relu flatten linear relu dropout linear logsoftmax",
        known=True,
    ),
    "BadNet CNN": Copied(
        BadNetCnn,
        (1, 28, 28),
        "conv relu avgpool2 conv relu avgpool2 flatten linear relu linear softmax",
        known=True,
    ),
    "BadNet CNN, colour": Copied(
        lambda: BadNetCnn(3, 43),
        (3, 32, 32),
        "conv relu avgpool2 conv relu avgpool2 linear relu linear",
        known=True,
    ),
    "20-50": Copied(
        TwentyFifty,
        (1, 28, 28),
        "conv relu maxpool2 conv relu maxpool2 flatten linear relu linear",
        known=True,
    ),
    "LeNet-5": Copied(
        LeNet5, (1, 28, 28), "conv5p2 tanh avgpool2 conv5p0 tanh avgpool2 " + LENET.format("tanh"), True
    ),
    "LeNet-5, ReLU": Copied(
        lambda: LeNet5(nn.ReLU, nn.MaxPool2d),
        (1, 28, 28),
        "conv relu maxpool2 conv relu maxpool2 " + LENET.format("relu"),
        True,
    ),
    "ELU VGG": Copied(
        EluVgg, (3, 32, 32), 3 * "conv elu bn conv elu bn maxpool2 dropout " + "flatten linear softmax"
    ),
    "perceptron": Copied(Perceptron, (1, 28, 28), "flatten linear relu linear relu linear"),
    "perceptron, GELU": Copied(lambda: Perceptron(F.gelu), (1, 28, 28), "linear gelu linear gelu linear"),
    "norms last": Copied(NormsLast, (3, 32, 32), 3 * "conv bn relu maxpool2 " + "flatten linear"),
    "head first": Copied(
        HeadFirst,
        (1, 28, 28),
        "conv sigmoid avgpool2 conv sigmoid avgpool2 flatten linear sigmoid linear",
    ),
    "all convolutional": Copied(
        AllConvolutional,
        (3, 32, 32),
        "conv3p1 leakyrelu0.1 conv3s2p1 leakyrelu0.1 conv3p0 leakyrelu0.1 conv1 gap flatten",
    ),
    "separable": Copied(
        Separable, (3, 32, 32), "conv3p1 bn relu6 conv3s2p1 bn relu6 conv1 bn relu6 gap flatten linear"
    ),
    "small AlexNet": Copied(
        SmallAlexNet,
        (3, 64, 64),
        "conv11s2p2 relu maxpool3s2 conv5p2 relu maxpool3s2 conv3p1 relu gap3 dropout linear relu linear",
        True,
    ),
    "normalised head": Copied(
        Normalised, (1, 28, 28), 2 * "conv bn silu maxpool2 " + "flatten linear bn silu linear"
    ),
    "two Sequentials": Copied(
        TwoSequentials, (1, 28, 28), "conv relu maxpool2 conv relu maxpool2 flatten linear", known=True
    ),
    "two layers": Copied(TwoLayers, (1, 28, 28), 2 * "conv bn relu maxpool2 " + "linear", known=True),
    "two layers without norms": Copied(
        lambda: TwoLayers(normed=False), (1, 28, 28), 2 * "conv relu maxpool2 " + "linear linear", known=True
    ),
    "quickstart": Copied(Quickstart, (1, 28, 28), "linear relu linear relu linear", known=True),
    "FedAvg's CNN": Copied(
        FedAvgCnn, (1, 28, 28), 2 * "conv relu maxpool2 " + "linear relu linear", known=True
    ),
    "small CNN": Copied(
        lambda: SmallCnn(0), (3, 32, 32), 2 * "conv relu maxpool2 " + "linear relu linear", known=True
    ),
    "small CNN, padded": Copied(
        lambda: SmallCnn(1), (3, 32, 32), 2 * "conv relu maxpool2 " + "linear relu linear", known=True
    ),
    "LeNet-5 of three convolutions": Copied(
        ThirdConvolution,
        (1, 28, 28),
        "conv5p2 relu maxpool2 conv5p0 relu maxpool2 conv5p0 relu flatten linear relu linear",
        known=True,
    ),
    "two full layers": Copied(
        lambda: NumberedPerceptron(784, 128, 10), (1, 28, 28), "linear relu linear", known=True
    ),
    "four full layers": Copied(
        lambda: NumberedPerceptron(3072, 64, 32, 16, 10),
        (3, 32, 32),
        "linear relu linear relu linear relu linear",
        known=True,
    ),
}


def made(name: str, seed: int = 0) -> nn.Module:
    """The network with random weights and statistics, at test time."""
    return drawn(NETWORKS[name].build, seed)


def drawn(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with random weights and statistics, at test time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.8, 1.5)
    return network.eval()


def same_answers(ours: Tensor, bare: Tensor) -> bool:
    """Whether logits are those of the bare class, within 1e-4; its softmax or log-softmax is undone."""
    if bool((bare.exp().sum(1) - 1).abs().max() < 1e-4):
        ours = ours.log_softmax(1)
    elif bool((bare.sum(1) - 1).abs().max() < 1e-4 and bare.min() >= 0):
        ours = ours.softmax(1)
    return float((ours - bare).detach().abs().max()) <= 1e-4
