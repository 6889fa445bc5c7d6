"""Which files of a command are models, how they are opened as its flags say, and written again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unhorse.extras import install_line

if TYPE_CHECKING:
    from unhorse.core import Classifier
    from unhorse.loading.assembly import Said
    from unhorse.loading.formats import Networks, Opened
    from unhorse.loading.listing import Listing, Skipped
    from unhorse.loading.sources import Source
    from unhorse.report import Report
    from unhorse.scanned_model import ScannedModel


def find_models(paths: Sequence[Path]) -> list[Path]:
    """The models that `paths` name: a model's folder or a file as it is, any other folder with all the models
    below it, whatever their names.
    """
    from unhorse.loading.folders import list_files

    return list_files(paths).models


def with_listing(report: Report, listing: Listing) -> Report:
    """A report with the files that were not looked at, and how many files there were of each kind."""
    from dataclasses import replace

    from unhorse.scanned_model import FileCounts

    skipped = tuple(map(_not_looked_at, listing.skipped))
    files = FileCounts(
        seen=listing.seen,
        parts=listing.parts,
        archives=listing.archives,
        excluded=listing.excluded,
        harmless=dict(listing.harmless),
        links=tuple(listing.links),
    )
    return replace(report, models=(*report.models, *skipped), files=files)


def _not_looked_at(skipped: Skipped) -> ScannedModel:
    from unhorse.rulebook import RULES
    from unhorse.rules import Finding, Severity
    from unhorse.scanned_model import ScannedModel

    more = tuple(
        Finding(
            problem.rule,
            problem.reason,
            problem.remedy,
            RULES[problem.rule].severity if problem.rule in RULES else Severity.LOW,
        )
        for problem in skipped.more
    )
    return ScannedModel(
        skipped.path,
        sha256=skipped.sha256,
        size=skipped.size,
        format=skipped.format,
        error=str(skipped.problem),
        error_rule=skipped.problem.rule,
        findings=more,
        inspected=True,
    )


def prepare(models: Sequence[Path]) -> None:
    """Starts the process that opens foreign formats, if one is there, while torch is imported here."""
    from unhorse.checks.sniff import Format, sniff
    from unhorse.rules import LoadRefused
    from unhorse.sandbox import server

    for path in models:
        try:
            foreign = (
                (path / "config.json").exists() if path.is_dir() else sniff(path) is not Format.SAFETENSORS
            )
        except (OSError, LoadRefused):
            continue  # said when it is its turn
        if foreign:
            server.warm(heavy=True)
            return


def load(path: Path, options: Mapping[str, Any]) -> Opened:
    """open_model with a command's options, `image_size` and `channels` turned into an image shape."""
    from unhorse.loading.addresses import missing
    from unhorse.loading.formats import open_model

    if (nothing := missing(path)) is not None:
        raise nothing
    return open_model(path, _said(options), progress=_told(path))


def read_networks(source: Source, options: Mapping[str, Any]) -> Networks:
    """Every network of an open file, with a command's options."""
    from unhorse.loading.formats import read

    return read(source, _said(options), progress=_told(source.path))


def _said(options: Mapping[str, Any]) -> Said:
    from unhorse.loading.assembly import Said

    given = {name: value for name, value in options.items() if value is not None}
    size, channels = given.pop("image_size", None), given.pop("channels", None)
    if size is not None:
        given["image_shape"] = (channels or 3, *size)
    return Said(**given)


def _told(path: Path) -> Callable[[str], None]:
    from unhorse.jobs import say
    from unhorse.wording import plain

    return lambda line: say(f"{path.name}: {plain(line)}")


def write_model(model: Classifier, output: Path) -> None:
    """As safetensors with the card inside, ONNX for pixels in [0, 1], or a folder of weights and card."""
    from unhorse.models.classifier import save_classifier, save_weights

    if output.suffix == ".safetensors":
        save_weights(model, output)
    elif output.suffix == ".onnx":
        _write_onnx(model, output)
    elif output.suffix:
        raise ValueError(f"{output} ends in neither .safetensors nor .onnx: choose one, or name a folder")
    else:
        save_classifier(model, output)


def _write_onnx(model: Classifier, output: Path) -> None:
    """One file, any size of batch; the normalisation is inside, so that it takes pixels in [0, 1]."""
    import warnings

    import torch

    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ValueError(f"ONNX needs a library that is not installed: {install_line('onnx')}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.rand(2, *model.image_shape),),
            str(output),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
