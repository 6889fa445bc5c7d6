"""The guarded classifier: what a guard decides, and the one module that is deployed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from unhorse.core import Classifier, Images, Labels, Logits, Scores
from unhorse.inputs import SLACK
from unhorse.monitors.contrast import Comparison, contrast_score

Policy = Literal["observe", "hold", "replace"]
POLICIES: tuple[Policy, ...] = ("observe", "hold", "replace")
HELD = -1
"""The label of an image that gets no answer."""


class Decision(NamedTuple):
    """What a guard says of n images; `counter_trigger` (n, c, h, w) is what the filter took away, x - x°."""

    logits: Logits
    filtered_logits: Logits
    label: Labels
    alarm: Tensor
    score: Scores
    filtered: Images
    counter_trigger: Tensor


def decide(
    images: Images,
    comparison: Comparison,
    *,
    threshold: Tensor | float,
    hold: Tensor | bool,
    replace: Tensor | bool,
) -> Decision:
    """Alarm where the score exceeds `threshold`, and the label that the policy gives.

    An image with pixels outside [0, 1] or a NaN, in itself or in its logits, has an infinite score: it always
    alarms and is never answered by its filtered self.
    """
    logits, filtered, filtered_logits, score = comparison
    pixels = images.flatten(1)
    usable = (pixels.amin(1) >= -SLACK) & (pixels.amax(1) <= 1 + SLACK)  # False for NaN
    score = score.masked_fill(~usable, torch.inf)
    alarm = score > threshold
    label = torch.where(alarm & replace, filtered_logits.argmax(1), logits.argmax(1))
    label = label.masked_fill(alarm & (hold | (replace & score.isinf())), HELD)
    return Decision(logits, filtered_logits, label, alarm, score, filtered, images - filtered)


class GuardedClassifier(nn.Module):
    """Images to (logits, filtered logits, label or -1, alarm, counter-trigger): a classifier and its guard.

    Threshold and policy are buffers, so the module is its tensors; torch.export takes it with a dynamic
    batch.
    """

    threshold: Tensor
    hold: Tensor
    replace: Tensor

    def __init__(
        self, classifier: Classifier, filter_network: nn.Module, *, threshold: float, policy: Policy
    ) -> None:
        super().__init__()
        self.classifier, self.filter_network = classifier, filter_network
        self.register_buffer("threshold", torch.tensor(threshold))
        self.register_buffer("hold", torch.tensor(policy == "hold"))
        self.register_buffer("replace", torch.tensor(policy == "replace"))

    def forward(self, images: Images) -> tuple[Logits, Logits, Labels, Tensor, Tensor]:
        filtered = self.filter_network(images)
        both = self.classifier(torch.cat([images, filtered]))  # (2n, k)
        logits, filtered_logits = both[: images.shape[0]], both[images.shape[0] :]
        comparison = Comparison(logits, filtered, filtered_logits, contrast_score(logits, filtered_logits))
        decision = decide(images, comparison, threshold=self.threshold, hold=self.hold, replace=self.replace)
        return (
            decision.logits,
            decision.filtered_logits,
            decision.label,
            decision.alarm,
            decision.counter_trigger,
        )
