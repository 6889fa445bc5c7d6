"""Screening of many classes: a few steps for all, all steps for those that lead and a sample of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Labels


class Plan(NamedTuple):
    """Classes that go to full steps: `leaders` (n,), and `controls`, one per block of neighbours in the
    screened ranking; `block` (k,) has the place of each class's control, -1 for leaders.
    """

    leaders: Labels
    controls: Labels
    block: Labels

    @property
    def classes(self) -> Labels:
        """Leaders, then controls."""
        return torch.cat([self.leaders, self.controls])

    def combined(self, reached: Float[Tensor, " n"]) -> Float[Tensor, " k"]:
        """Margins of all classes from those of `classes`: one that was not finished stands at the margin of
        its block's control, at most at the leaders' median, below which screening ranked it.
        """
        own, controls = reached[: len(self.leaders)], reached[len(self.leaders) :]
        margins = controls.clamp(max=own.median())[self.block.clamp(min=0)]
        margins[self.leaders], margins[self.controls] = own, controls
        return margins


@dataclass(frozen=True)
class Screening:
    """Models of `above` classes or more are screened for `steps` steps from one start; the `share` of classes
    that lead, `least` at least, are finished, and `controls` others spread evenly over the screened ranks.

    The controls are a stratified sample of the classes that do not lead, so that the median and the spread of
    the margins are estimated at full steps: margins of unequal steps are never compared.
    """

    above: int = 100
    steps: int = 10
    share: float = 0.05
    least: int = 8
    controls: int = 32

    def leading(self, num_classes: int) -> int:
        """How many classes are finished because they lead."""
        return max(self.least, round(self.share * num_classes))

    def finished(self, num_classes: int) -> int:
        """How many classes go to full steps."""
        return self.leading(num_classes) + self.controls

    def plan(self, screened: Float[Tensor, " k"]) -> Plan:
        """What to finish, given the screened margins of all classes."""
        ranking = screened.argsort(descending=True, stable=True)
        leaders, rest = ranking.split([n := self.leading(len(ranking)), len(ranking) - n])
        blocks = rest.tensor_split(self.controls)
        block = torch.full((len(ranking),), -1)
        for place, classes in enumerate(blocks):
            block[classes] = place
        return Plan(leaders, torch.stack([classes[len(classes) // 2] for classes in blocks]), block)
