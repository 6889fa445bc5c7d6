"""Queries: images shown to a model, of whose logits another classifier tells whether it is trojaned. What
scanners that learn queries share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unhorse.core import Classifier, Images, ScanResult, Scores, Verdict
from unhorse.scanners.optimisation import frozen
from unhorse.scanners.signature_storage import read_scanner, write_scanner
from unhorse.scanners.signature_training import best_threshold, stratified_split

Answers = Float[Tensor, "n m k"]
"""Logits of n models on m queries."""
Progress = Callable[[int, int, float], None]
"""Called after each epoch with the epochs done, the epochs in all and the validation loss."""


class Unanswered(ValueError):
    """A model cannot be asked, and why."""


class QueryScanner(Protocol):
    """A scanner that judges a model by its answers alone: a dataclass whose learned fields end in an
    underscore.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    image_shape_: tuple[int, ...]
    num_classes_: int
    threshold_: float
    fitted_on_: int
    validated_on_: int

    @property
    def name(self) -> str: ...

    @property
    def queries(self) -> Images: ...

    def log_odds(self, answers: Answers) -> Scores: ...


S = TypeVar("S", bound=QueryScanner)


class Population(NamedTuple):
    """Models of one image shape and number of classes, split into a part to fit on and one to validate on."""

    models: Sequence[Classifier]
    trojaned: Bool[Tensor, " n"]
    fitting: Int[Tensor, " f"]
    validation: Int[Tensor, " v"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.models[0].image_shape

    @property
    def num_classes(self) -> int:
        return self.models[0].num_classes

    @property
    def device(self) -> torch.device:
        return self.models[0].mean.device

    def validators(self) -> list[Classifier]:
        return [self.models[index] for index in self.validation.tolist()]


def divide(models: Sequence[Classifier], trojaned: Sequence[bool], fraction: float, seed: int) -> Population:
    """A population with `fraction` of its benign and of its trojaned models for validation; ValueError for
    models that do not fit together.
    """
    if len(models) != len(trojaned):
        raise ValueError(f"{len(models)} models have {len(trojaned)} labels: give one per model")
    flags = torch.tensor([bool(flag) for flag in trojaned], dtype=torch.bool)
    for kind, count in (("benign", int((~flags).sum())), ("trojaned", int(flags.sum()))):
        if count < 2:
            raise ValueError(f"{count} {kind} models: give at least 2, one of them is for validation")
    for index, model in enumerate(models):
        if problem := _differs(model, models[0].image_shape, models[0].num_classes):
            raise ValueError(f"model {index} does not fit to model 0: {problem}")
    return Population(models, flags, *stratified_split(flags, fraction, seed))


def ask(model: Classifier, queries: Images) -> Float[Tensor, "m k"]:
    """The logits of a model on the queries, on the CPU; Unanswered where they are not finite."""
    with frozen(model, "fp32"), torch.no_grad():
        answers = model(queries.to(model.mean.device)).cpu()
    if not answers.isfinite().all():
        raise Unanswered("the logits are not finite: check the weights for NaN")
    return answers


def ask_all(models: Sequence[Classifier], queries: Images) -> Answers:
    """The logits of each model, asked by itself: what one answers depends on no other."""
    answers = []
    for index, model in enumerate(models):
        try:
            answers.append(ask(model, queries))
        except Unanswered as error:
            raise Unanswered(f"model {index}: {error}") from error
    return torch.stack(answers)


@contextmanager
def ready(models: Sequence[Classifier]) -> Iterator[None]:
    """Many models in eval mode with frozen weights, for gradients to queries; all are as found afterwards.

    Weights are channels_last meanwhile: a step on a small-cnn takes about two thirds of the time on a CPU.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(frozen(model, "fp32"))
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            stack.callback(model.to, memory_format=torch.contiguous_format)  # type: ignore[arg-type]
        yield


# --- judging ------------------------------------------------------------------------------------------------


def score_models(scanner: QueryScanner, models: Sequence[Classifier]) -> Scores:
    """Probability of "trojaned" per model, in float64 on the CPU; ValueError for models unlike the fitted
    ones.
    """
    _fitted(scanner)
    if not models:
        raise ValueError("no models: give at least one")
    scores = []
    for index, model in enumerate(models):
        try:
            scores.append(_score(scanner, model))
        except Unanswered as error:
            raise Unanswered(f"model {index}: {error}") from error
    return torch.tensor(scores, dtype=torch.float64)


def scan_model(scanner: QueryScanner, model: Classifier) -> ScanResult:
    """SUSPICIOUS or NO SIGN FOUND: a learned score demonstrates no trigger. UNDECIDED where the model cannot
    be asked.
    """
    _fitted(scanner)
    try:
        score = _score(scanner, model)
    except Unanswered as error:
        return ScanResult.undecided(scanner.name, str(error))
    return ScanResult(
        Verdict.of(flagged=score >= scanner.threshold_, demonstrated=False),
        scanner.name,
        score=score,
        threshold=scanner.threshold_,
        facts={
            "queries": len(scanner.queries),
            "fitted on": scanner.fitted_on_,
            "validated on": scanner.validated_on_,
        },
    )


def note_population(scanner: QueryScanner, population: Population) -> None:
    """What a scanner keeps of the population it has learned from: its shape, its sizes and the threshold of
    the validation part.
    """
    scanner.image_shape_, scanner.num_classes_ = population.image_shape, population.num_classes
    scanner.fitted_on_, scanner.validated_on_ = len(population.fitting), len(population.validation)
    scores = score_models(scanner, population.validators())
    scanner.threshold_ = best_threshold(scores, population.trojaned[population.validation])


def _score(scanner: QueryScanner, model: Classifier) -> float:
    if problem := _differs(model, scanner.image_shape_, scanner.num_classes_):
        raise Unanswered(f"{problem}: fit the scanner on models like this one")
    return float(scanner.log_odds(ask(model, scanner.queries)[None]).double().sigmoid())


def _differs(model: Classifier, image_shape: tuple[int, ...], num_classes: int) -> str:
    if tuple(model.image_shape) == tuple(image_shape) and model.num_classes == num_classes:
        return ""
    shape, expected = ("x".join(map(str, size)) for size in (model.image_shape, image_shape))
    return f"it takes {shape} images to {model.num_classes} classes, not {expected} to {num_classes}"


def _fitted(scanner: QueryScanner) -> None:
    if not scanner.fitted_on_:
        raise ValueError(f"this {scanner.name} scanner has learned nothing yet: call fit() or load()")


# --- on disk ------------------------------------------------------------------------------------------------


def save_queries(scanner: QueryScanner, folder: Path) -> Path:
    """Write the scanner's fields to scanner.json and the tensors it learned to safetensors."""
    _fitted(scanner)
    values = {field.name: getattr(scanner, field.name) for field in fields(scanner)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    card = {name: value for name, value in values.items() if name not in tensors}
    return write_scanner(Path(folder), {"scanner": type(scanner).__name__, **card}, tensors)


def load_queries(kind: type[S], folder: Path) -> S:
    """The scanner that `save_queries` wrote; ValueError where files are missing or do not fit."""
    names = {field.name: field for field in fields(kind)}
    card, tensors = read_scanner(Path(folder), required=("scanner",))
    if card["scanner"] != kind.__name__:
        raise ValueError(f"{folder} holds a {card['scanner']}, not a {kind.__name__}: load it as that")
    found = {name: value for name, value in {**card, **tensors}.items() if name in names}
    if missing := sorted(names.keys() - found.keys()):
        raise ValueError(f"{folder} lacks {missing}: fit and save the scanner again")
    scanner = kind(**{name: value for name, value in found.items() if names[name].init})
    for name, value in found.items():
        if not names[name].init:
            setattr(scanner, name, value)
    return scanner
