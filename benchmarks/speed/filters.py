"""What fitting a filter costs: seconds per image and epoch of VIF and AIF, and AIF's as a ratio to VIF's.

One epoch over random images after the other, VIF and AIF in turn; random weights and images, since neither
changes the work. Run it on an idle machine:
python benchmarks/speed/filters.py [--rows benchmarks/results/ours-filter-cost.jsonl]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from unhorse.benchmark.tables import Row, append_rows
from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.core import Classifier, Dataset
from unhorse.filters.registry import FILTERS
from unhorse.models.classifier import new_classifier

CASES = (
    ("preact-resnet18", "small", (3, 32, 32), 128),
    ("wanet-cnn", "tiny", (1, 28, 28), 1024),
    ("input-aware-cnn", "tiny", (1, 28, 28), 1024),
)


def epoch_seconds(name: str, network: str, model: Classifier, clean: Dataset, epochs: int) -> list[float]:
    """Seconds per image of each epoch but the first."""
    stamps: list[float] = []
    fitted = FILTERS[name](network=network, epochs=epochs, held_out=0.0, batch_size=64)
    fitted.fit(model, clean, on_epoch=lambda _: stamps.append(time.perf_counter()))
    return [(after - before) / len(clean) for before, after in zip(stamps, stamps[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="append rows to this file")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    origin, rows = provenance(), []
    for architecture, network, shape, count in CASES:
        started = time.monotonic()
        names = tuple(str(label) for label in range(10))
        model = new_classifier(architecture, image_shape=shape, class_names=names, seed=0).to(chosen_device())
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, *shape), generator=rng).to(torch.uint8)
        clean = Dataset(images, torch.randint(10, (count,), generator=rng), names)
        cost: dict[str, list[float]] = {"vif": [], "aif": []}
        for _ in range(options.rounds):
            for name in cost:
                cost[name] += epoch_seconds(name, network, model, clean, 3)
        best = {name: min(values) for name, values in cost.items()}
        ratio = statistics.median(cost["aif"]) / statistics.median(cost["vif"])
        print(f"{network} before {architecture}: VIF {1e3 * best['vif']:.2f}, AIF {1e3 * best['aif']:.2f} ms")
        print(f"  AIF / VIF: {best['aif'] / best['vif']:.2f} (medians {ratio:.2f})")
        shared = {
            "table": "ours-filter-cost",
            "dataset": "random",
            "architecture": architecture,
            "options": {"network": network, "batch": 64},
            "attack": "benign",
            "seed": 0,
            "n": count,
            "seconds": round(time.monotonic() - started, 2),
            **origin,
        }
        rows.append(Row(method="aif", metric="step_ratio", value=ratio, **shared))
        rows += [Row(method=m, metric="seconds_per_image", value=v, **shared) for m, v in best.items()]
    if options.rows:
        append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
