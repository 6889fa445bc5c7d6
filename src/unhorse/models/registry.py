"""What the registry keeps of an architecture: how to build it, and how a state dict shows that it is one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

ImageShape = tuple[int, int, int]
State = Mapping[str, Tensor]
Renames = tuple[tuple[str, str], ...]
"""Pattern and replacement: foreign names into ours."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Normal:
    """What a network subtracts and divides by, for pixels in [0, 1]."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


IMAGENET, HALVES = Normal(IMAGENET_MEAN, IMAGENET_STD), Normal((0.5,), (0.5,))


@dataclass(frozen=True)
class Naming:
    """How another code base names the same tensors, and what is different in its networks.

    `renames` turn its names into ours, then `change` does what patterns cannot (ValueError or KeyError: the
    state is not named so). `options` and `normal` hold for networks of this naming; `notes` say what was
    assumed or left out.
    """

    renames: Renames = ()
    change: Callable[[State], State] | None = None
    options: tuple[tuple[str, object], ...] = ()
    normal: Normal | None = None
    notes: tuple[str, ...] = ()

    def __call__(self, state: State) -> dict[str, Tensor]:
        """The state under our names."""
        renamed = {}
        for name, tensor in state.items():
            for pattern, ours in self.renames:
                name = re.sub(pattern, ours, name)
            renamed[name] = tensor
        return dict(self.change(renamed) if self.change else renamed)


OURS = Naming()


@dataclass(frozen=True)
class Signs:
    """How a state dict shows that it is of an architecture, before a network is built to compare.

    The number of channels is in the 4-d weight `first`, that of classes in `last`; all `marks` must be there.
    `side` gives the side of the images and whether the weights determine it. `options` reads the options off
    the shapes; it raises KeyError or ValueError where the state is of another member of the family, which
    costs less than building that member.
    """

    first: str
    last: str
    side: Callable[[State], tuple[int, bool]]
    options: Callable[[State], dict[str, object]] = lambda state: {}
    namings: tuple[Naming, ...] = ()
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """How to build a network, the image shape and normalisation that are usual for it, and its signs.

    `options` names what may be chosen: a card from elsewhere can set nothing more. `family` is what error
    messages list it under. One with the tensors of its `twin` is taken only where the user names it.
    """

    network: Callable[..., nn.Module]
    image_shape: ImageShape
    signs: Signs
    normal: Normal = Normal()
    options: tuple[str, ...] = ()
    family: str = ""
    twin: str = ""


def fixed(side: int) -> Callable[[State], tuple[int, bool]]:
    """The weights fit images of this side only."""
    return lambda state: (side, True)


def assumed(side: int) -> Callable[[State], tuple[int, bool]]:
    """The weights fit images of other sides, too."""
    return lambda state: (side, False)


def numbered(state: State, pattern: str) -> int:
    """How many different numbers stand at the group of `pattern` in the names: blocks of a stage, say."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
