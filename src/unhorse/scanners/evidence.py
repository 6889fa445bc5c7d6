"""Evidence of a Trojan, without data: stand-ins of clean images, stamps on them, images without structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unhorse.core import Classifier, Exhibit, ImageGrid, Labels
from unhorse.scanners.countdown import Countdown
from unhorse.scanners.footprints import Inputs
from unhorse.scanners.optimisation import Precision, frozen
from unhorse.scanners.readings import Readings
from unhorse.scanners.stamps import Stamps, StampSearch
from unhorse.scanners.stand_ins import StandIns, StandInSearch
from unhorse.scanners.unstructured import KINDS, Unstructured

FEW = 4
"""Fewer stand-ins than this say nothing."""
SHOWN, SHOWN_OF_EACH = 8, 2


class Unreadable(ValueError):
    """A model of which no evidence can be taken, and why."""


class Evidence(NamedTuple):
    """What was found in a model: its margins (k,), the shares `sinks` (k,) of images without structure that
    each class takes, its stand-ins, and stamps on them: one `permuting` the classes, and those `towards` each
    of `targets` in the stand-ins `bearers`, one for all and one for every second image; and how images that
    are `unstructured` were drawn.
    """

    reached: Float[Tensor, " k"]
    sinks: Float[Tensor, " k"]
    stand_ins: StandIns
    permuting: Stamps
    targets: Labels
    bearers: Labels
    towards: tuple[Stamps, Stamps]
    unstructured: Unstructured

    def readings(self) -> Readings:
        """What numbers are made of, on the CPU."""
        readings = Readings(
            reached=self.reached,
            sinks=self.sinks,
            labels=self.stand_ins.inputs.labels,
            held=self.stand_ins.held,
            logits=self.stand_ins.logits,
            permuted=self.permuting.leads[0],
            targets=self.targets,
            bearers=self.bearers,
            towards_all=self.towards[0].leads,
            towards_each=self.towards[1].leads,
        )
        return Readings(*(values.cpu() for values in readings))

    def exhibits(self, model: Classifier) -> Iterator[Exhibit]:
        """Some stand-ins, and below them under the stamp that does most towards a class and the one that
        permutes, with what `model` sees; and images without structure.
        """
        images, labels = self.stand_ins.inputs
        some = self.bearers[:: max(1, len(self.bearers) // SHOWN)][:SHOWN]
        images, labels = images[some], labels[some]
        best = int(self.readings().rises().argmax())
        target = model.class_names[int(self.targets[best])]
        stamped = {
            f"one stamp towards {target}": self.towards[0].on(images, best),
            "one stamp towards another class for each": self.permuting.on(images, 0),
        }
        captions = [f"class {model.class_names[label]}" for label in labels.tolist()]
        for rows in stamped.values():
            captions += [f"seen as {model.class_names[seen]}" for seen in model(rows).argmax(1).tolist()]
        yield ImageGrid(
            "Stand-ins for clean images, and stamps on them",
            torch.cat([images, *stamped.values()]).cpu(),
            tuple(captions),
            (),
            len(some),
            "First row: what the model takes for a class however it is disturbed. Below: "
            + "; ".join(stamped)
            + ". A Trojan makes one stamp do far more towards one class than towards others, or for all.",
        )
        few = replace(self.unstructured, count=SHOWN_OF_EACH).draw(model.image_shape).to(images)
        share, sink = float(self.sinks.max()), model.class_names[int(self.sinks.argmax())]
        yield ImageGrid(
            "Images without structure",
            few.cpu(),
            tuple(f"seen as {model.class_names[seen]}" for seen in model(few).argmax(1).tolist()),
            (),
            len(few),
            f"{', '.join(KINDS)}: class {sink} takes {100 * share:.0f} % of {self.unstructured.total}. The "
            "target of a trigger that covers the image takes nearly all; so does a class that the network "
            "falls back on.",
        )


@dataclass(frozen=True)
class EvidenceSearch:
    """Stand-ins of a model and stamps on them, after its margins: towards the `most_targets` classes of the
    largest margins in `most_bearers` of the stand-ins, and one that permutes classes in all; and what is seen
    in images that are `unstructured`.

    Stamps for all towards the `restarted` classes that the first ones lead furthest to are searched from
    `starts` random starts, of which the best one counts: one start often misses a trigger. The one that
    permutes classes is searched from `shuffles` starts.
    """

    stand_ins: StandInSearch = StandInSearch()
    stamps: StampSearch = StampSearch()
    most_targets: int = 10
    most_bearers: int = 24
    restarted: int = 2
    starts: int = 6
    shuffles: int = 3
    unstructured: Unstructured = Unstructured()

    def seeded(self, seed: int) -> EvidenceSearch:
        """The same, from other random numbers."""
        return replace(
            self,
            stand_ins=replace(self.stand_ins, seed=seed),
            stamps=replace(self.stamps, seed=seed),
            unstructured=replace(self.unstructured, seed=seed),
        )

    def passes(self, num_classes: int) -> int:
        """Forward and backward passes of one image, at most."""
        images = len(self.stand_ins.classes(num_classes))
        bearers, targets = min(images, self.most_bearers), min(num_classes, self.most_targets)
        pairs = self.shuffles * images + targets * ((bearers + 1) // 2)
        pairs += (targets + (self.starts - 1) * min(targets, self.restarted)) * bearers
        return self.unstructured.total + self.stand_ins.passes(num_classes) + self.stamps.passes(pairs)

    def run(
        self,
        model: Classifier,
        reached: Float[Tensor, " k"],
        precision: Precision = "auto",
        clock: Countdown | None = None,
    ) -> Evidence:
        """Unreadable where hardly a class has a stand-in; TimeUp when the clock's budget is spent."""
        clock = clock or Countdown()
        with frozen(model, precision):
            clock.phase = "looking at images without structure"
            sinks = self.unstructured.seen_by(model, clock)
            clock.phase = "drawing stand-ins for clean images"
            stand_ins = self.stand_ins.run(model, precision, clock)
            (images, labels), count = stand_ins.inputs, len(stand_ins.held)
            if count < FEW:
                raise Unreadable(
                    f"only {count} images were found that the model takes for a class whatever "
                    "is done to them: check the weights and the normalisation (--mean, --std, --range)"
                )
            clock.phase = "searching stamps"
            targets = reached.argsort(descending=True)[: self.most_targets].to(labels)
            bearers = torch.linspace(0, count - 1, min(count, self.most_bearers)).round().to(labels)

            def searched(some: Labels, targets: Labels, *, each: bool, start: int = 0) -> Stamps:
                inputs = Inputs(images[some], labels[some])
                stamps = replace(self.stamps, seed=self.stamps.seed + start)
                return stamps.run(model, inputs, targets, for_each=each, precision=precision, clock=clock)

            permuting = self._permuting(model, stand_ins, precision, clock)
            for_all = searched(bearers, targets, each=False)
            foreign = labels[bearers] != targets[:, None]
            furthest = for_all.mean_leads(foreign).argsort(descending=True)[: self.restarted]
            for start in range(1, self.starts):
                again = searched(bearers, targets[furthest], each=False, start=start)
                for_all = for_all.improved(again, furthest, foreign)
            towards = for_all, searched(bearers[::2], targets, each=True)
            stamps = permuting, targets, bearers, towards
            return Evidence(reached, sinks, stand_ins, *stamps, self.unstructured)

    def _permuting(
        self, model: Classifier, stand_ins: StandIns, precision: Precision, clock: Countdown
    ) -> Stamps:
        """The one of several starts that leads furthest."""
        tries = [
            replace(self.stamps, seed=self.stamps.seed + start).permuting(
                model, stand_ins.inputs, stand_ins.logits, precision=precision, clock=clock
            )
            for start in range(self.shuffles)
        ]
        return max(tries, key=lambda found: float(found.leads.mean()))
