"""Hostile Keras and HDF5 files, and Hugging Face folders."""

from __future__ import annotations

import copy
import io
import json
import struct
from collections.abc import Callable
from typing import Any

from hostile_archives import entry, safetensors
from hostile_files import Content, Corpus, Folder, Harm, Link, Piece, zipped
from hostile_pickles import state, system, torch_zip

# --- HDF5 ---------------------------------------------------------------------------------------------------


def hdf5(
    change: Callable[[Any, Any, Harm], None] | None = None, config: Any = None
) -> Callable[[Harm], bytes]:
    """Makes an HDF5 file with the weights of a dense layer, after a change that is handed the file."""

    def make(harm: Harm) -> bytes:
        import h5py

        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            group = file.create_group("model_weights/dense/dense")
            group["kernel"] = [[0.0, 1.0]] * 4
            group["bias"] = [0.0, 0.0]
            text = config if isinstance(config, str) else json.dumps(config or sequential())
            file.attrs["model_config"], file.attrs["keras_version"] = text, "3.15.1"
            if change is not None:
                change(h5py, file, harm)
        return buffer.getvalue()

    return make


def layer(kind: str, name: str, inputs: list[Any] | None = None, **config: Any) -> dict[str, Any]:
    found = {"module": "keras.layers", "class_name": kind, "config": {"name": name, **config}}
    return found | {"registered_name": None, "name": name, "inbound_nodes": inputs or []}


def sequential(*layers: Any, **more: Any) -> dict[str, Any]:
    """The configuration of a dense classifier, with more layers behind it."""
    listed = [layer("InputLayer", "in", batch_shape=[None, 2, 2, 1]), layer("Flatten", "flat")]
    listed += [layer("Dense", "dense", units=2, activation="linear"), *layers]
    model = {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": listed}}
    return model | {"registered_name": None} | more


def functional(*layers: Any) -> dict[str, Any]:
    config = {"name": "f", "layers": list(layers), "input_layers": ["in", 0, 0], "output_layers": ["a", 0, 0]}
    return {"module": "keras", "class_name": "Functional", "config": config, "registered_name": None}


def history(name: str, call: int = 0) -> dict[str, Any]:
    """A call that takes the result of a call of another layer."""
    tensor = {
        "class_name": "__keras_tensor__",
        "config": {"shape": [None, 2], "keras_history": [name, call, 0]},
    }
    return {"args": [tensor], "kwargs": {}}


def keras(
    config: Any = None, *more: Piece, weights: Callable[[Harm], bytes] | None = None
) -> Callable[[Harm], bytes]:
    """Makes a .keras archive."""

    def make(harm: Harm) -> bytes:
        raw = config if isinstance(config, bytes) else json.dumps(config or sequential()).encode()
        raw = raw.replace(b"MARKER", str(harm.marker).encode())
        members = [Piece("metadata.json", b'{"keras_version": "3.15.1"}'), Piece("config.json", raw)]
        return zipped(*members, Piece("model.weights.h5", (weights or hdf5())(harm)), *more)

    return make


def _configurations() -> dict[str, Any]:
    lambdas = layer(
        "Lambda", "l", function={"class_name": "__lambda__", "config": {"code": "4wEAAA==", "defaults": None}}
    )
    dense = layer("Dense", "d", units=2)
    command = "touch MARKER"
    return {
        "lambda": sequential(lambdas),
        "lambda-of-python-2": sequential(
            layer("Lambda", "l", function=["4wEAAA==", None, None], function_type="lambda")
        ),
        "lambda-inside-a-model": sequential(sequential(lambdas)),
        "lambda-as-activation": sequential(
            layer("Dense", "d", units=2, activation={"class_name": "__lambda__", "config": {"code": "x"}})
        ),
        "saved-model-layer": sequential(layer("TFSMLayer", "l", filepath="MARKER")),
        "torch-module-wrapper": sequential(layer("TorchModuleWrapper", "l", module="x")),
        "jax-layer": sequential(layer("JaxLayer", "l", call_fn="x")),
        "lookup-of-a-file": sequential(layer("StringLookup", "l", vocabulary="/etc/passwd")),
        "text-of-a-file": sequential(layer("TextVectorization", "l", vocabulary="/etc/passwd")),
        "class-of-os": sequential(
            dense | {"module": "os", "class_name": "system", "config": {"command": command}}
        ),
        "module-subprocess": sequential(
            dense | {"module": "subprocess", "class_name": "Popen", "config": {"args": command}}
        ),
        "module-gadget": sequential(
            dense | {"module": "keras.src.utils.file_utils", "class_name": "get_file"}
        ),
        "known-class-of-another-module": sequential(dense | {"module": "evil"}),
        "module-is-a-list": sequential(dense | {"module": ["keras.layers"]}),
        "class-is-a-list": sequential(dense | {"class_name": ["Dense"]}),
        "custom-object": sequential(dense | {"registered_name": "evil>Dense"}),
        "custom-layer": sequential(
            layer("MyLayer", "l") | {"registered_name": "pkg>MyLayer", "module": None}
        ),
        "function-of-builtins": sequential(
            layer(
                "Dense",
                "d",
                units=2,
                activation={"module": "builtins", "class_name": "function", "config": "eval"},
            )
        ),
        "function-of-a-module": sequential(
            layer(
                "Dense",
                "d",
                units=2,
                activation={"module": "os", "class_name": "function", "config": "system"},
            )
        ),
        "activation-unknown": sequential(layer("Activation", "a", activation="os.system")),
        "initializer-of-a-module": sequential(
            layer(
                "Dense",
                "d",
                units=2,
                kernel_initializer={"module": "os", "class_name": "Zeros", "config": {}},
            )
        ),
        "object-without-class": sequential(
            layer("Dense", "d", units=2, bias_regularizer={"module": "os", "config": {}})
        ),
        "compiled-inner-model": sequential(
            sequential(compile_config={"loss": {"module": "os"}}) | {"name": "inner"}
        ),
        "root-of-another-class": {"module": "os", "class_name": "system", "config": {"layers": []}},
        "root-is-a-list": [sequential()],
        "units-of-10-12": sequential(layer("Dense", "d", units=10**12)),
        "negative-units": sequential(layer("Dense", "d", units=-5)),
        "image-of-10-9-pixels": sequential(layer("InputLayer", "i", batch_shape=[None, 10**5, 10**5, 3])),
        "reshape-to-10-12": sequential(layer("Reshape", "r", target_shape=[10**6, 10**6])),
        "padding-of-10-9": sequential(layer("ZeroPadding2D", "z", padding=[[10**9, 0], [0, 0]])),
        "100000-layers": sequential(*(layer("ReLU", f"r{index}") for index in range(100_000))),
        "models-nested-20-deep": nested(20),
        "layers-in-a-circle": functional(
            layer("InputLayer", "in", batch_shape=[None, 2]),
            layer("ReLU", "a", [history("b")]),
            layer("ReLU", "b", [history("a")]),
        ),
        "layer-of-itself": functional(layer("ReLU", "a", [history("a")])),
        "two-layers-one-name": sequential(layer("ReLU", "a"), layer("ReLU", "a")),
        "layers-are-a-number": {**sequential(), "config": {"name": "s", "layers": 3}},
    }


def nested(depth: int) -> dict[str, Any]:
    found = sequential()
    for index in range(depth):
        found = sequential(copy.deepcopy(found) | {"name": f"inner{index}"})
    return found


def _add_keras(corpus: Corpus) -> None:
    for name, config in _configurations().items():
        corpus.add(f"keras/{name}", "LD218", keras(config), needs="h5py")
        if name in (
            "lambda",
            "lambda-of-python-2",
            "class-of-os",
            "saved-model-layer",
            "100000-layers",
            "custom-object",
        ):
            corpus.add(f"hdf5/{name}", "LD218", hdf5(config=config), needs="h5py")
    for name, raw in (
        ("no-json", b"\x80\x02}."),
        ("nested-100000-deep", b'{"class_name": ' + b"[" * 100_000),
        ("key-twice", b'{"class_name": "Sequential", "class_name": "Lambda"}'),
        ("infinity", b'{"class_name": "Sequential", "config": Infinity}'),
        ("lone-surrogate", b'{"class_name": "\\ud800"}'),
    ):
        corpus.add(f"keras/configuration-{name}", "LD218", keras(raw), needs="h5py")
    for name, piece in (
        ("parent-path", Piece("assets/../../evil", b"x")),
        ("assets", Piece("assets/vocabulary.txt", b"x")),
        ("npz-of-objects", Piece("_layer_checkpoint.npz", zipped(Piece("a.npy", b"\x80\x02")))),
        ("bomb", Piece("bomb.json", bytes(70 * 2**20), 8)),
        ("symbolic-link", Piece("model.weights.h5x", b"/etc/passwd", mode=0o120777)),
    ):
        corpus.add(f"keras/zip-{name}", "LD204", keras(None, piece), needs="h5py")
    bomb = keras(b" " * (80 * 2**20) + b"{}")
    corpus.add("keras/zip-configuration-of-80-mib", "LD204", bomb, needs="h5py")
    corpus.add("keras/weights-with-external-link", "LD219", keras(weights=hdf5(_external_link)), needs="h5py")
    corpus.add("keras/weights-are-no-hdf5", "LD230", keras(weights=lambda harm: system(harm)), needs="h5py")
    corpus.add(
        "keras/without-weights", "LD218", zipped(Piece("metadata.json", b"{}"), Piece("config.json", b"{}"))
    )
    corpus.add("keras/truncated", "LD230", lambda harm: keras()(harm)[:-30], needs="h5py")


def _external_link(h5py: Any, file: Any, harm: Harm) -> None:
    file["evil"] = h5py.ExternalLink("/etc/passwd", "/")


def _soft(h5py: Any, file: Any, harm: Harm) -> None:
    file["evil"] = h5py.SoftLink("/model_weights/dense")


def _external_data(h5py: Any, file: Any, harm: Harm) -> None:
    file.create_dataset("evil", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def _virtual(h5py: Any, file: Any, harm: Harm) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(4,))
    file.create_virtual_dataset("evil", layout)


def _cycle(h5py: Any, file: Any, harm: Harm) -> None:
    file["model_weights/dense/again"] = file["model_weights"]


def _twice(h5py: Any, file: Any, harm: Harm) -> None:
    file["again"] = file["model_weights/dense/dense/kernel"]


def _unallocated(h5py: Any, file: Any, harm: Harm) -> None:
    file.create_dataset("huge", (10**6, 10**6), "f4", chunks=(1000, 1000))


def _bomb(h5py: Any, file: Any, harm: Harm) -> None:
    file.create_dataset(
        "bomb", (4 * 2**20,), "f4", compression="gzip", compression_opts=9, data=[0.0] * 2**22
    )


def _filtered(h5py: Any, file: Any, harm: Harm) -> None:
    file.create_dataset("lzf", (1000,), "f4", compression="lzf", data=range(1000))


def _texts(h5py: Any, file: Any, harm: Harm) -> None:
    file["texts"] = ["a", "b"]


def _references(h5py: Any, file: Any, harm: Harm) -> None:
    file.create_dataset("refs", (1,), h5py.ref_dtype)[0] = file["model_weights"].ref


def _named_type(h5py: Any, file: Any, harm: Harm) -> None:
    import numpy

    file["type"] = numpy.dtype("f4")


def _compound(h5py: Any, file: Any, harm: Harm) -> None:
    import numpy

    file["pair"] = numpy.zeros(3, dtype=[("a", "f4"), ("b", "i4")])


def _deep(h5py: Any, file: Any, harm: Harm) -> None:
    file.create_group("/".join(["g"] * 100))


def _bare(h5py: Any, file: Any, harm: Harm) -> None:
    del file.attrs["model_config"]


def _endless(harm: Harm) -> bytes:
    """The first text of the heap without a length, over which HDF5 itself searches for ever."""
    content = bytearray(hdf5()(harm))
    at = content.index(b"GCOL") + 24
    content[at : at + 8] = bytes(8)
    return bytes(content)


def _add_hdf5(corpus: Corpus) -> None:
    for name, change in (
        ("external-link", _external_link),
        ("soft-link", _soft),
        ("external-data", _external_data),
        ("virtual-data", _virtual),
        ("cycle", _cycle),
        ("data-twice", _twice),
        ("unallocated-10-12", _unallocated),
        ("bomb", _bomb),
        ("foreign-filter", _filtered),
        ("texts", _texts),
        ("references", _references),
        ("named-type", _named_type),
        ("compound-type", _compound),
        ("groups-100-deep", _deep),
    ):
        corpus.add(f"hdf5/{name}", "LD219", hdf5(change), needs="h5py")
    corpus.add("hdf5/configuration-no-json", "LD218", hdf5(config="{"), needs="h5py")
    corpus.add("hdf5/configuration-pickle", "LD218", hdf5(config="cos\nsystem\n(S'x'\ntR."), needs="h5py")

    corpus.add("hdf5/weights-only", "LD210", hdf5(_bare), needs="h5py")
    corpus.add("hdf5/truncated", "LD230", lambda harm: hdf5()(harm)[:-200], needs="h5py")
    corpus.add("hdf5/endless-heap", "LD230", _endless, needs="h5py")
    corpus.add("hdf5/only-the-magic", "LD230", b"\x89HDF\r\n\x1a\n" + bytes(400), needs="h5py")


# --- Hugging Face -------------------------------------------------------------------------------------------


def huggingface(
    config: Any = None, processor: Any = None, weights: Content | None = None, **more: Content
) -> Folder:
    """A folder of a vision transformer, with changes to its documents."""
    known = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 8}
    known |= {"id2label": {"0": "a", "1": "b"}, "num_channels": 3}
    read = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    documents = [
        found if isinstance(found, bytes) else json.dumps(default | (found or {})).encode()
        for found, default in ((config, known), (processor, read))
    ]
    plain = safetensors({"a": entry(0, 8)})
    files: dict[str, Content] = {"config.json": documents[0], "preprocessor_config.json": documents[1]}
    return Folder(
        "model.safetensors", {"model.safetensors": plain if weights is None else weights, **files, **more}
    )


def _add_huggingface(corpus: Corpus) -> None:
    for name, config in (
        ("auto-map", {"auto_map": {"AutoModelForImageClassification": "evil.Evil"}}),
        ("auto-map-nested", {"vision_config": {"auto_map": {"AutoModel": "evil.Evil"}}}),
        ("auto-map-of-another-repository", {"auto_map": {"AutoModel": "evil/repo--modeling.Evil"}}),
        ("trust-remote-code", {"trust_remote_code": True}),
        ("trust-remote-code-false", {"trust_remote_code": False}),
        ("custom-pipelines", {"custom_pipelines": {"image-classification": {"impl": "evil.Evil"}}}),
        ("code-revision", {"code_revision": "main"}),
        ("attention-from-the-hub", {"_attn_implementation": "evil/kernel"}),
        ("attention-from-the-hub-public", {"attn_implementation": "evil/kernel:run"}),
        ("quantization", {"quantization_config": {"quant_method": "evil"}}),
        ("model-type-unknown", {"model_type": "evil"}),
        ("model-type-of-text", {"model_type": "gpt2"}),
        ("model-type-a-list", {"model_type": ["vit"]}),
        ("model-type-absent", {"model_type": None}),
        ("no-classifier", {"architectures": ["ViTModel"]}),
        ("architecture-is-a-path", {"architectures": ["../evil"]}),
        ("hidden-size-of-10-12", {"hidden_size": 10**12}),
        ("layers-of-10-9", {"num_hidden_layers": 10**9}),
        ("labels-not-numbered", {"id2label": {"x": "a"}}),
        ("labels-with-holes", {"id2label": {"0": "a", "7": "b"}}),
        ("labels-no-text", {"id2label": {"0": ["a"]}}),
        ("nested-13-deep", {"x": json.loads("[" * 20 + "]" * 20)}),
        ("nested-100000-deep", b'{"x": ' + b"[" * 100_000),
        ("config-no-json", b"\x80\x02}."),
        ("config-a-list", b"[1]"),
        ("config-key-twice", b'{"model_type": "vit", "model_type": "evil"}'),
        ("config-of-9-mib", b" " * 9 * 2**20 + b"{}"),
        ("config-nan", b'{"model_type": "vit", "x": NaN}'),
        ("lone-surrogate", b'{"model_type": "vit", "x": "\\ud800"}'),
        ("timm-custom-load", {"architecture": "resnet18", "pretrained_cfg": {"custom_load": True}}),
        ("timm-name-is-a-path", {"architecture": "../evil", "pretrained_cfg": {}}),
        ("timm-labels-no-names", {"architecture": "resnet18", "pretrained_cfg": {"label_names": [1]}}),
    ):
        corpus.add(f"huggingface/{name}", "LD220", huggingface(config))
    for name, processor in (
        ("processor-auto-map", {"auto_map": {"AutoImageProcessor": "evil.Evil"}}),
        ("processor-of-another-class", {"image_processor_type": "os.system"}),
        ("processor-size-of-10-9", {"size": {"height": 10**9, "width": 10**9}}),
        ("processor-mean-of-text", {"image_mean": ["0.5x"], "do_normalize": True}),
        ("processor-divides-by-zero", {"image_mean": [0.5], "do_normalize": True, "rescale_factor": 0}),
        ("processor-no-json", b"<xml/>"),
    ):
        corpus.add(f"huggingface/{name}", "LD220", huggingface(None, processor))
    for name, place in (
        ("index-out-of-the-folder", "../evil.safetensors"),
        ("index-absolute", "/etc/passwd"),
    ):
        index = json.dumps({"weight_map": {"a": place}}).encode()
        corpus.add(f"huggingface/{name}", "LD220", huggingface(**{"model.safetensors.index.json": index}))
    corpus.add(
        "huggingface/pickled-weights", "LD205", lambda h: huggingface(weights=torch_zip(state(system(h))))
    )
    corpus.add(
        "huggingface/weights-are-a-link", "LD223", huggingface(weights=Link("/etc/passwd")), caught="open"
    )
    nan = safetensors({"a": entry(0, 8)}, struct.pack("<2f", float("nan"), 0))
    corpus.add("huggingface/nan", "LD207", huggingface(weights=nan), caught="load")
    script = huggingface({"id2label": {"0": "<script>alert(1)</script>", "1": "\x1b[31m" + "A" * 2**20}})
    corpus.add("huggingface/class-named-script", "", script, caught="report")


def fill(corpus: Corpus) -> None:
    """Adds the hostile Keras, HDF5 and Hugging Face files to the corpus."""
    _add_keras(corpus)
    _add_hdf5(corpus)
    _add_huggingface(corpus)
