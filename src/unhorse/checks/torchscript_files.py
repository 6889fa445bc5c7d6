"""TorchScript archives, read but not run: code by a list of operators, pickles by a list of globals."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import BinaryIO

from unhorse.checks import archives, pickles, zip_directory
from unhorse.checks.expectations import Facts
from unhorse.checks.operators import PRIM, SCRIPT, is_torch_operator
from unhorse.checks.sniff import EXPORT_REMEDY
from unhorse.checks.weight_files import check_root
from unhorse.rules import LoadRefused

MAX_CODE_BYTES = 8 * 2**20
MAX_INDENT = 100

_PICKLES = {"data.pkl", "constants.pkl", "traced_inputs.pkl"}
_MEMBERS = {*_PICKLES, "version", "byteorder", ".format_version", ".storage_alignment"}
_FOLDERS = ("data/", "constants/", "code/", "extra/", ".data/", "traced_inputs/")
_BUILTINS = {
    *(
        "annotate",
        "unchecked_cast",
        "uninitialized",
        "getattr",
        "range",
        "int",
        "float",
        "bool",
        "str",
        "len",
    ),
    *(
        "isinstance",
        "list",
        "tuple",
        "dict",
        "min",
        "max",
        "abs",
        "round",
        "zip",
        "enumerate",
        "print",
        "complex",
    ),
}
# names that no class of the archive may give to a method: on a tensor they mean something else
_FORBIDDEN = {
    *(
        "from_file",
        "save",
        "load",
        "PythonOp",
        "rpc_async",
        "rpc_sync",
        "rpc_remote",
        "fork",
        "wait",
        "awaitable",
    ),
    *(
        "as_strided",
        "as_strided_",
        "set_",
        "set_data",
        "resize_",
        "_shared_memory",
        "_new_shared_filename_cpu",
    ),
    *("_cast_Byte", "storage", "data_ptr", "manual_seed", "eval", "exec", "__import__", "__reduce__", "open"),
}


def check_torchscript(stream: BinaryIO) -> Facts:
    """The facts of a TorchScript archive; LD214 for code off the list, LD205 for a pickle."""
    directory = zip_directory.read_directory(stream)
    archives.check_members(stream, directory, deflated=_may_be_deflated)
    check_root(directory)
    sources = []
    for member in directory.members:
        local = member.local()
        if local in _PICKLES or local.endswith(".debug_pkl"):
            pickled = archives.read_member(stream, member)
            pickles.check_pickle(pickled, pickles.is_scripted, where=local)
        elif local.startswith("code/") and local.endswith(".py"):
            sources.append((local, archives.read_member(stream, member, MAX_CODE_BYTES)))
        elif local not in _MEMBERS and not local.startswith(_FOLDERS):
            raise zip_directory.hostile(f"has {member.name!r}, which torch.jit.save does not write")
    operators = check_code(sources)
    return Facts(producer="torch.jit", operators=tuple(sorted(operators)))


def _may_be_deflated(name: str) -> bool:
    return name.partition("/")[2].startswith(("code/", "extra/"))


def check_code(sources: list[tuple[str, bytes]]) -> set[str]:
    """The operators that the code of an archive names; LD214 where one is not on the list."""
    if sum(len(source) for _, source in sources) > MAX_CODE_BYTES:
        raise _refused("the code has more than 8 MiB", "code/")
    trees = [(where, _parsed(source, where)) for where, source in sources]
    own = set[str]()
    for where, tree in trees:
        for name in _defined(tree):
            if name in _FORBIDDEN:
                raise _refused(f"the code defines {name!r}, the name of an operator outside the list", where)
            own.add(name)
    return {name for where, tree in trees for name in _operators(tree, own, where)}


def _parsed(source: bytes, where: str) -> ast.Module:
    try:
        text = source.decode("utf-8")
        if re.search(rf"^ {{{2 * MAX_INDENT}}}", text, re.MULTILINE):
            raise _refused("the code is nested too deep", where)
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, LoadRefused):
            raise
        raise _refused("the code is not TorchScript", where) from error
    except (RecursionError, MemoryError) as error:
        raise _refused("the code is nested too deep", where) from error


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "__annotations__":
            yield ast.literal_eval(node.slice) if isinstance(node.slice, ast.Constant) else ""


def _operators(tree: ast.Module, own: set[str], where: str) -> Iterator[str]:
    """What the code calls on torch and ops; LD214 for imports, other namespaces, operators off the list."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            # each file of an archive may import others of the same archive
            modules = [alias.name for alias in node.names]
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if not all(module.startswith("__torch__") for module in modules[-1:]):
                raise _refused(f"the code imports {modules[0]!r}", where)
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            yield from _operator(node, own, where)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name in _FORBIDDEN:
                raise _refused(f"the code calls {name!r}", where)
            if name == "getattr" and not _is_own_attribute(node, own):
                raise _refused("the code takes an attribute by a name that no class in it has", where)
        elif isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.Lambda | ast.Global | ast.Nonlocal):
            raise _refused(f"the code has a {type(node).__name__}, which is not TorchScript", where)


def _is_own_attribute(call: ast.Call, own: set[str]) -> bool:
    name = call.args[1] if len(call.args) == 2 else None
    return isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value in own


def _operator(node: ast.Attribute, own: set[str], where: str) -> Iterator[str]:
    """The operator that a dotted name stands for, if any, after a look at each of its parts."""
    parts: list[str] = []
    root: ast.expr = node
    while isinstance(root, ast.Attribute):
        parts.insert(0, root.attr)
        root = root.value
    path = [root.id, *parts] if isinstance(root, ast.Name) else ["", *parts]
    if path[0] == "__torch__" or path[0] == "CONSTANTS":
        return
    allowed = len(path) == 2 and (is_torch_operator(path[1]) or path[1] in SCRIPT)
    if path[0] == "ops":
        operator = path[2] if len(path) > 2 else ""
        allowed = len(path) == 2 and path[1] == "prim"
        allowed |= len(path) == 3 and path[1] == "prim" and operator in PRIM
        allowed |= len(path) == 3 and path[1] == "aten" and is_torch_operator(operator)
    elif path[0] != "torch":
        allowed = all(_is_harmless(part, own) for part in parts)
    if not allowed:
        raise _refused(f"the code uses {'.'.join(path)}, an operator outside the list", where)
    if path[0] in ("torch", "ops") and len(path) > 1:
        yield path[-1]


def _is_harmless(part: str, own: set[str]) -> bool:
    if part in _FORBIDDEN:
        return False
    return part in own or part in SCRIPT or part in PRIM or is_torch_operator(part) or part == "forward"


def _refused(what: str, where: str) -> LoadRefused:
    return LoadRefused(
        "LD214", f"{what} ({where})", f"do not run it; ask its author for the weights, or {EXPORT_REMEDY}"
    )
