"""Trigger synthesis three ways (Do et al., ECCV 2022, Sec. 3, Fig. 2): triggers that turn images into a
class, found by gradient. An analysis of a victim, not a defence.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from unhorse.core import Classifier, Dataset, ImageGrid, Images, Labels
from unhorse.scanners.optimisation import Adam, frozen

Variant = Literal["per-image", "mask-generator", "image-generator"]
HELD_OUT = 200
"""At most so many images are measured; generators learn from the others, `BATCH` per step."""
BATCH = 32
NORM_WEIGHT = 1.0  # lambda0
COMMON_RATE = 10.0  # the common map learns as fast as the variables of PerImage


class Synthesis(NamedTuple):
    """Held-out images of other classes, under the synthetic trigger of the class.

    `masks` are in [0, 1]: the blending masks, or the size of the change where the variant has no mask. `norm`
    is the Euclidean norm of the mask, or of the whole change.
    """

    originals: Images
    images: Images
    masks: Float[Tensor, "n 1 h w"]
    success: Bool[Tensor, " n"]
    norm: Float[Tensor, " n"]


class Stamped(NamedTuple):
    images: Images
    masks: Float[Tensor, "n 1 h w"]
    norm: Float[Tensor, " n"]


class PerImage(nn.Module):
    """Mask and pattern are free variables of each image, so it stamps just the images that it learned on."""

    learning_rate = 0.1

    def __init__(self, images: Images, start: float, rng: torch.Generator) -> None:
        super().__init__()
        noise = torch.randn(images.shape, generator=rng).to(images)
        self.masks = nn.Parameter(torch.full_like(images[:, :1], start))
        self.patterns = nn.Parameter(noise)

    def forward(self, images: Images) -> Stamped:
        return _blended(images, self.masks, self.patterns)


class Generator(nn.Module):
    """A small network of the image, and one learned map that is the same for all images."""

    learning_rate = 0.01

    def __init__(self, shape: tuple[int, int, int], maps: int, start: float) -> None:
        super().__init__()
        channels, height, width = shape
        self.inner = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)),
            *(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()),
            nn.Upsample((height, width)),
            nn.Conv2d(16, maps, 3, padding=1),
        )
        common = torch.zeros(1, maps, height, width)
        common[:, 0] = start / COMMON_RATE
        self.common = nn.Parameter(common)

    def maps(self, images: Images) -> Tensor:
        return self.inner(images) + COMMON_RATE * self.common


class MaskGenerator(Generator):
    """(mask, pattern) = G(x), blended into x."""

    def __init__(self, shape: tuple[int, int, int], start: float) -> None:
        super().__init__(shape, 1 + shape[0], start)

    def forward(self, images: Images) -> Stamped:
        maps = self.maps(images)
        return _blended(images, maps[:, :1], maps[:, 1:])


class ImageGenerator(Generator):
    """x~ = G(x): moves every pixel a learned share of its way to black or to white, so it starts as x."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape, shape[0], 0.0)

    def forward(self, images: Images) -> Stamped:
        moves = self.maps(images).tanh()
        synthetic = images + moves.relu() * (1 - images) - (-moves).relu() * images
        change = synthetic - images
        return Stamped(synthetic, change.abs().amax(1, keepdim=True), _norm(change))


def _blended(images: Images, mask_logits: Tensor, pattern_logits: Tensor) -> Stamped:
    masks = mask_logits.sigmoid()
    return Stamped(images + masks * (pattern_logits.sigmoid() - images), masks, _norm(masks))


def _norm(maps: Tensor) -> Float[Tensor, " n"]:
    return (maps.flatten(1).square().sum(1) + 1e-12).sqrt()  # its gradient at 0 is 0, not NaN


def synthesise(
    model: Classifier,
    images: Images,
    labels: Labels,
    target: int,
    variant: Variant,
    delta: float,
    *,
    steps: int,
    seed: int,
) -> Synthesis:
    """Minimises L_gen = -log p(target | x~) + max(||m|| - delta, 0), and measures what was found on images
    that the generators did not learn from.

    `images` (n, c, h, w) of class `target` are left out; `delta` bounds the Euclidean norm of the mask, which
    for pixels in [0, 1] is at most sqrt(h * w), or that of x~ - x. The model is left as it was.
    Raises ValueError for a target, variant or bound that cannot be, and where there are too few images.
    """
    others = images[labels != target]
    if not 0 <= target < model.num_classes:
        raise ValueError(f"target class {target} is outside 0..{model.num_classes - 1}")
    if not delta > 0:
        raise ValueError(f"delta bounds the norm of a trigger, got {delta}: give a positive number")
    if len(others) < 2:
        raise ValueError(f"{len(others)} images are not of class {target}: give at least two")
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(others), generator=rng).to(images.device)
    count = min(HELD_OUT, len(others) // 2)
    held_out, known = others[order[:count]], others[order[count:]]
    stamp = _stamp(variant, held_out, delta, rng)
    wanted = torch.tensor(target, device=images.device)
    with frozen(model, "fp32"):
        leaves = list(stamp.parameters())
        optimizer = Adam(leaves, stamp.learning_rate)
        for _ in range(steps):
            batch = held_out
            if not isinstance(stamp, PerImage):
                batch = known[torch.randint(len(known), (BATCH,), generator=rng).to(images.device)]
            loss = _loss(model, stamp(batch), wanted, delta)
            optimizer.step(torch.autograd.grad(loss, leaves))
        with torch.no_grad():
            found = stamp(held_out)
            success = model(found.images).argmax(1) == wanted
    return Synthesis(held_out, found.images, found.masks, success, found.norm)


def measure_synthesis(
    model: Classifier,
    data: Dataset,
    attack_target: int,
    *,
    variant: Variant,
    delta: float,
    steps: int = 150,
    seed: int = 0,
) -> dict[str, float]:
    """How far synthetic triggers get for the attack's target class, and for another class drawn by `seed`.

    `success_rate` and `trigger_norm` (mean) are of the target class, with `other_` before them of the other.
    Where they are alike, the synthesis found adversarial noise rather than the Trojan. The bound is a price,
    not a wall: a norm above `delta` says that turning images within it was dearer than leaving it.
    """
    if data.labels is None:
        raise ValueError(f"data set {data.name!r} has no labels: give images in one folder per class")
    device = model.mean.device
    images, labels = data.pixels(device), data.labels.to(device)
    step = torch.randint(1, model.num_classes, (), generator=torch.Generator().manual_seed(seed)).item()
    other = int(attack_target + step) % model.num_classes
    found = {}
    for prefix, target in (("", attack_target), ("other_", other)):
        result = synthesise(model, images, labels, target, variant, delta, steps=steps, seed=seed)
        found[f"{prefix}success_rate"] = result.success.double().mean().item()
        found[f"{prefix}trigger_norm"] = result.norm.double().mean().item()
    return found


def pictures(result: Synthesis, title: str, *, count: int = 8) -> ImageGrid:
    """A row each of images, of the same under their synthetic trigger, and of the masks."""
    rows = (result.originals, result.images, result.masks.expand_as(result.images))
    names = ("image", "with trigger", "mask")
    shown = min(count, len(result.images))
    captions = tuple(name for name in names for _ in range(shown))
    return ImageGrid(title, torch.cat([row[:count] for row in rows]), captions, columns=shown)


def _stamp(
    variant: Variant, images: Images, delta: float, rng: torch.Generator
) -> PerImage | MaskGenerator | ImageGenerator:
    """A stamp whose masks start near half of their bound."""
    channels, height, width = images.shape[1:]
    share = min(max(delta / 2 / (height * width) ** 0.5, 0.01), 0.5)
    start = torch.logit(torch.tensor(share)).item()
    if variant == "per-image":
        return PerImage(images, start, rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        if variant == "mask-generator":
            return MaskGenerator((channels, height, width), start).to(images.device)
        if variant == "image-generator":
            return ImageGenerator((channels, height, width)).to(images.device)
    raise ValueError(f"no variant {variant!r}: one of per-image, mask-generator, image-generator")


def _loss(model: Classifier, stamped: Stamped, wanted: Tensor, delta: float) -> Tensor:
    labels = wanted.expand(len(stamped.images))
    excess = (stamped.norm - delta).relu().sum()
    return functional.cross_entropy(model(stamped.images), labels, reduction="sum") + NORM_WEIGHT * excess
