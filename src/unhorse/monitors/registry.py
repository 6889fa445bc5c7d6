"""Input monitors by the name of their table rows."""

from __future__ import annotations

from collections.abc import Callable

from unhorse.monitors.neurons import NeuronCheck
from unhorse.monitors.strip import Strip

MONITORS: dict[str, Callable[..., Strip | NeuronCheck]] = {"strip": Strip, "neurons": NeuronCheck}
