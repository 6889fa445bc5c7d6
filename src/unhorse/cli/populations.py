"""`simulate`, `zoo` and `benchmark`: victims, populations of them, and the tables they fill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from unhorse.cli.options import TWO_JOBS_HERE, EngineOptions

AttackName = Literal[
    "none",
    "badnet",
    "blended",
    "badnet-plus",
    "noise-blend-plus",
    "image-blend-plus",
    "clean-label",
    "input-aware",
    "wanet",
]
"""The keys of victims.ATTACKS, which a help text must not import, and "none"."""

zoo_app = App(name="zoo", help="Populations of benign and trojaned models.")


@zoo_app.command
def build(
    spec: Path,
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
    scale: Annotated[float, Parameter(help="Multiplies every count.")] = 1.0,
    stack: Annotated[
        int | None, Parameter(help="Models trained at once as one; 16 on an accelerator if left out, else 1.")
    ] = None,
    engine: EngineOptions = TWO_JOBS_HERE,
) -> int:
    """Build a population, or a family of them, from a TOML spec; killed and called again, on whatever engine,
    it goes on.
    """
    from unhorse.populations import read_populations
    from unhorse.zoo import build_all

    populations = {folder: each.scaled(scale) for folder, each in read_populations(spec, output).items()}
    with engine.open() as workers:
        for folder, counts in build_all(populations, workers=workers, stack=stack).items():
            print(f"{folder}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0


def simulate(  # noqa: PLR0913 - one parameter per flag
    attack: AttackName,
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


def benchmark(
    spec: Annotated[Path | None, Parameter(help="A TOML spec of benchmarks/specs.")] = None,
    /,
    *,
    work: Annotated[Path, Parameter(help="Where populations and finished jobs lie.")] = Path("runs"),
    results: Annotated[Path, Parameter(help="The folder of rows and tables.")] = Path("benchmarks"),
    victims: Annotated[
        Path | None, Parameter(help="Another victims spec than the one that a table of filters names.")
    ] = None,
    engine: EngineOptions = TWO_JOBS_HERE,
    render: Annotated[bool, Parameter(help="Only render the tables from the rows.")] = False,
) -> int:
    """Run a benchmark spec into rows (resumable), and render the tables."""
    from unhorse.benchmark.tables import render_to

    if spec is not None and not render:
        from unhorse.benchmark.run import run_spec

        with engine.open() as workers:
            run_spec(spec, work, results / "results", victims=victims, workers=workers)
    elif not render:
        raise ValueError("no spec given: name one of benchmarks/specs, or pass --render")
    render_to(results)
    print(results / "README.md")
    return 0
