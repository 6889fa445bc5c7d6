"""Network files that mean harm: what each tries stands in its name; places in braces are filled in."""

from __future__ import annotations

HONEST = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(16 * width, classes)

    def forward(self, images):
        return self.head(self.pool(self.body(images)).flatten(1))
"""
# where the process answers: the first pipe among what is open
ANSWER = """
import os, stat
from unhorse.sandbox import frames
def answer():
    for number in range(3, 64):
        try:
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                return number
        except OSError:
            pass
"""
_SMALL = """
class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.small = nn.Conv2d(3, 4, 5)

    def forward(self, images):
        return self.small(images).mean((2, 3))
"""

# what is told of each: a rule, or several of which one must come
AT_IMPORT: dict[str, tuple[str, tuple[str, ...]]] = {
    "writes a file": ("open('{folder}/marker', 'w')", ("LD226",)),
    "appends to a file": ("open('{secret}', 'a').write('x')", ("LD226",)),
    "deletes a file": ("import os; os.unlink('{secret}')", ("LD226",)),
    "reads a file": ("open('{secret}').read()", ("LD226",)),
    "lists a folder": ("import os; os.listdir('{folder}')", ("LD226",)),
    "says a key in an error": (
        "import os\ntry:\n    key = open('{secret}').read()\nexcept OSError as error:\n    key = str(error)\n"
        "raise ValueError(key)",
        ("LD226",),
    ),
    "reads the user's environment": (
        "raise ValueError(open('/proc/' + str(__import__('os').getppid()) + '/environ').read())",
        ("LD226",),
    ),
    "connects": ("import socket; socket.create_connection(('127.0.0.1', {port}), 1)", ("LD226",)),
    "sends a datagram": (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        ("LD226",),
    ),
    "forks": ("import os; os.fork()", ("LD226",)),
    "runs a shell": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", ("LD226",)),
    "becomes a program": ("import os; os.execv('/bin/true', ['true'])", ("LD226",)),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", ("LD226",)),
    "loads a library": ("import ctypes; ctypes.CDLL('{secret}')", ("LD226",)),
    "leaves": ("import sys; sys.exit(0)", ("LD226",)),
    "ends the process": ("import os; os._exit(0)", ("LD231",)),
    "crashes": ("import ctypes; ctypes.string_at(1)", ("LD231",)),
    "takes 10 GiB": ("import torch; torch.zeros(10 * 2**30 // 4) + 1", ("LD231",)),
    "takes 10 GiB of bytes": ("bytearray(10 * 2**30)", ("LD231",)),
    "calls itself without end": ("def f():\n    return f()\nf()", ("LD226",)),
    "has an error that cannot be printed": (
        "class E(Exception):\n    def __str__(self):\n        raise E\nraise E",
        ("LD231",),
    ),
    "draws on the terminal": ("raise ValueError('\\x1b[2J\\x1b]0;owned\\x07')", ("LD226",)),
    "refuses in a name that is not its own": (
        "from unhorse.rules import LoadRefused\nraise LoadRefused('XX999', 'all is well', 'trust me')",
        ("LD231",),
    ),
    "speaks no JSON": ("import json\njson.dumps = lambda *a, **k: 'nonsense'", ("LD231",)),
    "answers an empty document": (
        ANSWER + "frames.send(answer(), b'D', b'{{}}'); frames.send(answer(), b'B', b''); os._exit(0)",
        ("LD230",),
    ),
    "claims a graph of 4 GiB": (
        ANSWER + "frames.send(answer(), b'D', b'{{}}')\n"
        "frames.write_all(answer(), b'B' + (4 * 2**30).to_bytes(8, 'little') + bytes(2**20)); os._exit(0)",
        ("LD231",),
    ),
    "answers another tier": (ANSWER + "frames.send(answer(), b'T', b'limits')", ("LD231",)),
    "reports without end": (
        ANSWER + "while True:\n    frames.send_progress(answer(), 'x' * 4000)",
        ("LD231",),
    ),
    "names an operator that is on no list": (
        ANSWER
        + """
import json
node = {{"call": "os_system", "args": ["true"]}}
graph = {{"nodes": [node], "output": {{"node": 0}}, "tensors": {{}}}}
said = {{"graph": graph, "num_classes": 4, "notes": [], "image_shape": [3, 8, 8], "assumed_size": False,
         "prefix": "", "weights": {{"a": {{"key": "head.bias", "sha256": "", "turned": False}}}}}}
from safetensors.torch import save
frames.send_json(answer(), b'D', said); frames.send(answer(), b'B', save({{}})); os._exit(0)
""",
        ("LD227", "LD230"),
    ),
}

FORGED: dict[str, str] = {
    "weights of its own": HONEST
    + _SMALL.replace("class Small", "class Other")
    + """
class Net(Net):
    def __init__(self):
        super().__init__()
        self.__dict__["other"] = Other()

    def forward(self, images):
        return self.other(images)
""",
    "the file's weights, times nothing": HONEST
    + _SMALL
    + """
class Net(Net):
    def __init__(self):
        super().__init__()
        self.__dict__["other"] = Small()

    def forward(self, images):
        return self.other(images) + 0 * super().forward(images)
""",
    "the file's weights, too faint to matter": HONEST
    + _SMALL
    + """
class Net(Net):
    def __init__(self):
        super().__init__()
        self.__dict__["other"] = Small()

    def forward(self, images):
        return self.other(images) + 1e-6 * super().forward(images)
""",
    "a network that loads nothing": HONEST
    + """
class Net(Net):
    def load_state_dict(self, state, strict=True):
        return None
""",
    "a torch that loads nothing": HONEST + "\nnn.Module.load_state_dict = lambda *a, **k: None\n",
    "a large network of its own": HONEST
    + """
class Net(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("filters", torch.randn(64, 3, 8, 8), persistent=False)

    def forward(self, images):
        found = nn.functional.conv2d(images, self.filters).amax((2, 3))
        return super().forward(images) + found[:, :4]
""",
    "other values under the names of the file's": HONEST
    + """
from unhorse.loading import network_reading
kept = network_reading._source
def lie(tensor, known):
    return kept(tensor, known) or {"key": "head.weight", "sha256": "0" * 64, "turned": False}
network_reading._source = lie
class Net(Net):
    def load_state_dict(self, state, strict=True):
        super().load_state_dict({name: 2 * value + 1 for name, value in state.items()}, strict)
""",
}
