"""Parts that several published networks share, named as in torchvision."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional


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

    def __init__(
        self,
        width: int,
        squeezed: int,
        *,
        activation: type[nn.Module] = nn.SiLU,
        gate: type[nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, images: Tensor) -> Tensor:
        return images * self.gate(self.fc2(self.activation(self.fc1(images.mean((2, 3), keepdim=True)))))


class LayerNorm2d(nn.LayerNorm):
    """Normalises the channels of each pixel of feature maps (n, channels, height, width)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """The dimensions in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(self.order)


class SameConvolution(nn.Conv2d):
    """Without bias, padded as TensorFlow's "same": of an odd number of rows the larger part goes below."""

    def __init__(self, before: int, after: int, size: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, size, stride=stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max(0, (-side % stride) + size - stride) for side in images.shape[2:])
        around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return super().forward(functional.pad(images, around) if any(around) else images)


def convolution(
    wide: int,
    width: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
    eps: float = 1e-5,
    same: bool = False,
) -> nn.Sequential:
    """Convolution without bias, batch normalisation and `activation`; `same` pads as TensorFlow does."""
    padding = {} if same else {"padding": size // 2, "bias": False}
    kind = SameConvolution if same else nn.Conv2d
    layer = kind(wide, width, size, stride=stride, groups=groups, **padding)  # type: ignore[arg-type]
    return nn.Sequential(layer, nn.BatchNorm2d(width, eps=eps), *([activation()] if activation else []))


def multiple_of_8(width: float) -> int:
    """The nearest multiple of 8, and one more where that takes away over a tenth."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * width else rounded + 8


def require_depths(state: Mapping[str, Tensor], depths: Mapping[str, int]) -> None:
    """ValueError unless the blocks of each stage are as many: a name with {} for the number of a block."""
    for pattern, depth in depths.items():
        if pattern.format(depth - 1) not in state or pattern.format(depth) in state:
            raise ValueError(f"there are not {depth} of {pattern}")


def require_widths(state: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """ValueError unless each of the named weights has this many outputs."""
    for name, width in widths.items():
        if len(state[name]) != width:
            raise ValueError(f"{name} is not {width} wide")
