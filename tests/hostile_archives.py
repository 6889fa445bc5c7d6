"""Hostile safetensors files, and archives that two readers read differently."""

from __future__ import annotations

import json
import stat
import struct

from hostile_files import Corpus, Folder, Harm, Link, Piece, zipped
from hostile_pickles import FLOATS, state, system, tensor, torch_zip, two


def entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: object, payload: bytes = bytes(8)) -> bytes:
    """A safetensors file with this header, as an object or as its very bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


def fill(corpus: Corpus) -> None:
    """Adds the hostile safetensors files and archives to the corpus."""
    _add_safetensors(corpus)
    _add_archives(corpus)
    _add_polyglots(corpus)


def _add_safetensors(corpus: Corpus) -> None:
    good = {"a": entry(0, 8)}
    for name, header, payload in (
        ("shape-shorter-than-data", {"a": entry(0, 4)}, bytes(8)),
        ("overlap", {"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
        ("gap", {"a": entry(0, 8), "b": entry(16, 24)}, bytes(24)),
        ("bytes-behind", good, bytes(800)),
        ("negative-shape", {"a": entry(0, 8, [-2, -1])}, bytes(8)),
        ("boolean-shape", {"a": entry(0, 8, [True, 2])}, bytes(8)),
        ("fractional-shape", {"a": entry(0, 8, [2.0])}, bytes(8)),
        ("shape-of-10-18", {"a": entry(0, 8, [10**9, 10**9])}, bytes(8)),
        ("shape-beyond-64-bits", {"a": entry(0, 8, [2**62, 4, 2])}, bytes(8)),
        ("rank-1000", {"a": entry(0, 8, [1] * 1000 + [2])}, bytes(8)),
        ("unknown-type", {"a": entry(0, 8, [2], "F9")}, bytes(8)),
        ("type-is-a-list", {"a": entry(0, 8, [2], ["F32"])}, bytes(8)),
        ("tensor-is-a-number", {"a": 3}, bytes(8)),
        ("field-too-many", {"a": {**entry(0, 8), "strides": [0]}}, bytes(8)),
        ("metadata-is-no-text", {"__metadata__": {"format": 1}, **good}, bytes(8)),
        ("metadata-is-a-list", {"__metadata__": [1], **good}, bytes(8)),
        ("20001-tensors", {f"t{index}": entry(0, 0, [0]) for index in range(20_001)}, b""),
        ("key-twice", b'{"a": 1, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        ("nested-100000-deep", b'{"a": ' + b"[" * 100_000, bytes(8)),
        ("not-utf-8", b"{\xff\xfe}", bytes(8)),
        ("utf-16", '{"a": 1}'.encode("utf-16-le"), bytes(8)),
        ("lone-surrogate", {"\ud800": entry(0, 8)}, bytes(8)),
        ("nan-in-header", b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)),
    ):
        corpus.add(f"safetensors/{name}", "LD203", safetensors(header, payload))
    corpus.add("safetensors/header-of-2-gib", "LD203", struct.pack("<Q", 2**31) + b"{" + bytes(100))
    corpus.add("safetensors/header-of-9-mib", "LD203", safetensors(b"{" + b" " * (9 * 2**20) + b"}"))
    corpus.add("safetensors/truncated-header", "LD230", safetensors(good)[:20])
    corpus.add("safetensors/truncated-tensor", "LD230", safetensors({"a": entry(0, 8000, [2000])}))
    for name, card in (
        ("card-is-no-json", "{"),
        ("card-nested-deep", "[" * 100_000),
        ("card-with-a-lone-surrogate", json.dumps({"class_names": ["\ud800"]})),
        ("card-with-a-mean-of-text", json.dumps({"class_names": ["a"], "mean": "0.5"})),
    ):
        header = {"__metadata__": {"unhorse": card}, **good}
        corpus.add(f"safetensors/{name}", "LD212", safetensors(header))
    for name, value in (("nan", float("nan")), ("infinite", float("-inf"))):
        payload = struct.pack("<2f", 0.5, value)
        corpus.add(f"safetensors/{name}", "LD207", safetensors(good, payload), caught="load")
    names = {"script": "<script>alert(1)</script>", "ansi": "\x1b[2J\x1b]0;x\x07", "megabyte": "A" * 2**20}
    names |= {"right-to-left": "\u202egpj.exe"}
    for name, label in names.items():
        header = {"__metadata__": {"unhorse": json.dumps({"class_names": [label, "b"]})}, **good}
        corpus.add(f"safetensors/class-named-{name}", "", safetensors(header), caught="report")
    link = Folder("model", {"model": Link("../../../../etc/passwd")})
    corpus.add("safetensors/link-out-of-the-folder", "LD223", link, caught="open")


def _add_archives(corpus: Corpus) -> None:
    pickled = state(tensor())
    members = [Piece("m/data.pkl", pickled), Piece("m/data/0", FLOATS), Piece("m/version", b"3\n")]

    def with_last(piece: Piece) -> bytes:
        return zipped(*members, piece)

    def evil(harm: Harm) -> bytes:
        return two(system(harm))

    for name, piece in (
        ("parent-path", Piece("../evil", b"x")),
        ("parent-path-inside", Piece("m/../../evil", b"x")),
        ("absolute-path", Piece("/evil", b"x")),
        ("backslash-path", Piece("m\\..\\evil", b"x")),
        ("drive-path", Piece("C:evil", b"x")),
        ("name-with-zero", Piece("m/data/1\0.pkl", b"x")),
        ("name-with-newline", Piece("m/data/1\n", b"x")),
        ("empty-name", Piece("", b"x")),
        ("very-long-name", Piece("m/" + "d" * 60_000, b"x")),
        ("symbolic-link", Piece("m/data/1", b"/etc/passwd", mode=stat.S_IFLNK | 0o777)),
        ("encrypted", Piece("m/data/1", b"x", flags=1)),
        ("deflated", Piece("m/data/1", bytes(100), 8)),
        ("bomb", Piece("m/data/1", bytes(30 * 2**20), 8)),
        ("unknown-method", Piece("m/data/1", b"x", 99)),
        ("nested-archive", Piece("m/data/1", zipped(Piece("x", b"x")))),
        ("second-pickle", Piece("n/data.pkl", pickled)),
        ("pickle-of-another-name", Piece("m/constants2.pkl", pickled)),
        ("shared-object", Piece("m/lib/evil.so", b"\x7fELF")),
        ("local-name-differs", Piece("m/data/1", b"x", local_name="m/data.pk1")),
        ("local-size-differs", Piece("m/data/1", b"xxxx", local_size=2)),
        ("member-comment", Piece("m/data/1", b"x", comment=b"evil")),
    ):
        corpus.add(f"torch/zip-{name}", "LD204", with_last(piece))
    corpus.add("torch/zip-duplicate", "LD204", lambda h: zipped(*members, Piece("m/data.pkl", evil(h))))
    corpus.add(
        "torch/zip-duplicate-but-for-case", "LD204", lambda h: zipped(*members, Piece("m/DATA.pkl", evil(h)))
    )
    corpus.add("torch/zip-overlap", "LD204", zipped(*members, Piece("m/data.pkl2", pickled, offset=0)))
    corpus.add(
        "torch/zip-20001-members", "LD204", zipped(*(Piece(f"m/data/{i}", b"") for i in range(20_001)))
    )
    corpus.add("torch/zip-size-beyond-the-file", "LD204", with_last(Piece("m/data/1", b"x", size=2**31)))
    for name, piece in (
        ("bytes-between-members", Piece("m/data/1", b"x", behind=b"hidden" * 20)),
        ("bytes-in-extra-field", Piece("m/data/1", b"x", extra=struct.pack("<HH", 0x4242, 6) + b"hidden")),
        ("bytes-in-padding", Piece("m/data/1", b"x", extra=struct.pack("<HH", 0x4246, 6) + b"hidden")),
    ):
        corpus.add(f"torch/zip-{name}", "LD213", with_last(piece))
    corpus.add("torch/zip-comment", "LD213", zipped(*members, comment=b"hidden"))
    whole = torch_zip(pickled)
    for share in (10, 50, 97):
        corpus.add(f"torch/zip-cut-at-{share}-percent", "LD230", whole[: len(whole) * share // 100])
    broken = bytearray(whole)
    broken[whole.index(b"PK\1\2") + 3] = 0
    corpus.add("torch/zip-broken-directory", "LD230", bytes(broken))
    flipped = bytearray(whole)
    flipped[whole.index(b"_rebuild")] ^= 1
    corpus.add("torch/zip-wrong-checksum", "LD230", bytes(flipped))


def _add_polyglots(corpus: Corpus) -> None:
    whole = torch_zip(state(tensor()))
    plain = safetensors({"a": entry(0, 8)})
    hdf5 = b"\x89HDF\r\n\x1a\n"
    for name, content in (
        ("safetensors/and-zip", plain + whole),
        (
            "safetensors/and-zip-inside-a-tensor",
            safetensors({"a": entry(0, len(whole), [len(whole)], "U8")}, whole),
        ),
        ("safetensors/and-hdf5", plain.ljust(512, b"\0") + hdf5 + bytes(100)),
        ("torch/zip-behind-other-bytes", b"GIF89a" + bytes(20) + whole),
        ("torch/zip-behind-a-script", b"#!/bin/sh\ntouch marker; exit\n" + whole),
        ("torch/zip-and-bytes-behind", whole + b"behind"),
        ("torch/zip-and-zip", whole + whole),
        (
            "torch/zip-before-the-first-member",
            zipped(Piece("m/data.pkl", state(tensor())), before=b"PK\3\4" + bytes(60)),
        ),
        ("hdf5/user-block", bytes(512) + hdf5 + bytes(100)),
        ("hdf5/and-zip", hdf5 + bytes(504) + whole),
        ("onnx/and-zip", b"\x08\x08\x12\x01x" + whole),
    ):
        corpus.add(name, "LD213", content)
    tarred = bytearray(plain.ljust(1024, b"\0"))
    tarred[257:262] = b"ustar"
    corpus.add("safetensors/and-tar", "LD213", bytes(tarred))
    both = [Piece("m/data.pkl", state(tensor())), Piece("m/archive_format", b"pt2")]
    corpus.add("torch/zip-of-two-formats", "LD213", zipped(*both))
    keras = [Piece("config.json", b"{}"), Piece("metadata.json", b"{}"), Piece("m/data.pkl", state(tensor()))]
    corpus.add("keras/and-torch", "LD213", zipped(*keras))
