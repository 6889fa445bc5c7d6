"""A user's own network file: run only where it is confined, read from memory, and not believed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import network_files
from hostile_networks import AT_IMPORT, FORGED, HONEST
from unhorse.cli import run as command
from unhorse.loading import formats
from unhorse.loading.assembly import Said
from unhorse.loading.formats import load_model, open_networks
from unhorse.loading.network_code import MAX_FILES, read_network
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import server
from unhorse.sandbox.confinement import LimitExceeded, Limits, Tier
from unhorse.sandbox.server import Server
from unhorse.survey import Request, _Scan

NET = HONEST
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def built(text: str, name: str = "Net", **arguments: Any) -> nn.Module:
    """The network of a source, built here, with weights and statistics that are drawn."""
    scope: dict[str, Any] = {"__name__": "net"}
    exec(compile(text, "net.py", "exec"), scope)
    torch.manual_seed(3)
    network = scope[name](**arguments)
    rng = torch.Generator().manual_seed(1)
    for key, tensor in network.state_dict().items():
        if key.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * 0.1)
        elif key.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
    return network.eval()


def written(folder: Path, text: str = NET, file: str = "net.py") -> str:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    return f"{folder / file}:Net"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return built(NET)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, network: nn.Module) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def refusal(path: Path, network: str, **options: Any) -> LoadRefused:
    with pytest.raises(LoadRefused) as refused:
        load_model(path, network=network, **options)
    assert refused.value.remedy
    return refused.value


# --- where it runs ------------------------------------------------------------------------------------------

WEAKER = {
    Tier.CALLS: "landlock.version = lambda: 0",
    Tier.FILES: "seccomp.filter_calls = lambda: False",
    Tier.LIMITS: "landlock.version = lambda: 0; seccomp.filter_calls = lambda: False",
}


@pytest.fixture(scope="module", params=WEAKER)
def weaker_server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tier, Server]]:
    """A server whose restricted processes lack something."""
    path = tmp_path_factory.mktemp("weaker") / "weaker.py"
    path.write_text(f"from unhorse.sandbox import landlock, seccomp\n{WEAKER[request.param]}\nTASKS = {{}}\n")
    running = Server(heavy=True, arguments=["--tasks", str(path)])
    yield request.param, running
    running.close()


@pytest.fixture
def weaker(weaker_server: tuple[Tier, Server], monkeypatch: pytest.MonkeyPatch) -> Tier:
    """All restricted processes of this test lack something."""
    tier, running = weaker_server
    monkeypatch.setattr(server, "_server", lambda heavy: running)
    return tier


def test_where_files_or_calls_are_not_confined_it_is_refused_before_it_runs(
    weaker, weights, tmp_path, capsys
):
    place = written(tmp_path, "raise ValueError('it ran')\n" + NET)
    refused = refusal(weights, place)
    assert refused.rule == "LD225" and str(weaker) in refused.reason
    assert "docker run" in refused.remedy and "--trust-network" in refused.remedy
    for words in (["scan"], ["inspect"], ["convert", "-o", str(tmp_path / "out.safetensors")]):
        assert command([*words, str(weights), "--network", place]) == 4
        assert "LD225" in capsys.readouterr().err


def test_a_child_of_a_weaker_tier_refuses_by_itself(weaker, weights, tmp_path):
    code = read_network(written(tmp_path, "raise ValueError('it ran')\n" + NET))
    options = {"format": "PyTorch state dict", "names": ["weights.pth"], "network": code.to_json()}
    with weights.open("rb") as file, pytest.raises(LoadRefused) as refused:
        server.run("network", [file], options, heavy=True)
    assert refused.value.rule == "LD225"


def test_trusted_code_runs_anyway_and_the_report_says_so(weaker, weights, network, tmp_path):
    model = load_model(weights, network=written(tmp_path), trust_network=True)
    assert torch.equal(model(IMAGES), network(IMAGES))
    (line,) = [line for line in model.assumptions if line.startswith("LD225")]
    assert str(weaker) in line and "--trust-network" in line


# --- what it tries ------------------------------------------------------------------------------------------


class Outside(NamedTuple):
    """What hostile code aims at."""

    folder: Path
    secret: Path
    port: int
    door: socket.socket

    def is_untouched(self) -> bool:
        with pytest.raises(BlockingIOError):
            self.door.accept()
        return list(self.folder.iterdir()) == [] and self.secret.read_text() == "the-key"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    home = tmp_path_factory.mktemp("home")
    (home / "empty").mkdir()
    (home / "secret").write_text("the-key")
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setblocking(False)
        yield Outside(home / "empty", home / "secret", door.getsockname()[1], door)


def stopped(path: Path, network: str) -> LoadRefused | LoadFailed:
    with pytest.raises((LoadRefused, LoadFailed)) as ended:
        load_model(path, network=network)
    assert ended.value.remedy
    return ended.value


@pytest.mark.parametrize("attack", AT_IMPORT)
def test_what_a_hostile_file_does_has_no_effect_and_a_rule(attack, weights, tmp_path, outside):
    text, rules = AT_IMPORT[attack]
    text = text.format(folder=outside.folder, secret=outside.secret, port=outside.port)
    error = stopped(weights, written(tmp_path, text + "\n" + HONEST))
    assert error.rule in rules, error
    assert "the-key" not in str(error)
    assert outside.is_untouched()


@pytest.mark.parametrize("attack", ["while True: pass", "import time; time.sleep(1000)"])
def test_a_file_that_does_not_end_is_ended(attack, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_limits", lambda size: Limits(cpu_seconds=2, wall_seconds=60))
    error = stopped(weights, written(tmp_path, attack + "\n" + HONEST))
    assert isinstance(error, LimitExceeded) and error.limit in ("CPU time", "wall time")


@pytest.mark.parametrize("forgery", FORGED)
def test_a_network_that_is_not_of_the_files_weights_is_refused(forgery, weights, tmp_path):
    error = stopped(weights, written(tmp_path, FORGED[forgery]))
    # a torch that is broken so far that a graph cannot be checked gives none
    assert error.rule == ("LD221" if forgery == "a torch that loads nothing" else "LD227"), error


def test_a_lie_about_weights_is_of_no_use_where_the_values_are_taken_from_the_file(
    weights, network, tmp_path
):
    lie = """
from unhorse.loading import network_reading
class Net(Net):
    def load_state_dict(self, state, strict=True):
        super().load_state_dict({name: 3 * value for name, value in state.items()}, strict)
        true = {(3 * value).numpy().tobytes(): name for name, value in state.items()}
        first = network_reading._source
        def source(tensor, known):
            name = true.get(tensor.numpy().tobytes())
            return first(state[name], known) if name else first(tensor, known)
        network_reading._source = source
"""
    model = load_model(weights, network=written(tmp_path, NET + lie))
    assert torch.equal(model(IMAGES), network(IMAGES))


def test_control_characters_of_a_network_file_do_not_reach_the_terminal(weights, tmp_path, capfd):
    place = written(tmp_path, AT_IMPORT["draws on the terminal"][0] + "\n" + HONEST)
    out = str(tmp_path / "out.safetensors")
    assert command(["convert", str(weights), "-o", out, "--network", place]) == 4
    printed = "".join(capfd.readouterr())
    assert "LD226" in printed and "\x1b]" not in printed and "\x1b[2J" not in printed


# --- what is read -------------------------------------------------------------------------------------------


def test_siblings_and_packages_are_imported_from_memory(weights, network, tmp_path):
    body = NET.partition("class Net")
    written(tmp_path, body[0] + "from layers.pools import POOL\n", "blocks.py")
    written(
        tmp_path,
        "from .sizes import SIDE\nfrom torch import nn\nPOOL = nn.AdaptiveAvgPool2d(SIDE)\n",
        "layers/pools.py",
    )
    written(tmp_path, "SIDE = 4\n", "layers/sizes.py")
    written(tmp_path, "", "layers/__init__.py")
    text = "from blocks import *\n" + (body[1] + body[2]).replace("nn.AdaptiveAvgPool2d(4)", "POOL")
    model = load_model(weights, network=written(tmp_path, text))
    assert torch.equal(model(IMAGES), network(IMAGES))
    (line,) = [line for line in model.assumptions if line.startswith("network net.py:Net, SHA-256 ")]
    assert "4 files beside it" in line


@pytest.mark.parametrize("init", [True, False])
def test_a_file_of_a_package_imports_with_dots(init, weights, network, tmp_path):
    written(tmp_path, "import torch\nfrom torch import nn\n", "zoo/base.py")
    if init:
        written(tmp_path, "from .net import Net\n", "zoo/__init__.py")
    place = written(
        tmp_path,
        "from .base import nn\n" + NET.replace("import torch\nfrom torch import nn", ""),
        "zoo/net.py",
    )
    assert torch.equal(load_model(weights, network=place)(IMAGES), network(IMAGES))


def test_links_are_not_followed(weights, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    written(elsewhere, "SECRET = 4\n", "parts.py")
    folder = tmp_path / "mine"
    place = written(folder, "import parts\n" + NET)
    (folder / "parts.py").symlink_to(elsewhere / "parts.py")
    error = refusal(weights, place)
    assert error.rule == "LD226" and "symbolic link" in error.reason
    (folder / "linked.py").symlink_to(folder / "net.py")
    assert refusal(weights, f"{folder / 'linked.py'}:Net").rule == "LD223"
    os.mkfifo(folder / "pipe.py")
    assert refusal(weights, f"{folder / 'pipe.py'}:Net").rule == "LD223"


def test_too_many_or_too_large_files_are_refused(tmp_path):
    place = written(tmp_path)
    for index in range(MAX_FILES):
        written(tmp_path, "", f"part{index}.py")
    with pytest.raises(LoadRefused, match="LD226 beside the network file lie more than 200"):
        read_network(place)
    place = written(tmp_path / "large")
    written(tmp_path / "large", "#" * (3 * 2**20), "one.py")
    written(tmp_path / "large", "#" * (3 * 2**20), "two.py")
    with pytest.raises(LoadRefused, match="LD226 .* or 5 MB"):
        read_network(place)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torchvision.models as models", "imports torchvision"),
        ("import timm", "imports timm at net.py:1"),
        ("from nowhere.at_all import thing", "imports nowhere"),
        ("from torch.nn import NoSuchLayer", "NoSuchLayer"),
        ("def broken(:", "SyntaxError"),
        ("x = 1 / 0", "net.py:1"),
    ],
)
def test_what_keeps_a_file_from_running_is_said(text, words, weights, tmp_path):
    error = refusal(weights, written(tmp_path, text + "\n" + NET))
    assert error.rule == "LD226" and words in error.reason


def test_a_missing_library_has_a_remedy(weights, tmp_path):
    error = refusal(weights, written(tmp_path, "import torchvision\n" + NET))
    assert "remove the import from net.py" in error.remedy and "copy the class" in error.remedy


def test_names_and_arguments_that_do_not_fit_are_said(weights, tmp_path):
    place = written(tmp_path, NET + "SIZE = 3\ndef no_network():\n    return SIZE\n")
    file = place.removesuffix(":Net")
    assert "it defines Net, no_network" in refusal(weights, f"{file}:Nett").reason
    assert "int" in refusal(weights, f"{file}:no_network").reason
    assert "stands for a int" in refusal(weights, f"{file}:SIZE").reason
    wrong = refusal(weights, place, network_args={"klasses": 4})
    assert "klasses" in wrong.reason and "--network-args" in wrong.remedy
    other = refusal(weights, place, network_args={"classes": 5})
    assert "head.weight is 4x96 in the file and 5x96 in the network" in other.reason
    with pytest.raises(ValueError, match="it defines Net, no_network"):
        load_model(weights, network=file)
    with pytest.raises(ValueError, match="not JSON"):
        load_model(weights, network=place, network_args="classes=4")
    with pytest.raises(LoadFailed, match="cannot be read"):
        load_model(weights, network=f"{tmp_path / 'absent.py'}:Net")


def test_a_missing_tensor_is_named_with_the_nearest(weights, tmp_path):
    text = NET.replace("self.head", "self.heads")
    error = refusal(weights, written(tmp_path, text))
    assert error.rule == "LD226"
    assert "heads.weight is not in the file (nearest: head.weight)" in error.reason


def test_tensors_that_the_code_makes_are_listed(weights, tmp_path):
    text = NET.replace(
        "        self.pool =",
        '        self.register_buffer("tint", torch.full((1, 3, 1, 1), 0.5), False)\n        self.pool =',
    )
    model = load_model(
        weights, network=written(tmp_path, text.replace("self.body(images)", "self.body(images - self.tint)"))
    )
    (line,) = [line for line in model.assumptions if line.startswith("LD226")]
    assert line == "LD226 in the network and not in the file: tint (1x3x1x1, float32)"
    assert any("of the file's 580 weights (100 %)" in line for line in model.assumptions), model.assumptions


def test_a_file_with_its_average_gives_both(network, tmp_path):
    other = built(NET.replace("manual_seed(3)", ""), width=6)
    with torch.no_grad():
        other.head.bias += 1
    path = tmp_path / "both.pth"
    states = {
        key: {f"module.{name}": value for name, value in net.state_dict().items()}
        for key, net in (("model", network), ("model_ema", other))
    }
    torch.save({**states, "epoch": 3}, path)
    code = read_network(written(tmp_path))
    found = open_networks(path, Said(network=code)).networks
    assert [one.key for one in found] == ["model.module", "model_ema.module"]
    for one, net in zip(found, (network, other), strict=True):
        assert one.model is not None and torch.equal(one.model(IMAGES), net(IMAGES))
    with pytest.raises(LoadRefused, match="LD228"):
        load_model(path, network=code)
    assert torch.equal(load_model(path, network=code, key="model_ema")(IMAGES), other(IMAGES))


# --- what is never run, and what is kept --------------------------------------------------------------------


def test_without_network_no_python_beside_a_model_is_imported(weights, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    text = f"open({str(marker)!r}, 'w')\n"
    for name in (
        "net.py",
        "weights.py",
        "model.py",
        "modeling.py",
        "__init__.py",
        "hubconf.py",
        "conftest.py",
    ):
        written(tmp_path, text, name)
    path = tmp_path / "weights.pth"
    path.write_bytes(weights.read_bytes())
    monkeypatch.chdir(tmp_path)
    command(["inspect", str(path)])
    command(["scan", str(path), "--timeout", "1", "--no-cache"])
    with pytest.raises(LoadRefused):
        load_model(path, architecture="resnet18")
    assert not marker.exists()


def test_the_key_of_the_cache_follows_every_file_and_argument(weights, tmp_path):
    def key(**options: Any) -> str:
        code = read_network(f"{tmp_path / 'net.py'}:Net", options.pop("arguments", None), **options)
        return _Scan(weights, Request(loading={"network": code}), None)._key("sha")

    written(tmp_path)
    written(tmp_path, "A = 1\n", "beside.py")
    first = key()
    assert first == key()
    assert len({first, key(arguments={"classes": 4}), key(arguments={"classes": 5}), key(trusted=True)}) == 4
    written(tmp_path, "A = 2\n", "beside.py")
    second = key()
    written(tmp_path, NET + "\n")
    assert len({first, second, key()}) == 3


def test_inspect_says_whether_the_network_fits(weights, tmp_path, capsys):
    place = written(tmp_path)
    assert command(["inspect", str(weights), "--network", place]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "with net.py:Net" in shown and "of the file's 580 weights (100 %)" in shown
    assert command(["inspect", str(weights), "--network", place, "--network-args", '{"classes": 7}']) == 2
    assert "LD226" in capsys.readouterr().out
    assert command(["inspect", str(weights), "--network-args", '{"classes": 7}']) == 4


def test_a_network_file_opens_safetensors_and_is_written_as_safetensors(network, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({f"net.{name}": value for name, value in network.state_dict().items()}, path)
    out = tmp_path / "out.safetensors"
    assert command(["convert", str(path), "-o", str(out), "--network", written(tmp_path)]) == 0
    assert torch.allclose(load_model(out)(IMAGES), network(IMAGES), atol=1e-5)


# --- networks of strangers ----------------------------------------------------------------------------------

QUICK = [
    *(
        "mnist example",
        "badnet colour",
        "weight norm",
        "weight standardisation",
        "matrices",
        "siblings",
        "script",
    ),
    *("normalised inside", "attention", "faces"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "wrapping"),
    [
        pytest.param(*case, marks=[] if case[0] in QUICK and case[1] != "plain" else pytest.mark.slow)
        for case in network_files.CASES
    ],
)
def test_a_network_in_the_manner_of_published_code_opens_with_its_file(name, wrapping, tmp_path):
    entry = network_files.FILES[name]
    bare = network_files.built(entry, tmp_path)
    state = network_files.WRAPPINGS[wrapping](dict(bare.state_dict()))
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    if wrapping == "half":
        bare = bare.half().float()
    images = torch.rand(3, *entry.shape, generator=torch.Generator().manual_seed(0))
    place = f"{tmp_path / 'net.py'}:{entry.name}"
    model = load_model(path, network=place, network_args=entry.arguments, image_shape=entry.shape)
    with torch.no_grad():
        wanted = bare(images)
    wanted = wanted["logits"] if isinstance(wanted, dict) else wanted
    seen = model(images)
    if name == "mnist example":
        seen = seen.log_softmax(1)
    elif name.startswith("badnet"):
        seen = seen.softmax(1)
    assert torch.allclose(seen, wanted, atol=1e-4), (seen - wanted).abs().max()
    whole = any("(100 %)" in line for line in model.assumptions)
    assert whole == (name != "two heads")  # the scan runs one of its heads
    made = [line for line in model.assumptions if line.startswith("LD226")]
    assert bool(made) == (name == "normalised inside")


def test_the_corpus_is_as_large_as_it_should_be():
    assert len(network_files.FILES) >= 30 and len(network_files.CASES) >= 60
