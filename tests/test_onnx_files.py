"""ONNX files told apart: hostile, not read, damaged; and which files beside one are its own."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile_graphs import kept, model, node, put, weight
from unhorse.checks.inspection import check_task
from unhorse.checks.onnx_outline import external_names, is_onnx, is_plain
from unhorse.checks.sniff import Format, sniff
from unhorse.loading.sources import opened
from unhorse.rulebook import RULES
from unhorse.rules import LoadFailed, LoadRefused, Severity


def refusal_of(content: bytes, **beside: bytes) -> LoadRefused | LoadFailed | None:
    files = [io.BytesIO(content), *map(io.BytesIO, beside.values())]
    try:
        check_task(files, {"name": "m.onnx", "names": list(beside)})
    except (LoadRefused, LoadFailed) as refusal:
        return refusal
    return None


# --- which files it names -----------------------------------------------------------------------------------


def inside_a_branch(location: str) -> bytes:
    """A model whose weight lies in a constant of a graph in an attribute of a node."""
    constant = put(5, put(1, "value") + put(20, 4) + put(5, weight(kept(location=location), name="")))
    branch = put(1, node("Constant", (), "z", constant)) + put(2, "b") + put(12, put(1, "z"))
    return model(node("If", ("x",), more=put(5, put(1, "then_branch") + put(20, 5) + put(6, branch))))


def test_names_of_data_files_are_found_wherever_tensors_lie():
    tensors = (weight(kept(location="features.0.bias")), weight(kept(offset="0", location="./b"), name="v"))
    function = put(25, put(7, node("Constant", (), "c", put(5, put(5, weight(kept(location="f")))))))
    assert external_names(io.BytesIO(model(tensors=tensors))) == ("b", "features.0.bias")
    assert external_names(io.BytesIO(inside_a_branch("deep"))) == ("deep",)
    assert external_names(io.BytesIO(model(more=function))) == ("f",)
    assert external_names(io.BytesIO(model(graph=put(15, put(1, weight(kept(location="s"))))))) == ("s",)
    assert external_names(io.BytesIO(model())) == ()


def test_names_of_a_damaged_file_are_those_before_the_damage():
    whole = model(tensors=(weight(kept(location="a")), weight(kept(location="b"), name="v")))
    stream = io.BytesIO(whole[: whole.index(b"b" + put(14, 1)) - 8])
    assert set(external_names(stream)) <= {"a", "b"}
    assert stream.tell() == 0
    assert external_names(io.BytesIO(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")) == ()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "..\\x", "C:x", "a\0b", "x" * 300])
def test_a_location_that_is_no_name_of_a_file_is_not_plain(name: str):
    assert not is_plain(name)
    assert is_plain("onnx__Gemm_7") and is_plain("...")


def test_the_files_that_a_model_names_are_opened_and_no_others(tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(
        model(
            tensors=(
                weight(kept(location="features.0.weight")),
                weight(kept(location="onnx__Gemm_7"), name="v"),
            )
        )
    )
    for name in ("features.0.weight", "onnx__Gemm_7", "m.onnx.data", "m.onnx_data", "secret"):
        (tmp_path / name).write_bytes(bytes(64))
    with opened(tmp_path / "m.onnx") as source:
        assert source.names == ("m.onnx", "features.0.weight", "onnx__Gemm_7")
        assert check_task(list(source.files), {"names": list(source.names[1:])})[0]["format"] == "ONNX"


def test_a_data_file_elsewhere_or_behind_a_link_is_not_opened(tmp_path: Path):
    outside = tmp_path / "secret"
    outside.write_bytes(bytes(64))
    folder = tmp_path / "model"
    folder.mkdir()
    for location in ("../secret", str(outside)):
        (folder / "m.onnx").write_bytes(model(tensors=(weight(kept(location=location)),)))
        with opened(folder / "m.onnx") as source:
            assert source.names == ("m.onnx",)
    (folder / "m.onnx").write_bytes(model(tensors=(weight(kept(location="data")),)))
    (folder / "data").symlink_to(outside)
    with pytest.raises(LoadRefused) as refused, opened(folder / "m.onnx"):
        pass
    assert refused.value.rule == "LD216"
    (folder / "data").unlink()
    os.mkfifo(folder / "data")
    with pytest.raises(LoadRefused) as refused, opened(folder / "m.onnx"):
        pass
    assert refused.value.rule == "LD216"


# --- hostile, not read, damaged -----------------------------------------------------------------------------


def test_what_is_not_read_is_named_with_a_remedy_of_its_own():
    for content, words, remedy in (
        (model(node("LSTM")), "operator LSTM", "torch.onnx.export"),
        (model(opset=28), "operator set 28; unhorse reads 7 to 26", "version_converter"),
        (model(opset=6), "operator set 6", "version_converter"),
        (model(node("FusedConv", more=put(7, "com.microsoft"))), "FusedConv of com.microsoft", "optimised"),
        (model(node("QLinearConv")), "operator QLinearConv", "float model"),
        (model(node("QuantizeLinear"), node("Relu", ("y",), "z")), "int8 numbers (Relu)", "float model"),
        (model(more=put(25, put(1, "gelu"))), "functions of its own ('gelu')", "export"),
    ):
        refused = refusal_of(content)
        assert isinstance(refused, LoadRefused) and refused.rule == "LD235", content
        assert words in refused.reason and remedy in refused.remedy, refused


def test_a_domain_that_no_node_uses_is_no_reason_to_refuse():
    imported = b"".join(
        put(8, put(1, domain) + put(2, 1))
        for domain in ("com.microsoft", "ai.onnx.preview", "org.pytorch.aten")
    )
    assert refusal_of(model(more=imported)) is None


def test_data_that_is_not_there_or_cut_off_is_damage_not_malice():
    content = model(tensors=(weight(kept(location="data")),))
    for refused in (refusal_of(content), refusal_of(content, data=bytes(63))):
        assert isinstance(refused, LoadFailed) and "'data'" in refused.reason
    assert refusal_of(content, data=bytes(64)) is None


def test_what_only_looks_like_protobuf_is_no_onnx():
    coreml = put(1, 4) + put(2, put(1, put(1, "image") + put(3, put(5, b"")))) + put(500, put(1, b"layer"))
    caffe = put(1, "CaffeNet") + put(100, put(1, "data"))
    graph_elsewhere = put(1, 8) + put(2, "maker") + put(7, put(99, b"x"))
    for content in (coreml, caffe, graph_elsewhere, put(1, 8), b"\x08\x08\x12\x07pytorch"):
        assert not is_onnx(io.BytesIO(content))
        assert sniff(io.BytesIO(content)) is not Format.ONNX
    assert is_onnx(io.BytesIO(model())) and is_onnx(io.BytesIO(model()[:20]))


# --- onnx's own test models ---------------------------------------------------------------------------------


def backend_models(*, nodes: bool) -> Iterator[tuple[str, bytes]]:
    """The models that onnx tests runtimes with: those in its package, and those it makes of each operator."""
    loader = pytest.importorskip("onnx.backend.test.loader", reason="needs onnx, which an extra installs")
    data = Path(loader.DATA_DIR)
    for path in sorted((*data.glob("*/*/model.onnx"), *data.glob("light/*.onnx"))):
        yield str(path.relative_to(data)), path.read_bytes()
    for case in loader.load_node_model_tests() if nodes else ():
        if case.model is not None:
            yield case.name, case.model.SerializeToString()


def severities(models: Iterator[tuple[str, bytes]]) -> dict[str, Severity]:
    return {
        name: Severity.NONE if (refused := refusal_of(content)) is None else RULES[refused.rule].severity
        for name, content in models
    }


def test_no_test_model_of_onnx_is_called_hostile():
    seen = severities(backend_models(nodes=False))
    assert len(seen) >= 140
    assert {name for name, severity in seen.items() if severity.rank > Severity.LOW.rank} == set()
    assert sum(severity is Severity.NONE for severity in seen.values()) > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_model_that_onnx_makes_for_an_operator_is_called_hostile():
    seen = severities(backend_models(nodes=True))
    assert len(seen) > 1_500
    assert {name for name, severity in seen.items() if severity.rank > Severity.LOW.rank} == set()
