"""Names that pickles use, by module: what weights need, plain values, models, and what runs code."""

from __future__ import annotations

import sys
from collections.abc import Set
from enum import IntEnum


class Danger(IntEnum):
    """What naming a global in a pickle says of the pickle, from what weights need to what runs code."""

    PLAIN = 0  # what weights need: tensors, storages, types, plain containers
    VALUE = 1  # a value beside the weights: a date, a path, an array of NumPy's
    MODEL = 2  # a class of a library of models
    UNKNOWN = 3  # a class that no list has; nothing but its own code says what it does
    CALL = 4  # a function that no list has, called
    HIGH = 5  # code, processes, files, network, other pickles


_DTYPES = {
    *("float64", "float32", "float16", "bfloat16", "complex32", "complex64", "complex128", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("qint8", "quint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2"),
}
_STORAGES = {
    f"{kind}Storage"
    for kind in (
        *("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"),
        *("ComplexDouble", "ComplexFloat", "QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4"),
    )
}
_QUANTISED = {
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"),
    "per_channel_affine_float_qparams",
}
_REBUILDERS = {
    *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    *("_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"),
}
# the list of weights_only=True, less what only subclasses of tensors need
PLAIN: dict[str, Set[str]] = {
    "torch": {"Size", "device", "Tensor", *_DTYPES, *_STORAGES, *_QUANTISED},
    "torch._utils": _REBUILDERS,
    "torch.storage": {"TypedStorage", "UntypedStorage"},
    "torch.serialization": {"_get_layout"},
    "torch.nn.parameter": {"Parameter"},
    "collections": {"OrderedDict", "Counter"},
    "builtins": {"set", "bytearray", "complex"},
    "_codecs": {"encode"},
}
VALUES: dict[str, Set[str]] = {
    "builtins": {
        *("object", "set", "frozenset", "list", "dict", "tuple", "int", "float", "complex", "str", "bytes"),
        *("bytearray", "bool", "slice", "range", "Ellipsis", "NotImplemented"),
    },
    "collections": {"defaultdict", "deque", "ChainMap", "UserDict", "UserList", "UserString"},
    "copyreg": {"_reconstructor", "__newobj__", "__newobj_ex__"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "zoneinfo": {"ZoneInfo._unpickle"},
    "time": {"struct_time"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "uuid": {"UUID", "SafeUUID"},
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace", "MappingProxyType", "NoneType"},
    "array": {"array", "_array_reconstructor"},
    "random": {"Random"},
    "re": {"_compile", "RegexFlag"},
    "inspect": {"_empty", "Signature", "Parameter", "_ParameterKind"},
    "logging": {"getLogger"},
    "itertools": {"count", "repeat"},
    "_io": {"BytesIO", "StringIO"},
    "io": {"BytesIO", "StringIO"},
    **{
        module: {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"}
        for module in ("pathlib", "pathlib._local")
    },
    "numpy": {
        *("dtype", "ndarray", "generic", "matrix", "bool", "bool_", "str_", "bytes_", "void", "datetime64"),
        *("timedelta64", "object_", "longdouble", "intc", "uintc", "longlong", "ulonglong", "intp", "uintp"),
        *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
        *("float16", "float32", "float64", "float128", "complex64", "complex128"),
    },
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), {"_reconstruct", "scalar"}),
    **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), {"_frombuffer"}),
    "numpy.ma.core": {"_mareconstruct", "MaskedArray", "MaskedConstant", "default_fill_value"},
    "numpy.dtypes": {f"{kind}DType" for kind in ("Float32", "Float64", "Int64", "Int32", "Bool", "Object")},
    "torch": {"Generator", "strided", "preserve_format", "contiguous_format", "channels_last", "layout"},
    "torch._C": {"Generator"},
    "omegaconf.dictconfig": {"DictConfig"},
    "omegaconf.listconfig": {"ListConfig"},
    "omegaconf.base": {"ContainerMetadata", "Metadata"},
    "omegaconf.nodes": {
        f"{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Path", "Bytes")
    },
    "easydict": {"EasyDict"},
    "yacs.config": {"CfgNode"},
    "addict.addict": {"Dict"},
    **dict.fromkeys(
        (
            *("pytorch_lightning.utilities.parsing", "lightning.pytorch.utilities.parsing"),
            *("lightning_fabric.utilities.data", "lightning.fabric.utilities.data"),
        ),
        {"AttributeDict"},
    ),
}
"""Values beside the weights: they hold data and do nothing, and are left out when a checkpoint is read."""
NAMED: dict[str, Set[str]] = {
    "typing": {"Any", "Union", "Optional", "List", "Dict", "Tuple", "Set", "Callable", "Sequence", "Mapping"},
    "enum": {"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag"},
    "abc": {"ABC", "ABCMeta"},
    "math": {"sqrt", "log", "log2", "exp", "floor", "ceil", "sin", "cos", "tanh", "prod", "pi", "inf"},
}
_REMOVED = {  # of the standard library, in other versions of Python or on other systems
    *("__builtin__", "commands", "popen2", "os2", "nt", "posix", "httplib", "urllib2", "urlparse", "imp"),
    *("distutils", "lib2to3", "asyncore", "asynchat", "smtpd", "cgi", "cgitb", "crypt", "nis", "pipes"),
    *("telnetlib", "xdrlib", "uu", "nntplib", "mailcap", "msilib", "spwd", "cPickle", "StringIO"),
    *("test", "idlelib", "_osx_support", "_aix_support", "_pyrepl", "_winapi", "msvcrt", "winreg", "ntpath"),
}
STANDARD = frozenset(sys.stdlib_module_names) | _REMOVED
HIGH_PACKAGES = {
    *("pip", "setuptools", "pkg_resources", "ensurepip", "wheel", "requests", "aiohttp", "httpx", "urllib3"),
    *("paramiko", "fabric", "invoke", "pexpect", "ptyprocess"),
    *("sh", "plumbum", "execnet", "boto3", "botocore"),
    *("docker", "psutil", "cffi", "_cffi_backend", "pycparser", "IPython", "ipykernel", "jupyter_client"),
    *("fsspec", "smart_open", "git", "wget", "websocket", "websockets", "tornado", "twisted", "zmq", "flask"),
    *("django", "uvicorn", "gunicorn", "celery"),
    *("selenium", "pyautogui", "win32api", "win32com", "pythoncom"),
    *("py", "_pytest", "pytest", "nose", "cloudpickle", "dill", "jsonpickle"),
    *("sqlalchemy", "pymysql", "psycopg2", "redis", "pymongo", "nltk", "jinja2", "mako", "RestrictedPython"),
}
MODELS = {
    *("torch", "torchvision", "torchaudio", "timm", "numpy", "scipy", "sklearn", "pandas", "xgboost"),
    *("lightgbm", "catboost", "joblib", "keras", "tf_keras", "tensorflow", "transformers", "ultralytics"),
    *("mmcv", "mmengine", "mmdet", "mmcls", "mmpretrain", "fastai", "fastcore", "pytorch_lightning"),
    *("lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "torch_geometric", "monai"),
    *("segmentation_models_pytorch", "efficientnet_pytorch", "pretrainedmodels", "detectron2", "open_clip"),
    *("clip", "statsmodels", "jax", "jaxlib", "flax", "optax", "peft", "accelerate", "safetensors", "skorch"),
    *("sentence_transformers", "skimage", "albumentations", "imblearn", "omegaconf", "yacs", "easydict"),
    *("tokenizers", "huggingface_hub", "networkx", "PIL", "cv2", "gensim", "spacy", "datasets", "evaluate"),
}
# calls of these packages that their own pickles make
CALLED: dict[str, Set[str]] = {
    "numpy.random._pickle": {
        *("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"),
    },
    "numpy.random._mt19937": {"MT19937"},
    "numpy.random._pcg64": {"PCG64"},
    "numpy.random.bit_generator": {"__pyx_unpickle_SeedSequence"},
    "numpy.polynomial": set(),
    "pandas.core.internals.blocks": {"new_block"},
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas.core.indexes.base": {"_new_Index"},
    "pandas.core.indexes.datetimes": {"_new_DatetimeIndex"},
    "pandas._libs.tslibs.timestamps": {"_unpickle_timestamp"},
    "torch.distributions.constraints": set(),
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {
        *_REBUILDERS,
        *("_rebuild_parameter_with_state", "_rebuild_wrapper_subclass", "_rebuild_nested_tensor"),
        *("_rebuild_device_tensor_from_numpy", "_rebuild_device_tensor_from_cpu_tensor"),
    },
    "sklearn.neighbors._kd_tree": {"newObj"},
    "sklearn.neighbors._ball_tree": {"newObj"},
    "sklearn.metrics._dist_metrics": {"newObj"},
    "sklearn.utils._bunch": {"Bunch"},
    # a Keras model in a pickle is a .keras archive in bytes, which carriers.py looks into
    "keras.src.saving.keras_saveable": {"KerasSaveable._unpickle_model"},
    **dict.fromkeys(
        tuple(f"{package}.saving.pickle_utils" for package in ("keras", "keras.src", "tf_keras.src")),
        {"deserialize_model_from_bytecode"},
    ),
}
STRICT = {"torch", "numpy"}
"""Packages whose functions run code under many names: a call that is on no list is high."""
MADE = ("torch.nn.", "torch.optim.", "torch.distributions.", "torch.utils.data.")
HIGH_IN_MODELS: dict[str, Set[str] | None] = {  # None: everything below the module
    **dict.fromkeys(
        (
            *("torch.hub", "torch.package"),
            *("torch.jit", "torch.utils.cpp_extension", "torch.utils.collect_env"),
            *("torch.utils.bottleneck", "torch.utils._config_module"),
            *("torch.utils.data.datapipes", "torch._C"),
            *("torch.distributed", "torch._inductor", "torch._dynamo", "torch.fx", "torch.multiprocessing"),
            *("torch.testing", "torch.onnx", "torch.export", "torch.profiler", "torch.utils.tensorboard"),
            *("torch._functorch", "torch._higher_order_ops", "torch.ops", "torch.classes", "torch.library"),
            *("torch.utils.model_zoo", "torch.utils.model_dump", "torch.utils._triton", "torch.utils.hipify"),
            *("numpy.f2py", "numpy.testing", "numpy.distutils", "numpy.ctypeslib", "numpy.lib.npyio"),
            *("numpy.lib._npyio_impl", "numpy.compat", "numpy.lib.format"),
            *("scipy.io", "scipy.weave", "sklearn.utils._testing", "joblib.externals", "joblib.parallel"),
            *("joblib.memory", "pandas.io"),
            *("pandas.core.computation", "pandas.compat", "tensorflow.python.framework.load_library"),
            *("tensorflow.io", "tensorflow.python.ops.gen_io_ops", "tensorflow.python.ops.script_ops"),
            *("tensorflow.python.platform.gfile"),
            *("tensorflow.python.lib.io", "transformers.utils.import_utils"),
            *("transformers.dynamic_module_utils", "huggingface_hub.file_download", "torchvision.datasets"),
            *("networkx.utils.decorators", "jax.experimental.host_callback", "jax._src.pure_callback"),
            *("fastcore.xtras", "fastcore.basics.exec_eval", "nltk.data", "mmcv.fileio", "mmengine.fileio"),
            *("PIL.ImageMath", "PIL.ImageShow", "PIL.ImageGrab", "cv2.utils"),
        )
    ),
    "torch": {"load", "save", "compile", "hub", "ops", "classes", "package", "jit", "import_ir_module", "os"},
    "torch.serialization": {"load", "save", "_load", "_legacy_load", "add_safe_globals"},
    "numpy": {
        *("load", "save", "savez", "savez_compressed", "loadtxt", "genfromtxt", "fromfile", "memmap", "save"),
        *("savetxt", "fromregex", "f2py", "ctypeslib", "testing", "distutils", "frompyfunc", "vectorize"),
        *("apply_along_axis", "apply_over_axes", "fromfunction", "piecewise", "DataSource", "tofile"),
    },
    **dict.fromkeys(("numpy.core.memmap", "numpy._core.memmap")),
    "pandas": {"read_pickle", "eval", "read_csv", "read_hdf", "read_sql", "read_html", "read_json"},
    "joblib": {"load", "dump", "Memory", "Parallel"},
    "joblib.numpy_pickle": {"load", "dump", "_unpickle", "NDArrayWrapper", "ZNDArrayWrapper"},
    "keras.models": {"load_model", "model_from_json", "model_from_config"},
    "tensorflow": {"load_op_library", "load_library", "py_function", "numpy_function", "io", "saved_model"},
    "sklearn": {"show_versions"},
}
INFAMOUS = {
    *("system", "popen", "Popen", "exec", "eval", "execfile", "check_output", "check_call", "getoutput"),
    *("getstatusoutput", "execv", "execve", "execvp", "spawn", "spawnl", "spawnv", "posix_spawn", "fork"),
    *("import_module", "run_path", "run_module", "runctx", "runcode", "runsource", "runstring", "run_cell"),
    *("load_module", "exec_module", "load_library", "LoadLibrary", "dlopen", "CDLL", "read_pickle"),
    *("os", "sys", "subprocess", "builtins", "importlib"),
    *("pickle", "ctypes", "shutil", "socket", "pty", "posix"),
}
"""Names that modules pass on from elsewhere: they are what they are, whatever module they are taken from."""
