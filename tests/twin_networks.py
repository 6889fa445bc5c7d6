"""The same networks from other libraries, with random weights, and how their tensors are called here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Renames = tuple[tuple[str, str], ...]
CLASSES = 7


class Twin(NamedTuple):
    """A network of transformers: its kind, the settings that make it `name`, and our names of its tensors."""

    name: str
    kind: str
    settings: dict[str, Any]
    renames: Renames
    side: int
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state


def random_weights(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor drawn so that none of them, nor the eps of a normalisation, can be left out unseen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif tensor.dim() < 2:
                about = 1.0 if name.endswith(("norm.weight", "normalization.weight")) else 0.3
                tensor.copy_(about + 0.3 * torch.randn(tensor.shape, generator=draw))
            else:
                fan = tensor[0].numel() if tensor.dim() != 3 else tensor.shape[-1]
                tensor.copy_(torch.randn(tensor.shape, generator=draw) / fan**0.5)
    return network.eval()


def measured(network: nn.Module, side: int) -> nn.Module:
    """The network with the statistics that its own maps have, without which deep ones answer alike to all."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        network(torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1)
    return network.eval()


def of_transformers(twin: Twin) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network of transformers, and its tensors under our names."""
    import transformers

    config = getattr(transformers, f"{twin.kind}Config")(num_labels=CLASSES, **twin.settings)
    ending = "WithTeacher" if twin.kind == "DeiT" else ""
    kind = getattr(transformers, f"{twin.kind}ForImageClassification{ending}")
    network = measured(random_weights(kind(config)), twin.side)
    state = {}
    for name, tensor in network.state_dict().items():
        for pattern, ours in twin.renames:
            name = re.sub(pattern, ours, name)
        state[name] = tensor
    return network, twin.change(state)


def joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value under one another, as they stand in the published files; no bias means zeros."""
    done = {
        name: tensor for name, tensor in state.items() if not re.search(r"[._][qkv]_(weight|bias)$", name)
    }
    for name in state:
        if name.endswith((".q_weight", "_q_weight")):
            start = name.removesuffix("q_weight")
            done[start + "weight"] = torch.cat([state[f"{start}{part}_weight"] for part in "qkv"])
            nothing = torch.zeros_like(state[start + "q_bias"])
            done[start + "bias"] = torch.cat([state.get(f"{start}{part}_bias", nothing) for part in "qkv"])
    return done


def _half(matched: re.Match[str]) -> str:
    return f"features.{2 * int(matched[1]) + 1}."


def _swin_places(state: dict[str, Tensor]) -> dict[str, Tensor]:
    placed = {}
    for name, tensor in joined(state).items():
        name = re.sub(r"^stage(\d)\.", _half, name)
        placed[re.sub(r"^merging(\d)\.", lambda found: f"features.{2 * int(found[1]) + 2}.", name)] = tensor
    return placed


def _convnext_places(state: dict[str, Tensor]) -> dict[str, Tensor]:
    placed = {}
    for name, tensor in state.items():
        name = re.sub(r"^stage(\d)\.", _half, name)
        name = re.sub(r"^halving(\d)\.", lambda found: f"features.{2 * int(found[1])}.", name)
        placed[name] = tensor[:, None, None] if name.endswith("layer_scale") else tensor
    return placed


def _efficient_places(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks are numbered through; B0 has 1, 2, 2, 3, 3, 4, 1 of them. Without expansion, one entry less."""
    placed = {}
    of_block = [
        (stage, index) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1), 1) for index in range(count)
    ]
    for name, tensor in state.items():
        if match := re.fullmatch(r"block(\d+)\.(\d)(.+)", name):
            stage, index = of_block[int(match[1])]
            entry = int(match[2]) - (stage == 1)
            name = f"features.{stage}.{index}.block.{entry}{match[3]}"
        placed[name] = tensor
    return placed


def _mobile_places(state: dict[str, Tensor]) -> dict[str, Tensor]:
    placed = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"layer(\d+)\.(.+)", name):
            name = f"features.{int(match[1]) + 2}.conv.{match[2]}"
        placed[name] = tensor
    return placed


_TRANSFORMER: Renames = (
    *((r"^(?:vit|deit)\.", ""), (r"^embeddings\.cls_token", "class_token")),
    *(
        (r"^embeddings\.distillation_token", "dist_token"),
        (r"^embeddings\.position_e.*", "encoder.pos_embedding"),
    ),
    (r"^embeddings\.patch_embeddings\.projection\.", "conv_proj."),
    (r"^layers\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.attention\.([qkv])_proj\.", r".self_attention.in_proj_\1_"),
    *((r"\.attention\.o_proj\.", ".self_attention.out_proj."), (r"\.layernorm_before\.", ".ln_1.")),
    *((r"\.layernorm_after\.", ".ln_2."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3.")),
    *((r"^layernorm\.", "encoder.ln."), (r"^(?:cls_)?classifier\.", "heads.head.")),
    (r"^distillation_classifier\.", "heads.head_dist."),
)
_SWIN: Renames = (
    *((r"^swin(?:v2)?\.", ""), (r"^embeddings\.patch_embeddings\.projection\.", "features.0.0.")),
    *((r"^embeddings\.norm\.", "features.0.2."), (r"^encoder\.layers\.(\d)\.blocks\.", r"stage\1.")),
    (r"^encoder\.layers\.(\d)\.downsample\.", r"merging\1."),
    *((r"\.attention\.([qkv])_proj\.", r".attn.qkv.\1_"), (r"\.attention\.o_proj\.", ".attn.proj.")),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    *((r"\.attention\.self\.query\.", ".attn.qkv.q_"), (r"\.attention\.self\.key\.", ".attn.qkv.k_")),
    *((r"\.attention\.self\.value\.", ".attn.qkv.v_"), (r"\.attention\.output\.dense\.", ".attn.proj.")),
    *((r"\.attention\.self\.cont[a-z_]*\.", ".attn.cpb_mlp."), (r"\.attention\.self\.", ".attn.")),
    *((r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2.")),
    *((r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3.")),
    *((r"\.intermediate\.dense\.", ".mlp.0."), (r"\.output\.dense\.", ".mlp.3.")),
    *((r"^layernorm\.", "norm."), (r"^classifier\.", "head.")),
)
_CONVNEXT: Renames = (
    *((r"^convnext\.", ""), (r"^embeddings\.patch_embeddings\.", "features.0.0.")),
    *((r"^embeddings\.layernorm\.", "features.0.1."), (r"^encoder\.stages\.(\d)\.layers\.", r"stage\1.")),
    *((r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"halving\1."), (r"_parameter$", "")),
    *((r"\.dwconv\.", ".block.0."), (r"(\d)\.layernorm\.", r"\1.block.2.")),
    *((r"\.pwconv1\.", ".block.3."), (r"\.pwconv2\.", ".block.5.")),
    *((r"^layernorm\.", "classifier.0."), (r"^classifier\.(?=weight|bias)", "classifier.2.")),
)
_REGNET: Renames = (
    *(
        (r"^regnet\.embedder\.embedder\.", "stem."),
        (r"\.convolution\.", ".0."),
        (r"\.normalization\.", ".1."),
    ),
    (
        r"^regnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.",
        lambda found: f"trunk_output.block{int(found[1]) + 1}.block{int(found[1]) + 1}-{found[2]}.",  # type: ignore[dict-item]
    ),
    *((r"\.shortcut\.", ".proj."), (r"\.layer\.0\.", ".f.a."), (r"\.layer\.1\.", ".f.b.")),
    *((r"\.layer\.2\.attention\.0\.", ".f.se.fc1."), (r"\.layer\.2\.attention\.2\.", ".f.se.fc2.")),
    *((r"\.layer\.[23]\.", ".f.c."), (r"^classifier\.1\.", "fc.")),
)
_RESNET: Renames = (
    *(
        (r"^resnet\.embedder\.embedder\.convolution\.", "conv1."),
        (r"^resnet\.embedder\.embedder\.n.*?\.", "bn1."),
    ),
    (
        r"^resnet\.encoder\.stages\.(\d)\.layers\.",
        lambda found: f"layer{int(found[1]) + 1}.",  # type: ignore[dict-item]
    ),
    *((r"\.shortcut\.convolution\.", ".downsample.0."), (r"\.shortcut\.normalization\.", ".downsample.1.")),
    (
        r"\.layer\.(\d)\.(conv|norm)[a-z]*\.",
        lambda found: f".{'conv' if found[2] == 'conv' else 'bn'}{int(found[1]) + 1}.",  # type: ignore[dict-item]
    ),
    (r"^classifier\.1\.", "fc."),
)
_EFFICIENT: Renames = (
    *((r"^efficientnet\.", ""), (r"^embeddings\.convolution\.", "features.0.0.")),
    *((r"^embeddings\.batchnorm\.", "features.0.1."), (r"^encoder\.top_conv\.", "features.8.0.")),
    *((r"^encoder\.top_bn\.", "features.8.1."), (r"^encoder\.blocks\.(\d+)\.", r"block\1.")),
    *((r"\.expansion\.expand_conv\.", ".0.0."), (r"\.expansion\.expand_bn\.", ".0.1.")),
    *((r"\.depthwise_conv\.depthwise_conv\.", ".1.0."), (r"\.depthwise_conv\.depthwise_norm\.", ".1.1.")),
    *((r"\.squeeze_excite\.reduce\.", ".2.fc1."), (r"\.squeeze_excite\.expand\.", ".2.fc2.")),
    *((r"\.projection\.project_conv\.", ".3.0."), (r"\.projection\.project_bn\.", ".3.1.")),
    (r"^classifier\.(?=weight|bias)", "classifier.1."),
)
_MOBILE: Renames = (
    *((r"^mobilenet_v2\.", ""), (r"^conv_stem\.first_conv\.convolution\.", "features.0.0.")),
    *(
        (r"^conv_stem\.first_conv\.n[a-z]*\.", "features.0.1."),
        (r"^conv_stem\.conv_3x3\.c[a-z]*\.", "features.1.conv.0.0."),
    ),
    *(
        (r"^conv_stem\.conv_3x3\.n[a-z]*\.", "features.1.conv.0.1."),
        (r"^conv_stem\.reduce_1x1\.c[a-z]*\.", "features.1.conv.1."),
    ),
    *(
        (r"^conv_stem\.reduce_1x1\.n[a-z]*\.", "features.1.conv.2."),
        (r"^conv_1x1\.c[a-z]*\.", "features.18.0."),
    ),
    *((r"^conv_1x1\.n[a-z]*\.", "features.18.1."), (r"^layer\.(\d+)\.", r"layer\1.")),
    *((r"\.expand_1x1\.c[a-z]*\.", ".0.0."), (r"\.expand_1x1\.n[a-z]*\.", ".0.1.")),
    *((r"\.conv_3x3\.c[a-z]*\.", ".1.0."), (r"\.conv_3x3\.n[a-z]*\.", ".1.1.")),
    *((r"\.reduce_1x1\.c[a-z]*\.", ".2."), (r"\.reduce_1x1\.n[a-z]*\.", ".3.")),
    (r"^classifier\.(?=weight|bias)", "classifier.1."),
)
_SMALL_VIT = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "layer_norm_eps": 1e-6}
# sides that leave windows and halvings a remainder, where the network takes such
TWINS = (
    Twin("vit-ti-16", "ViT", {**_SMALL_VIT, "image_size": 48}, _TRANSFORMER, 48, joined),
    Twin("deit-ti-16-distilled", "DeiT", {**_SMALL_VIT, "image_size": 48}, _TRANSFORMER, 48, joined),
    Twin("swin-t", "Swin", {"image_size": 228}, _SWIN, 228, _swin_places),
    Twin("swin-v2-t", "Swinv2", {"window_size": 8, "image_size": 256}, _SWIN, 256, _swin_places),
    Twin("convnext-tiny", "ConvNext", {"layer_norm_eps": 1e-6}, _CONVNEXT, 70, _convnext_places),
    Twin(
        "regnet-y-400mf",
        "RegNet",
        {"hidden_sizes": [48, 104, 208, 440], "depths": [1, 3, 6, 6], "groups_width": 8},
        _REGNET,
        70,
    ),
    Twin(
        "regnet-x-400mf",
        "RegNet",
        {"hidden_sizes": [32, 64, 160, 400], "depths": [1, 2, 7, 12], "groups_width": 16, "layer_type": "x"},
        _REGNET,
        70,
    ),
    Twin("resnet50", "ResNet", {}, _RESNET, 70),
    Twin("resnet101", "ResNet", {"depths": [3, 4, 23, 3]}, _RESNET, 70),
    Twin(
        "mobilenet-v2",
        "MobileNetV2",
        {"tf_padding": False, "layer_norm_eps": 1e-5},
        _MOBILE,
        70,
        _mobile_places,
    ),
    Twin(
        "tf-efficientnet-b0",
        "EfficientNet",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224},
        _EFFICIENT,
        64,
        _efficient_places,
    ),
)
