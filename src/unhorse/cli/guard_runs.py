"""A guard fitted, measured and described: what `unhorse guard` and the demonstration do with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from unhorse.cli.clean_images import ImageSource, class_index, fingerprints
from unhorse.cli.output import epochs_progress
from unhorse.core import Classifier, Dataset, Exhibit, ImageGrid
from unhorse.filters.fitting import FilterEpoch
from unhorse.filters.registry import NETWORK_FILTERS, filter_name
from unhorse.guard_report import MEASURES, Estimate, GuardedModel
from unhorse.inputs import scaled
from unhorse.models.classifier import weights_hash
from unhorse.monitors.evidence import evidence
from unhorse.monitors.guard import Guard, evaluate
from unhorse.monitors.guard_storage import GUARD_FILE
from unhorse.monitors.guarded_classifier import Policy
from unhorse.monitors.rates import Evaluation
from unhorse.rates import TrojanImages
from unhorse.report import Report
from unhorse.survey import environment
from unhorse.victims import load_victim, trojan_images

RECORD_FILE = "record.json"
EXPORT_FILE = "guard.pt2"
CALIBRATION_SHARE = 0.3
STEPS = 400
SHOWN = 10
FEW, FEW_TO_FIT = 100, 1000


class Record(BaseModel):
    """record.json beside guard.json: what a guard was fitted on, so that it is not judged by the same images.

    `images` are the fingerprints of all its images, those of the calibration among them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["unhorse-guard-record-1"] = "unhorse-guard-record-1"
    model: str
    clean: str
    labelled: bool
    fitted_on: int
    images: tuple[str, ...]


@dataclass(frozen=True)
class FitRequest:
    """How a guard is fitted. With `epochs` None there are as many as the filter's own, or more where images
    are few, for STEPS steps. `mask_norm` is AIF's: the largest trigger that it prepares for.
    """

    filter: str = "aif"
    network: str = "auto"
    epochs: int | None = None
    fpr: float | None = 0.05
    policy: Policy = "hold"
    seed: int = 0
    mask_norm: float | None = None

    def make_filter(self, images: int) -> Any:
        """The unfitted filter, for that many clean images."""
        chosen: dict[str, Any] = {"network": self.network, "seed": self.seed}
        if self.mask_norm is not None:
            if self.filter != "aif":
                raise ValueError(f"--mask-norm belongs to --filter aif, and {self.filter} draws no masks")
            if not 0 < self.mask_norm < math.inf:
                raise ValueError(f"--mask-norm is {self.mask_norm:g}: give a number of pixels above 0")
            chosen["mask_norm"] = self.mask_norm
        made = NETWORK_FILTERS[self.filter](**chosen)
        fitting = images * (1 - CALIBRATION_SHARE) * (1 - made.held_out)
        steps = max(1, math.ceil(fitting / made.batch_size))
        enough = max(made.epochs, math.ceil(STEPS / steps))
        return replace(made, epochs=enough if self.epochs is None else self.epochs)


def check_folder(folder: Path) -> None:
    """Refuses, before anything is fitted, a folder that is in use for something else."""
    if folder.exists() and not (folder / GUARD_FILE).is_file():
        raise ValueError(f"{folder} exists and is not a guard: choose another name")


def fit_guard(
    model: Classifier, clean: Dataset, request: FitRequest, folder: Path, *, source: str, path: Path
) -> Guard:
    """Fits a guard and writes it to `folder`; interrupted and called again, it goes on after the last epoch.

    `source` and `path` say where the images and the model came from.
    """
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    used, made = fingerprints(clean), request.make_filter(len(clean))
    labels = [] if clean.labels is None else clean.labels.tolist()
    identity = hashlib.sha256(repr((weights_hash(model), used, labels, made)).encode()).hexdigest()[:12]
    step = epochs_progress(f"fitting {request.filter}")

    def on_epoch(epoch: FilterEpoch) -> None:
        words = f"loss {epoch.loss:.3f}"
        step(epoch.epoch + 1, epoch.epochs, f"{epoch.stage}, {words}" if epoch.stage else words)

    guard = Guard.fit(
        model,
        made,
        clean,
        fpr=request.fpr,
        policy=request.policy,
        calibration_share=CALIBRATION_SHARE,
        seed=request.seed,
        checkpoint=folder.with_name(f".{folder.name}.{identity}.fitting"),
        on_epoch=on_epoch,
    )
    guard.save(folder)
    assert guard.calibration_ is not None
    record = Record(
        model=str(path),
        clean=source,
        labelled=clean.labels is not None,
        fitted_on=len(clean) - guard.calibration_.n,
        images=tuple(used),
    )
    (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return guard


def export(guard: Guard, folder: Path) -> Path:
    """The guarded classifier as one program for any batch size: load it with torch.export.load."""
    example = torch.zeros(2, *guard.model.image_shape, device=guard.model.mean.device)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(guard.module(), (example,), dynamic_shapes=({0: batch},))
    path = folder / EXPORT_FILE
    torch.export.save(program, path)
    return path


def warnings_of(request: FitRequest, images: int) -> tuple[str, ...]:
    """What clean images do not show: on few of them a plain autoencoder can learn to copy the trigger."""
    if request.filter == "aif" or images >= FEW_TO_FIT:
        return ()
    return (
        f"{request.filter} fitted on few images ({images}) may let a trigger pass though clean images look "
        "well: measure it on Trojan images, or fit with --filter aif",
    )


def read_record(folder: Path) -> Record | None:
    """What the guard of a folder was fitted on; None where that was not kept."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: fit the guard again, or delete the file") from error


# --- Trojan images ------------------------------------------------------------------------------------------


def stamped_by_victim(folder: Path, guard: Guard, clean: Dataset) -> TrojanImages:
    """The clean images under the trigger of a victim, which must be the model that is guarded."""
    victim = load_victim(folder)
    if victim.attack is None or not victim.card.get("trojaned"):
        raise ValueError(f"{folder} is a benign victim, it has no trigger: leave --card out")
    if weights_hash(victim.model) != weights_hash(guard.model):
        raise ValueError(f"{folder} is not the model that is guarded: give the victim that the guard is for")
    if clean.labels is None:
        raise ValueError("--card needs the labels of the clean images: leave --unlabelled out")
    return trojan_images(victim.attack, clean, seed=int(victim.card["spec"]["seed"]))


def stamped_in_folder(source: ImageSource, model: Classifier, target: str | None) -> TrojanImages:
    """Images that carry a trigger already, in one folder per true class or without labels."""
    data = source.read(model)
    wanted = None
    if target is not None:
        wanted = torch.full((len(data),), class_index(model, target), dtype=torch.long)
    return TrojanImages(data.images, data.labels, wanted)


# --- the description ----------------------------------------------------------------------------------------


def describe(
    guard: Guard, record: Record | None, evaluation: Evaluation | None, **given: Any
) -> GuardedModel:
    """A guard's part of the report. Before an evaluation it is the calibration that says what is known."""
    calibration, purifier = guard.calibration_, guard.monitor.filter
    measured: dict[str, Any] = {}
    if evaluation is not None:
        measured = {name: getattr(evaluation, name) for name in MEASURES}
    elif calibration is not None:
        measured = {name: getattr(calibration, name) for name in ("clean_accuracy", "clean_drop")}
        measured["fpr_hard"] = calibration.disagreement
    options = {entry.name: getattr(purifier, entry.name) for entry in fields(purifier) if entry.init}  # type: ignore[arg-type]
    return GuardedModel(
        sha256=weights_hash(guard.model),
        architecture=str(guard.model.architecture.get("name", "")),
        image_shape=guard.model.image_shape,
        class_names=guard.model.class_names,
        filter=filter_name(purifier),
        options=options,
        policy=guard.policy,
        threshold=guard.threshold,
        fpr=guard.fpr,
        calibration=None if calibration is None else Estimate(*calibration.alarm_rate),
        fitted_on=None if record is None else record.fitted_on,
        measures={name: Estimate(*rate) for name, rate in measured.items() if rate is not None},
        **({"path": record.model} if record is not None else {}) | given,
    )


def measure(
    guard: Guard,
    clean: Dataset,
    trojaned: TrojanImages | None,
    *,
    record: Record | None = None,
    warnings: Sequence[str] = (),
    **given: Any,
) -> GuardedModel:
    """Evaluates a guard and describes it, with pictures and scores; `given` are fields of the description."""
    found = evaluate(guard, clean, trojaned)
    few = (f"{len(clean)} clean images are few: the intervals are wide",) if len(clean) < FEW else ()
    exhibits = pictures(guard, clean, trojaned, found)
    return describe(guard, record, found, exhibits=exhibits, warnings=(*warnings, *few), **given)


def pictures(
    guard: Guard, clean: Dataset, trojaned: TrojanImages | None, evaluation: Evaluation | None
) -> tuple[Exhibit, ...]:
    """Images with what the filter made of them, clean ones first, and the scores of all."""
    if trojaned is None:
        return evidence(guard, scaled(clean.images[:SHOWN]), evaluation)
    half, shown = SHOWN // 2, trojaned.images
    if trojaned.eligible is not None:
        shown = shown[trojaned.eligible]
    elif trojaned.labels is not None and trojaned.wanted is not None:
        shown = shown[trojaned.labels != trojaned.wanted]
    plain = clean.images[:half]
    grid, *others = evidence(guard, torch.cat([scaled(plain), scaled(shown[:half])]), evaluation)
    assert isinstance(grid, ImageGrid)
    note = f"The first {len(plain)} columns are clean images, the others carry the trigger. {grid.note}"
    return (replace(grid, note=note), *others)


def report_of(
    guarded: GuardedModel, command: tuple[str, ...], device: str, seed: int | None = None
) -> Report:
    """A report of one guard."""
    return Report(
        guards=(guarded,),
        command=command,
        environment=environment(device) | ({} if seed is None else {"seed": seed}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
