"""Imports a user's Python sources from memory, inside a restricted process, which sees no folder."""

from __future__ import annotations

import base64
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox.frames import MEMORY_WORDS

ARGUMENTS_REMEDY = "give what it needs with --network-args '{\"num_classes\": 10}'"
_MIRRORED = "remove the import from {file}, or copy the class of the network into a file of its own"


class Sources(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads the modules of a network file's folder, before all that is installed."""

    def __init__(self, code: Mapping[str, Any]) -> None:
        self.sources = {name: base64.b64decode(text) for name, text in code["sources"].items()}
        self.modules = _modules(self.sources, code["folder"])
        self.folders = {code["folder"]} - {""}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The specification of a module of ours."""
        if fullname in self.modules:
            origin = self.modules[fullname]
            package = origin.endswith("__init__.py")
            spec = importlib.machinery.ModuleSpec(fullname, self, origin=origin, is_package=package)
            spec.has_location = True  # so that __file__ is set, to the name alone
            return spec
        if fullname in self.folders:  # a folder without __init__.py whose files import each other with dots
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def is_package(self, fullname: str) -> bool:
        """Whether a module is a folder."""
        return fullname in self.folders or self.modules[fullname].endswith("__init__.py")

    def get_source(self, fullname: str) -> str:
        """A module's text, which torch.jit.script and inspect ask for."""
        return importlib.util.decode_source(self.sources.get(self.modules.get(fullname, ""), b""))

    def get_code(self, fullname: str) -> Any:
        """A module's code, compiled from its bytes under its own name."""
        name = self.modules.get(fullname, "")
        return compile(self.sources.get(name, b""), name or fullname, "exec", dont_inherit=True)


def _modules(sources: Mapping[str, bytes], folder: str) -> dict[str, str]:
    """The names under which the sources can be imported: from their folder, and as members of it."""
    found: dict[str, str] = {}
    for place in sorted(sources):
        dotted = place.removesuffix(".py").replace("/", ".")
        dotted = dotted.removesuffix(".__init__")
        if dotted != "__init__":
            found[dotted] = place
        if folder:
            found[folder if dotted == "__init__" else f"{folder}.{dotted}"] = place
    return found


def named_in(code: Mapping[str, Any]) -> Any:
    """What the file calls by the network's name, its modules imported; LoadRefused LD226 otherwise."""
    finder = Sources(code)
    sys.meta_path.insert(0, finder)
    sys.argv = [code["file"]]  # a file that reads arguments as it is imported finds none
    name = f"{code['folder']}.{code['file'].removesuffix('.py')}".strip(".")
    if name in sys.modules:  # a file that is called like a library
        name = f"the_network_file_{name}"
        finder.modules[name] = code["file"]
    module = guarded(lambda: pkgutil.resolve_name(name), code)
    found: Any = module
    for part in code["name"].split("."):
        if not hasattr(found, part):
            raise _no_such_name(module, code)
        found = getattr(found, part)
    return found


def guarded(action: Any, code: Mapping[str, Any]) -> Any:
    """What `action` gives; whatever the user's code raises, SystemExit too, is LD226 and says where."""
    try:
        return action()
    except MemoryError:
        raise
    except ImportError as error:
        raise _not_importable(error, code) from error
    except RecursionError as error:
        raise refused("the network file calls itself without end", "build the network without it") from error
    except BaseException as error:
        out_of_memory = any(word in str(error) for word in MEMORY_WORDS)
        if out_of_memory or isinstance(error, LoadRefused | LoadFailed):
            raise
        line = (str(error).strip().splitlines() or [""])[0][:200]
        reason = f"the network file fails{_place(error, code)} ({type(error).__name__}: {line})"
        remedy = (
            ARGUMENTS_REMEDY
            if isinstance(error, TypeError) and "argument" in line
            else (f"correct {code['file']} until its network can be built and run on the CPU with no files")
        )
        raise refused(reason, remedy) from error


def _place(error: BaseException, code: Mapping[str, Any]) -> str:
    """The last line of the user's own that an error came through."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in code["sources"]
    ]
    if isinstance(error, SyntaxError) and error.filename in code["sources"]:
        return f" at {error.filename}:{error.lineno}"
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _not_importable(error: ImportError, code: Mapping[str, Any]) -> LoadRefused:
    name = error.name or ""
    root = name.partition(".")[0]
    place = _place(error, code)
    if any(link in (f"{root}.py", f"{name.replace('.', '/')}.py") for link in code["links"]):
        return refused(
            f"the network file imports {root}{place}, which is a symbolic link", "copy the file itself"
        )
    if not root or (isinstance(error, ImportError) and type(error) is ImportError and root in sys.modules):
        line = (str(error).splitlines() or [""])[0][:200]
        return refused(
            f"the network file imports what is not there{place} ({line})", _MIRRORED.format(**code)
        )
    reason = f"the network file imports {name}{place}, which is not there in the confined process"
    remedy = _MIRRORED.format(**code)
    if root not in ("torchvision", "timm"):
        remedy += f"; if {root} is a file of yours, put it beside {code['file']}"
    return refused(reason, remedy)


def _no_such_name(module: Any, code: Mapping[str, Any]) -> LoadRefused:
    own = [
        name
        for name, value in sorted(vars(module).items())
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith("_")
    ]
    reason = f"{code['file']} has no {code['name']!r}; it defines {', '.join(own[:12]) or 'nothing'}"
    return refused(reason, f"name one of them: --network {code['file']}:NAME")


def refused(reason: str, remedy: str) -> LoadRefused:
    """LD226: the network does not fit, or does not work."""
    return LoadRefused("LD226", reason, remedy)
