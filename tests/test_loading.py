"""What people hand in is loaded right or refused with a remedy; nothing in a file is ever run."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

import unhorse.loading
from unhorse.checks import weight_files
from unhorse.checks.sniff import Format, sniff
from unhorse.core import Classifier
from unhorse.loading.formats import load_model
from unhorse.loading.identification import identify
from unhorse.models.architectures import ARCHITECTURES, outline
from unhorse.models.classifier import new_classifier, save_classifier
from unhorse.models.registry import IMAGENET_MEAN
from unhorse.rulebook import RULES
from unhorse.rules import LoadFailed, LoadRefused


def small_classifier(classes: int = 3, side: int = 8) -> Classifier:
    names = [f"class {index}" for index in range(classes)]
    shape = (1, side, side)
    return new_classifier(
        "small-cnn", image_shape=shape, class_names=names, mean=[0.3], std=[0.2], seed=0
    ).eval()


def weights() -> dict[str, Tensor]:
    return dict(small_classifier().network.state_dict())


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def rule_of(path: Path, **options: object) -> str:
    with pytest.raises(LoadRefused) as refusal:
        load_model(path, **options)
    assert refusal.value.reason and refusal.value.remedy
    return refusal.value.rule


# --- what loads ---------------------------------------------------------------------------------------------


def test_classifier_folder_loads_as_it_was_saved(tmp_path: Path) -> None:
    model = small_classifier()
    loaded = load_model(save_classifier(model, tmp_path / "m"))
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert loaded.class_names == model.class_names and loaded.assumptions == () and not loaded.training


def test_safetensors_file_carries_its_card_inside(tmp_path: Path) -> None:
    save_classifier(small_classifier(), tmp_path / "m")
    shutil.copy(tmp_path / "m" / "model.safetensors", tmp_path / "renamed.safetensors")
    loaded = load_model(tmp_path / "renamed.safetensors")
    assert loaded.class_names == ("class 0", "class 1", "class 2") and loaded.assumptions == ()


def test_card_beside_a_renamed_file_counts_only_if_its_hash_matches(tmp_path: Path) -> None:
    folder = save_classifier(small_classifier(), tmp_path / "m")
    same, other = weights(), {name: tensor + 1 for name, tensor in weights().items()}
    save_file(same, folder / "same.safetensors")
    save_file(other, folder / "other.safetensors")
    assert load_model(folder / "same.safetensors").assumptions == ()
    assert load_model(folder / "other.safetensors").class_names == ("0", "1", "2")


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net", "netC"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_state_dict_loads_out_of_what_training_scripts_wrap_around_it(
    tmp_path: Path, wrapper: str | None, prefix: str
) -> None:
    state = {prefix + name: tensor for name, tensor in weights().items()}
    content = state if wrapper is None else {wrapper: state, "epoch": 7, "best": 0.9}
    loaded = load_model(saved(content, tmp_path / "checkpoint.pth"))
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded.network(images), small_classifier().network(images))


def test_state_dict_with_an_optimizer_and_a_schedule_beside_it_loads(tmp_path: Path) -> None:
    network = small_classifier().network
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    network(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "netC": network.state_dict(),
        "optimizerC": optimizer.state_dict(),
        "schedulerC": schedule.state_dict(),
    }
    assert load_model(saved(content, tmp_path / "c.pth.tar")).num_classes == 3


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in weights().items()}
    loaded = load_model(saved(half, tmp_path / "m.pt"))
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}


def test_tied_tensors_are_separated(tmp_path: Path) -> None:
    state = weights()
    state["features.3.bias"] = state["features.3.weight"].flatten()[:32]
    loaded = load_model(saved(state, tmp_path / "m.pt"))
    with torch.no_grad():
        loaded.network.features[3].bias.zero_()
    assert torch.equal(loaded.network.features[3].weight, state["features.3.weight"])


def test_legacy_checkpoint_without_batch_counters_loads(tmp_path: Path) -> None:
    network = new_classifier("ulp-vgg", image_shape=(3, 32, 32), class_names=["a", "b"], seed=0).network
    state = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    assert load_model(saved(state, tmp_path / "m.pt")).architecture["name"] == "ulp-vgg"


@pytest.mark.parametrize("classes", [0, 2, 1000])
def test_any_number_of_classes_loads(tmp_path: Path, classes: int) -> None:
    state = weights()
    state |= {"head.3.weight": torch.zeros(classes, 64), "head.3.bias": torch.zeros(classes)}
    assert load_model(saved(state, tmp_path / "m.pt")).num_classes == classes


# --- what a state dict is -----------------------------------------------------------------------------------


def meta_state(name: str, **options: object) -> dict[str, Tensor]:
    return dict(
        outline(name, num_classes=11, image_shape=ARCHITECTURES[name].image_shape, **options).state_dict()
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_recognised_by_its_state_dict(name: str) -> None:
    known = ARCHITECTURES[name]
    found = identify(meta_state(name))
    assert (found.name, found.num_classes, found.image_shape) == (known.twin or name, 11, known.image_shape)
    rebuilt = outline(name, num_classes=11, image_shape=found.image_shape, **found.options)
    rebuilt.load_state_dict(found.state, strict=True, assign=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg16", {"batch_norm": True}),
        ("resnet34", {"small_stem": True, "max_pool": False}),
        ("small-cnn", {"widths": [5, 7], "hidden": 9}),
    ],
)
def test_options_are_read_off_the_shapes(name: str, options: dict[str, object]) -> None:
    assert identify(meta_state(name, **options)).options == options


@pytest.mark.parametrize("side", [8, 28, 64])
def test_image_size_of_small_cnn_is_read_off_its_shapes(side: int) -> None:
    assert identify(small_classifier(side=side).network.state_dict()).image_shape == (1, side, side)


def test_image_size_of_a_transformer_is_read_off_its_positions() -> None:
    state = dict(outline("vit-b-16", num_classes=5, image_shape=(3, 384, 384)).state_dict())
    found = identify(state)
    assert found.image_shape == (3, 384, 384) and found.assumptions == ()


def test_timm_transformer_is_the_same_network_under_other_names() -> None:
    state = meta_state("vit-b-16")
    ours = {
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "conv_proj.": "patch_embed.proj.",
    }
    ours |= {"encoder.ln.": "norm.", "heads.head.": "head.", "encoder.layers.encoder_layer_": "blocks."}
    ours |= {
        ".ln_": ".norm",
        ".self_attention.in_proj_": ".attn.qkv.",
        ".self_attention.out_proj": ".attn.proj",
    }
    ours |= {".mlp.0": ".mlp.fc1", ".mlp.3": ".mlp.fc2"}
    timm = {}
    for name, tensor in state.items():
        for part, theirs in ours.items():
            name = name.replace(part, theirs)
        timm[name] = tensor
    assert {"blocks.0.attn.qkv.weight", "blocks.11.norm2.bias", "norm.weight", "head.bias"} <= timm.keys()
    found = identify(timm)
    assert found.name == "vit-b-16" and found.mean == (0.5,)
    assert all(found.state[name] is state[name] for name in state)


@pytest.mark.parametrize("name", ["preact-resnet18", "resnet18-64", "resnet18"])
def test_residual_networks_of_the_attack_code_bases_are_recognised(name: str) -> None:
    options = {"small_stem": True, "max_pool": False} if name == "resnet18" else {}
    theirs = {
        key.replace("downsample", "shortcut").replace("fc.", "linear."): tensor
        for key, tensor in meta_state(name, **options).items()
    }
    assert "linear.weight" in theirs and identify(theirs).name == name


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("input-aware-cnn", ["conv1.weight", "conv1.bias", "conv5.weight", "conv5.bias"]),
        ("wanet-cnn", ["conv1.weight", "conv1.bias", "layer2.bn1.weight", "layer2.bn1.bias"]),
        ("ulp-vgg", []),
    ],
)
def test_published_names_of_attack_classifiers_are_recognised(name: str, theirs: list[str]) -> None:
    published = {
        "input-aware-cnn": {
            "features.0.": "conv1.",
            "features.4.": "conv5.",
            "head.1.": "linear6.",
            "head.4.": "linear9.",
        },
        "wanet-cnn": {"features.0.": "conv1.", "features.2.": "layer2.bn1.", "features.4.": "layer2.conv1."}
        | {
            "features.5.": "layer3.bn1.",
            "features.7.": "layer3.conv1.",
            "head.1.": "linear6.",
            "head.4.": "linear9.",
        },
        "ulp-vgg": {f"head.{index + 1}.": f"fc.{index}." for index in (0, 1, 4, 5, 8)},
    }[name]
    state = {}
    for key, tensor in meta_state(name).items():
        for ours, other in published.items():
            key = other + key.removeprefix(ours) if key.startswith(ours) else key
        state[key] = tensor
    assert set(theirs) <= state.keys() and not {"head.1.weight", "head.4.weight"} & state.keys()
    assert identify(state).name == name


# --- what is assumed, and what the user says ----------------------------------------------------------------


def test_missing_normalisation_is_assumed_and_said(tmp_path: Path) -> None:
    loaded = load_model(saved(weights(), tmp_path / "m.pt"))
    assert (loaded.mean.item(), loaded.std.item()) == (0.0, 1.0)
    size, normalisation, names = loaded.assumptions
    assert names.startswith("MD302") and "--labels" in names
    assert size.startswith("MD301 input size assumed 8x8")
    assert (
        normalisation.startswith("MD301 input normalisation assumed mean 0, std 1")
        and "--mean" in normalisation
    )


def test_imagenet_normalisation_is_assumed_for_torchvision_names() -> None:
    found = identify(meta_state("resnet18"))
    assert found.mean == IMAGENET_MEAN
    assert found.assumptions == ("MD301 input size assumed 224x224: the weights fit others too; pass --size",)


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({"mean": [0.5], "std": [0.25]}, 0.5, 0.25),
        ({"value_range": (0, 255)}, 0.0, 1 / 255),
        ({"value_range": (-1, 1)}, 0.5, 0.5),
        ({"mean": [51.0], "std": [102.0], "value_range": (0, 255)}, 0.2, 0.4),
    ],
)
def test_given_normalisation_is_used_and_no_longer_assumed(
    tmp_path: Path, given: dict[str, object], mean: float, std: float
) -> None:
    loaded = load_model(saved(weights(), tmp_path / "m.pt"), **given)
    assert loaded.mean.item() == pytest.approx(mean) and loaded.std.item() == pytest.approx(std)
    assert not any("normalisation" in line for line in loaded.assumptions)


def test_given_names_and_image_shape_are_used(tmp_path: Path) -> None:
    path = saved(weights(), tmp_path / "m.pt")
    loaded = load_model(path, class_names=["x", "y", "z"], image_shape=(1, 8, 11))
    assert loaded.class_names == ("x", "y", "z") and loaded.image_shape == (1, 8, 11)
    assert loaded(torch.rand(2, 1, 8, 11)).shape == (2, 3)


@pytest.mark.parametrize(
    "claim",
    [
        {"num_classes": 10},
        {"class_names": ["x"]},
        {"num_classes": 3, "class_names": ["x", "y"]},
        {"image_shape": (3, 8, 8)},
        {"image_shape": (1, 32, 32)},
        {"mean": [0.1, 0.2, 0.3]},
        {"std": [0.0]},
        {"mean": [float("nan")]},
        {"value_range": (1, 0)},
        {"architecture": "resnet19"},
    ],
    ids=str,
)
def test_claim_that_contradicts_the_weights_is_refused(tmp_path: Path, claim: dict[str, object]) -> None:
    assert rule_of(saved(weights(), tmp_path / "m.pt"), **claim) == "LD211"
    assert rule_of(save_classifier(small_classifier(), tmp_path / "m"), **claim) == "LD211"


def test_wrong_number_of_classes_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadRefused, match="the weights have 3 classes, not 10: leave --classes out"):
        load_model(saved(weights(), tmp_path / "m.pt"), num_classes=10)


def test_refusal_of_an_unknown_network_names_the_nearest(tmp_path: Path) -> None:
    state = weights()
    del state["head.3.bias"]
    with pytest.raises(LoadRefused, match="nearest is small-cnn .*lacks 'head.3.bias'.*--arch") as refusal:
        load_model(saved(state, tmp_path / "m.pt"))
    assert refusal.value.rule == "LD210"


def test_state_dict_like_nothing_known_is_refused(tmp_path: Path) -> None:
    assert rule_of(saved({"w": torch.zeros(3, 3)}, tmp_path / "m.pt")) == "LD210"
    assert rule_of(saved(weights(), tmp_path / "m.pt"), architecture="resnet18") == "LD210"


# --- bad files ----------------------------------------------------------------------------------------------


class Payload:
    """Unpickling this creates a file; no loader may do it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_malicious_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    archive = saved(weights() | {"x": Payload(marker)}, tmp_path / "archive.pt")
    legacy = tmp_path / "legacy.pt"
    torch.save({"x": Payload(marker)}, legacy, _use_new_zipfile_serialization=False)
    bare = tmp_path / "model.safetensors"
    bare.write_bytes(pickle.dumps(Payload(marker)))
    assert [rule_of(path) for path in (archive, legacy, bare)] == ["LD205"] * 3
    assert not marker.exists()


def test_pickled_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadRefused, match="a whole pickled network, .*, not a state dict") as refusal:
        load_model(saved(small_classifier().network, tmp_path / "m.pt"))
    assert refusal.value.rule == "LD209" and "--network" in refusal.value.remedy


def test_source_never_asks_for_unrestricted_unpickling() -> None:
    folder = Path(unhorse.loading.__file__).parents[1]
    sources = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    loads = [call for text in sources.values() for call in re.findall(r"torch\.load\([^)]*\)[^)]*\)", text)]
    assert loads and all("weights_only=True" in call for call in loads)
    banned = re.compile(r"weights_only\s*=\s*False|pickle\.loads?\(|joblib\.load\(")
    assert [str(path) for path, text in sources.items() if banned.search(text)] == []
    # what reads a program is called by the restricted child alone
    program = re.compile(r"torch\.(jit|export)\.load\(")
    assert [path.name for path, text in sources.items() if program.search(text)] == ["torch_reader.py"]


def test_text_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("this is not a model, whatever its name says\n" * 20)
    assert sniff(path) is Format.UNKNOWN and rule_of(path) == "LD202"
    path.write_bytes(b"")
    assert rule_of(path) == "LD202"


def test_file_beyond_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(weights(), tmp_path / "m.pt")
    monkeypatch.setattr(weight_files, "MAX_FILE_BYTES", path.stat().st_size - 1)
    assert rule_of(path) == "LD208"


def test_missing_file_and_folder_without_a_model_are_errors(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="cannot be read"):
        load_model(tmp_path / "nothing.pt")
    assert rule_of(tmp_path) == "LD202"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_file_fails_with_a_reason(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"m{suffix}"
    _ = save_file(weights(), path) if suffix == ".safetensors" else saved(weights(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(LoadFailed, match="truncated"):
        load_model(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    state = weights()
    state["features.3.weight"][1, 2, 0, 0] = value
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(LoadRefused, match="contain NaN or infinity, first in 'features.3.weight'") as refusal:
        load_model(tmp_path / "m.safetensors")
    assert refusal.value.rule == "LD207" and rule_of(saved(state, tmp_path / "m.pt")) == "LD207"


def test_hollow_files_of_every_format_are_recognised_and_refused(tmp_path: Path) -> None:
    def archive(*names: str) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as content:
            for name in names:
                content.writestr(name, "{}")
        return buffer.getvalue()

    examples = {
        Format.TORCHSCRIPT: archive("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl"),
        Format.PT2: archive("m/archive_format", "m/models/model.json"),
        Format.KERAS_ZIP: archive("metadata.json", "config.json", "model.weights.h5"),
        Format.HDF5: b"\x89HDF\r\n\x1a\n" + bytes(600),
        Format.ONNX: b"\x08\x08\x12\x07pytorch\x3a\x7f\x0a" + bytes(100),
        Format.TORCH_LEGACY_PICKLE: pickle.dumps({"a": 1}, protocol=2),
    }
    for kind, content in examples.items():
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        assert sniff(path) is kind
        with pytest.raises((LoadRefused, LoadFailed)) as refusal:
            load_model(path)
        assert refusal.value.rule in RULES and refusal.value.remedy


def test_a_state_dict_of_an_old_pytorch_is_the_same_network(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert sniff(tmp_path / "old.pth") is Format.TORCH_OLD
    old, new = load_model(tmp_path / "old.pth"), load_model(saved(weights(), tmp_path / "new.pt"))
    images = torch.rand(2, *new.image_shape)
    assert torch.equal(old(images), new(images))


def old_file(content: object, **changed: bytes) -> bytes:
    """What an old torch.save writes, with some of its parts put in place of others."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    for old, new in changed.items():
        data = data.replace(old.encode(), new)
    return data


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (lambda marker: old_file({"x": Payload(marker)}), "LD205"),
        (lambda marker: old_file(weights(), _rebuild_tensor_v2=b"_load_from_bytess."), "LD205"),
        (lambda marker: old_file(weights(), little_endian=b"little_enx\x85\x93a"), "LD230"),
        (lambda marker: old_file(weights())[:15] + pickle.dumps(Payload(marker), protocol=2), "LD205"),
        (lambda marker: old_file(weights())[:400], "LD230"),
        (lambda marker: old_file(weights())[:-40], "LD230"),
    ],
)
def test_a_hostile_file_of_an_old_pytorch_is_refused(data, rule: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "m.pth", tmp_path / "marker"
    path.write_bytes(data(marker))
    with pytest.raises((LoadRefused, LoadFailed)) as refusal:
        load_model(path)
    assert refusal.value.rule == rule and refusal.value.remedy
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [[1, 2], torch.zeros(3), {}, {"a": 1}, {1: torch.zeros(2)}, {"a": "b"}], ids=str
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    assert rule_of(saved(content, tmp_path / "m.pt")) == "LD209"


@pytest.mark.parametrize(
    ("tensor", "rule"),
    [
        (torch.zeros(1).expand(10**12), "LD206"),
        (torch.empty(3, device="meta"), "LD206"),
        (torch.zeros(3, 3).to_sparse(), "LD209"),
        (torch.zeros(3, dtype=torch.complex64), "LD209"),
    ],
    ids=["a million millions from one number", "no data", "sparse", "complex"],
)
def test_tensor_that_is_not_plain_is_refused(tmp_path: Path, tensor: Tensor, rule: str) -> None:
    assert rule_of(saved(weights() | {"head.3.bias": tensor}, tmp_path / "m.pt")) == rule


def test_tensor_that_claims_more_than_its_storage_is_named(tmp_path: Path) -> None:
    path = saved(weights() | {"head.3.bias": torch.zeros(1).expand(3)}, tmp_path / "m.pt")
    with pytest.raises(LoadRefused, match="LD206 tensor 'head.3.bias' claims more than the file has"):
        load_model(path)


def test_thousand_views_of_one_tensor_are_refused(tmp_path: Path) -> None:
    block = torch.zeros(100_000)
    assert (
        rule_of(saved({f"t{index}": block.view(-1) for index in range(1000)}, tmp_path / "m.pt")) == "LD206"
    )


# --- hostile archives and headers ---------------------------------------------------------------------------


def rewritten(
    path: Path,
    change: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], None],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    saved(weights(), path)
    with zipfile.ZipFile(path) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for info, content in members:
            archive.writestr(info.filename, content, compression)
    return path


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    bomb = rewritten(
        tmp_path / "b.pt",
        lambda m: m.append((zipfile.ZipInfo("m/data/99"), bytes(10**6))),
        zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(LoadRefused, match="LD204 the archive compresses 'b/data.pkl'"):
        load_model(bomb)
    noise = rewritten(tmp_path / "n.pt", lambda members: None)
    with zipfile.ZipFile(noise, "a") as archive:
        archive.writestr("m/data/99", bytes(100), zipfile.ZIP_DEFLATED)
    with pytest.raises(LoadRefused, match="LD204 the archive compresses 'm/data/99'"):
        load_model(noise)


@pytest.mark.parametrize("name", ["../evil", "m/../../evil", "/evil", "m\\..\\evil"])
def test_path_that_leaves_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    path = rewritten(tmp_path / "m.pt", lambda members: members.append((zipfile.ZipInfo(name), b"x")))
    assert rule_of(path) == "LD204"


def test_archive_in_the_archive_and_second_pickle_are_refused(tmp_path: Path) -> None:
    inner = zipfile.ZipInfo("m/data/99")
    assert (
        rule_of(rewritten(tmp_path / "a.pt", lambda m: m.append((inner, b"PK\x03\x04 and more")))) == "LD204"
    )
    second = zipfile.ZipInfo("n/data.pkl")
    assert rule_of(rewritten(tmp_path / "b.pt", lambda m: m.append((second, pickle.dumps({}))))) == "LD204"


def test_duplicate_member_is_refused(tmp_path: Path) -> None:
    path = saved(weights(), tmp_path / "m.pt")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], pickle.dumps({}))
    with pytest.raises(LoadRefused, match="LD204 the archive has duplicate members"):
        load_model(path)


def header_file(path: Path, header: object, payload: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 4)},
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(4, 8, [1])},
        {"a": entry(0, 4, [1])},
        {"a": entry(0, 8, [-1])},
        {"a": entry(0, 8, [True, 2])},
        {"a": entry(0, 8, [2], "F8_E4M3")},
        {"a": entry(0, 8, [2], ["F32"])},
        {"a": {"dtype": "F32"}},
        {"a": 3},
        {"a": entry(0, 8, 2)},
        {"__metadata__": {"format": 1}, "a": entry(0, 8)},
        [1],
        b"{" * 100_000,
        b'{"a": 1, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"{\xff}",
        b"{}",
        b'{"a": ' + b"[" * 100_000,
    ],
    ids=lambda header: str(header)[:60],
)
def test_safetensors_header_that_does_not_account_for_every_byte_is_refused(
    tmp_path: Path, header: object
) -> None:
    assert rule_of(header_file(tmp_path / "m.safetensors", header)) in {"LD202", "LD203"}


def test_huge_safetensors_header_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 2**31) + b"{" + bytes(100))
    assert rule_of(path) == "LD203"
    crowd = {f"t{index}": entry(0, 0, [0]) for index in range(20_001)}
    assert rule_of(header_file(path, crowd, b"")) == "LD203"


@pytest.mark.parametrize("card", ["{", "[]", '{"architecture": {"name": "resnet18"}}', "{" * 100_000, "\xff"])
def test_broken_card_is_refused_or_ignored_with_assumptions(tmp_path: Path, card: str) -> None:
    folder = save_classifier(small_classifier(), tmp_path / "m")
    (folder / "card.json").write_bytes(card.encode("latin-1"))
    if card == "[]":
        assert load_model(folder).class_names == ("class 0", "class 1", "class 2")
    else:
        assert rule_of(folder) == "LD212"


def test_mutated_files_end_in_a_classifier_or_a_typed_error(tmp_path: Path) -> None:
    """Every byte flip, cut or splice of two valid files: no other exception leaves load_model."""
    choice = random.Random(0)
    network = nn.Sequential(collections.OrderedDict(small_classifier().network.named_children()))
    state = {name: tensor for name, tensor in network.state_dict().items()}
    path = tmp_path / "m"
    originals = [save(state), saved(state, path).read_bytes()]
    outcomes: collections.Counter[str] = collections.Counter()
    for index in range(200):
        data = bytearray(originals[index % 2])
        for _ in range(choice.randint(1, 8)):
            # the interesting bytes are in the header and the directory, at both ends
            at = choice.choice(
                [choice.randrange(min(1500, len(data))), -choice.randrange(1, min(1500, len(data)))]
            )
            data[at] = choice.randrange(256)
        path.write_bytes(data)
        try:
            load_model(path)
            outcomes["loaded"] += 1
        except (LoadRefused, LoadFailed) as error:
            outcomes[type(error).__name__] += 1
    assert outcomes["LoadRefused"] > 10 and outcomes["LoadFailed"] > 10
