"""Looks at model files without running them: hash, format, what they say, which rules they break."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unhorse import jobs
from unhorse.checks.expectations import Facts
from unhorse.loading.listing import Looked
from unhorse.loading.network_code import require_confinement
from unhorse.loading.sources import NAMELESS, opened
from unhorse.report import Report, ScannedModel
from unhorse.rules import LoadFailed, LoadRefused
from unhorse.sandbox import server
from unhorse.sandbox.confinement import Limits

_LIMITS = Limits(memory=2**30, cpu_seconds=60, wall_seconds=90)
_NO_MEAN = "MD301 the file says no normalisation: a scan will assume one; pass --mean/--std/--range"


def inspect_models(
    models: Sequence[Path],
    looked: Sequence[Looked] = (),
    *,
    loading: Mapping[str, Any] | None = None,
    workers: int = 1,
    command: Sequence[str] = (),
) -> Report:
    """Every file looked at in a restricted process of its own; what breaks a rule stops nothing.

    With `loading`, arguments of load_model that say the network, the weights are tried in it, too. `looked`
    are models in archives, which were looked at as the archives were listed.
    """
    require_confinement((loading or {}).get("network"))
    todo = [_Look(path, loading or {}) for path in models]
    done = jobs.gather("the inspection", todo, workers=workers)
    seen = (
        done.values.get(job.path) or ScannedModel(str(job.path), inspected=True, error=done.errors[job.path])
        for job in todo
    )
    return Report(
        (*seen, *map(_inside, looked)),
        command=tuple(command),
        environment=_environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        interrupted=done.interrupted,
    )


@dataclass(frozen=True)
class _Look:
    """One file of an inspection."""

    path: Path
    loading: Mapping[str, Any]

    def __call__(self) -> ScannedModel:
        started = time.monotonic()
        seen = ScannedModel(str(self.path), inspected=True)
        try:
            with opened(self.path) as source:
                seen = replace(seen, sha256=source.sha256, size=source.size, format=source.format)
                source.check()
                options = {
                    "name": source.names[0] if source.kind is None else NAMELESS,
                    "names": list(source.names[1:]),
                }
                if not self.loading.get("network"):  # with one, the file alone need not be a network
                    parcel = server.run("check", source.files, options, heavy=False, limits=_LIMITS)
                    seen = _described(seen, Facts.from_json(parcel.document["facts"]), parcel.tier)
            if self.loading:
                seen = self._tried(seen)
        except (LoadRefused, LoadFailed) as error:
            seen = replace(seen, error=str(error), error_rule=error.rule)
        return replace(seen, seconds=time.monotonic() - started)

    def _tried(self, seen: ScannedModel) -> ScannedModel:
        """With the network that was said, if the weights fit it."""
        from unhorse.descriptions import describe
        from unhorse.model_files import load

        file = load(self.path, self.loading)
        model = describe(self.path, file.model, file)
        return replace(model, inspected=True)


def _inside(looked: Looked) -> ScannedModel:
    member = looked.member
    seen = ScannedModel(
        looked.path, sha256=member.sha256, size=member.size, format=member.format, inspected=True, seconds=0.0
    )
    return _described(seen, member.facts or Facts(), looked.tier)


def _described(seen: ScannedModel, facts: Facts, tier: str) -> ScannedModel:
    """With what the file says of itself."""
    shape = facts.image_shape or ()
    return replace(
        seen,
        opened=f"its structure in the sandbox ({tier})",
        architecture=_contents(facts),
        image_shape=() if None in shape else tuple(size or 0 for size in shape),
        class_names=facts.class_names or (),
        assumptions=(*(() if facts.mean else (_NO_MEAN,)), *facts.notes),
    )


def _contents(facts: Facts) -> str:
    """What would be loaded, in words."""
    parts = [facts.producer] if facts.producer else []
    if facts.num_classes:
        parts.append(f"{facts.num_classes} classes")
    parts += [f"{word.replace('_', ' ')} {value}" for word, value in facts.extra.items() if value]
    if facts.operators:
        parts.append(f"operators {', '.join(facts.operators[:12])}{' …' * (len(facts.operators) > 12)}")
    return "; ".join(parts)


def _environment() -> dict[str, object]:
    """What an inspection depends on; torch is not imported for it."""
    import platform
    from importlib import metadata

    return {
        "unhorse": metadata.version("unhorse"),
        "python": platform.python_version(),
        "platform": platform.system(),
    }
