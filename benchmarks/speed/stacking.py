"""What stacking is worth: many models of one architecture at once against one after the other, in one run.

Three things are measured, each per model: `step` (forward, backward and Adam on a batch in memory; there
torch.func's vmap over the weights is a third method, beside the grouped convolutions that unhorse uses),
`training` (train_victims against train_victim, data, poison and measuring included) and `signatures`.
One by one is measured on --alone models per round. The methods take turns, every other round backwards.
Run it on an idle machine (or with --cpu-time on one that others share):
python benchmarks/speed/stacking.py [--architecture ulp-vgg --options '{"width": 12}' --size 32]
    [--models 4 16 64] [--what step training signatures] [--rows benchmarks/results/ours-stacking-speed.jsonl]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional

from unhorse.benchmark.rows import Row, append_rows
from unhorse.benchmark.trials import chosen_device, provenance
from unhorse.core import Classifier
from unhorse.datasets import load_dataset
from unhorse.models.classifier import new_classifier
from unhorse.models.stacking import StackedClassifier
from unhorse.models.training import Recipe, autocast, bf16_pays, optimizer_of
from unhorse.scanners.signatures import compute_signature
from unhorse.scanners.stacked_signatures import stacked_signatures
from unhorse.victims import AttackSpec, DataSpec, VictimSpec, train_victim, train_victims

Work = dict[tuple[str, int], Callable[[], object]]
"""What to time by (method, number of models that it treats)."""


def victims(options: argparse.Namespace, count: int) -> list[VictimSpec]:
    """Half of them benign, half with a patch."""
    data = DataSpec(source=options.data, images=options.images, test_images=options.test_images)
    if options.size:
        data = data.model_copy(update={"size": (options.size, options.size)})
    same = {"data": data, "architecture": options.architecture, "options": json.loads(options.options)}
    same |= {"recipe": Recipe(epochs=options.epochs, precision=options.precision)}
    badnet = AttackSpec(kind="badnet")
    return [
        VictimSpec(**same, attack=badnet if index >= count // 2 else None, seed=index)
        for index in range(count)
    ]


def classifiers(options: argparse.Namespace, count: int) -> list[Classifier]:
    """Untrained ones."""
    size = (options.size, options.size) if options.size else None
    data = load_dataset(options.data, "test", size=size)
    return [
        new_classifier(
            options.architecture,
            image_shape=data.image_shape,
            class_names=data.class_names,
            options=json.loads(options.options),
            seed=seed,
        ).to(options.device)
        for seed in range(count)
    ]


def training(options: argparse.Namespace) -> Work:
    """train_victims against train_victim."""
    specs = victims(options, max(options.models + [options.alone]))
    work: Work = {
        ("one by one", options.alone): lambda: [
            train_victim(spec, device=options.device) for spec in specs[-options.alone :]
        ]
    }
    for count in options.models:
        work["grouped", count] = lambda count=count: train_victims(specs[-count:], device=options.device)
    return work


def signatures(options: argparse.Namespace) -> Work:
    """stacked_signatures against compute_signature."""
    models = [model.eval() for model in classifiers(options, max(options.models + [options.alone]))]
    settings = {"precision": options.precision}
    work: Work = {
        ("one by one", options.alone): lambda: [
            compute_signature(model, options.preset, **settings) for model in models[: options.alone]
        ]
    }
    for count in options.models:
        work["grouped", count] = lambda count=count: stacked_signatures(
            models[:count], options.preset, **settings
        )
    return work


def step(options: argparse.Namespace) -> Work:
    """The network and the optimizer alone, on one batch that is there."""
    models = classifiers(options, max(options.models + [options.alone]))
    low = bf16_pays(models[0], options.device) if options.precision == "auto" else options.precision == "bf16"
    rng = torch.Generator().manual_seed(0)
    shape = (Recipe().batch_size, len(models), *models[0].image_shape)
    images = torch.rand(shape, generator=rng).to(options.device)
    labels = torch.randint(models[0].num_classes, shape[:2], generator=rng).to(options.device)
    alone = [
        _single(model, images[:, index].contiguous(), labels[:, index], low, options.steps)
        for index, model in enumerate(models[: options.alone])
    ]
    work: Work = {("one by one", options.alone): lambda: [each() for each in alone]}
    for count in options.models:
        batch = images[:, :count].contiguous(), labels[:, :count].contiguous()
        for layout in (torch.contiguous_format, torch.channels_last) if low else (torch.contiguous_format,):
            name = "grouped, channels last" if layout is torch.channels_last else "grouped"
            work[name, count] = _grouped(models[:count], batch, low, options.steps, layout)
        if not (low and any(isinstance(layer, nn.BatchNorm2d) for layer in models[0].modules())):
            # vmap's batch_norm takes no bf16 images beside fp32 statistics
            work["torch.func", count] = _functional(models[:count], batch, low, options.steps)
    return work


def _single(model: Classifier, images: Tensor, labels: Tensor, low: bool, steps: int) -> Callable[[], None]:
    model = copy.deepcopy(model).train()
    if low:
        model.to(memory_format=torch.channels_last)
    return _stepping(model, images, labels, low, steps)


def _grouped(
    models: Sequence[Classifier],
    batch: tuple[Tensor, Tensor],
    low: bool,
    steps: int,
    layout: torch.memory_format,
) -> Callable[[], None]:
    images, labels = batch
    stack = StackedClassifier(models).train().to(memory_format=layout)
    return _stepping(stack, images.flatten(0, 1), labels.flatten(), low, steps)


def _stepping(
    network: nn.Module, images: Tensor, labels: Tensor, low: bool, steps: int
) -> Callable[[], None]:
    optimizer = optimizer_of(network, Recipe(), fused=images.is_cuda or None)

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast(images.device, low):
                logits = network(images)
            functional.cross_entropy(logits, labels, reduction="sum").backward()
            optimizer.step()

    return run


def _functional(
    models: Sequence[Classifier], batch: tuple[Tensor, Tensor], low: bool, steps: int
) -> Callable[[], None]:
    images, labels = batch
    single = copy.deepcopy(models[0]).train()
    weights, buffers = stack_module_state([copy.deepcopy(model).train() for model in models])
    optimizer = torch.optim.Adam(list(weights.values()), Recipe().learning_rate, fused=images.is_cuda or None)

    def loss(weights: dict, buffers: dict, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(images.device, low):
            logits = functional_call(single, (weights, buffers), (images,))
        return functional.cross_entropy(logits, labels, reduction="sum")

    gradients = vmap(grad(loss), in_dims=(0, 0, 1, 1), randomness="different")

    def run() -> None:
        for _ in range(steps):
            with torch.no_grad():
                found = gradients(weights, buffers, images, labels)
            for name, weight in weights.items():
                weight.grad = found[name]
            optimizer.step()

    return run


WHAT = {"step": step, "training": training, "signatures": signatures}


def measured(work: Work, options: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Seconds per model of each method in each round, after one warm-up."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    found: dict[tuple[str, int], list[float]] = {method: [] for method in work}
    for turn in range(options.rounds + 1):
        for method in list(work)[:: -1 if turn % 2 else 1]:
            started = clock()
            work[method]()
            if options.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                found[method].append((clock() - started) / method[1])
    return found


def rows_of(
    what: str, found: dict[tuple[str, int], list[float]], options: argparse.Namespace, elapsed: float
) -> list[Row]:
    """Speed of each method, and what it is worth against one by one in the same round."""
    shared = {
        "table": "ours-stacking-speed",
        "dataset": Path(options.data).name,
        "architecture": options.architecture,
        "attack": "badnet" if what == "training" else "benign",
        "seed": 0,
        "n": options.rounds,
        "seconds": round(elapsed, 2),
        **provenance(),
    }
    settings = {"threads": torch.get_num_threads(), "clock": "cpu" if options.cpu_time else "wall"}
    settings |= {
        "what": what,
        "precision": options.precision,
        "side": options.size,
        **json.loads(options.options),
    }
    if what == "training":
        settings |= {"epochs": options.epochs, "images": options.images}
    elif what == "signatures":
        settings |= {"preset": options.preset}
    slow = found["one by one", options.alone]
    rows = []
    for (name, count), seconds in found.items():
        chosen = settings | {"models": count}
        unit, scale = ("steps_per_second", options.steps) if what == "step" else ("models_per_minute", 60)
        speed = scale / statistics.median(seconds)
        rows.append(Row(**shared, method=name, options=chosen, metric=unit, value=speed))
        if name != "one by one":
            ratios = [alone / each for alone, each in zip(slow, seconds, strict=True)]
            value, ends = statistics.median(ratios), (min(ratios), max(ratios))
            rows.append(Row(**shared, method=name, options=chosen, metric="speed_up", value=value, ci95=ends))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="append the numbers to this file of rows")
    parser.add_argument("--what", nargs="+", choices=list(WHAT), default=list(WHAT))
    parser.add_argument("--models", nargs="+", type=int, default=[4, 16], help="sizes of stacks")
    parser.add_argument("--alone", type=int, default=4, help="models that one by one is measured on")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round, for `step`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--architecture", default="small-cnn")
    parser.add_argument("--options", default="{}", help="the architecture's, as JSON")
    parser.add_argument("--data", default="digits", help="digits, or a folder")
    parser.add_argument("--size", type=int, default=28, help="side of the images; 0: as they are")
    parser.add_argument("--images", type=int, help="images that each model trains on; all without")
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--preset", default="paper-cifar10")
    parser.add_argument("--device", type=torch.device, default=chosen_device())
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="count the CPU seconds of all threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for what in options.what:
        started = time.monotonic()
        found = measured(WHAT[what](options), options)
        rows = rows_of(what, found, options, time.monotonic() - started)
        for row in rows:
            ends = "" if row.ci95 is None else f" [{row.ci95[0]:.2f}, {row.ci95[1]:.2f}]"
            name = f"{what:10s} {row.method:24s} x{row.options['models']:<4}"
            print(f"{name} {row.metric:18s} {row.value:9.2f}{ends}")
        if options.rows:
            append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
