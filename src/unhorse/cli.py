"""The command line. Nothing heavy is imported before a command needs it: --help answers at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

Effort = Literal["quick", "standard", "deep"]
FailOn = Literal["high", "medium", "none"]

app = App(
    name="unhorse",
    help="Find Trojans (backdoors) in image classifiers. Exit codes: 0 nothing at or above --fail-on, "
    "1 finding, 2 failed, incomplete or undecided, 3 nothing scannable, 4 usage, 130 interrupted.",
    help_format="markdown",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # run() says what an interruption leaves
)
scanner_app = App(name="scanner", help="Learned scanners.")
zoo_app = App(name="zoo", help="Populations of benign and trojaned models.")
app.command(scanner_app)
app.command(zoo_app)

OUTPUT = Group("Output", sort_key=3)
MODEL = Group("What the file does not say", sort_key=2)
COMPUTE = Group("Compute", sort_key=4)


@app.command
def scan(  # noqa: PLR0913 - one parameter per flag
    paths: Annotated[
        tuple[Path, ...], Parameter(help="Model files, classifier folders, or folders of them.")
    ],
    /,
    *,
    scanner: Annotated[
        Path | None, Parameter(help="A fitted scanner (`unhorse scanner fit`) to use instead.")
    ] = None,
    reference: Annotated[
        Path | None, Parameter(help="A folder of your own benign models: gives a p-value.")
    ] = None,
    clean: Annotated[
        Path | None, Parameter(help="Clean images (folder or parquet) for the demonstration.")
    ] = None,
    effort: Annotated[Effort, Parameter(group=COMPUTE, help="How long to search.")] = "standard",
    device: Annotated[str, Parameter(group=COMPUTE)] = "auto",
    seed: Annotated[int, Parameter(group=COMPUTE)] = 0,
    jobs: Annotated[int, Parameter(group=COMPUTE, help="Models at a time.")] = 1,
    arch: Annotated[
        str, Parameter(group=MODEL, help="Architecture name; auto reads it from keys and shapes.")
    ] = "auto",
    classes: Annotated[int | None, Parameter(group=MODEL, help="Number of classes.")] = None,
    labels: Annotated[
        Path | None, Parameter(group=MODEL, help="Text file with one class name a line.")
    ] = None,
    size: Annotated[tuple[int, int] | None, Parameter(group=MODEL, help="Input height and width.")] = None,
    channels: Annotated[int | None, Parameter(group=MODEL, help="Input channels, with --size.")] = None,
    mean: Annotated[tuple[float, ...] | None, Parameter(group=MODEL, help="Normalisation mean.")] = None,
    std: Annotated[tuple[float, ...] | None, Parameter(group=MODEL, help="Normalisation deviation.")] = None,
    range: Annotated[
        tuple[float, float] | None, Parameter(group=MODEL, help="Input range, e.g. 0 255.")
    ] = None,
    html: Annotated[Path | None, Parameter(group=OUTPUT, help="Write a self-contained page.")] = None,
    json: Annotated[Path | None, Parameter(group=OUTPUT, help="Write machine-readable results.")] = None,
    fail_on: Annotated[
        FailOn, Parameter(group=OUTPUT, help="Severity that makes the exit code 1.")
    ] = "medium",
) -> int:
    """Say whether models are trojaned, with evidence; no training data needed."""
    from unhorse import report
    from unhorse.survey import Request, find_models, scan_models

    request = Request(
        scanner=scanner,
        reference=reference,
        clean=clean,
        effort=effort,
        device=device,
        seed=seed,
        loading={
            "architecture": arch,
            "num_classes": classes,
            "class_names": None if labels is None else labels.read_text(encoding="utf-8").splitlines(),
            "image_size": size,
            "channels": channels,
            "mean": mean,
            "std": std,
            "value_range": range,
        },
    )
    models = find_models(paths)
    result = scan_models(models, request, workers=jobs, command=_command())
    _show(result, html, json)
    return report.exit_code(result, fail_on)


@scanner_app.command
def fit(
    population: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    kind: Literal["set", "convolution", "transformer"] = "set",
    maps: Literal["min", "max", "both"] = "both",
    preset: Annotated[
        str | None, Parameter(help="Signature preset; the kind's own default if left out.")
    ] = None,
    epochs: int | None = None,
    seed: int = 0,
    jobs: int = 1,
) -> int:
    """Fit a scanner on the signatures of a population's `fit` split."""
    from unhorse.benchmark.signatures import population_signatures
    from unhorse.scanners.signature_scanner import SignatureScanner

    settings: dict[str, Any] = {} if preset is None else {"preset": preset}
    scanner = SignatureScanner(kind=kind, maps=maps, epochs=epochs, seed=seed, **settings)
    register, signatures = population_signatures(population, "fit", scanner.preset, workers=jobs)
    _say(f"fitting on {len(register)} models, {sum(member.trojaned for member in register)} of them trojaned")
    trojaned, targets = [member.trojaned for member in register], [member.target for member in register]
    scanner.fit(signatures, trojaned, targets, progress=_fit_progress())
    scanner.save(output)
    _say(f"scanner written to {output}: use it with `unhorse scan MODEL --scanner {output}`")
    return 0


@zoo_app.command
def build(
    spec: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    jobs: int = 2,
    scale: Annotated[float, Parameter(help="Multiplies every count.")] = 1.0,
) -> int:
    """Build a population from a TOML spec; killed and called again, it goes on."""
    from unhorse.zoo import ZooSpec
    from unhorse.zoo import build as build_zoo

    counts = build_zoo(ZooSpec.read(spec).scaled(scale), output, workers=jobs)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    return 0


@app.command
def simulate(  # noqa: PLR0913 - one parameter per flag
    attack: Annotated[
        str,
        Parameter(
            help="none, badnet, blended, badnet-plus, noise-blend-plus, image-blend-plus or clean-label."
        ),
    ],
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    data: str = "digits",
    architecture: str = "small-cnn",
    mode: Literal["single-target", "all-target", "source-target", "placebo"] = "single-target",
    target: int | None = None,
    source: int | None = None,
    rate: float | None = None,
    epochs: int = 15,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> int:
    """Train one victim, benign (`none`) or infected, and write its folder."""
    from unhorse.models.training import Recipe
    from unhorse.victims import AttackSpec, DataSpec, VictimSpec, save_victim, train_victim

    chosen = None
    if attack != "none":
        chosen = AttackSpec(kind=attack, mode=mode, target=target, source=source, rate=rate)
    recipe = Recipe(epochs=epochs, learning_rate=learning_rate, batch_size=64 if data == "digits" else 128)
    spec = VictimSpec(
        data=DataSpec(source=data), architecture=architecture, recipe=recipe, attack=chosen, seed=seed
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = output.with_name(f".{output.name}.training")
    model, made, card = train_victim(spec, checkpoint=checkpoint)
    save_victim(output, model, made, card)
    measured = ", ".join(
        f"{name} {value:.4f}" for name, value in card["metrics"].items() if value is not None
    )
    print(f"{output}: {measured}")
    return 0


@app.command
def benchmark(
    spec: Annotated[Path | None, Parameter(help="A TOML spec of benchmarks/specs.")] = None,
    /,
    *,
    work: Annotated[Path, Parameter(help="Where populations and finished jobs lie.")] = Path("runs"),
    results: Annotated[Path, Parameter(help="The folder of rows and tables.")] = Path("benchmarks"),
    jobs: int = 2,
    render: Annotated[bool, Parameter(help="Only render the tables from the rows.")] = False,
) -> int:
    """Run a benchmark spec into rows (resumable), and render the tables."""
    from unhorse.benchmark.tables import render_to

    if spec is not None and not render:
        from unhorse.benchmark.run import run_spec

        run_spec(spec, work, results / "results", workers=jobs)
    elif not render:
        raise ValueError("no spec given: name one of benchmarks/specs, or pass --render")
    render_to(results / "README.md")
    print(results / "README.md")
    return 0


@app.command
def demo(
    *,
    output: Annotated[Path, Parameter(alias="-o")] = Path("runs/demo"),
    seed: int = 0,
) -> int:
    """Train an infected and a benign digits model, scan both, and write the report."""
    from unhorse.demo import run_demo

    return run_demo(output, seed=seed, command=_command())


@app.command
def doctor() -> int:
    """Say what this installation has: versions, devices, threads, extras."""
    from unhorse.survey import environment

    for name, value in environment("auto").items():
        print(f"{name}: {value}")
    return 0


def _show(result: Any, html: Path | None, json: Path | None) -> None:
    from rich.console import Console

    from unhorse import report

    Console().print(report.to_terminal(result))
    report.save(result, html=html, json=json)
    for path in (html, json):
        if path is not None:
            _say(f"written: {path}")


def _fit_progress() -> Callable[[int, int, float], None]:
    started = spoken = time.monotonic()

    def say(done: int, total: int, loss: float) -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken >= 5 or done == total:
            spoken = now
            left = (now - started) / done * (total - done)
            _say(f"fitting: {done}/{total} epochs, validation loss {loss:.4f}, {left:.0f} s left")

    return say


def _command() -> tuple[str, ...]:
    return ("unhorse", *sys.argv[1:])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; no error of a user's making ends in a stack trace."""
    try:
        code = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        return 4
    except KeyboardInterrupt:
        _say("interrupted; what was finished is kept, call again to go on")
        return 130
    except ValueError as error:
        _say(f"error: {error}")
        return 4
    except (OSError, RuntimeError) as error:
        _say(f"error: {error}")
        return 2
    return int(code or 0)


def main() -> None:
    """The entry point of the `unhorse` command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
