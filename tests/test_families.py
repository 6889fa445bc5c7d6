"""Published networks answer as the originals do, and are recognised under every name they are known by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unhorse.loading.identification import identify
from unhorse.models.architectures import ARCHITECTURES, outline

from twin_networks import CLASSES, TWINS, Twin, of_transformers


def filled(name: str, state: dict[str, Tensor], shape: tuple[int, int, int], **options: object) -> nn.Module:
    """The named network with these weights."""
    network = outline(name, num_classes=CLASSES, image_shape=shape, **options)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
@torch.no_grad()
def test_outputs_are_those_of_transformers(twin: Twin) -> None:
    other, state = of_transformers(twin)
    shape = (3, twin.side, twin.side)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wanted = other(images).logits
    # the counters of batches are absent from some networks
    found = identify(state, architecture=twin.name, image_shape=shape)
    network = filled(found.name, found.state, shape, **found.options)
    assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3 * float(wanted.abs().max())
    assert relative_difference(network(images), wanted) < 1e-4
