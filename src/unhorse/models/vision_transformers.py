"""ViT-B/16 (Dosovitskiy et al., ICLR 2021), named as in torchvision."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from unhorse.models.registry import HALVES, IMAGENET, Architecture, ImageShape, Naming, Signs, State


class ViTB16(nn.Module):
    """ViT-B/16 (Dosovitskiy et al., ICLR 2021); the sides of the images are multiples of 16."""

    patch, width, depth = 16, 768, 12

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"vit-b-16 needs sides that are multiples of 16, got {height}x{width}: resize the images"
            )
        patches = (height // self.patch) * (width // self.patch)
        self.conv_proj = nn.Conv2d(channels, self.width, self.patch, stride=self.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.encoder = Encoder(patches + 1, self.width, self.depth)
        self.heads = nn.Sequential(OrderedDict[str, nn.Module](head=nn.Linear(self.width, num_classes)))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)  # (n, patches, width)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.heads(self.encoder(tokens)[:, 0])


class Encoder(nn.Module):
    """Learned positions, a stack of transformer blocks and a final normalisation."""

    def __init__(self, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        blocks = {f"encoder_layer_{index}": EncoderBlock(width) for index in range(depth)}
        self.layers = nn.Sequential(OrderedDict[str, nn.Module](blocks))
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ln(self.layers(tokens + self.pos_embedding))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block with heads of 64 dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        # the dropouts of rate 0 keep torchvision's numbering
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(4 * width, width),
            nn.Dropout(0.0),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.self_attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


def _side(state: State) -> tuple[int, bool]:
    return 16 * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1), True


_TIMM = Naming(
    (
        (r"^cls_token$", "class_token"),
        (r"^pos_embed$", "encoder.pos_embedding"),
        (r"^patch_embed\.proj\.", "conv_proj."),
        (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
        (r"\.attn\.proj\.", ".self_attention.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
        (r"^norm\.", "encoder.ln."),
        (r"^head\.", "heads.head."),
    ),
    normal=HALVES,
)

VISION_TRANSFORMERS = {
    "vit-b-16": Architecture(
        ViTB16,
        (3, 224, 224),
        Signs("conv_proj.weight", "heads.head.weight", _side, namings=(_TIMM,)),
        IMAGENET,
        family="vit",
    )
}
