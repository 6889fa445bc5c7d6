"""Specs of tables of model scanners: which methods, fitted on which models, judge which others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import Field, model_validator

from unhorse.benchmark.model_scores import Options
from unhorse.benchmark.populations import FittedSpec, JudgedSpec
from unhorse.benchmark.scanners import METHODS, make
from unhorse.victims import Spec


class MethodSpec(Spec):
    """A method and its options; a learned one runs once per entry of `maps`. Fewer `epochs` than the paper's
    are a deviation.

    `images` counts the clean ones of methods that need them; without `verdicts` only scores are measured.
    """

    name: str
    maps: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    images: int | None = Field(default=None, ge=1)
    verdicts: bool = True
    options: dict[str, bool | int | float | str | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        for options in self.settings():
            make(self.name, dict(options))
        if METHODS[self.name].needs_images and self.images is None:
            raise ValueError(f"{self.name} searches on clean images: give `images`, such as 200")
        if self.images is not None and not METHODS[self.name].needs_images:
            raise ValueError(f"{self.name} needs no clean images: leave out `images`")
        return self

    def settings(self) -> Iterator[Options]:
        """The scanner's options, once per entry of `maps`."""
        for maps in self.maps or (None,):
            yield tuple(sorted((self.options | ({} if maps is None else {"maps": maps})).items()))

    def runs(self, seeds: Sequence[int]) -> Iterator[tuple[Options, int]]:
        """(options, seed) of every run; a method without a seed runs once."""
        for options in self.settings():
            chosen = self.seeds or seeds
            seeded = hasattr(make(self.name, dict(options)), "seed")
            yield from ((options, seed) for seed in (chosen if seeded else chosen[:1]))


class ScanningSpec(Spec):
    """One table: methods that learn are fitted on the models that `fit` names, all judge those of `judge`.

    `population` is short for all groups of one zoo spec, fitted on and held back, without rows that pool
    them. `sizes` makes learning curves: numbers of models to fit on. With `leave_one_out` each population of
    `judge` is judged by what the others teach; with `folds`, where they are many and small, every so-manieth
    of them together, and there are rows over all of them only. Without leave_one_out, `pooled` adds rows
    of all populations together. `dataset` and `trained_on` are those of the models unless given.
    """

    table: str
    dataset: str | None = None
    population: str | None = None
    fit: tuple[FittedSpec, ...] = ()
    judge: tuple[JudgedSpec, ...] = ()
    leave_one_out: bool = False
    folds: int | None = Field(default=None, ge=3)
    pooled: bool = False
    sizes: tuple[int, ...] = ()
    trained_on: str | None = None
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    methods: tuple[MethodSpec, ...]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.population is None) == (not self.judge) or (self.population and self.fit):
            raise ValueError("name the models: either `population`, or `judge` (and `fit` for what learns)")
        if self.leave_one_out and (self.fit or self.sizes or not self.judge):
            raise ValueError(
                "leave_one_out fits on the other populations of `judge`: leave out fit and sizes"
            )
        if self.folds is not None and not self.leave_one_out:
            raise ValueError("folds are left out in turn: say leave_one_out = true too")
        if any(part.beside for part in self.judge) and (self.leave_one_out or self.pooled):
            raise ValueError(
                "models beside placebos are compared with those alone: not leave_one_out or pooled"
            )
        if self.pooled and (self.leave_one_out or not self.judge):
            raise ValueError("pooled rows are of populations in `judge`; leave_one_out has them by itself")
        learning = [method.name for method in self.methods if METHODS[method.name].learns]
        if learning and not (self.population or self.fit or self.leave_one_out):
            raise ValueError(f"{learning[0]} learns from models: name some in `fit`")
        return self

    @property
    def fitted_parts(self) -> tuple[FittedSpec, ...]:
        return (FittedSpec(population=self.population),) if self.population else self.fit

    @property
    def judged_parts(self) -> tuple[JudgedSpec, ...]:
        return (JudgedSpec(population=self.population),) if self.population else self.judge
