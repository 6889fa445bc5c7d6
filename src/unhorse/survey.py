"""A survey of models: find the files, load each, scan it, and gather what a report needs."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unhorse import jobs
from unhorse.cli.clean_images import clean_images
from unhorse.core import Classifier, Dataset, ModelScanner, Reference, ScanResult, Verdict
from unhorse.descriptions import known, of_network
from unhorse.doubts import doubts
from unhorse.jobs import say
from unhorse.loading.formats import Networks
from unhorse.loading.network_code import require_confinement
from unhorse.loading.networks import Found
from unhorse.loading.sources import opened
from unhorse.model_files import find_models, read_networks
from unhorse.model_files import load as open_with
from unhorse.report import Report, ScannedModel
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.scanners.named import DATA_FREE, NAMED, NEURAL_CLEANSE, named_scanner
from unhorse.scanners.neural_cleanse import NeuralCleanse
from unhorse.scanners.signature_scanner import SignatureScanner
from unhorse.survey_cache import ScanCache, scan_key, stamp

INTERVAL = 10.0
"""Seconds between lines of progress."""


@dataclass(frozen=True)
class Request:
    """How models are to be scanned. `scanner` is the folder of a fitted one, or one of NAMED.

    `loading` holds arguments of load_model; None in it means: as the file says. A scan is given up after
    `timeout` seconds; with `cached` what was scanned before is taken from there.
    """

    scanner: Path | str | None = None
    reference: Path | None = None
    clean: Path | None = None
    effort: str = "standard"
    device: str = "auto"
    seed: int = 0
    loading: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    cached: bool = True

    def __post_init__(self) -> None:
        if self.loading.get("channels") is not None and self.loading.get("image_size") is None:
            raise ValueError("--channels goes with --size: give both")
        if str(self.scanner) == NEURAL_CLEANSE and (self.clean is None or self.reference is not None):
            raise ValueError(f"{NEURAL_CLEANSE} takes clean images and no reference: give --clean alone")
        folders = [self.reference, None if str(self.scanner) in NAMED else self.scanner]
        for folder in folders:
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"there is no folder {folder}")


def make_scanner(request: Request, *, device: torch.device) -> ModelScanner:
    """The scanner of a request: by its name at the requested effort, or a fitted one from its folder."""
    if request.scanner is None or str(request.scanner) in NAMED:
        name = None if request.scanner is None else str(request.scanner)
        return named_scanner(name, request.effort, seed=request.seed, budget=request.timeout)
    folder = Path(request.scanner)
    return SignatureScanner.load(folder, device=str(device), cache=cache_folder() / "signatures")


def scan_with(scanner: ModelScanner, model: Classifier, clean: Dataset | None, *, label: str) -> ScanResult:
    """Scans one model, with a word to who waits on how long it takes; `label` says what is scanned."""
    if isinstance(scanner, DATA_FREE):
        say(f"{label}: about {scanner.estimate(model):.0f} s")
    if isinstance(scanner, (NeuralCleanse, *DATA_FREE)):
        return scanner.scan(model, clean, on_step=_steps(label))
    return scanner.scan(model, clean)


def _steps(label: str) -> Callable[[int, int, str], None]:
    """Gives a function to call with (steps done, steps at most, words): a line now and then, with an ETA."""
    started = spoken = time.monotonic()

    def step(done: int, most: int, words: str) -> None:
        nonlocal spoken
        now = time.monotonic()
        if now - spoken >= INTERVAL:
            spoken, left = now, (now - started) / done * (most - done)
            say(f"{label}: step {done} of at most {most}, {words}, at most {left:.0f} s left")

    return step


def scan_models(
    models: Sequence[Path], request: Request, *, workers: int = 1, command: Sequence[str] = ()
) -> Report:
    """Scans every model, each on its own: what fails is reported and stops nothing."""
    problem = ScanCache(cache_folder() / "scans").problem() if request.cached else None
    if problem is not None:
        say(f"warning: {problem}")
    reference = None
    require_confinement(request.loading.get("network"))
    if request.reference is not None:
        reference = build_reference(request, workers=workers)
        say(f"reference: {len(reference.scores)} benign models of {request.reference}")
    todo = [_Scan(path, request, reference) for path in models]
    done = jobs.gather("the scan", todo, workers=workers)
    unseen = {path: (ScannedModel(str(path), error=words),) for path, words in done.errors.items()}
    return Report(
        tuple(network for path in models for network in done.values.get(path) or unseen[path]),
        command=tuple(command),
        environment=environment(request.device) | {"effort": request.effort, "seed": request.seed},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=() if problem is None else (problem,),
        interrupted=done.interrupted,
    )


def build_reference(request: Request, *, workers: int = 1) -> Reference:
    """The scores of the benign models below `request.reference`; one that cannot be scored is an error, not
    left out silently.
    """
    assert request.reference is not None
    models = find_models([request.reference])
    if not models:
        raise ValueError(
            f"{request.reference} holds no models: give a folder of benign models for --reference"
        )
    todo = [_Score(path, request) for path in models]
    scores = []
    for outcome in jobs.track("reference", jobs.run(jobs.call, todo, workers=workers), len(todo)):
        if outcome.error is not None:
            raise ValueError(f"reference model {outcome.item.path} cannot be scored: {outcome.error}")
        scores.append(outcome.value)
    return Reference(str(request.reference), tuple(sorted(scores)))


@dataclass(frozen=True)
class _Score:
    """The score of one benign reference model."""

    path: Path
    request: Request

    def __call__(self) -> float:
        device = choose_device(self.request.device)
        model = load(self.path, self.request.loading).to(device)
        scanner = make_scanner(self.request, device=device)
        result = scanner.measure(model) if isinstance(scanner, DATA_FREE) else scanner.scan(model)
        if result.score is None:
            raise ValueError(result.reason)
        return result.score


@dataclass(frozen=True)
class _Scan:
    """One file of a survey: each of its networks is scanned."""

    path: Path
    request: Request
    reference: Reference | None

    def __call__(self) -> tuple[ScannedModel, ...]:
        started = time.monotonic()
        seen = ScannedModel(str(self.path))
        kept = ScanCache(cache_folder() / "scans")
        try:
            with opened(self.path) as source:
                seen = replace(seen, sha256=source.sha256, size=source.size, format=source.format)
                source.check()
                if self.request.cached and (found := kept.read(self._key(source.sha256))):
                    say(f"{self.path}: scanned before, taken from the cache (--no-cache scans again)")
                    return tuple(replace(network, path=str(self.path)) for network in found)
                file = read_networks(source, self._loading())
        except (LoadRefused, LoadFailed) as error:
            return (_unopened(seen, error, time.monotonic() - started),)
        if len(file.networks) > 1:
            keys = ", ".join(network.key for network in file.networks)
            say(f"{self.path}: {len(file.networks)} different networks, each is scanned: {keys}")
        scanned = tuple(self._scanned_network(network, file) for network in file.networks)
        judged = all(one.result and one.result.verdict is not Verdict.UNDECIDED for one in scanned)
        if self.request.cached and judged:
            kept.write(self._key(file.sha256), scanned)
        return scanned

    def _scanned_network(self, network: Found, file: Networks) -> ScannedModel:
        started = time.monotonic() - file.seconds / len(file.networks)
        seen = ScannedModel(str(self.path), key=network.key, **known(file))
        if network.model is None:
            assert network.error is not None
            return _unopened(seen, network.error, time.monotonic() - started)
        name = f"{self.path} [{network.key}]" if network.key else str(self.path)
        result = self._scanned(network.model, name)
        return replace(seen, **of_network(network.model), result=result, seconds=time.monotonic() - started)

    def _loading(self) -> dict[str, Any]:
        """As the user says, with the clean images, which may show what network a state dict is of."""
        clean = self.request.clean
        own = None if clean is None else partial(clean_images, clean)
        return {**self.request.loading, "clean": own}

    def _key(self, sha256: str) -> str:
        request = asdict(self.request) | {
            "files": [stamp(self.request.clean), stamp(_folder_of(self.request.scanner))],
            "reference": self.reference and self.reference.scores,
            "environment": environment(self.request.device),
        }
        return scan_key(sha256, request)

    def _scanned(self, model: Classifier, name: str) -> ScanResult:
        device = choose_device(self.request.device)
        model.to(device)
        scanner = make_scanner(self.request, device=device)
        if isinstance(scanner, DATA_FREE):
            scanner = replace(scanner, reference=self.reference)
        if isinstance(scanner, SignatureScanner) and self.reference is not None:
            scanner.reference_ = self.reference
        clean = clean_images(self.request.clean, model)
        result = scan_with(scanner, model, clean, label=f"{name} ({self.request.effort})")
        if isinstance(scanner, DATA_FREE):
            result = replace(result, warnings=(*result.warnings, *doubts(scanner, model, result)))
        return result


def _folder_of(scanner: Path | str | None) -> Path | None:
    return None if scanner is None or str(scanner) in NAMED else Path(scanner)


def _unopened(seen: ScannedModel, error: LoadRefused | LoadFailed, seconds: float) -> ScannedModel:
    return replace(seen, error=str(error), error_rule=error.rule, seconds=seconds)


def load(path: Path, options: Mapping[str, Any]) -> Classifier:
    """The classifier in a file, with a command's options."""
    return open_with(path, options).model


def choose_device(name: str) -> torch.device:
    """ "auto" is an accelerator if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cache_folder() -> Path:
    """Where signatures are kept between runs: $UNHORSE_CACHE, else ~/.cache/unhorse."""
    return Path(os.environ.get("UNHORSE_CACHE") or Path.home() / ".cache" / "unhorse")


def environment(device: str) -> dict[str, object]:
    """What a result depends on beside the model: versions, device, threads."""
    chosen = choose_device(device)
    name = (
        torch.cuda.get_device_name(chosen)
        if chosen.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "unhorse": metadata.version("unhorse"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": f"{chosen.type} ({name})",
        "threads": torch.get_num_threads(),
    }
