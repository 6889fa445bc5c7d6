"""Hostile files are refused by the rule that names what is wrong; files of real exporters are not."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hostile_files import FORMATS, Harm, Hostile, Piece, corpus, write, zipped
from hostile_graphs import GOOD_CODE, exported, model, script
from hostile_keras import hdf5, huggingface, keras
from hostile_pickles import gadgets, opcodes, state, tensor, torch_zip, two
from unhorse.checks.expectations import Facts
from unhorse.checks.expressions import is_guard, is_size
from unhorse.checks.inspection import check_task
from unhorse.checks.sniff import Format, sniff
from unhorse.loading.formats import load_model
from unhorse.models.classifier import new_classifier
from unhorse.rules import LoadFailed, LoadRefused

CORPUS = corpus()


def few() -> list[Hostile]:
    """Two files for each rule and format, without the slow ones, which are large."""
    large = ("flood", "bomb", "100000", "20001", "mib", "megabytes", "nested")
    found: dict[tuple[str, str], list[Hostile]] = {}
    for hostile in CORPUS.values():
        if hostile.caught == "check" and not any(word in hostile.name for word in large):
            found.setdefault((hostile.format, hostile.rule), []).append(hostile)
    return [hostile for group in found.values() for hostile in group[:2]][:60]


def facts_of(path: Path) -> Facts:
    """What the checks find in a file, which may look at the files beside it."""
    beside = [found for found in path.parent.iterdir() if found != path and not found.is_symlink()]
    files = [found.open("rb") for found in (path, *beside) if found.is_file()]
    try:
        document, blob = check_task(files, {"names": [found.name for found in beside], "name": path.name})
    finally:
        for file in files:
            file.close()
    assert blob == b"" and document["format"] in Format.__members__
    return Facts.from_json(json.loads(json.dumps(document["facts"])))


def rule_of(path: Path) -> str:
    with pytest.raises((LoadRefused, LoadFailed)) as refusal:
        facts_of(path)
    assert refusal.value.reason and refusal.value.remedy
    return refusal.value.rule


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Listens on the loopback; whoever connects is in its queue."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def heard(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except TimeoutError:
        return False
    return True


# --- the corpus ---------------------------------------------------------------------------------------------


def test_corpus_covers_nine_formats_and_every_rule_of_the_checks() -> None:
    assert {hostile.format for hostile in CORPUS.values()} == set(FORMATS) and len(CORPUS) >= 150
    rules = {hostile.rule for hostile in CORPUS.values()}
    checked = {1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 30, 35, 40}
    assert rules - {""} == {f"LD2{number:02}" for number in checked}


@pytest.mark.parametrize("hostile", few(), ids=lambda hostile: hostile.name)
def test_hostile_file_is_refused_by_the_rule_that_names_it(hostile: Hostile, tmp_path: Path) -> None:
    if hostile.needs:
        pytest.importorskip(hostile.needs, reason="making and reading this file needs it")
    harm = Harm(tmp_path / "marker")
    assert rule_of(write(hostile, tmp_path / "files", harm)) == hostile.rule
    assert not harm.marker.exists()


@pytest.mark.slow
def test_whole_corpus_is_refused_and_runs_nothing(tmp_path: Path, listener: socket.socket) -> None:
    pytest.importorskip("h5py", reason="making and reading HDF5 files needs it")
    harm = Harm(tmp_path / "marker", listener.getsockname()[1])
    wrong = {}
    for name, hostile in CORPUS.items():
        path = write(hostile, tmp_path / "files", harm)
        if hostile.caught == "open":
            continue  # the path is refused before anything is read
        try:
            facts_of(path)
            rule = ""
        except (LoadRefused, LoadFailed) as error:
            rule = error.rule
        expected = hostile.rule if hostile.caught == "check" else ""
        if rule != expected:
            wrong[name] = (rule, expected)
    assert wrong == {}
    assert not harm.marker.exists() and not heard(listener)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hostile", [h for h in CORPUS.values() if h.caught in ("load", "open")], ids=lambda h: h.name
)
def test_what_passes_the_checks_is_refused_on_opening_or_loading(hostile: Hostile, tmp_path: Path) -> None:
    if hostile.format == "onnx":
        pytest.importorskip("onnx2fx", reason="loading ONNX needs it")
    with pytest.raises((LoadRefused, LoadFailed)) as refusal:
        load_model(write(hostile, tmp_path, Harm(tmp_path / "marker")))
    assert refusal.value.rule == hostile.rule


@pytest.mark.slow
def test_payloads_would_do_harm_if_they_were_run(tmp_path: Path, listener: socket.socket) -> None:
    """Unpickles some of them for real, in processes of their own: a corpus of duds would prove nothing."""
    harm = Harm(tmp_path / "marker", listener.getsockname()[1])
    made = gadgets()
    live = {
        name: two(made[name](harm))
        for name in ("os-system", "builtins-exec", "getattr-chain", "map-consumed")
    }
    live |= {name: opcodes()[name](harm) for name in ("inst", "obj", "stack-global", "protocol-0")}
    for name, payload in live.items():
        file = tmp_path / "payload"
        file.write_bytes(payload)
        code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
        subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, check=False)
        assert harm.marker.exists(), name
        harm.marker.unlink()
    file.write_bytes(two(made["socket"](harm)))
    subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, check=False)
    assert heard(listener)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["use-pickle", "symbol-that-runs", "guard-that-runs", "sample-inputs-os-system"]
)
def test_torch_runs_what_the_pt2_checks_refuse(name: str, tmp_path: Path) -> None:
    """Without a pickle in it, a .pt2 file still runs code: as a symbolic size and as a guard."""
    path = write(CORPUS[f"pt2/{name}"], tmp_path, Harm(tmp_path / "marker"))
    code = "import sys, torch; torch.export.load(open(sys.argv[1], 'rb')).module()(torch.ones(1, 4))"
    subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert (tmp_path / "marker").exists() and rule_of(path) == CORPUS[f"pt2/{name}"].rule


def test_checks_import_no_torch() -> None:
    code = (
        "import sys, unhorse.checks.inspection; print({'torch', 'onnx', 'keras', 'h5py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- what real exporters write ------------------------------------------------------------------------------


def small() -> nn.Module:
    classes = ["a", "b", "c"]
    return new_classifier("small-cnn", image_shape=(1, 8, 8), class_names=classes, seed=0).network.eval()


def test_state_dicts_and_checkpoints_pass(tmp_path: Path) -> None:
    network = small()
    moments = {
        index: {"step": torch.tensor(1.0), "exp_avg": value}
        for index, value in enumerate(network.parameters())
    }
    adam = {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}]}
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    torch.save({"model": network.state_dict(), "adam": adam, "epoch": 3}, tmp_path / "checkpoint.tar")
    torch.save({name: value.half() for name, value in network.state_dict().items()}, tmp_path / "half.bin")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    for path in list(tmp_path.iterdir()):
        assert facts_of(path).num_classes is None
    parameters = sum(value.numel() for value in network.parameters())
    found = facts_of(tmp_path / "weights.safetensors")
    assert found.extra == {"tensors": "8", "parameters": str(parameters)}


@pytest.mark.parametrize("name", ["benign", "infected"])
def test_trained_victim_passes_with_the_facts_of_its_card(name: str) -> None:
    facts = facts_of(Path(__file__).parent / "victims" / name / "model.safetensors")
    assert facts.image_shape == (1, 8, 8) and facts.class_names == tuple("0123456789")
    assert (facts.mean, facts.std, facts.producer) == ((0.0,), (1.0,), "unhorse")


@pytest.mark.slow
def test_torchscript_passes_scripted_and_traced(tmp_path: Path) -> None:
    network = small()
    with pytest.warns((DeprecationWarning, FutureWarning)):
        torch.jit.save(torch.jit.script(network), tmp_path / "scripted.pt")
        torch.jit.save(torch.jit.trace(network, torch.rand(1, 1, 8, 8)), tmp_path / "traced.pt")
    for name in ("scripted", "traced"):
        assert {"linear", "max_pool2d"} <= set(facts_of(tmp_path / f"{name}.pt").operators)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_program_passes_with_its_shapes(tmp_path: Path, dynamic: bool) -> None:
    sizes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(small(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "m.pt2", extra_files={"card.json": "{}"})
    facts = facts_of(tmp_path / "m.pt2")
    assert (facts.image_shape, facts.num_classes) == ((1, 8, 8), 3)
    assert facts.producer == f"torch {torch.__version__}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("external", [False, True])
def test_onnx_passes_from_both_exporters(tmp_path: Path, dynamo: bool, external: bool) -> None:
    onnx = pytest.importorskip("onnx", reason="exporting needs it")
    pytest.importorskip("onnxscript", reason="exporting needs it")
    options: dict[str, Any] = {"external_data": external} if dynamo else {}
    path = tmp_path / "m.onnx"
    torch.onnx.export(small(), (torch.rand(2, 1, 8, 8),), path, dynamo=dynamo, **options)
    if external and not dynamo:
        loaded = onnx.load(path)
        onnx.save(loaded, path, save_as_external_data=True, location="m.data", size_threshold=0)
    facts = facts_of(path)
    assert (facts.image_shape, facts.num_classes) == ((1, 8, 8), 3)
    assert {"Conv", "Gemm", "MaxPool", "Relu"} <= set(facts.operators) and facts.producer.startswith(
        "pytorch"
    )


@pytest.mark.slow
def test_keras_models_pass_in_both_formats(tmp_path: Path) -> None:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("saving needs keras")
    code = """
import sys, keras
from keras import layers
image = keras.Input((8, 8, 3))
x = layers.Rescaling(1 / 255)(image)
x = layers.Conv2D(4, 3, padding="same", activation="relu", kernel_regularizer="l2")(x)
x = layers.Add()([x, layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(x)))])
x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
model = keras.Model(image, layers.Dense(5, activation="softmax")(x))
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
outer = keras.Sequential([keras.Input((8, 8, 3)), model, layers.Dense(5)])
for name, saved in (("inner", model), ("outer", outer)):
    saved.save(f"{sys.argv[1]}/{name}.keras")
    saved.save(f"{sys.argv[1]}/{name}.h5")
"""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, env=environment
    )
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["inner.h5", "inner.keras", "outer.h5", "outer.keras"]
    for path in paths:
        facts = facts_of(path)
        assert (facts.image_shape, facts.num_classes) == ((3, 8, 8), 5) and facts.producer.startswith(
            "Keras 3"
        )
        assert facts.extra["rescaling"].startswith("0.00392")


def test_hand_made_originals_of_the_corpus_pass(tmp_path: Path) -> None:
    """What is hostile about a file of the corpus is what was changed in it, not how it was made."""
    harm = Harm(tmp_path / "marker")
    made: dict[str, bytes] = {
        "torch": torch_zip(state(tensor())),
        **{"torchscript": script(GOOD_CODE), "pt2": exported(), "onnx": model()},
    }
    if pytest.importorskip("h5py", reason="making HDF5 files needs it"):
        made |= {"keras": keras()(harm), "hdf5": hdf5()(harm)}
    for name, content in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_bytes(content)
        assert isinstance(facts_of(tmp_path / name / "model"), Facts), name


def test_huggingface_folder_gives_size_names_and_normalisation(tmp_path: Path) -> None:
    read = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "do_normalize": True}
    hostile = Hostile("huggingface/good", "huggingface", "", lambda harm: huggingface(None, read))
    facts = facts_of(write(hostile, tmp_path, Harm(tmp_path / "marker")))
    assert (facts.image_shape, facts.num_classes, facts.class_names) == ((3, 8, 8), 2, ("a", "b"))
    assert facts.mean == pytest.approx((0.5,) * 3) and facts.std == pytest.approx((0.25,) * 3)
    assert facts.extra["model_type"] == "vit" and facts.extra["tensors"] == "1"


def test_timm_folder_gives_what_its_configuration_says(tmp_path: Path) -> None:
    known = {
        "input_size": [3, 224, 224],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.2, 0.2],
        "label_names": ["x", "y"],
    }
    config = json.dumps({"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": known}).encode()
    hostile = Hostile("huggingface/timm", "huggingface", "", lambda harm: huggingface(config))
    facts = facts_of(write(hostile, tmp_path, Harm(tmp_path / "marker")))
    assert facts.image_shape == (3, 224, 224) and facts.class_names == ("x", "y")
    assert (
        facts.mean == (0.4, 0.5, 0.6)
        and facts.producer == "timm"
        and facts.extra["architecture"] == "resnet18"
    )


@pytest.mark.parametrize(
    "hostile", [h for h in CORPUS.values() if h.caught == "report"], ids=lambda h: h.name
)
def test_hostile_class_names_come_back_as_they_are(hostile: Hostile, tmp_path: Path) -> None:
    facts = facts_of(write(hostile, tmp_path, Harm(tmp_path / "marker")))
    assert facts.class_names is not None and len(facts.class_names) == 2
    assert any(not name.isalnum() or len(name) > 1000 for name in facts.class_names)


# --- single rules, where the corpus alone would not tell right from wrong ---------------------------------


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("Mul(Integer(3), Symbol('s0', positive=True, integer=True))", True),
        ("Max(Integer(1), FloorDiv(Add(Symbol('s0', integer=True), Integer(-3)), Integer(2)))", True),
        ("2*s39", True),
        ("__import__('os')", False),
        ("Symbol.__class__", False),
        ("Symbol('__import__(1)')", False),
        ("Add('s0')", False),
        ("9**9**9", False),
        ("[s0]", False),
        ("s0 if s0 else s1", False),
        ("evil", False),
    ],
)
def test_size_is_arithmetic_on_symbols(text: str, fits: bool) -> None:
    assert is_size(text) is fits


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("L['x'].size()[2] >= 3", True),
        ("(max(1, 1 + (((-3) + L['x'].size()[3]) // 2))*max(1, L['x'].size()[2])) != 1", True),
        ("L['x'].__class__ == 1", False),
        ("L[open] == 1", False),
        ("L['x'].size(open('x')) == 1", False),
        ("open('x') == 1", False),
        ("L['x'].size()[0] == 1\n  or 1", False),
        ("L['x'].size()[0]; 1", False),
    ],
)
def test_guard_compares_sizes_of_inputs(text: str, fits: bool) -> None:
    assert is_guard(text) is fits


def test_facts_survive_a_trip_through_json() -> None:
    facts = Facts((3, None, 8), 2, (0.5,), (1.0,), ("a", "\x1b"), "maker", ("Conv",), {"key": "value"})
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert Facts.from_json({}) == Facts()


@pytest.mark.parametrize(
    "said", [{"image_shape": [1, 2]}, {"num_classes": "3"}, {"mean": ["x"]}, {"extra": {"a": 1}}]
)
def test_facts_of_other_types_are_no_facts(said: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Facts.from_json(said)


def test_safetensors_whose_length_begins_like_a_pickle_is_safetensors() -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode().ljust(640)
    data = (640).to_bytes(8, "little") + header
    assert data[:2] == b"\x80\x02" and sniff(io.BytesIO(data)) is Format.SAFETENSORS


@pytest.mark.parametrize("rate", [0, 3])
def test_members_may_be_deflated_only_in_keras_archives(rate: int) -> None:
    pieces = [Piece("m/data.pkl", state(tensor())), Piece("m/data/0", bytes(32), 8 if rate else 0)]
    stream = io.BytesIO(zipped(*pieces))
    if rate:
        with pytest.raises(LoadRefused, match="LD204 the archive compresses 'm/data/0'"):
            check_task([stream], {})
    else:
        assert check_task([stream], {})[0]["format"] == "TORCH_ZIP"


def test_file_of_100_megabytes_is_checked_without_reading_its_tensors(tmp_path: Path) -> None:
    class Counting(io.FileIO):
        total = 0

        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer)
            Counting.total += count
            return count

    with (tmp_path / "m.safetensors").open("wb") as file:
        header = json.dumps({"a": {"dtype": "F32", "shape": [25 * 2**20], "data_offsets": [0, 100 * 2**20]}})
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 100 * 2**20)
    torch_file = tmp_path / "m.pt"
    torch.save({"a": torch.zeros(2**20)}, torch_file)
    for path, most in ((tmp_path / "m.safetensors", 2**19), (torch_file, 2**19)):
        Counting.total = 0
        started = time.perf_counter()
        with io.BufferedReader(Counting(path)) as stream:
            check_task([stream], {})
        assert Counting.total < most and time.perf_counter() - started < 2
