"""The autoencoders that purify images: convolutions down to a spatial latent, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Images

ImageShape = tuple[int, int, int]
STRIDE = 4
LOG_VARIANCE_BOUND = 8.0


@dataclass(frozen=True)
class FilterSize:
    """Widths at full, half and quarter resolution (0: none), channels of the latent, blocks around it.

    `residual` blocks are two convolutions with a shortcut, the others one convolution.
    """

    widths: tuple[int, int, int]
    latent: int
    blocks: int = 1
    residual: bool = True


FILTER_NETWORKS: dict[str, FilterSize] = {
    "tiny": FilterSize((0, 16, 32), 8, residual=False),
    "small": FilterSize((32, 64, 128), 16),
    "base": FilterSize((64, 128, 256), 32, blocks=2),
}


class FilterNetwork(nn.Module):
    """Images to images in [0, 1] through a latent at a quarter of the resolution, and no way around it.

    Input Filtering (Do et al., ECCV 2022) leaves the network open: the three sizes are our choice. Images
    whose sides 4 does not divide are padded by their edge pixels and cropped back.
    """

    def __init__(self, size: FilterSize, image_shape: ImageShape) -> None:
        super().__init__()
        self.image_shape = image_shape
        channels, self.height, self.width = image_shape
        full, half, quarter = size.widths
        self.below, self.right = -self.height % STRIDE, -self.width % STRIDE
        down = [*_layer(nn.Conv2d(channels, full, 3, padding=1, bias=False))] if full else []
        down += _layer(nn.Conv2d(full or channels, half, 4, 2, 1, bias=False))
        down += _layer(nn.Conv2d(half, quarter, 4, 2, 1, bias=False))
        self.encoder = nn.Sequential(*down, *_blocks(size))
        self.to_latent = nn.Conv2d(quarter, 2 * size.latent, 1)
        up = _layer(nn.Conv2d(size.latent, quarter, 1, bias=False))
        up += [*_blocks(size), *_layer(nn.ConvTranspose2d(quarter, half, 4, 2, 1, bias=False))]
        if full:
            up += _layer(nn.ConvTranspose2d(half, full, 4, 2, 1, bias=False))
            up.append(nn.Conv2d(full, channels, 3, padding=1))
        else:
            up.append(nn.ConvTranspose2d(half, channels, 4, 2, 1))
        self.decoder = nn.Sequential(*up)

    def encode(self, images: Images) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, each (n, latent, h/4, w/4), the latter within [-8, 8]."""
        if self.below or self.right:
            images = functional.pad(images, (0, self.right, 0, self.below), mode="replicate")
        mean, log_variance = self.to_latent(self.encoder(images)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)

    def decode(self, latent: Tensor) -> Images:
        return self.decoder(latent).float().sigmoid()[:, :, : self.height, : self.width]

    def forward(self, images: Images) -> Images:
        """The purified images: decoded from the mean, so the same on every call."""
        return self.decode(self.encode(images)[0])


def build_filter(size: str, image_shape: ImageShape) -> FilterNetwork:
    """A network of random weights, drawn from torch's current random state.

    "auto" is "tiny" for images below 32 pixels and "small" from there on.
    """
    if size == "auto":
        size = "tiny" if max(image_shape[1:]) < 32 else "small"
    if size not in FILTER_NETWORKS:
        raise ValueError(f"unknown filter network {size!r}: take auto, {', '.join(FILTER_NETWORKS)}")
    if min(image_shape[1:]) < STRIDE:
        raise ValueError(f"a filter needs images of at least 4x4 pixels, got {image_shape[1:]}: enlarge them")
    return FilterNetwork(FILTER_NETWORKS[size], image_shape)


def _layer(convolution: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.LeakyReLU(0.2)]


def _blocks(size: FilterSize) -> list[nn.Module]:
    width = size.widths[-1]
    if size.residual:
        return [_ResidualBlock(width) for _ in range(size.blocks)]
    return [layer for _ in range(size.blocks) for layer in _layer(_same_size(width))]


def _same_size(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1, bias=False)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_layer(_same_size(width)), _same_size(width), nn.BatchNorm2d(width))

    def forward(self, features: Tensor) -> Tensor:
        return functional.leaky_relu(features + self.inner(features), 0.2)
