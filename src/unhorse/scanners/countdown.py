"""How far a scan has come, and when its time is up."""

from __future__ import annotations

import time
from collections.abc import Callable

OnScanStep = Callable[[int, int, str], None]
"""Hears (passes done, passes at most, what is going on); a pass is one image forward and backward."""


class TimeUp(Exception):
    """The time given to a scan is over; what was found by then stands."""


class Countdown:
    """Counts the passes of a scan and says when its `budget` of seconds is spent; None never is.

    `phase` says what is going on, in words that follow "while".
    """

    def __init__(
        self,
        most: int = 0,
        *,
        budget: float | None = None,
        on_step: OnScanStep | None = None,
        phase: str = "",
    ) -> None:
        self.most, self.on_step, self.phase, self.done = most, on_step, phase, 0
        self._end = None if budget is None else time.monotonic() + budget

    def passed(self, count: int) -> None:
        """Reports `count` more passes; TimeUp when the budget is spent."""
        self.done += count
        if self.on_step is not None:
            self.on_step(self.done, max(self.most, self.done), self.phase)
        if self._end is not None and time.monotonic() >= self._end:
            raise TimeUp
