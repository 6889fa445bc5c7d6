"""`inspect` and `convert`: what is in a model file, and the same network in a safe format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unhorse.cli.options import (
    AS_THE_FILE_SAYS,
    COMPUTE,
    EVERY_FILE,
    TERMINAL_ONLY,
    FileOptions,
    ModelOptions,
    ReportOptions,
)
from unhorse.cli.output import check_writable, command_line, delivery, listing
from unhorse.jobs import say


def inspect(
    paths: Annotated[
        tuple[Path, ...], Parameter(help="Model files, Hugging Face folders, archives, or folders of them.")
    ],
    /,
    *,
    files: FileOptions = EVERY_FILE,
    jobs: Annotated[int, Parameter(group=COMPUTE, help="Files at a time.")] = 1,
    options: ModelOptions = AS_THE_FILE_SAYS,
    output: ReportOptions = TERMINAL_ONLY,
) -> int:
    """Look at model files without running them: format, hash, what they say, and rules they break.

    With --layers, --network, or another flag that says the network, the weights are tried in it.
    """
    from unhorse.inspection import inspect_models
    from unhorse.model_files import with_listing

    deliver = delivery(output, options.flags())
    loading = {} if options == AS_THE_FILE_SAYS else options.loading()
    found = listing(paths, files, output)
    report = inspect_models(found.models, found.looked, loading=loading, workers=jobs, command=command_line())
    return deliver(with_listing(report, found))


def convert(
    model: Path,
    /,
    *,
    output: Annotated[
        Path, Parameter(alias="-o", help="FILE.safetensors, FILE.onnx, or a folder for weights and card.")
    ],
    options: ModelOptions = AS_THE_FILE_SAYS,
) -> int:
    """Open a model file in the sandbox and write it as safetensors or ONNX, which run no code."""
    from unhorse.model_files import load, prepare, write_model

    check_writable({"output": output if output.suffix else None})
    prepare([model])
    if output.exists() and (output.is_dir() != (output.suffix == "")):
        raise ValueError(f"{output} exists: choose another name")
    opened = load(model, options.loading())
    write_model(opened.model, output)
    say(f"{model}: {opened.format}, opened {opened.opened}")
    for assumption in opened.model.assumptions:
        say(f"assumed: {assumption}")
    say(f"written: {output}; scan it with `unhorse scan {output}`")
    return 0
