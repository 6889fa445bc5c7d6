"""What batching is worth to Neural Cleanse: a class-by-class fp32 loop against all classes at once.

Both search the same triggers with the same draws, prices and stopping rule. `class_by_class` is written as
one would write it for a single class, with torch's own gradients; it is the twin that the tests hold
the batched search against. MNIST's wanet-cnn, ten classes. Without --victim its weights are random, and no
class stops early. Run it on an idle machine (or with --cpu-time on one that others share):
python benchmarks/speed/neural_cleanse.py [--victim FOLDER --data FOLDER]
    [--rows benchmarks/results/ours-neural-cleanse-speed.jsonl]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from unhorse.benchmark.tables import Row, append_rows
from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.core import Classifier, Images
from unhorse.models.classifier import load_classifier, new_classifier
from unhorse.scanners.neural_cleanse import NeuralCleanse
from unhorse.scanners.optimisation import Adam, frozen
from unhorse.scanners.trigger_inversion import invert


class Found(NamedTuple):
    """The trigger of one class: mask (1, h, w), pattern (c, h, w), success at it (0: never good enough)."""

    mask: Tensor
    pattern: Tensor
    reached: float
    steps: int


def class_by_class(
    model: Classifier, images: Images, settings: NeuralCleanse, seed: int, targets: Sequence[int]
) -> list[Found]:
    """One class after the other, in fp32, weights frozen: the plain reading of the paper's search."""
    with frozen(model, "fp32"):
        return [_one_class(model, images, settings, seed, target) for target in targets]


def _one_class(model: Classifier, images: Images, settings: NeuralCleanse, seed: int, target: int) -> Found:
    rng, size = torch.Generator().manual_seed(seed), settings.batch_size
    variables = _start(model, settings, rng, target)
    optimizer = Adam(variables, settings.learning_rate, betas=(0.5, 0.9))
    samples, price = settings.samples_per_step, Price(settings)
    per_step = math.ceil(len(images) / size) if samples is None else samples // size
    order: list[int] = []
    best, reached, steps = [squash(each).detach() for each in variables], 0.0, 0
    done = False
    while steps < settings.steps and not done:
        steps, hits, norms = steps + 1, 0, 0.0
        for _ in range(per_step):
            while len(order) < size:
                order += torch.randperm(len(images), generator=rng).tolist()
            batch, order = images[order[:size]], order[size:]
            mask, pattern = (squash(each) for each in variables)
            logits = model((1 - mask) * batch + mask * pattern)
            wanted = torch.full((len(batch),), target, device=images.device)
            norm = mask.abs().sum() if settings.norm == "l1" else mask.norm()
            loss = functional.cross_entropy(logits, wanted) + price.cost * norm
            optimizer.step(torch.autograd.grad(loss, variables))
            hits += int((logits.argmax(1) == wanted).sum())
            norms += norm.item()
        improved, done = price.look(hits / (per_step * size), norms / per_step)
        if improved or not reached:
            best = [squash(each).detach() for each in variables]
        if improved:
            reached = hits / (per_step * size)
    return Found(best[0], best[1], reached, steps)


def _start(model: Classifier, settings: NeuralCleanse, rng: torch.Generator, target: int) -> list[Tensor]:
    """Mask and pattern of one class in tanh space, as drawn for all of them."""
    channels, height, width = model.image_shape
    shape = (model.num_classes, 1 + channels, height, width)
    drawn = torch.rand(shape, generator=rng, dtype=torch.float64)[target]
    start = torch.atanh((drawn - 0.5) * (2 - 1e-7)) if settings.start == "uniform" else torch.ones_like(drawn)
    parts = start.float().to(model.mean.device).split([1, channels])
    return [part.clone().requires_grad_(True) for part in parts]


def squash(variable: Tensor) -> Tensor:
    return torch.tanh(variable) / (2 - 1e-7) + 0.5


class Price:
    """The price of one mask and when to stop, step by step."""

    def __init__(self, settings: NeuralCleanse) -> None:
        self.settings = settings
        self.cost = settings.cost if settings.cost_from_start else 0.0
        self.best, self.still = math.inf, 0
        self.free, self.ups, self.downs = 0, 0, 0
        self.moved: set[str] = set()

    def look(self, success: float, norm: float) -> tuple[bool, bool]:
        """Whether this step's trigger is the best so far, and whether the search is over."""
        settings = self.settings
        good = success >= settings.success
        improved = good and norm < self.best
        if improved:
            self.best, self.still = norm, 0
        elif self.best < math.inf:
            self.still += 1
        if settings.early_stop and len(self.moved) == 2 and self.still >= settings.early_stop_patience:
            return improved, True
        if self.cost == 0 and good:
            self.free += 1
            if self.free >= settings.patience:
                self.cost, self.ups, self.moved = settings.cost, 0, set()
        else:
            self.free = 0
        self.ups, self.downs = (self.ups + 1, 0) if good else (0, self.downs + 1)
        if self.ups >= settings.patience:
            self.ups, self.cost = 0, self.cost * settings.multiplier
            self.moved.add("up")
        elif self.downs >= settings.patience:
            self.downs, self.cost = 0, self.cost / settings.multiplier**1.5
            self.moved.add("down")
        return improved, False


def measured(options: argparse.Namespace) -> tuple[dict[str, list[float]], int]:
    """Seconds of each method in each round, the methods in turn, and the class-steps of the loop."""
    model, images = _case(options)
    settings = NeuralCleanse(steps=options.steps, samples_per_step=options.samples)
    every = range(model.num_classes)
    clock = time.process_time if options.cpu_time else time.perf_counter
    steps = 0

    def loop() -> None:
        nonlocal steps
        steps = sum(found.steps for found in class_by_class(model, images, settings, 0, every))

    methods: dict[str, Callable[[], object]] = {
        "class by class": loop,
        "batched, fp32": lambda: invert(model, images, replace(settings, precision="fp32"), 0),
        "batched": lambda: invert(model, images, settings, 0),
    }
    short = replace(settings, steps=1, samples_per_step=64)
    class_by_class(model, images, short, 0, [0])  # warms up
    invert(model, images, short, 0)
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, method in methods.items():
            started = clock()
            method()
            if images.is_cuda:
                torch.cuda.synchronize()
            found[name].append(clock() - started)
    return found, steps


def _case(options: argparse.Namespace) -> tuple[Classifier, Images]:
    if options.victim is None:
        names = [str(index) for index in range(10)]
        model = new_classifier("wanet-cnn", image_shape=(1, 28, 28), class_names=names, seed=0)
        images = torch.rand(2000, *model.image_shape, generator=torch.Generator().manual_seed(0))
        return model.to(options.device), images.to(options.device)
    from unhorse.datasets import load_dataset, subset

    model = load_classifier(options.victim)
    data = subset(load_dataset(str(options.data), "test"), 2000, seed=0)
    return model.to(options.device), data.pixels(options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="append the numbers to this file of rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=320, help="images of a step")
    parser.add_argument("--victim", type=Path, help="folder of an MNIST classifier; random weights without")
    parser.add_argument("--data", type=Path, help="folder of MNIST, with --victim")
    parser.add_argument("--device", type=torch.device, default=chosen_device())
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU seconds of all threads")
    options = parser.parse_args()
    started = time.monotonic()
    found, steps = measured(options)
    ratios = {
        name: [slow / fast for slow, fast in zip(found["class by class"], found[name], strict=True)]
        for name in ("batched", "batched, fp32")
    }
    print(
        f"{options.device}, {torch.get_num_threads()} threads, {steps} steps of classes, "
        f"{options.rounds} rounds"
    )
    for name, seconds in found.items():
        print(f"{name:16s} {statistics.median(seconds):8.2f} s")
    for name, values in ratios.items():
        print(
            f"class by class / {name}: {statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
        )
    if options.rows:
        append_rows(options.rows, _rows(found, ratios, steps, options, time.monotonic() - started))


def _rows(
    found: dict[str, list[float]],
    ratios: dict[str, list[float]],
    steps: int,
    options: argparse.Namespace,
    elapsed: float,
) -> list[Row]:
    """Two ratios and three times."""
    shared = {
        "table": "ours-neural-cleanse-speed",
        "dataset": "28x28 noise" if options.victim is None else "mnist",
        "architecture": "wanet-cnn",
        "attack": "benign" if options.victim is None else options.victim.name,
        "seed": 0,
        "n": options.rounds,
        "seconds": round(elapsed, 2),
        **provenance(),
    }
    chosen = {"steps": options.steps, "samples_per_step": options.samples, "class_steps": steps}
    chosen |= {"threads": torch.get_num_threads(), "clock": "cpu" if options.cpu_time else "wall"}
    rows = []
    for name, values in ratios.items():
        against = chosen | {
            "against": "class by class, fp32",
            "precision": "fp32" if "fp32" in name else "auto",
        }
        value, ends = statistics.median(values), (min(values), max(values))
        row = Row(
            **shared, method="neural-cleanse", options=against, metric="speed_up", value=value, ci95=ends
        )
        rows.append(row)
    for name, seconds in found.items():
        precision = {"batched": "auto"}.get(name, "fp32")
        options_of_row = chosen | {"precision": precision, "loop": name == "class by class"}
        value = statistics.median(seconds)
        row = Row(
            **shared, method="neural-cleanse", options=options_of_row, metric="seconds_per_model", value=value
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
