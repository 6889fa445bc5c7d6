"""What STRIP costs: the scores of 1000 inputs in large batches, against a loop over the inputs.

The loop classifies the 100 blends of an input as one batch, in fp32. Ours is timed in fp32 and in the
precision that it chooses for itself. All run in turn, on the MNIST network of WaNet, and the largest
difference of scores is recorded too. Random images and weights, the last layer's enlarged so that entropies
spread as those of a trained network do; --model takes a classifier folder instead. Run it on an idle machine
(or with OMP_NUM_THREADS=1 and --cpu-time on one that others share):
python benchmarks/speed/strip.py [--rows benchmarks/results/ours-strip-speed.jsonl]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unhorse.benchmark.tables import Row, append_rows
from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.core import Classifier, Dataset
from unhorse.models.classifier import load_classifier, new_classifier
from unhorse.monitors.strip import Strip, entropy

OVERLAYS = 100
ENLARGED = 60.0


class Timing(NamedTuple):
    """Seconds of each round, and the scores."""

    seconds: list[float]
    scores: Tensor


def loop(model: Classifier, overlays: Tensor, images: Tensor) -> Tensor:
    """The scores by their definition, input by input."""
    with torch.inference_mode():
        return torch.stack([-entropy(model(image + overlays)).mean() for image in images])


def untrained() -> Classifier:
    names = [str(index) for index in range(10)]
    model = new_classifier("wanet-cnn", image_shape=(1, 28, 28), class_names=names, seed=0)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(ENLARGED)
    return model


def random_images(model: Classifier, count: int) -> Dataset:
    """Noise of every contrast."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(count, *model.image_shape, generator=rng) * torch.rand(count, 1, 1, 1, generator=rng)
    return Dataset((255 * noise).to(torch.uint8), None, model.class_names)


def measure(model: Classifier, options: argparse.Namespace) -> dict[str, Timing]:
    """The methods one after the other in every round, after one short call of each."""
    clean = random_images(model, OVERLAYS + options.images)
    images = clean[OVERLAYS:].pixels(options.device)
    fp32, auto = (Strip(OVERLAYS, precision=name).fit(model, clean[:OVERLAYS]) for name in ("fp32", "auto"))
    overlays = fp32.overlays_.to(options.device).float() / 255
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "loop": lambda some: loop(model, overlays, some),
        "fp32": fp32.score,
        "auto": auto.score,
    }
    clock = time.process_time if options.cpu_time else time.perf_counter
    found = {name: Timing([], method(images[:20]).cpu()) for name, method in methods.items()}
    for _ in range(options.rounds):
        for name, method in methods.items():
            started = clock()
            scores = method(images).cpu()  # waits for the device
            found[name] = Timing([*found[name].seconds, clock() - started], scores)
    return found


def rows_of(found: dict[str, Timing], model: Classifier, options: argparse.Namespace) -> list[Row]:
    """Seconds per image of the three, and how ours compare with the loop: in time and in scores."""
    chosen = {"overlays": OVERLAYS, "threads": torch.get_num_threads(), "trained": options.model is not None}
    chosen |= {"clock": "cpu" if options.cpu_time else "wall"}
    shared = {
        "table": "ours-strip-speed",
        "dataset": "x".join(str(side) for side in model.image_shape) + " noise",
        "architecture": str(model.architecture["name"]),
        "attack": "benign",
        "seed": 0,
        "n": options.images,
        "seconds": round(sum(sum(timing.seconds) for timing in found.values()), 2),
        **provenance(),
    }
    rows = []
    for name, timing in found.items():
        method = "strip-loop" if name == "loop" else "strip"
        settings = chosen | {"precision": "fp32" if name == "loop" else name}
        numbers = {"seconds_per_image": statistics.median(timing.seconds) / options.images}
        if name != "loop":
            pairs = zip(found["loop"].seconds, timing.seconds, strict=True)
            numbers["speedup"] = statistics.median(theirs / ours for theirs, ours in pairs)
            numbers["largest_difference"] = float((timing.scores - found["loop"].scores).abs().max())
        rows += [
            Row(method=method, options=settings, metric=m, value=v, **shared) for m, v in numbers.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="append the numbers to this file of rows")
    parser.add_argument("--model", type=Path, help="a classifier folder instead of random weights")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=chosen_device())
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU seconds of all threads")
    options = parser.parse_args()
    model = untrained() if options.model is None else load_classifier(options.model)
    model.to(options.device).eval().requires_grad_(False)
    found = measure(model, options)
    print(f"{options.device}, {torch.get_num_threads()} threads, {options.images} inputs")
    print(f"deviation of the loop's scores: {float(found['loop'].scores.std()):.3f}")
    rows = rows_of(found, model, options)
    for row in rows:
        print(f"{row.method:10s} {row.options['precision']}  {row.metric:18s} {row.value:.4g}")
    if options.rows:
        append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
