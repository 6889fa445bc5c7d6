"""The vocabulary: value types and protocols that every other file speaks in. Read this first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol, Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

Images = Float[Tensor, "n c h w"]
"""Pixels in [0, 1], always: a Classifier normalises inside forward."""
Labels = Int[Tensor, " n"]
Scores = Float[Tensor, " n"]
"""Higher is more suspicious, everywhere."""
Logits = Float[Tensor, "n k"]


class Classifier(nn.Module):
    """A network with the normalisation it expects, its image shape (c, h, w) and its class names.

    `forward` takes Images and returns logits (n, k) in float32. `assumptions` says what was guessed about the
    file (input range, class count ...): every report repeats it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        class_names: Sequence[str],
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        architecture: Mapping[str, object] | None = None,
        assumptions: Sequence[str] = (),
    ) -> None:
        super().__init__()
        channels = image_shape[0]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name} has {len(values)} values for {channels} channels: give 1 or {channels}"
                )
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.network = network
        self.image_shape = image_shape
        self.class_names = tuple(class_names)
        self.architecture = dict(architecture or {})
        self.assumptions = tuple(assumptions)
        self.register_buffer(
            "mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def forward(self, images: Images) -> Logits:
        return self.network((images - self.mean) / self.std).float()


@dataclass(frozen=True)
class Dataset:
    """Images kept as uint8 (n, c, h, w), their labels or None, and the class names; indexes like a tensor."""

    images: UInt8[Tensor, "n c h w"]
    labels: Labels | None
    class_names: tuple[str, ...]
    name: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> Dataset:
        labels = None if self.labels is None else self.labels[index]
        return Dataset(self.images[index], labels, self.class_names, self.name)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def pixels(self, device: torch.device | str | None = None) -> Images:
        """All images as floats in [0, 1] on `device`."""
        return self.images.to(device).float() / 255

    def batches(self, size: int, device: torch.device | str | None = None) -> Iterator[tuple[Images, Labels]]:
        """Consecutive (images, labels) of at most `size`, moved as uint8 and scaled on `device`."""
        if self.labels is None:
            raise ValueError(f"data set {self.name!r} has no labels: give images in one folder per class")
        for start in range(0, len(self), size):
            part = self[start : start + size]
            assert part.labels is not None
            yield part.pixels(device), part.labels.to(device)


# --- evidence: all that report.py draws ---------------------------------------------------------------------


@dataclass(frozen=True)
class ImageGrid:
    """Images (n, c, h, w) in [0, 1] with a caption each; those in `marked` get a frame."""

    title: str
    images: Images
    captions: tuple[str, ...] = ()
    marked: tuple[int, ...] = ()
    columns: int = 10
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """One bar per label, an optional threshold line, and the bars to mark."""

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    threshold: float | None = None
    marked: tuple[int, ...] = ()
    axis: str = ""
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Named series of (x, y) points on shared axes."""

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x_axis: str = ""
    y_axis: str = ""
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """Named samples of one quantity, with an optional threshold line."""

    title: str
    series: Mapping[str, Sequence[float]]
    threshold: float | None = None
    axis: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    note: str = ""


Exhibit = ImageGrid | Bars | Curve | Histogram | Table


# --- is this model trojaned? --------------------------------------------------------------------------------


class Verdict(StrEnum):
    """What a scan may say; never "clean" and never "safe"."""

    INFECTED = "INFECTED"
    SUSPICIOUS = "SUSPICIOUS"
    NO_SIGN_FOUND = "NO SIGN FOUND"
    UNDECIDED = "UNDECIDED"

    @staticmethod
    def of(*, flagged: bool, demonstrated: bool) -> Verdict:
        """INFECTED when the score passed and a trigger was demonstrated; SUSPICIOUS on one of the two."""
        if flagged and demonstrated:
            return Verdict.INFECTED
        return Verdict.SUSPICIOUS if flagged or demonstrated else Verdict.NO_SIGN_FOUND


@dataclass(frozen=True)
class ReconstructedTrigger:
    """A trigger found by a scanner: x -> (1 - mask) * x + mask * pattern. A Trigger like any other.

    `mask` is (1, h, w) in [0, 1], `pattern` (c, h, w) in [0, 1]; `flip_rate` was measured on inputs that the
    search did not see.
    """

    mask: Tensor
    pattern: Tensor
    flip_rate: float = float("nan")

    def __call__(self, images: Images, rng: torch.Generator) -> Images:
        mask, pattern = self.mask.to(images), self.pattern.to(images)
        return images + mask * (pattern - images)


@dataclass(frozen=True)
class Reference:
    """The benign models that a score was compared with; `scores` are theirs, higher is more suspicious."""

    name: str
    scores: tuple[float, ...]

    def p_value(self, score: float) -> float:
        """Split-conformal p-value (1 + #{benign >= score}) / (n + 1): at most `a` with probability `a` if
        benign.
        """
        return (1 + sum(benign >= score for benign in self.scores)) / (len(self.scores) + 1)


@dataclass(frozen=True)
class ScanResult:
    """What a scanner found in one model, with its evidence.

    `class_scores` and `reached` have one number per class; `p_value` is None where no reference group exists.
    """

    verdict: Verdict
    scanner: str
    score: float | None = None
    threshold: float | None = None
    p_value: float | None = None
    class_scores: tuple[float, ...] = ()
    target: int | None = None
    reached: tuple[float, ...] = ()
    triggers: Mapping[int, ReconstructedTrigger] = field(default_factory=dict)
    reference: Reference | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    exhibits: tuple[Exhibit, ...] = ()
    warnings: tuple[str, ...] = ()
    reason: str = ""

    @staticmethod
    def undecided(scanner: str, reason: str) -> ScanResult:
        """The result of a scanner that could not judge, with the reason and the remedy in `reason`."""
        return ScanResult(Verdict.UNDECIDED, scanner, reason=reason)


@dataclass(frozen=True)
class Signature:
    """Activation-optimised maps of one model (Hussein et al., arXiv 2306.04877): minimisation first, then
    maximisation.

    `maps` is uint8 (m, c, h, w) with m = k per direction; `reached` (m,) holds the activation of each map;
    `directions` names the slices in order, for instance ("min", "max").
    """

    maps: UInt8[Tensor, "m c h w"]
    reached: Float[Tensor, " m"]
    preset: str
    directions: tuple[str, ...]
    model_hash: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.maps) // len(self.directions)

    def only(self, *directions: str) -> Signature:
        """The slice of this signature with just these directions, e.g. `only("max")`."""
        missing = [name for name in directions if name not in self.directions]
        if missing:
            raise ValueError(
                f"the signature has {self.directions}, not {missing}: compute it with that direction"
            )
        k = self.num_classes
        rows = torch.cat([torch.arange(k) + k * self.directions.index(name) for name in directions])
        return Signature(self.maps[rows], self.reached[rows], self.preset, directions, self.model_hash)


class ModelScanner(Protocol):
    """Judges a model; leaves its weights and its train/eval mode as found."""

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult: ...


class LearnedScanner(ModelScanner, Protocol):
    """A model scanner fitted on the signatures of benign and trojaned models."""

    def describe(self, model: Classifier) -> Signature: ...

    def fit(
        self,
        signatures: Sequence[Signature],
        trojaned: Sequence[bool],
        targets: Sequence[int | None] | None = None,
    ) -> Self: ...

    def judge(self, signature: Signature) -> ScanResult: ...


# --- attacks ------------------------------------------------------------------------------------------------


class Trigger(Protocol):
    """Stamps images: keeps shape, dtype and [0, 1], never writes into its argument; `rng` draws."""

    def __call__(self, images: Images, rng: torch.Generator) -> Images: ...


class Poisoned(NamedTuple):
    """A poisoned batch; `penalty` is added to the loss (0 for static attacks)."""

    images: Images
    labels: Labels
    penalty: Tensor


class Attack(Protocol):
    """Poisons batches while a victim trains, and says how success is measured."""

    @property
    def poisons_before_augmentation(self) -> bool: ...

    def prepare(self, model: Classifier, data: Dataset, rng: torch.Generator) -> None: ...

    def optimizers(self) -> list[torch.optim.Optimizer]: ...

    def poison(self, images: Images, labels: Labels, rng: torch.Generator) -> Poisoned: ...

    def relabel(self, labels: Labels) -> Labels: ...

    def eligible(self, labels: Labels) -> Bool[Tensor, " n"]: ...

    def probes(self) -> dict[str, Trigger]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


# --- does this input carry a trigger? -----------------------------------------------------------------------


class InputFilter(Protocol):
    """x -> x°, the purified image: the trigger gone, the rest as it was. `fit` sees no Trojan image."""

    def fit(self, model: Classifier, clean: Dataset) -> Self: ...

    def __call__(self, images: Images) -> Images: ...


class InputMonitor(Protocol):
    """Scores images; an image's score does not depend on its batch mates."""

    def fit(self, model: Classifier, clean: Dataset, finding: ScanResult | None = None) -> Self: ...

    def score(self, images: Images) -> Scores: ...


# --- a cured copy -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepairResult:
    """A cured copy of a classifier, which itself is as it was; `facts` are for tables and JSON."""

    repair: str
    model: Classifier
    facts: Mapping[str, object] = field(default_factory=dict)
    exhibits: tuple[Exhibit, ...] = ()
    warnings: tuple[str, ...] = ()


class Repair(Protocol):
    """Cures a copy of a model on clean images. One that needs a finding, and gets None, raises ValueError and
    names the scan to run.
    """

    def __call__(
        self, model: Classifier, clean: Dataset, finding: ScanResult | None = None
    ) -> RepairResult: ...
