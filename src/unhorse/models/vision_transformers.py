"""ViT (Dosovitskiy et al., ICLR 2021) and DeiT (Touvron et al., ICML 2021), named as in torchvision."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from unhorse.models.layers import require_depths, require_widths
from unhorse.models.registry import HALVES, IMAGENET, Architecture, ImageShape, Naming, Signs, State


class VisionTransformer(nn.Module):
    """ViT on patches of `patch` pixels; a `distilled` one (DeiT) answers with the mean of two heads."""

    def __init__(  # noqa: PLR0913 (one class for the whole family)
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        channels, tall, wide = image_shape
        if tall % patch or wide % patch:
            raise ValueError(
                f"sides must be multiples of {patch} for this network, got {tall}x{wide}: resize the images"
            )
        tokens = (tall // patch) * (wide // patch) + 1 + distilled
        self.conv_proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder(tokens, width, depth, heads)
        ends: dict[str, nn.Module] = {"head": nn.Linear(width, num_classes)}
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
            ends["head_dist"] = nn.Linear(width, num_classes)
        self.heads = nn.ModuleDict(ends)
        self.distilled = distilled

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)  # (n, patches, width)
        first = [self.class_token, *([self.dist_token] if self.distilled else [])]
        tokens = torch.cat([*(token.expand(len(images), -1, -1) for token in first), patches], dim=1)
        encoded = self.encoder(tokens)
        logits = self.heads["head"](encoded[:, 0])
        return (logits + self.heads["head_dist"](encoded[:, 1])) / 2 if self.distilled else logits


class Encoder(nn.Module):
    """Learned positions, a stack of transformer blocks and a final normalisation."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        blocks = {f"encoder_layer_{index}": EncoderBlock(width, heads) for index in range(depth)}
        self.layers = nn.Sequential(OrderedDict[str, nn.Module](blocks))
        self.ln = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.pos_embedding, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ln(self.layers(tokens + self.pos_embedding))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
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


def _side(patch: int, before: int) -> Callable[[State], tuple[int, bool]]:
    """The side of the images from the number of positions, of which `before` are of no patch."""
    return lambda state: (patch * math.isqrt(state["encoder.pos_embedding"].shape[1] - before), True)


def _reader(patch: int, width: int, depth: int) -> Callable[[State], dict[str, object]]:
    def read(state: State) -> dict[str, object]:
        require_depths(state, {"encoder.layers.encoder_layer_{}.ln_1.weight": depth})
        require_widths(state, {"conv_proj.weight": width})
        if state["conv_proj.weight"].shape[-1] != patch:
            raise ValueError(f"the patches are not of {patch} pixels")
        return {}

    return read


_RENAMES = (
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
    (r"^head_dist\.", "heads.head_dist."),
)
_OLD = Naming(((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")))
_DEIT = "MD301 taken for a ViT of timm: for a DeiT, whose tensors have the same names, pass --arch deit-..."


def _vit(patch: int, width: int, depth: int, heads: int, *, deit: str = "") -> Architecture:
    """The entry of a ViT; `deit` is the name of the ViT that has the same tensors."""
    note = (_DEIT,) if patch == 16 and width <= 768 else ()
    timm = Naming(_RENAMES) if deit else Naming(_RENAMES, normal=HALVES, notes=note)
    signs = Signs(
        *("conv_proj.weight", "heads.head.weight", _side(patch, 1), _reader(patch, width, depth)),
        *((timm, _OLD), ("encoder.pos_embedding",)),
    )
    network = partial(VisionTransformer, patch=patch, width=width, depth=depth, heads=heads)
    return Architecture(network, (3, 224, 224), signs, IMAGENET, (), "deit" if deit else "vit", deit)


def _distilled(width: int, heads: int) -> Architecture:
    signs = Signs(
        *("conv_proj.weight", "heads.head.weight", _side(16, 2), _reader(16, width, 12)),
        *((Naming(_RENAMES),), ("dist_token",)),
    )
    network = partial(VisionTransformer, patch=16, width=width, depth=12, heads=heads, distilled=True)
    return Architecture(network, (3, 224, 224), signs, IMAGENET, (), "deit")


VISION_TRANSFORMERS = {
    "vit-ti-16": _vit(16, 192, 12, 3),
    "vit-s-16": _vit(16, 384, 12, 6),
    "vit-s-32": _vit(32, 384, 12, 6),
    "vit-b-16": _vit(16, 768, 12, 12),
    "vit-b-32": _vit(32, 768, 12, 12),
    "vit-l-16": _vit(16, 1024, 24, 16),
    "vit-l-32": _vit(32, 1024, 24, 16),
    "vit-h-14": _vit(14, 1280, 32, 16),
    "deit-ti-16": _vit(16, 192, 12, 3, deit="vit-ti-16"),
    "deit-s-16": _vit(16, 384, 12, 6, deit="vit-s-16"),
    "deit-b-16": _vit(16, 768, 12, 12, deit="vit-b-16"),
    "deit-ti-16-distilled": _distilled(192, 3),
    "deit-s-16-distilled": _distilled(384, 6),
    "deit-b-16-distilled": _distilled(768, 12),
}
