"""What a report shows of a guard: pictures of what the filter removed, and the scores it judges by."""

from __future__ import annotations

import torch
from torch import Tensor

from unhorse.core import Exhibit, Histogram, ImageGrid
from unhorse.inputs import scaled
from unhorse.monitors.guard import Guard
from unhorse.monitors.rates import Evaluation

SHOWN = 10


def evidence(
    guard: Guard, images: Tensor, evaluation: Evaluation | None = None, *, shown: int = SHOWN
) -> tuple[Exhibit, ...]:
    """The first `shown` images with what the guard did to them, and a histogram of scores.

    The scores are those of `evaluation`, otherwise of the calibration; without either there is no histogram.
    """
    pictures = _pictures(guard, images[:shown])
    samples: dict[str, list[float]] = {}
    if evaluation is not None:
        samples["clean images"] = evaluation.clean_scores.tolist()
        if len(evaluation.trojan_scores):
            samples["Trojan images"] = evaluation.trojan_scores.tolist()
    elif guard.calibration_ is not None:
        samples["clean images, calibration"] = list(guard.calibration_.scores)
    if not samples:
        return (pictures,)
    note = "Above the threshold an image alarms; above 0 the filtered image has another class."
    return (pictures, Histogram("Scores of images", samples, guard.threshold, "score", note))


def _pictures(guard: Guard, images: Tensor) -> ImageGrid:
    """Three rows: the images, the filtered images, what was removed (grey is nothing)."""
    images = scaled(images).to(guard.model.mean.device)
    decision = guard(images)
    names, count = guard.model.class_names, len(images)
    before, after = decision.logits.argmax(1).tolist(), decision.filtered_logits.argmax(1).tolist()
    return ImageGrid(
        "Input, filtered input, difference",
        torch.cat([images, decision.filtered, 0.5 + decision.counter_trigger / 2]).cpu(),  # (3n, c, h, w)
        (
            *(f"input: {names[index]}" for index in before),
            *(f"filtered: {names[index]}" for index in after),
            *(f"removed, score {score:.2f}" for score in decision.score.tolist()),
        ),
        tuple(index for index, alarmed in enumerate(decision.alarm.tolist()) if alarmed),
        columns=count,
        note="Framed inputs alarm. The difference is input minus filtered input; grey is no difference.",
    )
