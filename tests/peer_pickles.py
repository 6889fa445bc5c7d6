"""Pickles in the manner of the test corpora of other scanners: hostile ones by what they call, harmless ones.

The hostile ones are never run. Names are those of public advisories on scanners of pickles.
"""

from __future__ import annotations

import argparse
import array
import collections
import datetime
import decimal
import enum
import functools
import io
import json
import lzma
import pathlib
import pickle
import random
import struct
import types
import uuid
import zipfile
import zlib
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

from hostile_pickles import text


def words(listed: str) -> list[str]:
    return listed.split()


CALLS = words("""
os.system posix.system nt.system os.popen os.execv os.spawnl os.remove os.putenv commands.getoutput
subprocess.Popen subprocess.run subprocess.check_output subprocess.getoutput _posixsubprocess.fork_exec
builtins.eval builtins.exec builtins.compile builtins.open builtins.__import__ builtins.getattr builtins.map
builtins.setattr builtins.globals builtins.breakpoint builtins.input builtins.vars __builtin__.eval
__builtin__.apply __builtin__.file builtins.eval.__call__ builtins.dict.get importlib.import_module
importlib.__import__ importlib.util.spec_from_file_location runpy.run_path runpy._run_code
pkgutil.resolve_name imp.load_source zipimport.zipimporter ctypes.CDLL ctypes.cdll.LoadLibrary
_ctypes.dlopen socket.create_connection socket.socket ssl.get_server_certificate http.client.HTTPSConnection
httplib.HTTPSConnection urllib.request.urlopen urllib2.urlopen ftplib.FTP smtplib.SMTP telnetlib.Telnet
imaplib.IMAP4_stream xmlrpc.client.ServerProxy webbrowser.open antigravity.fly pty.spawn shutil.rmtree
shutil.copy tempfile.mktemp pathlib.Path.unlink pathlib.Path.write_text io.open _io.FileIO io.FileIO
logging.FileHandler logging.config.listen fileinput.input mmap.mmap sqlite3.connect dbm.open shelve.open
pickle.loads pickle.load _pickle.loads cPickle.loads marshal.loads types.CodeType types.FunctionType
operator.attrgetter operator.methodcaller operator.itemgetter _operator.attrgetter functools.reduce
itertools.starmap code.InteractiveInterpreter code.InteractiveInterpreter.runcode code.interact
codeop.compile_command timeit.timeit timeit.main timeit.Timer pdb.run pdb.Pdb bdb.Bdb.run bdb.Bdb
trace.Trace.run cProfile.run cProfile.runctx profile.run profile.Profile.run doctest.debug_script
doctest.DocTestRunner pydoc.pipepager pydoc.locate pydoc.ErrorDuringImport asyncio.create_subprocess_shell
asyncio.unix_events._UnixSubprocessTransport._start multiprocessing.Process threading.Thread
_thread.start_new_thread concurrent.futures.ProcessPoolExecutor signal.signal atexit.register sys.exit
sys.settrace sys.modules gc.get_objects distutils.spawn.spawn distutils.file_util.write_file
setuptools.sandbox.run_setup pip.main pip._internal.main ensurepip._run_pip venv.create venv.EnvBuilder
test.support.script_helper.assert_python_ok uuid._get_command_stdout _osx_support._read_output
_aix_support._read_cmd_output _pyrepl.pager.pipe_pager idlelib.autocomplete.AutoComplete.get_entity
idlelib.calltip.get_entity idlelib.run.Executive.runcode idlelib.pyshell.ModifiedInterpreter.runcode
idlelib.debugobj.ObjectTreeItem.SetText lib2to3.pgen2.grammar.Grammar.loads
lib2to3.pgen2.pgen.ParserGenerator.make_label numpy.testing._private.utils.runstring
numpy.f2py.crackfortran.getlincoef numpy.f2py.crackfortran._eval_length numpy.load numpy.fromfile
numpy.memmap numpy.lib.npyio.load numpy.ctypeslib.load_library torch.load torch.save
torch.serialization.load torch.hub.load torch.hub.download_url_to_file torch.compile torch.jit.load
torch.jit.CompilationUnit torch.jit.unsupported_tensor_ops.execWrapper torch.classes.load_library
torch.ops.load_library torch.package.PackageImporter torch.utils.collect_env.run
torch.utils.cpp_extension.load torch.utils._config_module.ConfigModule.load_config
torch.utils.bottleneck.__main__.run_cprofile torch.utils.bottleneck.__main__.run_autograd_prof
torch.utils.data.datapipes.utils.decoder.basichandlers torch.utils.model_zoo.load_url
torch.utils.tensorboard.SummaryWriter torch._dynamo.guards.GuardBuilder.get
torch._inductor.codecache.compile_file torch._inductor.runtime.compile_tasks._reload_python_module
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
torch.fx.graph_module.reduce_graph_module torch.distributed.rpc.rpc_sync torch.multiprocessing.spawn
torch._C.PyTorchFileReader torch.from_file pandas.read_pickle pandas.eval pandas.io.pickle.read_pickle
joblib.load joblib.numpy_pickle.load tensorflow.io.write_file tensorflow.load_op_library
keras.models.load_model requests.get requests.api.get aiohttp.client.ClientSession aiohttp.ClientSession
httpx.get urllib3.PoolManager paramiko.SSHClient cloudpickle.cloudpickle._make_function
cloudpickle.cloudpickle._builtin_type cloudpickle.cloudpickle.subimport dill._dill._create_function
dill._dill._create_code dill._dill._import_module dill.loads IPython.core.interactiveshell.InteractiveShell
cffi.FFI docker.from_env pexpect.spawn sh.Command psutil.Process somewhere.os.system somewhere.system
torch.os.system transformers.file_utils.subprocess.Popen sklearn.utils.eval
""")
"""What hostile pickles call, as module.name; `split` tells where the module ends."""
_DOTTED = {
    name: module
    for module in (
        *("builtins", "pathlib", "ctypes", "code", "bdb", "trace", "profile", "torch.utils._config_module"),
        *(
            "torch._dynamo.guards",
            "torch.fx.experimental.symbolic_shapes",
            "idlelib.autocomplete",
            "idlelib.run",
        ),
        *("idlelib.pyshell", "idlelib.debugobj", "lib2to3.pgen2.grammar", "lib2to3.pgen2.pgen", "somewhere"),
        *("torch", "asyncio.unix_events", "transformers.file_utils"),
    )
    for name in CALLS
    if name.startswith(f"{module}.")
    and name[len(module) + 1 :].count(".") > 0
    and (module != "torch" or name == "torch.os.system")
}


def split(name: str) -> tuple[str, str]:
    """Module and name of a call of the list."""
    module = _DOTTED.get(name) or name.rpartition(".")[0]
    return module, name[len(module) + 1 :]


def calling(name: str, protocol: int, argument: str = "true") -> bytes:
    """A pickle that calls what `name` says, spelled as a protocol spells it."""
    module, function = split(name)
    if protocol == 0:
        return f"c{module}\n{function}\n(S{argument!r}\ntR.".encode()
    body = f"c{module}\n{function}\n".encode() + text(argument) + b"\x85R."
    if protocol < 4:
        return b"\x80" + bytes([protocol]) + body
    short = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() + b"\x94" for part in (module, function))
    body = short + b"\x93\x94" + text(argument) + b"\x94\x85\x94R\x94."
    return b"\x80" + bytes([protocol]) + b"\x95" + struct.pack("<Q", len(body)) + body


def _npy(pickled: bytes) -> bytes:
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + pickled


def _zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def tricks() -> dict[str, bytes]:
    """Hostile pickles that hide their call from readers of a plain list of opcodes; each calls os.system."""
    system = calling("os.system", 2)
    globals_by_memo = b"Vos\np2\n0Vsystem\np3\n0Vtorch\np0\n0VLongStorage\np1\n0g2\ng3\n\x93(Vtrue\ntR."
    inner = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + _bytes(_old_torch(system)) + b"\x85R."
    wrapper = (
        b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}(Vdtype\ncnumpy\ndtype\n(Vu1\n\x89\x88tRVshape\n"
    )
    hidden = b"M" + struct.pack("<H", len(system)) + b"\x85ub0" + system[2:]
    return {
        "memo": globals_by_memo + b"\n\n\t\t",
        "memo-with-gaps": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940"
        b"Nr\xff\xff\0\x000h\0h\1\x93\x8c\4true\x85R.",
        "unicode-first": b"X\4\0\0\0true0cos\nsystem\n(Vtrue\ntR.",
        "short-text-first": b"\x8c\4true0cos\nsystem\n(Vtrue\ntR.",
        "frame-first": b"\x95" + struct.pack("<Q", 30) + b"\x8c\2os\x8c\6system\x93\x8c\4true\x85R.",
        "number-first": b"I1\n0cos\nsystem\n(Vtrue\ntR.",
        "hexadecimal-number-first": b"I0x1\n0cos\nsystem\n(Vtrue\ntR.",
        "list-first": b"]0cos\nsystem\n(Vtrue\ntR.",
        "set-first": b"\x8f0cos\nsystem\n(Vtrue\ntR.",
        "none-first": b"N0cos\nsystem\n(Vtrue\ntR.",
        "bytes-first": b"C\4true0cos\nsystem\n(Vtrue\ntR.",
        "bytearray-first": b"\x96" + struct.pack("<Q", 4) + b"true0cos\nsystem\n(Vtrue\ntR.",
        "float-first": b"G" + bytes(8) + b"0cos\nsystem\n(Vtrue\ntR.",
        "megabyte-first": b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"0cos\nsystem\n(Vtrue\ntR.",
        "instance": b"(S'true'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nVtrue\no.",
        "new-with-keywords": b"\x80\x04\x8c\2os\x8c\6system\x93Vtrue\n\x85}\x92.",
        "second-pickle": pickle.dumps(["a", "b"]) + system,
        "third-pickle-of-protocol-0": pickle.dumps("a", 0) * 2 + calling("os.system", 0),
        "behind-padding": pickle.dumps(["a"]) + bytes(16) + system,
        "broken-behind-the-call": system[:-1] + b"\xff\xff\xff",
        "cut-behind-the-call": system[:-1],
        "protocol-7": b"\x80\x07"[:1] + b"\x05" + system[2:],
        "nested-in-bytes": b"\x80\x03cpickle\nloads\n" + _bytes(system) + b"\x85R.",
        "nested-in-text": b"(S" + repr(calling("os.system", 0).decode()).encode() + b"\nt.",
        "tensor-in-bytes": inner,
        "array-of-joblib-that-is-none": b"\x80\x02" + wrapper + hidden,
        "array-of-objects-of-joblib": _joblib_objects(system),
        "getattr-of-a-module": (
            b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(Vtrue\ntR."
        ),
        "npy": _npy(system),
        "npz": _zip(weights__npy=_npy(system)),
        "zip": _zip(data__pkl=system),
        "zip-of-another-name": _zip(data__pkl=pickle.dumps([1]), model__txt=system),
        "zlib": zlib.compress(system),
        "gzip": _gzip(system),
        "xz": lzma.compress(system),
        "magic-of-torch-by-a-call": b"\x80\x02cos\nsystem\nVtrue\n\x85R." + pickle.dumps(1001, 2),
    }


def keras_model(*classes: str, protocol: int = 4) -> bytes:
    """A pickled Keras model: a call of Keras' own function on a .keras archive in bytes."""
    layers = [{"class_name": name, "config": {"name": name.lower()}} for name in classes]
    config = json.dumps({"class_name": "Sequential", "config": {"layers": layers}}).encode()
    archive = io.BytesIO(_zip(config__json=config, metadata__json=b"{}"))
    pickled = pickle.dumps(archive, protocol)[2:-1]
    return b"\x80\x04ckeras.src.saving.keras_saveable\nKerasSaveable._unpickle_model\n" + pickled + b"\x85R."


def _bytes(raw: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(raw)) + raw


def _gzip(raw: bytes) -> bytes:
    press = zlib.compressobj(wbits=31)
    return press.compress(raw) + press.flush()


def _old_torch(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    parts = buffer.getvalue().split(b"\x80\x02")
    return b"\x80\x02".join([*parts[:4], pickled[2:], *parts[5:]])


def _joblib_objects(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(np.array([{"a": 1}], dtype=object), buffer)
    whole = buffer.getvalue()
    inner = whole.rindex(b"\x80")
    return whole[:inner] + pickled + whole[-1:]


class Net(nn.Module):
    """A class that only this file defines."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(2))
        self.norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.act = nn.functional.gelu

    class Inner:
        """A class within a class, which old protocols look up by getattr."""


class Colour(enum.Enum):
    RED = 1


class small_letters:  # noqa: N801 - as some libraries write it
    def act(self) -> int:
        return 1


class Early(collections.OrderedDict):  # type: ignore[type-arg]
    """A dictionary of its own."""


def harmless() -> dict[str, Any]:
    """Values that people pickle, none of which does anything when it is loaded."""
    from sklearn.datasets import load_iris
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    images, labels = np.random.default_rng(0).random((40, 3)), np.arange(40) % 2
    fitted = {
        type(model).__name__: model.fit(images, labels)
        for model in (
            *(RandomForestClassifier(3), GradientBoostingClassifier(n_estimators=2), LogisticRegression()),
            *(KNeighborsClassifier(), SVC(), make_pipeline(StandardScaler(), SVC())),
        )
    }
    return {
        "list": ["a", "b", "c"],
        "numbers": [0, 1, 255, 65536, -1, 10**30, 1.5, float("inf"), True, None],
        "nested": {"a": [(1, 2), {"b": {3, 4}}, frozenset([5])], "c": b"bytes", "d": bytearray(b"more")},
        "text": "os.system is named in a text, and so is eval(...)\nposix\nsystem\n" * 40,
        "containers": [collections.OrderedDict(a=1), collections.defaultdict(list), collections.deque([1])],
        "counter": collections.Counter("aab"),
        "dates": [datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1)],
        "values": [
            decimal.Decimal("1.5"),
            uuid.UUID(int=1),
            pathlib.PurePosixPath("a"),
            range(3),
            slice(1),
            1j,
        ],
        "namespace": [argparse.Namespace(lr=0.1), types.SimpleNamespace(a=1)],
        "array": array.array("d", [1.0, 2.0]),
        "random": [random.Random(0), np.random.default_rng(0), np.random.RandomState(0)],
        "exception": ValueError("x"),
        "numpy": [
            np.arange(6).reshape(2, 3),
            np.float32(1),
            np.dtype("f4"),
            np.array(["a", None], dtype=object),
        ],
        "masked": np.ma.array([1, 2], mask=[True, False]),
        "iris": load_iris(),
        "module": Net(),
        "sequential": nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        "optimiser": torch.optim.Adam([torch.ones(1, requires_grad=True)]),
        "dataset": torch.utils.data.TensorDataset(torch.ones(2, 2)),
        "tensor": {"a": torch.ones(3), "b": torch.nn.Parameter(torch.zeros(2))},
        "enum": Colour.RED,
        "own dictionary": Early(a=1),
        "method of a class in small letters": small_letters().act,
        "class in a class": Net.Inner(),
        **fitted,
    }


def harmless_files() -> dict[str, bytes]:
    """Files of harmless pickles: every value at every protocol, and as joblib and NumPy write it."""
    files: dict[str, bytes] = {}
    for name, value in harmless().items():
        for protocol in range(6):
            files[f"{name}-{protocol}"] = pickle.dumps(value, protocol)
        buffer = io.BytesIO()
        joblib.dump(value, buffer)
        files[f"{name}-joblib"] = buffer.getvalue()
    packed, arrays, objects = io.BytesIO(), io.BytesIO(), io.BytesIO()
    joblib.dump(harmless()["RandomForestClassifier"], packed, compress=3)
    np.savez(arrays, a=np.arange(3), b=np.zeros((2, 2)))
    np.save(objects, np.array([{"a": 1}, None], dtype=object))
    files |= {"joblib-zlib": packed.getvalue(), "npz": arrays.getvalue(), "object-array": objects.getvalue()}
    files |= {"zip": _zip(data__pkl=pickle.dumps({"a": 0})), "two": pickle.dumps([1]) + pickle.dumps([2])}
    return files
