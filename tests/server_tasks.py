"""Harmless tasks for test_server.py and test_fuzz.py to send to a restricted process."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from unhorse.rules import LoadFailed, LoadRefused

Result = tuple[dict[str, Any], bytes]


def read_all(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    """What each file holds, and what the process is."""
    if "imported" in options:
        __import__(options["imported"])
    texts = [file.read().decode() for file in files]
    facts = {"process": os.getpid(), "server": os.getppid(), "torch": "torch" in sys.modules}
    return {"texts": texts, "echo": options.get("echo"), **facts}, b"blob"


def surroundings(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    """What the process can find out about who asks."""
    numbered = [Path(f"/proc/self/fd/{file.fileno()}") for file in files]
    links = [str(link.readlink()) for link in numbered if link.is_symlink()]
    told = {name: value for name, value in options.items() if name != "progress"}
    return {"folder": str(Path.cwd()), "environment": dict(os.environ), "links": links, "options": told}, b""


def count_down(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    for number in (3, 2, 1):
        options["progress"](f"{number} to go")
    return {}, b""


def refuse(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    raise LoadRefused("LD205", "it calls os.system", "do not use it")


def fail(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    raise LoadFailed("it is cut off", "download it again")


def break_down(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    raise KeyError("first line\nsecond line")


def chatter(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    os.write(1, b"to standard output")
    os.write(2, b"to standard error")
    return {"answered": True}, b""


def wait(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    options["progress"](str(os.getpid()))
    time.sleep(options["seconds"])
    return {"process": os.getpid()}, b""


def make_blob(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    return {}, bytes(range(256)) * (options["size"] // 256)


def compute(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    """A convolution on as many threads as asked for, and a thread of Python's own."""
    import torch
    from safetensors.torch import save

    images = torch.arange(16 * 3 * 64 * 64, dtype=torch.float32).view(16, 3, 64, 64) / 1e5
    sums = torch.nn.functional.conv2d(images, torch.ones(8, 3, 3, 3)).sum((2, 3))
    thread = threading.Thread(target=sums.mul_, args=(2,))
    thread.start()
    thread.join()
    return {"threads": torch.get_num_threads()}, save({"sums": sums})


def allocate_tensor(files: list[BinaryIO], options: dict[str, Any]) -> Result:
    import torch

    return {"mean": float(torch.zeros(options["bytes"] // 4).mean())}, b""


TASKS = {
    "surroundings": surroundings,
    **{"read_all": read_all, "count_down": count_down, "refuse": refuse, "fail": fail, "wait": wait},
    **{"break_down": break_down, "chatter": chatter, "make_blob": make_blob, "compute": compute},
    "allocate_tensor": allocate_tensor,
}
