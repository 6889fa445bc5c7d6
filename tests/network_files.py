"""Small network files in the manner of published code, and state dicts as training scripts save them.

Each entry of FILES: the sources by name ("net.py" first), what to name, its arguments, and the image shape.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NetworkFile(NamedTuple):
    """Sources by path, the name to call, its arguments, and the shape of its images."""

    sources: dict[str, str]
    name: str = "Net"
    arguments: Any = None
    shape: tuple[int, int, int] = (3, 32, 32)


TOP = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n\n"


def one(
    text: str, name: str = "Net", arguments: Any = None, shape: tuple[int, int, int] = (3, 32, 32)
) -> NetworkFile:
    return NetworkFile({"net.py": TOP + text}, name, arguments, shape)


def module(
    init: str, forward: str, *, base: str = "nn.Module", signature: str = "", name: str = "Net"
) -> str:
    """A class from the lines of its two functions."""
    lines = [f"class {name}({base}):", f"    def __init__(self{signature}):", "        super().__init__()"]
    lines += [f"        {line}" for line in init.strip().splitlines()]
    lines += ["", "    def forward(self, x):"]
    return "\n".join(lines + [f"        {line}" for line in forward.strip().splitlines()]) + "\n\n"


GREY, SMALL, LARGE = (1, 28, 28), (3, 32, 32), (3, 64, 64)
_TUTORIAL = module(
    """
self.conv1 = nn.Conv2d(3, 6, 5)
self.pool = nn.MaxPool2d(2, 2)
self.conv2 = nn.Conv2d(6, 16, 5)
self.fc1 = nn.Linear(16 * 5 * 5, 120)
self.fc2 = nn.Linear(120, 84)
self.fc3 = nn.Linear(84, 10)
""",
    """
x = self.pool(F.relu(self.conv1(x)))
x = self.pool(F.relu(self.conv2(x)))
x = torch.flatten(x, 1)
x = F.relu(self.fc1(x))
x = F.relu(self.fc2(x))
return self.fc3(x)
""",
)
_MNIST = module(
    """
self.conv1 = nn.Conv2d(1, 32, 3, 1)
self.conv2 = nn.Conv2d(32, 64, 3, 1)
self.dropout1 = nn.Dropout(0.25)
self.dropout2 = nn.Dropout(0.5)
self.fc1 = nn.Linear(9216, 128)
self.fc2 = nn.Linear(128, 10)
""",
    """
x = F.relu(self.conv1(x))
x = F.relu(self.conv2(x))
x = self.dropout1(F.max_pool2d(x, 2))
x = torch.flatten(x, 1)
x = self.dropout2(F.relu(self.fc1(x)))
return F.log_softmax(self.fc2(x), dim=1)
""",
)
_LENET = module(
    """
self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
self.conv2 = nn.Conv2d(6, 16, 5)
self.fc1 = nn.Linear(400, 120)
self.fc2 = nn.Linear(120, 84)
self.fc3 = nn.Linear(84, 10)
""",
    """
x = F.max_pool2d(F.relu(self.conv1(x)), 2)
x = F.max_pool2d(F.relu(self.conv2(x)), 2)
x = x.view(x.size(0), -1)
return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
""",
    name="LeNet5",
)
_BADNET = module(
    """
self.conv1 = nn.Sequential(nn.Conv2d(input_channels, 16, 5, 1), nn.ReLU(), nn.AvgPool2d(2, 2))
self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5, 1), nn.ReLU(), nn.AvgPool2d(2, 2))
features = 800 if input_channels == 3 else 512
self.fc1 = nn.Sequential(nn.Linear(features, 512), nn.ReLU())
self.fc2 = nn.Sequential(nn.Linear(512, output_num), nn.Softmax(dim=-1))
""",
    """
x = self.conv2(self.conv1(x))
return self.fc2(self.fc1(x.view(x.size(0), -1)))
""",
    signature=", input_channels, output_num",
    name="BadNet",
)
_BASIC = """class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes, planes, stride=1):
        super(BasicBlock, self).__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


"""
_RESNET = (
    _BASIC
    + """class ResNet(nn.Module):
    def __init__(self, block, num_blocks, num_classes=10, width=64):
        super(ResNet, self).__init__()
        self.in_planes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for index, count in enumerate(num_blocks):
            planes = width * 2**index
            setattr(self, f"layer{index + 1}", self._make_layer(block, planes, count, 1 if index == 0 else 2))
        self.stages = len(num_blocks)
        self.linear = nn.Linear(planes, num_classes)

    def _make_layer(self, block, planes, count, stride):
        layers = []
        for stride in [stride] + [1] * (count - 1):
            layers.append(block(self.in_planes, planes, stride))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        for index in range(self.stages):
            out = getattr(self, f"layer{index + 1}")(out)
        out = F.adaptive_avg_pool2d(out, 1)
        return self.linear(out.view(out.size(0), -1))


def ResNet18(num_classes=10):
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes)


def resnet20(num_classes=10):
    return ResNet(BasicBlock, [3, 3, 3], num_classes, width=16)
"""
)
_VGG = """cfg = {"VGG11": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"], "tiny": [8, "M", 16, "M", 32, "M"]}


class VGG(nn.Module):
    def __init__(self, vgg_name, num_classes=10):
        super(VGG, self).__init__()
        self.features = self._make_layers(cfg[vgg_name])
        self.classifier = nn.Linear([x for x in cfg[vgg_name] if x != "M"][-1], num_classes)

    def forward(self, x):
        out = self.features(x)
        out = F.adaptive_avg_pool2d(out, 1)
        return self.classifier(out.view(out.size(0), -1))

    def _make_layers(self, cfg):
        layers, in_channels = [], 3
        for x in cfg:
            if x == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(in_channels, x, kernel_size=3, padding=1), nn.BatchNorm2d(x), nn.ReLU(inplace=True)]
                in_channels = x
        return nn.Sequential(*layers)
"""


def _chain(*layers: str, name: str = "Net") -> str:
    return f"class {name}(nn.Sequential):\n    def __init__(self):\n        super().__init__({', '.join(layers)})\n\n"


FILES: dict[str, NetworkFile] = {
    "tutorial": one(_TUTORIAL),
    "mnist example": one(_MNIST, shape=GREY),
    "lenet": one(_LENET, "LeNet5", shape=GREY),
    "badnet grey": one(_BADNET, "BadNet", {"input_channels": 1, "output_num": 10}, GREY),
    "badnet colour": one(_BADNET, "BadNet", [3, 10]),
    "resnet18": one(_RESNET, "ResNet18"),
    "resnet18 of 43": one(_RESNET, "ResNet18", {"num_classes": 43}),
    "resnet20": one(_RESNET, "resnet20"),
    "vgg11": one(_VGG, "VGG", ["VGG11"]),
    "vgg tiny": one(_VGG, "VGG", {"vgg_name": "tiny", "num_classes": 7}),
    "sequential": one(
        _chain(
            *(
                "nn.Conv2d(3, 16, 3, padding=1)",
                "nn.ReLU()",
                "nn.MaxPool2d(2)",
                "nn.Conv2d(16, 32, 3, padding=1)",
            ),
            *(
                "nn.ReLU()",
                "nn.MaxPool2d(2)",
                "nn.Flatten()",
                "nn.Linear(2048, 64)",
                "nn.ReLU()",
                "nn.Linear(64, 10)",
            ),
        )
    ),
    "factory of a sequential": one(
        "def build_model(channels=1, classes=10):\n    return nn.Sequential(nn.Conv2d(channels, 8, 5), nn.ReLU(), "
        "nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, classes))\n",
        "build_model",
        shape=GREY,
    ),
    "perceptron": one(
        module(
            "self.fc1 = nn.Linear(784, 256)\nself.fc2 = nn.Linear(256, 10)",
            "return self.fc2(torch.relu(self.fc1(x.view(-1, 784))))",
        ),
        shape=GREY,
    ),
    "features and classifier": one(
        module(
            "self.features = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), "
            "nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))\n"
            "self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, num_classes))",
            "return self.classifier(torch.flatten(self.features(x), 1))",
            signature=", num_classes=10",
        )
    ),
    "numbered layers": one(
        module(
            "self.layer1 = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))\n"
            "self.layer2 = nn.Sequential(nn.Conv2d(16, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))\n"
            "self.fc = nn.Linear(7 * 7 * 32, 10)",
            "out = self.layer2(self.layer1(x))\nreturn self.fc(out.reshape(out.size(0), -1))",
            name="ConvNet",
        ),
        "ConvNet",
        shape=GREY,
    ),
    "leaky": one(
        module(
            "self.c1 = nn.Conv2d(3, 12, 3)\nself.c2 = nn.Conv2d(12, 24, 3, stride=2)\nself.out = nn.Linear(24, 5)",
            "x = F.leaky_relu(self.c1(x), 0.1)\nx = F.leaky_relu(self.c2(x), 0.1)\nreturn self.out(x.mean([2, 3]))",
        )
    ),
    "sign recogniser": one(
        module(
            "self.conv1 = nn.Conv2d(3, 32, 3)\nself.conv2 = nn.Conv2d(32, 64, 3)\nself.fc1 = nn.Linear(64 * 36, 128)\n"
            "self.fc2 = nn.Linear(128, 43)\nself.drop = nn.Dropout2d()",
            "x = F.max_pool2d(F.relu(self.conv1(x)), 2)\nx = self.drop(F.max_pool2d(F.relu(self.conv2(x)), 2))\n"
            "return self.fc2(F.relu(self.fc1(x.flatten(1))))",
            name="GTSRBNet",
        ),
        "GTSRBNet",
    ),
    "all convolutions": one(
        _chain(
            *("nn.Conv2d(3, 16, 3)", "nn.ELU()", "nn.Conv2d(16, 32, 3, stride=2)", "nn.ELU()"),
            *("nn.Conv2d(32, 10, 1)", "nn.AdaptiveAvgPool2d(1)", "nn.Flatten()"),
        )
    ),
    "squeeze and excite": one(
        module(
            "self.down = nn.Linear(c, c // r)\nself.up = nn.Linear(c // r, c)",
            "w = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))\nreturn x * w[:, :, None, None]",
            signature=", c, r=4",
            name="SE",
        )
        + module(
            "self.stem = nn.Conv2d(3, 16, 3, padding=1)\nself.se = SE(16)\nself.head = nn.Linear(16, 10)",
            "return self.head(self.se(F.relu(self.stem(x))).mean((2, 3)))",
        )
    ),
    "depthwise": one(
        "def conv_dw(a, b, stride):\n    return nn.Sequential(nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False), "
        "nn.BatchNorm2d(a), nn.ReLU6(True), nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6(True))\n\n\n"
        + module(
            "self.model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), conv_dw(8, 16, 1), conv_dw(16, 32, 2))\nself.fc = nn.Linear(32, classes)",
            "return self.fc(F.adaptive_avg_pool2d(self.model(x), 1).view(-1, 32))",
            signature=", *, classes=10, **kwargs",
        ),
        arguments={"classes": 6, "dropout": 0.1},
    ),
    "group norm": one(
        module(
            "self.conv = nn.Conv2d(3, 16, 3, padding=1)\nself.norm = nn.GroupNorm(4, 16)\nself.act = nn.GELU()\nself.fc = nn.Linear(16, 8)",
            "return self.fc(self.act(self.norm(self.conv(x))).mean(dim=(-2, -1)))",
        )
    ),
    "weight norm": one(
        module(
            "self.conv = nn.utils.weight_norm(nn.Conv2d(3, 16, 3))\nself.fc = nn.utils.weight_norm(nn.Linear(16, 10))",
            "return self.fc(F.relu(self.conv(x)).mean((2, 3)))",
        )
    ),
    "spectral norm": one(
        module(
            "self.conv = nn.utils.spectral_norm(nn.Conv2d(3, 16, 3))\nself.fc = nn.Linear(16, 10)",
            "return self.fc(F.relu(self.conv(x)).mean((2, 3)))",
        )
    ),
    "weight standardisation": one(
        "class WSConv2d(nn.Conv2d):\n    def forward(self, x):\n        weight = self.weight\n"
        "        weight = weight - weight.mean((1, 2, 3), keepdim=True)\n"
        "        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5\n"
        "        return F.conv2d(x, weight / std.expand_as(weight), self.bias, self.stride, self.padding)\n\n\n"
        + module(
            "self.conv1 = WSConv2d(3, 8, 3)\nself.conv2 = WSConv2d(8, 16, 3)\nself.fc = nn.Linear(16, 4)",
            "return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))",
        )
    ),
    "normalised inside": one(
        module(
            'self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.45]).view(1, 3, 1, 1), persistent=False)\n'
            "self.conv = nn.Conv2d(3, 16, 3)\nself.fc = nn.Linear(16, 10)",
            "return self.fc(F.relu(self.conv(x - self.mean)).mean((2, 3)))",
        )
    ),
    "two heads": one(
        module(
            "self.trunk = nn.Conv2d(3, 16, 3)\nself.logits = nn.Linear(16, 10)\nself.embed = nn.Linear(16, 32)",
            "x = F.relu(self.trunk(x)).mean((2, 3))\nreturn {'logits': self.logits(x), 'embedding': self.embed(x)}",
        )
    ),
    "attention": one(
        module(
            "self.patch = nn.Conv2d(3, 32, 8, 8)\nself.cls = nn.Parameter(torch.zeros(1, 1, 32))\n"
            "self.pos = nn.Parameter(torch.randn(1, 17, 32) * 0.02)\n"
            "self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)\nself.head = nn.Linear(32, 10)",
            "x = self.patch(x).flatten(2).transpose(1, 2)\nx = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos\n"
            "return self.head(self.enc(x)[:, 0])",
            name="TinyViT",
        ),
        "TinyViT",
    ),
    "matrices": one(
        module(
            "self.w1 = nn.Parameter(torch.randn(784, 32) * 0.05)\nself.b1 = nn.Parameter(torch.zeros(32))\n"
            "self.w2 = nn.Parameter(torch.randn(32, 10) * 0.2)",
            "return torch.tanh(x.flatten(1) @ self.w1 + self.b1) @ self.w2",
        ),
        shape=GREY,
    ),
    "siblings": NetworkFile(
        {
            "net.py": "from models import *\n\n\ndef get_net():\n    return small(num_classes=10)\n",
            "models/__init__.py": "from .small import *\n",
            "models/small.py": TOP
            + "from .blocks import Block\n\n__all__ = ['small']\n\n\ndef small(**kwargs):\n    return Small(**kwargs)\n\n\n"
            + module(
                "self.a = Block(3, 16)\nself.b = Block(16, 32)\nself.fc = nn.Linear(32, num_classes)",
                "return self.fc(self.b(self.a(x)).mean((2, 3)))",
                signature=", num_classes",
                name="Small",
            ),
            "models/blocks.py": TOP
            + module(
                "self.conv = nn.Conv2d(a, b, 3, 2, 1)\nself.bn = nn.BatchNorm2d(b)",
                "return F.relu(self.bn(self.conv(x)))",
                signature=", a, b",
                name="Block",
            ),
        },
        "get_net",
    ),
    "configured": one(
        "from dataclasses import dataclass, field\n\n\n@dataclass\nclass Config:\n    widths: list = field(default_factory=lambda: [8, 16])\n"
        "    classes: int = 10\n\n\n"
        + module(
            "config = config or Config()\nself.convs = nn.ModuleList()\na = 3\nfor b in config.widths:\n    self.convs.append(nn.Conv2d(a, b, 3))\n"
            "    a = b\nself.fc = nn.Linear(a, config.classes)",
            "for conv in self.convs:\n    x = F.silu(conv(x))\nreturn self.fc(x.mean((2, 3)))",
            signature=", config=None",
        )
    ),
    "script": one(
        "import argparse\nfrom collections import OrderedDict\n\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr', type=float, default=0.1)\n"
        "args = parser.parse_args()\ndevice = torch.device('cuda' if torch.cuda.is_available() else 'cpu')\n\n\n"
        + module(
            "self.net = nn.Sequential(OrderedDict([('conv', nn.Conv2d(3, 8, 3)), ('act', nn.ReLU()), ('pool', nn.AdaptiveMaxPool2d(2))]))\n"
            "self.fc = nn.Linear(32, 10)",
            "return self.fc(self.net(x).view(len(x), -1))",
        )
        + "net = Net().to(device)\n\nif __name__ == '__main__':\n    raise SystemExit('training')\n",
        "net",
    ),
    "scripted function": one(
        "@torch.jit.script\ndef swish(x):\n    return x * torch.sigmoid(x)\n\n\n"
        + module(
            "self.conv = nn.Conv2d(3, 8, 3)\nself.fc = nn.Linear(8, 10)",
            "return self.fc(swish(self.conv(x)).mean((2, 3)))",
        )
    ),
    "nested": one(
        "class Zoo:\n"
        + "\n".join(
            "    " + line
            for line in module(
                "self.c = nn.Conv2d(1, 8, 7)\nself.fc = nn.Linear(8, 3)",
                "return self.fc(F.relu(self.c(x)).amax((2, 3)))",
            ).splitlines()
        ),
        "Zoo.Net",
        shape=GREY,
    ),
    "faces": one(
        module(
            "self.conv1 = nn.Conv2d(1, 16, 3, padding=1)\nself.conv2 = nn.Conv2d(16, 32, 3, padding=1)\nself.fc = nn.Linear(32 * 12 * 12, 7)",
            "x = F.max_pool2d(F.relu(self.conv1(x)), 2)\nx = F.max_pool2d(F.relu(self.conv2(x)), 2)\nreturn self.fc(x.flatten(1))",
            name="FER",
        ),
        "FER",
        shape=(1, 48, 48),
    ),
}

State = dict[str, Tensor]
WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "parallel": lambda state: {
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "epoch": 7,
    },
    "half": lambda state: {
        "net": {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        "acc": 91.2,
    },
    "lightning": lambda state: {
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "global_step": 5,
    },
    "compiled": lambda state: collections.OrderedDict(
        (f"_orig_mod.{name}", value) for name, value in state.items()
    ),
    "double": lambda state: {
        "model_state_dict": {
            name: value.double() if value.is_floating_point() else value for name, value in state.items()
        }
    },
    "netC": lambda state: {
        "netC": state,
        "best_clean_acc": torch.tensor(0.93),
        "optimizerC": {"state": {}, "param_groups": []},
    },
}
KINDS = list(WRAPPINGS)
CASES = [
    (name, wrapping)
    for index, name in enumerate(FILES)
    for wrapping in ("plain", KINDS[1 + index % (len(KINDS) - 1)])
]


def built(entry: NetworkFile, folder: Path) -> nn.Module:
    """The bare class, run here in a process's own import system, with weights and statistics drawn."""
    import sys

    for place, text in entry.sources.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)
    before, arguments = set(sys.modules), sys.argv
    sys.path.insert(0, str(folder))
    sys.argv = ["net.py"]
    try:
        torch.manual_seed(11)
        module = __import__("net")
        found: Any = module
        for part in entry.name.split("."):
            found = getattr(found, part)
        if not isinstance(found, nn.Module):
            found = (
                found(*entry.arguments)
                if isinstance(entry.arguments, list)
                else found(**entry.arguments or {})
            )
    finally:
        sys.path.remove(str(folder))
        sys.argv = arguments
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("net", "models"):
                del sys.modules[name]
    for name, buffer in found.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return found.eval()
