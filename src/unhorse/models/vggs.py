"""VGG (Simonyan and Zisserman, ICLR 2015) and AlexNet (Krizhevsky, 2014), named as in torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from unhorse.models.registry import (
    IMAGENET,
    Architecture,
    ImageShape,
    Naming,
    Renames,
    Signs,
    State,
    assumed,
)

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG, plain or with batch normalisation; `repeats` is the number of convolutions before each pooling."""

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        *,
        repeats: tuple[int, ...],
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        wide = image_shape[0]
        layers: list[nn.Module] = []
        for count, width in zip(repeats, WIDTHS, strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(wide, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU())
                wide = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


class AlexNet(nn.Module):
    """AlexNet in one column (Krizhevsky, "One weird trick", 2014): 64 first maps, no local normalisation."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(image_shape[0], 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def _options(repeats: tuple[int, ...]) -> Callable[[State], dict[str, object]]:
    """Whether there is batch normalisation; ValueError unless there are as many convolutions."""

    def read(state: State) -> dict[str, object]:
        convolutions = [name for name, value in state.items() if value.dim() == 4]
        if len(convolutions) != sum(repeats):
            raise ValueError(f"{len(convolutions)} convolutions, not {sum(repeats)}")
        return {"batch_norm": True} if "features.1.running_mean" in state else {}

    return read


def _timm_head(state: State) -> State:
    """timm keeps the first two linear layers as convolutions over the 7x7 map."""
    return {
        name: value.flatten(1) if name in ("classifier.0.weight", "classifier.3.weight") else value
        for name, value in state.items()
    }


_TIMM_NAMES: Renames = (
    (r"^pre_logits\.fc1\.", "classifier.0."),
    (r"^pre_logits\.fc2\.", "classifier.3."),
    (r"^head\.fc\.", "classifier.6."),
)
_TIMM = Naming(_TIMM_NAMES, _timm_head)


def _vgg(*repeats: int) -> Architecture:
    last = "classifier.6.weight"
    marks = ("classifier.0.weight", "classifier.3.weight")
    signs = Signs("features.0.weight", last, assumed(224), _options(repeats), (_TIMM,), marks)
    return Architecture(
        partial(VGG, repeats=repeats), (3, 224, 224), signs, IMAGENET, ("batch_norm",), family="vgg"
    )


VGGS = {
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "alexnet": Architecture(
        AlexNet,
        (3, 224, 224),
        Signs("features.0.weight", "classifier.6.weight", assumed(224), marks=("classifier.4.weight",)),
        IMAGENET,
    ),
}
