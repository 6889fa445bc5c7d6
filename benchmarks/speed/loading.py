"""What opening a file in the sandbox costs over opening it bare, and how long `inspect` takes for 100 MB.

For each format a fresh process opens one file: bare, by the reader itself with nothing around it, or through
the sandbox, server start included. Both import what they need, and both times are of the whole process. The
network is MNIST's, of WaNet, with random weights. Run it on an idle machine:
python benchmarks/speed/loading.py [--rows benchmarks/results/ours-loading-cost.jsonl]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from unhorse.benchmark.tables import Row, append_rows
from unhorse.benchmark.trials import provenance
from unhorse.models.classifier import new_classifier, save_weights

SHAPE = (1, 28, 28)
BARE = """
import sys, warnings
warnings.simplefilter("ignore")
from unhorse.checks.sniff import sniff
from unhorse.loading.reading import read_task
path = sys.argv[1]
with open(path, "rb") as file:
    options = {"format": str(sniff(file)), "names": [path], "image_shape": [1, 28, 28]}
    read_task([file], options)
"""
BARE_SAFETENSORS = (
    "import sys, safetensors.torch, unhorse.loading.formats; safetensors.torch.load_file(sys.argv[1])"
)
CONFINED = "import sys, unhorse; unhorse.load_model(sys.argv[1], image_shape=(1, 28, 28))"
INSPECT = "import sys; from unhorse.cli import run; sys.exit(run(['inspect', sys.argv[1]]))"


def written(folder: Path) -> dict[str, Path]:
    """The same network in each format that torch writes, and 100 MB of weights."""
    model = new_classifier("wanet-cnn", image_shape=SHAPE, class_names=list("0123456789"), seed=0).eval()
    network, images = model.network, torch.rand(2, *SHAPE)
    names = ("model.safetensors", "model.pt", "traced.pt", "model.pt2", "model.onnx", "big.pt")
    paths = {name: folder / name for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_weights(model, paths["model.safetensors"])
        torch.save(network.state_dict(), paths["model.pt"])
        torch.jit.trace(network, images).save(str(paths["traced.pt"]))
        torch.export.save(torch.export.export(network, (images,)), paths["model.pt2"])
        torch.onnx.export(network, (images,), str(paths["model.onnx"]), external_data=False, verbose=False)
    layers = {f"layer{index}.weight": torch.rand(2**20) for index in range(25)}
    torch.save(layers, paths["big.pt"])
    return paths


def seconds(code: str, path: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
    return time.perf_counter() - started


def rows_of(paths: dict[str, Path], rounds: int) -> list[Row]:
    """Median seconds of the bare and the confined process per file, and what confinement adds."""
    shared = {
        "table": "ours-loading-cost",
        "dataset": "1x28x28 random weights",
        "architecture": "wanet-cnn",
        "attack": "benign",
        "seed": 0,
        "n": rounds,
        **provenance(),
    }
    rows = []
    for name, path in paths.items():
        if name.startswith("big"):
            continue
        bare = BARE_SAFETENSORS if name.endswith("safetensors") else BARE
        pairs = [(seconds(bare, path), seconds(CONFINED, path)) for _ in range(rounds)]
        numbers = {
            "seconds_bare": statistics.median(first for first, _ in pairs),
            "seconds_opened": statistics.median(second for _, second in pairs),
            "seconds_added": statistics.median(second - first for first, second in pairs),
        }
        total = round(sum(first + second for first, second in pairs), 2)
        rows += [
            Row(method="open", options={"file": name}, metric=metric, value=value, seconds=total, **shared)
            for metric, value in numbers.items()
        ]
    found = [seconds(INSPECT, paths["big.pt"]) for _ in range(rounds)]
    inspected = {"metric": "seconds_inspected", "value": statistics.median(found), "seconds": sum(found)}
    rows.append(Row(method="inspect", options={"megabytes": 105}, **inspected, **shared))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="append the numbers to this file of rows")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(written(Path(folder)), options.rounds)
    for row in rows:
        print(f"{row.method:8s} {row.options}  {row.metric:18s} {row.value:.3g}")
    if options.rows:
        append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
