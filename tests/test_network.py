"""A user's own network file: run only where it is confined, read from memory, and not believed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unhorse.cli import run as command
from unhorse.loading.formats import load_model
from unhorse.loading.network_code import read_network
from unhorse.rules import LoadRefused
from unhorse.sandbox import server
from unhorse.sandbox.confinement import Tier
from unhorse.sandbox.server import Server

NET = """
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
def weaker(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tier]:
    """All restricted processes lack something."""
    path = tmp_path_factory.mktemp("weaker") / "weaker.py"
    path.write_text(f"from unhorse.sandbox import landlock, seccomp\n{WEAKER[request.param]}\nTASKS = {{}}\n")
    running = Server(heavy=True, arguments=["--tasks", str(path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_server", lambda heavy: running)
        yield request.param
    running.close()


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
