"""VGG (Simonyan and Zisserman, ICLR 2015), named as in torchvision."""

from __future__ import annotations

from torch import Tensor, nn

from unhorse.models.registry import IMAGENET, Architecture, ImageShape, Signs, State, assumed


class VGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman, ICLR 2015), plain or with batch normalisation."""

    def __init__(self, num_classes: int, image_shape: ImageShape, *, batch_norm: bool = False) -> None:
        super().__init__()
        wide = image_shape[0]
        layers: list[nn.Module] = []
        for repeats, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(repeats):
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


def _options(state: State) -> dict[str, object]:
    return {"batch_norm": True} if "features.1.running_mean" in state else {}


VGGS = {
    "vgg16": Architecture(
        VGG16,
        (3, 224, 224),
        Signs("features.0.weight", "classifier.6.weight", assumed(224), _options),
        IMAGENET,
        ("batch_norm",),
        "vgg",
    )
}
