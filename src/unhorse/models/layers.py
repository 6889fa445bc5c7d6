"""Parts that several published networks share, named as in torchvision."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """Layers under `name`, added to their input where the shapes allow it."""

    def __init__(self, name: str, layers: nn.Sequential, *, skip: bool) -> None:
        super().__init__()
        self.add_module(name, layers)
        self.name, self.skip = name, skip

    def forward(self, images: Tensor) -> Tensor:
        out = self.get_submodule(self.name)(images)
        return images + out if self.skip else out


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all of them (Hu et al., CVPR 2018)."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)
        self.activation = nn.SiLU()

    def forward(self, images: Tensor) -> Tensor:
        gate = self.fc2(self.activation(self.fc1(images.mean((2, 3), keepdim=True))))
        return images * gate.sigmoid()


def convolution(
    wide: int,
    width: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    layers = [
        nn.Conv2d(wide, width, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


def multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, and one more where that takes away over a tenth."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8
