"""Stand-ins for clean images: what a model takes for each class, however much it is disturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from unhorse.core import Classifier, Images, Labels, Logits
from unhorse.models.training import autocast
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.footprints import Inputs
from unhorse.scanners.optimisation import Adam, Precision, chunk_size, uses_bf16
from unhorse.scanners.readings import lead_of, lead_of_others

COARSE = 4
"""A start image is this many random pixels wide and high, enlarged."""
LOOKS = 4
"""How often each finished image is disturbed and looked at."""


class StandIns(NamedTuple):
    """Images that the model gives their class, with it; how often each keeps it when disturbed (n,); and its
    logits on them. Of what it does not take for its class nothing is left.
    """

    inputs: Inputs
    held: Float[Tensor, " n"]
    logits: Logits

    @property
    def leads(self) -> Float[Tensor, " n"]:
        """By how much each image's class leads the next."""
        return -lead_of_others(self.logits, self.inputs.labels)


class _Drafts(NamedTuple):
    """Images on their way from their starts to their classes, and what departing from a start weighs (n,)."""

    starts: Images
    images: Images
    labels: Labels
    weights: Float[Tensor, " n"]


@dataclass(frozen=True)
class StandInSearch:
    """Draws `count` images in [0, 1], as many for each class, or one for each of `most_classes`.

    Each starts from a few random colours of low `contrast`, enlarged, and `steps` steps of Adam on its pixels
    raise the lead of its class to `lead`, and no further, while it is shifted by up to an eighth of its side,
    its contrast changed by up to 30 %, a quarter of its side covered with one colour and noise of deviation
    `noise` added; `strength` scales all of it, and grows to its full size in the first 60 % of the steps.
    `closeness` weighs the squared distance from the start, `smoothness` the total variation; what they cost
    an image is multiplied by `patience` at each step at which its class does not lead, for some networks see
    one class in all that is grey and smooth. Images that are not of their class in the end go on for as many
    steps again, in at most `rounds`.

    Images that are only optimised are brittle: any stamp changes what a benign network sees in them. These
    are not; but they are no louder than natural images either, which a trigger must drown out too: what
    cross-entropy alone drives far beyond them, the victim's own trigger does not flip (docs/log.md).
    """

    count: int = 40
    most_classes: int = 64
    steps: int = 80
    learning_rate: float = 0.03
    strength: float = 0.5
    noise: float = 0.15
    lead: float = 3.0
    contrast: float = 0.4
    closeness: float = 0.1
    smoothness: float = 0.15
    patience: float = 0.95
    rounds: int = 3
    seed: int = 0

    def classes(self, num_classes: int) -> Labels:
        """The class of each image, spread evenly where there are more than `most_classes`."""
        some = torch.linspace(0, num_classes - 1, min(num_classes, self.most_classes)).round().long()
        return some.repeat_interleave(max(1, self.count // len(some)))

    def passes(self, num_classes: int) -> int:
        """Forward and backward passes of one image, at most."""
        return len(self.classes(num_classes)) * (self.rounds * (self.steps + 1) + LOOKS)

    def run(
        self, model: Classifier, precision: Precision = "auto", clock: Countdown | None = None
    ) -> StandIns:
        """The images of `model`; call it inside `frozen(model)`. TimeUp when the clock's budget is spent."""
        clock, rng = clock or Countdown(), torch.Generator().manual_seed(self.seed)
        labels = self.classes(model.num_classes)
        coarse = torch.rand(len(labels), model.image_shape[0], COARSE, COARSE, generator=rng)
        coarse = 0.5 + self.contrast * (coarse - 0.5)
        images = functional.interpolate(coarse, size=model.image_shape[1:], mode="bicubic").clamp(0, 1)
        images, labels, size = images.to(model.mean.device), labels.to(model.mean.device), chunk_size(model)
        parts = [
            self._drawn(model, some, own, rng, precision, clock)
            for some, own in zip(images.split(size), labels.split(size), strict=True)
        ]
        inputs, held, logits = (torch.cat(several) for several in zip(*parts, strict=True))
        kept = logits.argmax(1) == labels
        return StandIns(Inputs(inputs[kept], labels[kept]), held[kept], logits[kept])

    def _drawn(
        self,
        model: Classifier,
        images: Images,
        labels: Labels,
        rng: torch.Generator,
        precision: Precision,
        clock: Countdown,
    ) -> tuple[Images, Tensor, Logits]:
        drafts = _Drafts(images, images.clone(), labels, torch.ones_like(images[:, 0, 0, 0]))
        failed = torch.arange(len(images), device=images.device)
        for _ in range(self.rounds):
            some = _Drafts(*(part[failed] for part in drafts))
            self._improve(model, some, rng, precision, clock)
            drafts.images[failed], drafts.weights[failed] = some.images, some.weights
            with torch.no_grad():
                seen = model(some.images).argmax(1)
            clock.passed(len(failed))
            failed = failed[seen != some.labels]
            if not len(failed):
                break
        with torch.no_grad():
            images = drafts.images
            looks = [model(self._disturbed(images, self.strength, rng)).argmax(1) for _ in range(LOOKS)]
            clock.passed(LOOKS * len(images))
            held = torch.stack([look == labels for look in looks]).float().mean(0)
            return images, held, model(images).float()

    def _improve(
        self,
        model: Classifier,
        drafts: _Drafts,
        rng: torch.Generator,
        precision: Precision,
        clock: Countdown,
    ) -> None:
        """One round, in place."""
        starts, images, labels, weights = drafts
        low_precision, optimizer = uses_bf16(model, precision), Adam([images], self.learning_rate)
        for step in range(self.steps):
            strength = self.strength * min(1.0, step / (0.6 * self.steps))
            images.requires_grad_(True)
            with autocast(images.device, low_precision):
                logits = model(self._disturbed(images, strength, rng))
            leads = lead_of(logits.float(), labels)
            departures = (images - starts).square().flatten(1).sum(1)
            costs = self.closeness * departures + self.smoothness * _total_variations(images)
            loss = (self.lead - leads).clamp(min=0).sum() + (weights * costs).sum()
            gradients = torch.autograd.grad(loss, [images])
            images.requires_grad_(False)
            optimizer.step(gradients)
            images.clamp_(0, 1)
            weights *= torch.where(leads.detach() < 0, self.patience, 1.0)
            clock.passed(len(images))

    def _disturbed(self, images: Images, strength: float, rng: torch.Generator) -> Images:
        """One shift for all; contrast, a covering square and noise for each."""
        (n, channels, height, width), to = images.shape, images
        reach, most = max(1, height // 8), round(max(1, height // 8) * strength)
        down, across = torch.randint(-most, most + 1, (2,), generator=rng).tolist()
        padded = functional.pad(images, (reach,) * 4, mode="replicate")
        images = padded[:, :, reach + down :, reach + across :][:, :, :height, :width]
        contrast, covers, level = torch.rand(3, n, 1, 1, 1, generator=rng).to(to)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (1 + strength * (0.6 * contrast - 0.3)) + mean
        squares = _squares(n, height, width, rng).to(to) * (covers < 0.7 * strength)
        colours = torch.rand(n, channels, 1, 1, generator=rng).to(to)
        images = images + squares * (colours - images)
        noise = torch.randn(images.shape, generator=rng).to(to)
        return (images + self.noise * strength * level * noise).clamp(0, 1)


def _total_variations(images: Images) -> Float[Tensor, " n"]:
    """How far neighbouring pixels of each image lie apart, all together."""
    down, across = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return down.flatten(1).sum(1) + across.flatten(1).sum(1)


def _squares(n: int, height: int, width: int, rng: torch.Generator) -> Float[Tensor, "n 1 h w"]:
    """A square of a quarter of the height, at a place of its own per image."""
    side = min(max(2, height // 4), height, width)
    tops = torch.randint(0, height - side + 1, (n, 1, 1, 1), generator=rng)
    lefts = torch.randint(0, width - side + 1, (n, 1, 1, 1), generator=rng)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    inside = (rows >= tops) & (rows < tops + side) & (columns >= lefts) & (columns < lefts + side)
    return inside.float()
