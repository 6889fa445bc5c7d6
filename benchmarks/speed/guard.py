"""What a guard costs: its time per image as a ratio to the bare classifier's, and to STRIP's 100 passes.

The guarded classifier is one filter pass and one classifier pass over twice the images. STRIP (Gao et al.,
ACSAC 2019) classifies 100 blends of every image, here as one batch. All run in turn, with the same weights,
format and precision; random weights and images, since neither changes the work. Run it on an idle machine
(or with OMP_NUM_THREADS=1 and --cpu-time on one that others share):
python benchmarks/speed/guard.py [--rows benchmarks/results/ours-guard-cost.jsonl]
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unhorse.benchmark.tables import Row, append_rows
from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.core import Classifier
from unhorse.filters.networks import build_filter
from unhorse.models.classifier import new_classifier
from unhorse.models.training import autocast
from unhorse.monitors.guarded_classifier import GuardedClassifier

CASES = (
    ("preact-resnet18", "small", (3, 32, 32)),
    ("preact-resnet18", "base", (3, 32, 32)),
    ("wanet-cnn", "tiny", (1, 28, 28)),
    ("input-aware-cnn", "tiny", (1, 28, 28)),
)
BATCHES = (1, 8, 64)
BLENDS = 100
AT_LEAST = 0.03  # seconds that one timing takes: short calls are repeated


class Cost(NamedTuple):
    """Seconds per image, and the ratios of each round."""

    architecture: str
    filter: str
    shape: tuple[int, int, int]
    batch: int
    bare: float
    guarded: float
    strip: float
    to_bare: list[float]
    to_strip: list[float]


def seconds(function: Callable[[], object], options: argparse.Namespace) -> float:
    """Time of one call, averaged over as many as fill AT_LEAST."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    calls, elapsed = 0, 0.0
    synchronise(options.device)
    started = clock()
    while elapsed < AT_LEAST:
        function()
        synchronise(options.device)
        calls, elapsed = calls + 1, clock() - started
    return elapsed / calls


def keep_memory() -> None:
    """Lets glibc reuse what was freed: by default every tensor above 32 MB is mapped and zeroed anew."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL("libc.so.6")
    assert libc.mallopt(mmap_threshold, 1 << 30)
    assert libc.mallopt(trim_threshold, (1 << 31) - 1)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def strip(model: Classifier, image: Tensor, overlays: Tensor) -> Tensor:
    """Mean entropy of the classes of one image (1, c, h, w) under blends."""
    probabilities = model((image + overlays) / 2).softmax(1)
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(1).mean()


def measure(case: tuple[str, str, tuple[int, int, int]], options: argparse.Namespace) -> list[Cost]:
    """One cost per batch size; every round times the three methods one after the other."""
    architecture, size, shape = case
    device, layout = options.device, torch.channels_last if options.channels_last else torch.contiguous_format
    names = [str(index) for index in range(10)]
    model = new_classifier(architecture, image_shape=shape, class_names=names, seed=0)
    guarded = GuardedClassifier(model, build_filter(size, shape), threshold=0.0, policy="hold")
    guarded.to(device).eval().requires_grad_(False).to(memory_format=layout)
    overlays = torch.rand(BLENDS, *shape, device=device).contiguous(memory_format=layout)
    costs = []
    with torch.inference_mode(), autocast(device, options.bf16):
        for batch in BATCHES:
            images = torch.rand(batch, *shape, device=device).contiguous(memory_format=layout)
            methods: tuple[Callable[[], object], ...] = (
                lambda images=images: model(images),
                lambda images=images: guarded(images),
                lambda image=images[:1]: strip(model, image, overlays),
            )
            for method in methods:
                method()
            rounds = [[seconds(method, options) for method in methods] for _ in range(options.rounds)]
            per_image = [(bare / batch, ours / batch, theirs) for bare, ours, theirs in rounds]
            middle = (statistics.median(column) for column in zip(*per_image, strict=True))
            to_bare = [ours / bare for bare, ours, _ in per_image]
            to_strip = [ours / theirs for _, ours, theirs in per_image]
            costs.append(Cost(architecture, size, shape, batch, *middle, to_bare, to_strip))
    return costs


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by order statistics."""
    ordered, reach = sorted(values), 0.98 * len(values) ** 0.5
    low = max(0, int(len(values) / 2 - reach))
    return ordered[low], ordered[-1 - low]


def rows_of(cost: Cost, options: argparse.Namespace, origin: dict[str, object], elapsed: float) -> list[Row]:
    """Two ratios and three times."""
    chosen = {"filter": cost.filter, "batch": cost.batch, "threads": torch.get_num_threads()}
    chosen |= {"precision": "bf16" if options.bf16 else "fp32", "channels_last": options.channels_last}
    chosen |= {"clock": "cpu" if options.cpu_time else "wall", "keep_memory": options.keep_memory}
    shared = {
        "table": "ours-guard-cost",
        "dataset": "x".join(str(side) for side in cost.shape) + " noise",
        "architecture": cost.architecture,
        "attack": "benign",
        "seed": 0,
        "n": options.rounds,
        "seconds": round(elapsed, 2),
        **origin,
    }
    found = []
    for against, ratios in (("bare", cost.to_bare), ("strip", cost.to_strip)):
        found.append(
            Row(
                **shared,
                method="guard",
                options=chosen | {"against": against},
                metric="seconds_per_image_ratio",
                value=statistics.median(ratios),
                ci95=median_interval(ratios),
            )
        )
    for method, value in (("none", cost.bare), ("guard", cost.guarded), ("strip", cost.strip)):
        found.append(Row(**shared, method=method, options=chosen, metric="seconds_per_image", value=value))
    return found


def line_of(cost: Cost) -> str:
    """A line of the printed table, times in milliseconds per image."""
    times = "".join(f"{1000 * value:8.3f}  " for value in (cost.bare, cost.guarded, cost.strip))
    ratios = []
    for values in (cost.to_bare, cost.to_strip):
        low, high = median_interval(values)
        ratios.append(f"{statistics.median(values):.3f} [{low:.3f}, {high:.3f}]")
    return f"{cost.architecture:16s} {cost.filter:6s} {cost.batch:5d} {times}{'  '.join(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="append the numbers to this file of rows")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", type=torch.device, default=chosen_device())
    parser.add_argument("--bf16", action="store_true", help="autocast all three to bf16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU seconds of all threads")
    parser.add_argument("--keep-memory", action="store_true", help="let glibc reuse freed tensors (Linux)")
    parser.add_argument("--only", choices=sorted({size for _, size, _ in CASES}), help="only this filter")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.keep_memory:
        keep_memory()
    print(f"{options.device}, {torch.get_num_threads()} threads; medians of {options.rounds} rounds [95 %]")
    print("classifier       filter batch  bare ms  guard ms  strip ms  guard / bare        guard / strip")
    for case in CASES:
        if options.only not in (None, case[1]):
            continue
        started = time.monotonic()
        costs = measure(case, options)
        for cost in costs:
            print(line_of(cost), flush=True)
        if options.rows:
            elapsed = time.monotonic() - started
            rows = [row for cost in costs for row in rows_of(cost, options, provenance(), elapsed)]
            append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
