"""Input filtering: an autoencoder that keeps what the classifier needs of an image and loses the trigger."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Classifier, Dataset, Images, Labels
from unhorse.filters.fitting import (
    FilterEpoch,
    OnEpoch,
    Precision,
    Terms,
    frozen,
    new_network,
    new_optimizer,
    play,
    purify,
    settled,
    trains_in_bf16,
    usable,
)
from unhorse.filters.networks import FilterNetwork
from unhorse.metrics import accuracy
from unhorse.models.training import autocast

SELECTION_SHARE = 0.2


class Trial(NamedTuple):
    """A KL weight and the clean accuracy that it cost on images the filter was not fitted on."""

    kl_weight: float
    clean_drop: float


@dataclass
class PurifyingFilter:
    """IF and VIF (Do et al., ECCV 2022, arXiv 2202.12154, Eq. 3 and 4): what passes a bottleneck is clean.

    The loss of an image x of class y, purified to x°, under the frozen classifier p is
    label_weight * -log p(y | x°) + reconstruction_weight * ||x° - x|| + kl_weight * KL(q(z | x) || N(0, I)).
    VIF has a `kl_weight` above 0 and samples z in fitting; IF has none; IP has no `label_weight` either;
    `input_noise` is the deviation of the noise that a denoising autoencoder undoes. Of `kl_candidates` the
    largest is taken that costs at most `tolerance` of clean accuracy. With `test_samples` above 0 the mean of
    so many decoded samples is returned in place of the decoded mean. The label term is left out for the first
    `warm_up` of the fit and comes in over as long again.
    """

    network: str = "auto"
    label_weight: float = 1.0
    reconstruction_weight: float = 1.0
    kl_weight: float = 0.0
    kl_candidates: tuple[float, ...] = ()
    tolerance: float = 0.01
    input_noise: float = 0.0
    test_samples: int = 0
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    crop: int = 0
    flip: bool = False
    rotation: float = 0.0
    precision: Precision = "auto"
    held_out: float = 0.1
    patience: int = 5
    warm_up: float = 0.1
    seed: int = 0
    network_: FilterNetwork = field(init=False, repr=False, compare=False)
    log_: list[FilterEpoch] = field(init=False, repr=False, compare=False)
    kl_weight_: float = field(init=False, repr=False, compare=False)
    trials_: list[Trial] = field(init=False, repr=False, compare=False)

    def fit(
        self,
        model: Classifier,
        clean: Dataset,
        *,
        checkpoint: Path | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> Self:
        """Fits on clean images; labels that are missing are the model's own predictions.

        With a `checkpoint` path a fit that was killed goes on after its last whole epoch.
        """
        clean = usable(model, clean, self)
        self.trials_ = self._trials(model, clean, checkpoint, on_epoch) if self.kl_candidates else []
        self.kl_weight_ = self.trials_[-1].kl_weight if self.trials_ else self.kl_weight
        settings = replace(self, kl_weight=self.kl_weight_, kl_candidates=())
        self.network_, self.log_ = settings._play(model, clean, "", checkpoint, on_epoch)
        if checkpoint is not None:
            for path in (checkpoint, *(_of_trial(checkpoint, index) for index in range(len(self.trials_)))):
                path.unlink(missing_ok=True)
        return self

    def __call__(self, images: Images) -> Images:
        """The purified images; what becomes of one does not depend on the others."""
        if not self.test_samples:
            return purify(self.network_, images)
        network = self.network_.to(images.device).eval()
        mean, log_variance = network.encode(images)
        rng = torch.Generator(images.device).manual_seed(self.seed)
        drawn = torch.randn(
            (self.test_samples, 1, *mean.shape[1:]), generator=rng, device=images.device, dtype=mean.dtype
        )
        return torch.stack([network.decode(mean + (log_variance / 2).exp() * noise) for noise in drawn]).mean(
            0
        )

    def _trials(
        self, model: Classifier, clean: Dataset, checkpoint: Path | None, on_epoch: OnEpoch | None
    ) -> list[Trial]:
        """Candidates from the largest down to the first that is accurate enough, or to the smallest."""
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(self.seed + 1))
        count = round(SELECTION_SHARE * len(clean))
        judging, fitting = clean[order[:count]], clean[order[count:]]
        before, trials = accuracy(model, judging), list[Trial]()
        for candidate in sorted(self.kl_candidates, reverse=True):
            settings = replace(self, kl_weight=candidate, kl_candidates=())
            path = None if checkpoint is None else _of_trial(checkpoint, len(trials))
            network, _ = settings._play(model, fitting, f"kl_weight {candidate:g}", path, on_epoch)
            trials.append(Trial(candidate, before - accuracy(nn.Sequential(network, model), judging)))
            if trials[-1].clean_drop <= self.tolerance:
                break
        return trials

    def _play(
        self, model: Classifier, clean: Dataset, stage: str, checkpoint: Path | None, on_epoch: OnEpoch | None
    ) -> tuple[FilterNetwork, list[FilterEpoch]]:
        network = new_network(self.network, model, self.seed)
        purification = _Purification(self, network, model)
        with frozen(model):
            log = play(purification, clean, self, stage=stage, checkpoint=checkpoint, on_epoch=on_epoch)
        return settled(network), log


class _Purification:
    """The game of one player: the filter network against its own loss."""

    label_share = 1.0

    def __init__(self, settings: PurifyingFilter, network: FilterNetwork, model: Classifier) -> None:
        self.settings, self.network, self.model = settings, network, model
        self.device = model.mean.device
        self.low_precision = trains_in_bf16(network, model, settings.precision)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks: dict[str, nn.Module] = {"network": network}
        self.optimizers = [new_optimizer(network, settings)]

    def step(self, images: Images, labels: Labels, rng: torch.Generator) -> Terms:
        terms = self._terms(images, labels, rng)
        self.optimizers[0].zero_grad(set_to_none=True)
        terms["loss"].backward()
        self.optimizers[0].step()
        return {name: value.detach() for name, value in terms.items()}

    def objective(self, images: Images, labels: Labels) -> Tensor:
        return self._terms(images, labels, None)["loss"]

    def _terms(self, images: Images, labels: Labels, rng: torch.Generator | None) -> Terms:
        settings, seen = self.settings, images
        if settings.input_noise and rng is not None:
            seen = images + settings.input_noise * _normal_like(images, rng)
        with autocast(self.device, self.low_precision):
            mean, log_variance = self.network.encode(seen)
            latent = mean
            if settings.kl_weight and rng is not None:
                latent = mean + (log_variance / 2).exp() * _normal_like(mean, rng)
            filtered = self.network.decode(latent)
        terms = {"reconstruction": distance(filtered, images).mean()}
        loss = settings.reconstruction_weight * terms["reconstruction"]
        if settings.label_weight:
            with autocast(self.device, self.low_precision):
                logits = self.model(filtered.contiguous(memory_format=torch.channels_last))
            terms["label"] = functional.cross_entropy(logits, labels)
            share = 1.0 if rng is None else self.label_share
            loss = loss + share * settings.label_weight * terms["label"]
        if settings.kl_weight:
            terms["divergence"] = divergence(mean, log_variance).mean()
            loss = loss + settings.kl_weight * terms["divergence"]
        return terms | {"loss": loss}


def _of_trial(checkpoint: Path, index: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.{index}")


def distance(filtered: Images, images: Images) -> Float[Tensor, " n"]:
    """Euclidean distance of each image to its original, over channels and pixels; not squared."""
    return torch.linalg.vector_norm((filtered - images).flatten(1), dim=1)


def divergence(mean: Tensor, log_variance: Tensor) -> Float[Tensor, " n"]:
    """KL(N(mean, exp(log_variance)) || N(0, I)) of each image, summed over the latent, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).flatten(1).sum(1)


def _normal_like(values: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(values.shape, generator=rng, device=values.device, dtype=values.dtype)
