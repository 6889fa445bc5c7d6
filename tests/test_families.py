"""Published networks answer as the originals do, and are recognised under every name they are known by."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from twin_networks import CLASSES, TWINS, Twin, of_transformers
from unhorse.loading import identification
from unhorse.loading.identification import identify
from unhorse.models.architectures import ARCHITECTURES, outline
from unhorse.models.swins import positions
from unhorse.rules import LoadRefused


def filled(name: str, state: dict[str, Tensor], shape: tuple[int, int, int], **options: object) -> nn.Module:
    """The named network with these weights."""
    network = outline(name, num_classes=CLASSES, image_shape=shape, **options)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
@torch.no_grad()
def test_outputs_are_those_of_transformers(twin: Twin) -> None:
    other, state = of_transformers(twin)
    shape = (3, twin.side, twin.side)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wanted = other(images).logits
    # the counters of batches are absent from some networks
    found = identify(state, architecture=twin.name, image_shape=shape)
    network = filled(found.name, found.state, shape, **found.options)
    assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3 * float(wanted.abs().max())
    assert relative_difference(network(images), wanted) < 1e-4


# --- the same networks under the names of other code bases --------------------------------------------------


def states(name: str, *, shape: tuple[int, int, int] | None = None, **options: object) -> dict[str, Tensor]:
    """The shapes of a network under our names."""
    return dict(
        outline(
            name, num_classes=CLASSES, image_shape=shape or ARCHITECTURES[name].image_shape, **options
        ).state_dict()
    )


def renamed(state: dict[str, Tensor], *renames: tuple[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        for pattern, theirs in renames:
            name = re.sub(pattern, theirs, name)
        found[name] = tensor
    return found


def _timm_block(layers: str) -> dict[str, str]:
    """Entries of torchvision's list of a block -> timm's names: "conv_dw,bn1 se conv_pw,bn2"."""
    names: dict[str, str] = {}
    for number, entry in enumerate(layers.split()):
        if entry == "se":
            names |= {f"{number}.fc1": "se.conv_reduce", f"{number}.fc2": "se.conv_expand"}
        else:
            names |= {f"{number}.{place}": name for place, name in enumerate(entry.split(","))}
    return names


def timm_efficientnet(state: dict[str, Tensor], fused: int) -> dict[str, Tensor]:
    """timm's names of an EfficientNet whose first `fused` stages are of fused blocks."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("features."))
    found = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"features\.(\d+)\.(\d+)\.block\.(\d)\.(\w+)\.(\w+)", name):
            stage, index, number, entry, leaf = match.groups()
            layers = (
                "conv_dw,bn1 se conv_pw,bn2" if stage == "1" else "conv_pw,bn1 conv_dw,bn2 se conv_pwl,bn3"
            )
            if int(stage) <= fused:
                layers = "conv,bn1" if stage == "1" else "conv_exp,bn1 conv_pwl,bn2"
            name = f"blocks.{int(stage) - 1}.{index}.{_timm_block(layers)[f'{number}.{entry}']}.{leaf}"
        found[name] = tensor
    return renamed(
        found,
        *((r"^features\.0\.0\.", "conv_stem."), (r"^features\.0\.1\.", "bn1.")),
        *((rf"^features\.{last}\.0\.", "conv_head."), (rf"^features\.{last}\.1\.", "bn2.")),
        (r"^classifier\.1\.", "classifier."),
    )


def test_timm_names_of_efficientnets_are_recognised() -> None:
    theirs = timm_efficientnet(states("efficientnet-b1"), 0)
    assert {
        "conv_stem.weight",
        "blocks.0.0.se.conv_reduce.bias",
        "blocks.1.0.conv_pwl.weight",
    } <= theirs.keys()
    found = identify(theirs)
    assert (found.name, found.options, found.mean[0]) == ("efficientnet-b1", {}, 0.485)
    assert any("pass --arch tf-efficientnet" in line for line in found.assumptions)
    assert identify(theirs, architecture="tf_efficientnet_b1").name == "tf-efficientnet-b1"
    second = timm_efficientnet(states("efficientnet-v2-s"), 3)
    assert {"blocks.0.0.conv.weight", "blocks.1.3.conv_exp.weight"} <= second.keys()
    found = identify(second)
    assert (found.name, found.options) == ("efficientnet-v2-s", {"eps": 1e-3, "same": True})
    assert found.mean == (0.5,)


def test_names_of_the_package_efficientnet_pytorch_mean_padding_of_tensorflow() -> None:
    found = {}
    number = {place: index for index, place in enumerate(_blocks("efficientnet-b0"))}
    for name, tensor in states("efficientnet-b0").items():
        if match := re.fullmatch(r"features\.(\d+)\.(\d+)\.block\.(\d)\.(\w+)\.(\w+)", name):
            stage, index, entry, part, leaf = match.groups()
            place = int(entry) + (stage == "1")
            names = {"20": "_depthwise", "2fc1": "_se_reduce", "2fc2": "_se_expand"}
            names = {"00": "_expand_conv", "01": "_bn0", "10": "_depthwise_conv", "11": "_bn1"} | names
            names |= {"30": "_project_conv", "31": "_bn2"}
            name = f"_blocks.{number[int(stage), int(index)]}.{names[f'{place}{part}']}.{leaf}"
        found[name] = tensor
    theirs = renamed(
        found,
        *((r"^features\.0\.0\.", "_conv_stem."), (r"^features\.0\.1\.", "_bn0.")),
        *((r"^features\.8\.0\.", "_conv_head."), (r"^features\.8\.1\.", "_bn1.")),
        (r"^classifier\.1\.", "_fc."),
    )
    assert "_blocks.15._se_expand.weight" in theirs
    known = identify(theirs)
    assert (known.name, known.options) == ("efficientnet-b0", {"eps": 1e-3, "same": True})


def _blocks(name: str) -> list[tuple[int, int]]:
    """Stage and place of every block."""
    matches = (re.match(r"features\.(\d+)\.(\d+)\.block", key) for key in states(name))
    return sorted({(int(match[1]), int(match[2])) for match in matches if match})


def test_timm_names_of_mobilenets_are_recognised() -> None:
    theirs, stages = {}, {}
    for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for index in range(count):
            stages[len(stages) + 1] = (stage, index)
    for name, tensor in states("mobilenet-v2").items():
        if match := re.fullmatch(r"features\.(\d+)\.conv\.([\d.]+)\.(\w+)", name):
            number, entry, leaf = int(match[1]), match[2], match[3]
            first = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
            other = {
                "0.0": "conv_pw",
                "0.1": "bn1",
                "1.0": "conv_dw",
                "1.1": "bn2",
                "2": "conv_pwl",
                "3": "bn3",
            }
            stage, index = stages[number]
            name = f"blocks.{stage}.{index}.{(first if number == 1 else other)[entry]}.{leaf}"
        theirs[name] = tensor
    theirs = renamed(
        theirs,
        *((r"^features\.0\.0\.", "conv_stem."), (r"^features\.0\.1\.", "bn1.")),
        *((r"^features\.18\.0\.", "conv_head."), (r"^features\.18\.1\.", "bn2.")),
        (r"^classifier\.1\.", "classifier."),
    )
    assert "blocks.6.0.conv_pwl.weight" in theirs and identify(theirs).name == "mobilenet-v2"


def test_timm_head_of_mobilenet_v3_is_a_convolution() -> None:
    # stages of the small one: 1, 2, 3, 2, 3 blocks and the last convolution
    places = [(stage, index) for stage, count in enumerate((1, 2, 3, 2, 3)) for index in range(count)]
    theirs = {}
    for name, tensor in states("mobilenet-v3-small").items():
        if match := re.fullmatch(r"features\.(\d+)\.block\.(\d)\.(\w+)\.(\w+)", name):
            number, entry, part, leaf = int(match[1]), int(match[2]), match[3], match[4]
            squeezed = f"features.{number}.block.2.fc1.bias" in states("mobilenet-v3-small")
            layers = (
                "conv_pw,bn1 conv_dw,bn2 se conv_pwl,bn3"
                if squeezed
                else "conv_pw,bn1 conv_dw,bn2 conv_pwl,bn3"
            )
            layers = "conv_dw,bn1 se conv_pw,bn2" if number == 1 else layers
            stage, index = places[number - 1]
            name = f"blocks.{stage}.{index}.{_timm_block(layers)[f'{entry}.{part}']}.{leaf}"
        theirs[name] = tensor[:, :, None, None] if name == "classifier.0.weight" else tensor
    theirs = renamed(
        theirs,
        *((r"^features\.0\.0\.", "conv_stem."), (r"^features\.0\.1\.", "bn1.")),
        *((r"^features\.12\.0\.", "blocks.5.0.conv."), (r"^features\.12\.1\.", "blocks.5.0.bn1.")),
        *((r"^classifier\.0\.", "conv_head."), (r"^classifier\.3\.", "classifier.")),
    )
    assert theirs["conv_head.weight"].dim() == 4
    found = identify(theirs)
    assert (found.name, found.options) == ("mobilenet-v3-small", {"eps": 1e-5})


CONVNEXT_STAGES = [
    *((rf"^features\.{2 * stage + 1}\.", f"stages.{stage}.blocks.") for stage in range(4)),
    *((rf"^features\.{2 * stage}\.", f"stages.{stage}.downsample.") for stage in range(1, 4)),
]


@pytest.mark.parametrize("paper", [False, True])
def test_convnext_is_known_as_in_timm_and_as_in_its_paper(paper: bool) -> None:
    state = {
        name: tensor.flatten() if name.endswith("layer_scale") else tensor
        for name, tensor in states("convnext-tiny").items()
    }
    theirs = renamed(
        state,
        *(
            (r"^features\.0\.", "stem."),
            *CONVNEXT_STAGES,
            (r"layer_scale$", "gamma"),
            (r"block\.0\.", "conv_dw."),
        ),
        *((r"block\.2\.", "norm."), (r"block\.3\.", "mlp.fc1."), (r"block\.5\.", "mlp.fc2.")),
        *((r"^classifier\.0\.", "head.norm."), (r"^classifier\.2\.", "head.fc.")),
    )
    if paper:
        theirs = renamed(
            theirs,
            *(
                (r"^stem\.", "downsample_layers.0."),
                (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            ),
            *((r"\.blocks\.", "."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv")),
            *((r"^head\.norm\.", "norm."), (r"^head\.fc\.", "head.")),
        )
    assert ("stages.2.8.dwconv.weight" if paper else "stages.2.blocks.8.conv_dw.weight") in theirs
    assert identify(theirs).name == "convnext-tiny"


@pytest.mark.parametrize("when", ["torchvision", "old", "new"])
def test_swin_is_known_with_its_buffers_and_as_in_old_and_new_timm(when: str) -> None:
    state = states("swin-t")
    for name in [name for name in state if name.endswith("bias_table")]:
        index = positions(7, torch.device("cpu"))
        state[name.replace("bias_table", "index")] = index.flatten() if when == "torchvision" else index
    if when != "torchvision":
        moved = 0 if when == "new" else -1
        state = renamed(
            state,
            *((r"^features\.0\.0\.", "patch_embed.proj."), (r"^features\.0\.2\.", "patch_embed.norm.")),
            *((rf"^features\.{2 * place + 1}\.", f"layers.{place}.blocks.") for place in range(4)),
            *((rf"^features\.{2 * place}\.", f"layers.{place + moved}.downsample.") for place in range(1, 4)),
            *((r"mlp\.0\.", "mlp.fc1."), (r"mlp\.3\.", "mlp.fc2.")),
            *([(r"^head\.", "head.fc.")] if when == "new" else []),
        )
    found = identify(state)
    assert (found.name, found.options, found.image_shape) == ("swin-t", {}, (3, 224, 224))


def test_swin_with_other_places_of_the_window_than_the_published_is_refused() -> None:
    state = states("swin-t")
    index = positions(7, torch.device("cpu"))
    state["features.1.0.attn.relative_position_index"] = index.flatten()
    assert identify(state).name == "swin-t"
    state["features.1.0.attn.relative_position_index"] = index.T.flatten()
    with pytest.raises(LoadRefused, match="LD210"):
        identify(state)


def test_window_of_swin_is_read_off_its_table() -> None:
    found = identify(states("swin-b", shape=(3, 384, 384), window=12))
    assert (found.name, found.options, found.image_shape) == ("swin-b", {"window": 12}, (3, 384, 384))


@pytest.mark.parametrize("name", ["regnet-y-400mf", "regnet-x-800mf"])
def test_timm_names_of_regnet_are_recognised(name: str) -> None:
    theirs = renamed(
        states(name),
        (
            r"^trunk_output\.block\d\.block(\d)-(\d+)\.",
            lambda found: f"s{found[1]}.b{int(found[2]) + 1}.",  # type: ignore[arg-type]
        ),
        *((r"\.f\.a\.", ".conv1."), (r"\.f\.b\.", ".conv2."), (r"\.f\.c\.", ".conv3.")),
        *((r"\.f\.se\.", ".se."), (r"\.proj\.", ".downsample."), (r"^fc\.", "head.fc.")),
        *(
            (r"((?:conv\d|downsample|stem)\.)0\.", r"\1conv."),
            (r"((?:conv\d|downsample|stem)\.)1\.", r"\1bn."),
        ),
    )
    assert {"s1.b1.conv1.conv.weight", "s4.b1.downsample.bn.bias", "stem.conv.weight"} <= theirs.keys()
    assert identify(theirs).name == name


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("googlenet", {"aux1.conv.conv.weight": (128, 512, 1, 1), "aux2.fc2.bias": (CLASSES,)}),
        ("inception-v3", {"AuxLogits.conv0.conv.weight": (128, 768, 1, 1), "AuxLogits.fc.bias": (CLASSES,)}),
    ],
)
def test_auxiliary_heads_are_left_out(name: str, heads: dict[str, tuple[int, ...]]) -> None:
    state = states(name) | {key: torch.empty(shape, device="meta") for key, shape in heads.items()}
    found = identify(state)
    assert found.name == name and not heads.keys() & found.state.keys()
    assert found.image_shape[1] == {"googlenet": 224, "inception-v3": 299}[name] and found.mean == (0.5,)


def test_old_names_of_densenet_are_recognised() -> None:
    theirs = renamed(states("densenet121"), (r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."))
    assert "features.denseblock1.denselayer1.norm.1.weight" in theirs
    assert identify(theirs).name == "densenet121"


@pytest.mark.parametrize("distilled", ["", "-distilled"])
def test_deit_is_known_by_its_second_head_only(distilled: str) -> None:
    theirs = renamed(
        states(f"deit-s-16{distilled}"),
        *((r"^class_token", "cls_token"), (r"^encoder\.pos_embedding", "pos_embed")),
        *((r"^conv_proj\.", "patch_embed.proj."), (r"^encoder\.layers\.encoder_layer_", "blocks.")),
        *((r"\.ln_", ".norm"), (r"\.self_attention\.in_proj_", ".attn.qkv.")),
        *(
            (r"\.self_attention\.out_proj", ".attn.proj"),
            (r"\.mlp\.0", ".mlp.fc1"),
            (r"\.mlp\.3", ".mlp.fc2"),
        ),
        *((r"^encoder\.ln\.", "norm."), (r"^heads\.", "")),
    )
    found = identify(theirs)
    if distilled:
        assert (found.name, found.mean[0], found.assumptions) == ("deit-s-16-distilled", 0.485, ())
    else:
        assert (found.name, found.mean) == ("vit-s-16", (0.5,)) and "deit" in found.assumptions[0]
        assert identify(theirs, architecture="DeiT-S-16").mean[0] == 0.485


@pytest.mark.parametrize("name", ["regnet-y-400mf", "convnext-tiny", "vgg11", "squeezenet1-1", "swin-t"])
def test_any_number_of_channels_is_recognised(name: str) -> None:
    side = ARCHITECTURES[name].image_shape[1]
    found = identify(states(name, shape=(1, side, side)))
    assert (found.name, found.image_shape, found.mean) == (name, (1, side, side), (0.0,))


# --- what a refusal says, and how soon ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["densenet161", "swin-b", "efficientnet-b7", "regnet-y-8gf", "vit-l-16"])
def test_refusal_names_the_nearest_of_a_family_without_building_them_all(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = states(name) | {"extra.weight": torch.zeros(2)}
    built: list[str] = []

    def counted(name: str, **options: object) -> nn.Module:
        built.append(name)
        return outline(name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(identification, "outline", counted)
    with pytest.raises(LoadRefused, match=f"the nearest is {name} .*adds 'extra.weight'"):
        identify(state)
    assert len(built) <= 12


def test_names_may_be_spelled_in_torchvisions_way() -> None:
    assert identify(states("densenet121"), architecture="DenseNet_121").name == "densenet121"
    with pytest.raises(LoadRefused, match="there is no architecture 'densenet122': take densenet121"):
        identify(states("densenet121"), architecture="densenet122")


@pytest.mark.parametrize("window", [0, 1, 10**9, -7])
def test_card_with_an_absurd_window_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match="the window of a Swin network"):
        outline("swin-t", num_classes=2, image_shape=(3, 64, 64), window=window)
