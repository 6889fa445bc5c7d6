"""Scanners that learn from the signatures of benign and trojaned models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from unhorse.core import Bars, Classifier, Dataset, Reference, ScanResult, Scores, Signature, Verdict
from unhorse.metrics import judge
from unhorse.scanners.optimisation import Precision
from unhorse.scanners.signature_networks import RESNEXT50, ConvolutionNetwork, TransformerNetwork
from unhorse.scanners.signature_set import Evidence, SetNetwork, evidence_of
from unhorse.scanners.signature_storage import read_scanner, write_scanner
from unhorse.scanners.signature_training import (
    NO_TARGET,
    Examples,
    Items,
    Progress,
    Recipe,
    best_threshold,
    ensemble_findings,
    margins,
    seeded,
    stratified_split,
    train_ensemble,
)
from unhorse.scanners.signatures import compute_signature, statistics_maps

STATISTICS_FROM = 100
DIRECTIONS = {"min": ("min",), "max": ("max",), "both": ("min", "max")}
HYPERPARAMETERS = (
    *("kind", "maps", "preset", "epochs", "learning_rate", "batch_size", "validation_fraction", "seed"),
    *("precision", "layers"),
)
LEARNED = ("shape_", "threshold_", "localises_", "validation_losses_", "fitted_on_", "validated_on_")


class Kind(NamedTuple):
    """The usual training of a kind of network; the score is the mean log odds of `members` networks."""

    epochs: int
    learning_rate: float
    batch_size: int
    members: int


KINDS = {
    "convolution": Kind(epochs=100, learning_rate=1e-4, batch_size=8, members=1),
    "transformer": Kind(epochs=20, learning_rate=1e-4, batch_size=8, members=1),
    "set": Kind(epochs=40, learning_rate=2e-3, batch_size=32, members=3),
}


@dataclass
class SignatureScanner:
    """Trojan model detection from activation-optimised maps (Hussein et al., arXiv 2306.04877).

    Kinds "convolution" and "transformer" are the paper's. "set" is ours: classes in any number and order,
    maps of any size, and it names the target class where it was fitted with targets. None takes the kind's
    usual value; `layers` are the depths of the ResNeXt stages. The score is the probability of "trojaned".
    Deviations: a 2-way head (the public code has 1000 outputs), batch normalisation over the maps of a whole
    batch, maps in [0, 1] without further normalisation.
    """

    kind: str = "set"
    maps: str = "both"
    preset: str = "pixels"
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    validation_fraction: float = 0.1
    seed: int = 0
    device: str | None = None
    precision: Precision = "auto"
    layers: tuple[int, ...] = RESNEXT50
    cache: Path | None = None

    network_: nn.ModuleList | None = field(default=None, init=False, repr=False)
    shape_: tuple[int, ...] = field(default=(), init=False)
    threshold_: float = field(default=0.5, init=False)
    localises_: bool = field(default=False, init=False)
    validation_losses_: tuple[tuple[float, ...], ...] = field(default=(), init=False, repr=False)
    fitted_on_: int = field(default=0, init=False)
    validated_on_: int = field(default=0, init=False)
    reference_: Reference | None = field(default=None, init=False, repr=False)

    def describe(self, model: Classifier) -> Signature:
        """The signature that this scanner reads; all models share one start image, whatever `seed` is."""
        return compute_signature(model, self.preset, directions=self._directions(), cache=self.cache)

    def fit(
        self,
        signatures: Sequence[Signature],
        trojaned: Sequence[bool],
        targets: Sequence[int | None] | None = None,
        *,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from labelled signatures; a stratified part of them chooses the epoch and the threshold.

        In `targets` None says "no single target class" (benign, all-to-all); leave `targets` out if unknown.
        """
        if len(signatures) != len(trojaned) or (targets is not None and len(targets) != len(signatures)):
            raise ValueError(
                f"{len(signatures)} signatures need as many labels, got {len(trojaned)} (and targets)"
            )
        flags = torch.tensor([bool(flag) for flag in trojaned])
        split = stratified_split(flags, self.validation_fraction, self.seed)
        shape = tuple(self._maps(self._select(signatures[0])).shape)
        known = [NO_TARGET if target is None else target for target in targets or [None] * len(signatures)]
        examples = Examples(self._items(signatures, shape), flags, torch.tensor(known), targets is not None)
        fitting, validation = (examples.take(index) for index in split)

        self.network_, self.validation_losses_ = train_ensemble(
            lambda: self._network(shape),
            fitting,
            validation,
            self._recipe(),
            device=self._device(fitting.items),
            progress=progress,
        )
        self.shape_, self.reference_ = shape, None
        self.localises_ = self.kind == "set" and bool((examples.targets != NO_TARGET).any())
        self.fitted_on_, self.validated_on_ = len(fitting), len(validation)
        self.threshold_ = best_threshold(self._probabilities(validation.items)[0], validation.trojaned)
        return self

    def calibrate(self, benign: Sequence[Signature], name: str = "benign models") -> Reference:
        """Take benign models that fit() has not seen as the reference of the split-conformal p-value."""
        self.reference_ = Reference(name, tuple(self.scores(benign).tolist()))
        return self.reference_

    def scores(self, signatures: Sequence[Signature]) -> Scores:
        """Probability of "trojaned" per signature, in float64 on the CPU."""
        self._fitted()
        return self._probabilities(self._items(signatures, self.shape_))[0]

    def judge(self, signature: Signature) -> ScanResult:
        """SUSPICIOUS or NO SIGN FOUND: a learned score alone demonstrates no trigger."""
        return self._judge(signature, tuple(str(index) for index in range(signature.num_classes)))

    def scan(self, model: Classifier, clean: Dataset | None = None) -> ScanResult:
        """Judge the signature of `model`; clean images are not needed."""
        return self._judge(self.describe(model), model.class_names)

    def save(self, folder: Path) -> Path:
        """Write scanner.json and the weights it names; what was there stays valid until the last moment."""
        card = {name: getattr(self, name) for name in (*HYPERPARAMETERS, *LEARNED)}
        if self.reference_ is not None:
            card["reference"] = {"name": self.reference_.name, "scores": self.reference_.scores}
        return write_scanner(Path(folder), card, self._fitted().state_dict())

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None, cache: Path | None = None) -> Self:
        """The scanner of a folder that save() wrote; ValueError where files are missing or do not fit."""
        card, weights = read_scanner(Path(folder), required=(*HYPERPARAMETERS, *LEARNED))
        scanner = cls(**{name: card[name] for name in HYPERPARAMETERS}, device=device, cache=cache)
        for name in LEARNED:
            setattr(scanner, name, card[name])
        with seeded(scanner.seed, torch.device("cpu")):
            networks = nn.ModuleList(scanner._network(scanner.shape_) for _ in range(scanner._kind().members))
        try:
            networks.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder}: weights and scanner.json do not fit ({error}): fit again") from error
        scanner.network_ = networks.eval()
        if reference := card.get("reference"):
            scanner.reference_ = Reference(reference["name"], reference["scores"])
        return scanner

    # --- inside ---------------------------------------------------------------------------------------------

    def _kind(self) -> Kind:
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown kind {self.kind!r} of signature scanner: take one of {', '.join(KINDS)}"
            )
        return KINDS[self.kind]

    def _directions(self) -> tuple[str, ...]:
        if self.maps not in DIRECTIONS:
            raise ValueError(f"maps is {self.maps!r}: take one of {', '.join(DIRECTIONS)}")
        return DIRECTIONS[self.maps]

    def _fitted(self) -> nn.ModuleList:
        if self.network_ is None:
            raise ValueError(
                "this signature scanner has learned nothing yet: call fit() or SignatureScanner.load()"
            )
        return self.network_

    def _network(self, shape: tuple[int, ...]) -> nn.Module:
        if self.kind == "set":
            return SetNetwork(len(self._directions()))
        network = ConvolutionNetwork if self.kind == "convolution" else TransformerNetwork
        return network(shape[0], shape[1], layers=self.layers)

    def _select(self, signature: Signature) -> Signature:
        """The directions that this scanner reads, of a signature with the preset it was made for."""
        if signature.preset != self.preset:
            raise ValueError(
                f"the signature has preset {signature.preset!r}, the scanner {self.preset!r}: use describe()"
            )
        wanted = self._directions()
        return signature if signature.directions == wanted else signature.only(*wanted)

    def _items(self, signatures: Sequence[Signature], shape: tuple[int, ...]) -> Items:
        self._kind()
        if not signatures:
            raise ValueError("no signatures: give at least one")
        selected = [self._select(signature) for signature in signatures]
        if problem := next(filter(None, map(_unreadable, selected)), ""):
            raise ValueError(problem)
        if self.kind == "set":
            return [evidence_of(signature) for signature in selected]
        items = [self._maps(signature) for signature in selected]
        strange = [maps for maps in items if tuple(maps.shape) != shape]
        if strange:
            raise ValueError(
                f"kind {self.kind!r} reads maps of shape {shape}, got {tuple(strange[0].shape)}: "
                "kind 'set' takes any number of classes and any image size"
            )
        return items

    def _maps(self, signature: Signature) -> Tensor:
        """What a network of the paper reads; the convolution reads statistics of them from 100 classes up."""
        many = self.kind == "convolution" and signature.num_classes >= STATISTICS_FROM
        return statistics_maps(signature) if many else signature.maps

    def _device(self, items: Items) -> torch.device:
        first = items[0].planes if isinstance(items[0], Evidence) else items[0]
        return torch.device(self.device) if self.device else first.device

    def _recipe(self) -> Recipe:
        usual = self._kind()
        return Recipe(
            epochs=self.epochs or usual.epochs,
            batch_size=self.batch_size or usual.batch_size,
            learning_rate=self.learning_rate or usual.learning_rate,
            precision="fp32" if self.kind == "set" else self.precision,
            seed=self.seed,
            members=usual.members,
        )

    def _probabilities(self, items: Items) -> tuple[Scores, Tensor | None]:
        """Probability of "trojaned" (n,), and of being the target (n, k) where classes have one."""
        findings = ensemble_findings(self._fitted(), items, self._device(items))
        classes = None if findings.classes is None else findings.classes.softmax(1)
        return margins(findings.logits).sigmoid(), classes

    def _judge(self, signature: Signature, class_names: Sequence[str]) -> ScanResult:
        name = f"signature-{self.kind}"
        self._fitted()
        if problem := _unreadable(signature):
            return ScanResult.undecided(name, problem)
        scores, classes = self._probabilities(self._items([signature], self.shape_))
        score, reference = float(scores[0]), self.reference_
        judgement = judge(score, self.threshold_, reference)
        class_scores = tuple(classes[0].tolist()) if classes is not None and self.localises_ else ()
        likely = judgement.flagged and max(class_scores, default=0.0) >= 0.5
        target = class_scores.index(max(class_scores)) if likely else None
        return ScanResult(
            Verdict.of(flagged=judgement.flagged, demonstrated=False),
            name,
            score=score,
            threshold=self.threshold_,
            p_value=judgement.p_value,
            class_scores=class_scores,
            target=target,
            reached=tuple(signature.reached[-signature.num_classes :].tolist()),
            reference=reference,
            facts={
                "maps": self.maps,
                "preset": self.preset,
                "fitted on": self.fitted_on_,
                "epochs": self._recipe().epochs,
            },
            exhibits=_exhibits(class_scores, class_names, target),
            warnings=judgement.warnings,
        )


def _unreadable(signature: Signature) -> str:
    if signature.num_classes < 2:
        return f"the signature has {signature.num_classes} class: scan a classifier of at least 2 classes"
    if not signature.reached.isfinite().all():
        return "activations of the signature are not finite: check the weights for NaN or change the preset"
    return ""


def _exhibits(scores: tuple[float, ...], names: Sequence[str], target: int | None) -> tuple[Bars, ...]:
    if not scores:
        return ()
    marked = () if target is None else (target,)
    return (Bars("Which class is the target", tuple(names), scores, marked=marked, axis="probability"),)
