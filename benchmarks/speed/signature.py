"""Speed of a signature: ours against a straightforward one, and against the machine's matrix-product rate.

ULP's modified VGG (64 filters, 988,554 parameters), 20 maps, 30 steps: 20 * 30 * 175.8e6 multiply-adds,
forward and input gradient, 0.42 TFLOP. Run it on an idle machine: python benchmarks/speed/signature.py
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from unhorse.models.classifier import new_classifier
from unhorse.scanners.optimisation import PRESETS, start_image
from unhorse.scanners.signatures import compute_signature

TERAFLOP = 20 * 30 * 175.8e6 * 2 * 2 / 1e12
REPEATS = 5


def seconds(function: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Wall times after one warm-up."""
    function()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return found


def straightforward(model: torch.nn.Module, k: int = 10) -> None:
    """fp32, minimisation then maximisation, and a Python loop over the maps after every step."""
    preset = PRESETS["paper-cifar10"]
    for sign in (1.0, -1.0):
        maps = ((start_image(model) - model.mean) / model.std).repeat(k, 1, 1, 1).requires_grad_(True)
        optimizer = torch.optim.Adam([maps], preset.learning_rate, weight_decay=preset.weight_decay)
        best: list[torch.Tensor | None] = [None] * k
        lowest = [float("inf")] * k
        for _ in range(preset.steps):
            optimizer.zero_grad()
            losses = sign * model.network(maps).diagonal()
            losses.sum().backward()
            for index in range(k):
                if losses[index].item() < lowest[index]:
                    lowest[index], best[index] = losses[index].item(), maps[index].detach().clone()
                for channel in range(maps.shape[1]):
                    maps.grad[index, channel] /= maps.grad[index, channel].norm() + 1e-8
            optimizer.step()


def product_rate(size: int = 2048) -> float:
    """The machine's bf16 matrix-product rate in TFLOP/s."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b, 10)) / 1e12


def main() -> None:
    names = tuple(str(index) for index in range(10))
    model = new_classifier(
        "ulp-vgg", image_shape=(3, 32, 32), class_names=names, std=(1 / 255,), seed=0
    ).eval()
    rate = product_rate()
    ours, theirs, fp32 = [], [], []
    for _ in range(REPEATS):  # in turn, so that a machine whose speed drifts treats all alike
        ours += seconds(lambda: compute_signature(model), 1)
        fp32 += seconds(lambda: compute_signature(model, precision="fp32"), 1)
        theirs += seconds(lambda: straightforward(model), 1)
    rate = max(rate, product_rate())
    median = statistics.median
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "seconds_ours": round(median(ours), 3),
        "seconds_ours_fp32": round(median(fp32), 3),
        "seconds_straightforward_fp32": round(median(theirs), 3),
        "speed_up": round(median(theirs) / median(ours), 2),
        "speed_up_same_precision": round(median(theirs) / median(fp32), 2),
        "bf16_product_tflops": round(rate, 3),
        "ours_tflops": round(TERAFLOP / median(ours), 3),
        "share_of_product_rate": round(TERAFLOP / median(ours) / rate, 3),
        "preset": "paper-cifar10",
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
