"""A model repaired, measured and described: what `unhorse repair` and the demonstration do with it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from unhorse.cli.clean_images import fingerprints
from unhorse.cli.output import epochs_progress
from unhorse.cli.repair_measures import Pair, Reversed, measure, scan_pictures, stamped_pictures
from unhorse.core import Classifier, Dataset, RepairResult, ScanResult, Verdict
from unhorse.datasets import split_dataset, subset
from unhorse.descriptions import describe
from unhorse.inputs import check_clean, check_recognised
from unhorse.jobs import say
from unhorse.models.classifier import CARD_FILE, read_card, save_classifier, weights_hash
from unhorse.rates import TrojanImages
from unhorse.repair_report import RepairedModel
from unhorse.repairs.registry import NEEDS_FINDING, REPAIRS
from unhorse.report import Report
from unhorse.scanners.named import NEURAL_CLEANSE
from unhorse.survey import Request, environment, make_scanner, scan_with
from unhorse.wording import finite

HELD_OUT = 0.3
"""The share of the clean images that measures and never repairs."""
ASIDE = 0.2
"""What a repair that watches itself keeps aside of its part: less than by itself, since the held-out images
measure it.
"""
STEPS, MINIMUM, FEW = 200, 30, 100


class Parts(NamedTuple):
    """Clean images divided once: `repairing` for the repair and the scans, `held_out` to measure."""

    repairing: Dataset
    held_out: Dataset


@dataclass(frozen=True)
class RepairRequest:
    """How a model is repaired and scanned; `options` are settings of the method.

    With `epochs` None there are as many as the method's own, or more where images are few, for STEPS steps:
    the papers' epochs are of thousands of images.
    """

    method: str = "unlearning"
    epochs: int | None = None
    scanner: str | None = None
    effort: str = "standard"
    seed: int = 0
    options: Mapping[str, object] = field(default_factory=dict)

    def make_repair(self, images: int) -> Any:
        """The repair for that many clean images; ValueError for a setting that the method does not have."""
        made: Any = REPAIRS[self.method](**self.options)
        names = {entry.name for entry in fields(made)}
        trained = "epochs" if "epochs" in names else "fine_tune_epochs"
        given: dict[str, Any] = {"seed": self.seed, "held_out": ASIDE}
        if total_epochs(made):
            steps = math.ceil(images * (1 - ASIDE * ("held_out" in names)) / made.batch_size)
            enough = max(getattr(made, trained), math.ceil(STEPS / max(1, steps)))
            given[trained] = enough if self.epochs is None else self.epochs
        elif self.epochs is not None:
            raise ValueError(f"{self.method} trains no epochs: leave --epochs out, or take another --method")
        return replace(made, **{name: value for name, value in given.items() if name in names})


def total_epochs(made: Any) -> int:
    """How many epochs a repair trains, those of a teacher included."""
    return int(getattr(made, "total_epochs", getattr(made, "epochs", 0)))


def check_folder(folder: Path) -> None:
    """Refuses, before anything is repaired, a folder that is in use for something else."""
    if folder.exists() and not ((folder / CARD_FILE).is_file() and "repair" in read_card(folder)):
        raise ValueError(f"{folder} exists and is not a repaired model: choose another name")


def divide(model: Classifier, clean: Dataset, *, images: int | None = None, seed: int = 0) -> Parts:
    """The two parts of the clean images, or of `images` of them; ValueError for what does not fit."""
    clean = clean if images is None else subset(clean, images, seed=seed)
    if len(clean) < MINIMUM:
        raise ValueError(f"{len(clean)} clean images: give at least {MINIMUM}, better some hundreds")
    check_clean(model, clean)
    check_recognised(model, clean)
    return Parts(*split_dataset(clean, (1 - HELD_OUT, HELD_OUT), seed=seed))


def run_repair(  # noqa: PLR0913
    model: Classifier,
    parts: Parts,
    request: RepairRequest,
    folder: Path,
    *,
    path: Path,
    source: str,
    attacked: TrojanImages | None = None,
) -> RepairedModel:
    """Scans, repairs, writes the cured model to `folder`, scans that and measures both.

    Interrupted and called again, a training goes on after its last epoch. `path` and `source` say where the
    model and the images came from; `attacked` are Trojan images, to measure.
    """
    check_folder(folder)
    before = _scan(model, parts.repairing, request, "before the repair")
    finding = _finding(model, before, parts.repairing, request)
    known, made = describe(path, model), request.make_repair(len(parts.repairing))
    options = {entry.name: getattr(made, entry.name) for entry in fields(made) if entry.init}
    result = _repaired(model, finding, parts.repairing, made, folder, request)
    card = {
        "method": request.method,
        "options": options,
        "source": str(path),
        "source_sha256": known.sha256,
        "source_weights": weights_hash(model),
        "clean_images": source,
        "repaired_on": len(parts.repairing),
        "facts": finite(result.facts),
    }
    save_classifier(result.model, folder, repair=card)
    after = _scan(result.model, parts.repairing, request, "after the repair")
    pair, found = Pair(model, result.model), Reversed.of(finding, model, request.method)
    exhibits = (
        *stamped_pictures(pair, parts.held_out, found, attacked),
        *result.exhibits,
        *scan_pictures(before, finding, after, drawn=request.method in NEEDS_FINDING),
    )
    return RepairedModel(
        path=known.path,
        folder=str(folder),
        sha256=known.sha256,
        repaired_sha256=weights_hash(result.model),
        architecture=known.architecture,
        image_shape=known.image_shape,
        class_names=known.class_names,
        assumptions=known.assumptions,
        method=request.method,
        options=options,
        facts=result.facts,
        before=before,
        after=after,
        target=None if found is None else found.target,
        trigger_found_by="" if found is None else found.scanner,
        repaired_on=len(parts.repairing),
        held_out=len(parts.held_out),
        clean_images=source,
        measures=measure(pair, parts.held_out, found, attacked),
        exhibits=exhibits,
        warnings=tuple(dict.fromkeys(_warnings(before, finding, after, result, parts))),
    )


def report_of(
    repaired: RepairedModel, command: tuple[str, ...], device: str, request: RepairRequest
) -> Report:
    """A report of one repair."""
    return Report(
        repairs=(repaired,),
        command=command,
        environment=environment(device) | {"effort": request.effort, "seed": request.seed},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _scan(model: Classifier, clean: Dataset, request: RepairRequest, when: str) -> ScanResult:
    asked = Request(scanner=request.scanner, clean=Path(clean.name), effort=request.effort, seed=request.seed)
    return scan_with(make_scanner(asked, device=model.mean.device), model, clean, label=f"scan {when}")


def _finding(model: Classifier, before: ScanResult, clean: Dataset, request: RepairRequest) -> ScanResult:
    """The scan that the repair goes by: Neural Cleanse's where it needs a trigger and `before` has none."""
    if before.triggers or request.method not in NEEDS_FINDING:
        return before
    finding = before
    if request.scanner != NEURAL_CLEANSE:
        say(f"no trigger was demonstrated, which {request.method} needs: {NEURAL_CLEANSE} searches for one")
        finding = _scan(model, clean, replace(request, scanner=NEURAL_CLEANSE), "for a trigger")
    if not finding.triggers:
        reason = f" ({finding.reason})" if finding.reason else ""
        raise ValueError(
            f"no trigger was found, which {request.method} needs{reason}: take --method fine-pruning, which "
            "needs none, or search with --effort deep"
        )
    return finding


def _repaired(  # noqa: PLR0913
    model: Classifier, finding: ScanResult, clean: Dataset, made: Any, folder: Path, request: RepairRequest
) -> RepairResult:
    labels = [] if clean.labels is None else clean.labels.tolist()
    seen = (weights_hash(model), fingerprints(clean), labels, request, made)
    identity = hashlib.sha256(repr(seen).encode()).hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    epochs, step = total_epochs(made), epochs_progress(f"repairing by {request.method}")
    result: RepairResult = made(
        model,
        clean,
        finding,
        on_epoch=lambda entry: step(entry.epoch + 1, epochs, f"loss {entry.loss:.3f}"),
        checkpoint=folder.with_name(f".{folder.name}.{identity}.repairing"),
    )
    if result.model.network.state_dict().keys() != model.network.state_dict().keys():
        name = model.architecture.get("name", "this model")
        raise ValueError(
            f"what {request.method} made of {name} has other layers: it could not be loaded again; take "
            "--method unlearning or fine-tuning"
        )
    return result


def _warnings(
    before: ScanResult, finding: ScanResult, after: ScanResult, result: RepairResult, parts: Parts
) -> list[str]:
    """What to bear in mind of a repair."""
    said = []
    if not {before.verdict, finding.verdict} & {Verdict.INFECTED, Verdict.SUSPICIOUS}:
        said.append("no scan flagged the model before the repair: there may have been nothing to cure")
    if finding is not before:
        said.append(f"{before.scanner} demonstrated no trigger: the one found by {finding.scanner} was used")
    if parts.held_out.labels is None:
        said.append("without labels clean accuracy is not known: only agreement with the model as it was")
    if len(parts.held_out) < FEW:
        said.append(f"{len(parts.held_out)} held-out images are few: the intervals are wide")
    return [*said, *result.warnings, *(text for scan in (before, finding, after) for text in scan.warnings)]
