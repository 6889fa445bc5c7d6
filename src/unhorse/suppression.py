"""What does not count: findings that `unhorse.toml` ignores until a date, and those of an older report."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

from unhorse.findings import findings_of, fingerprint
from unhorse.report import SCHEMA, Report
from unhorse.rulebook import find_rule
from unhorse.rules import Finding, Severity
from unhorse.scanned_model import ScannedModel

FILE = "unhorse.toml"
_OLDER = ("unhorse-report-2",)  # the findings had the same form
_KEYS = ("rule", "sha256", "path", "reason", "expires")
_EXAMPLE = (
    '[[ignore]] with rule = "LD201", path = "models/*.pb" or sha256 = "...", reason = "...", '
    "expires = 2027-01-31"
)


@dataclass(frozen=True)
class Ignore:
    """One entry: findings of `rule` in files with that hash or path, until the end of the day `expires`.

    `path` is a pattern as in a shell, in which * crosses folders; it may leave out leading folders.
    """

    rule: str
    reason: str
    expires: date
    sha256: str = ""
    path: str = ""

    def covers(self, model: ScannedModel, finding: Finding) -> bool:
        """Whether it is about that finding, expired or not."""
        if finding.rule != self.rule or (self.sha256 and self.sha256 != model.sha256):
            return False
        path = model.path.removeprefix("./")
        return not self.path or fnmatchcase(path, self.path) or fnmatchcase(path, f"*/{self.path}")


@dataclass(frozen=True)
class Config:
    """What `unhorse.toml` says; `severity` replaces that of a rule, `exclude` and `include` choose files."""

    ignore: tuple[Ignore, ...] = ()
    severity: Mapping[str, Severity] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()


def apply(
    report: Report, config: Config, baseline: Collection[str] = (), today: date | None = None
) -> Report:
    """The report with the reason on each finding that does not count, and a warning for each expired entry
    that would have applied. `baseline` holds fingerprints.
    """
    today = date.today() if today is None else today
    models = tuple(
        replace(model, findings=tuple(_marked(model, config, baseline, today))) for model in report.models
    )
    expired = [
        entry
        for entry in config.ignore
        if entry.expires < today
        and any(entry.covers(model, finding) for model in models for finding in model.findings)
    ]
    warnings = tuple(
        f"the entry for {entry.rule} in {FILE} expired on {entry.expires} and does not apply: look at the "
        f"finding again, then renew or delete the entry ({entry.reason})"
        for entry in expired
    )
    return replace(report, models=models, warnings=(*report.warnings, *warnings))


def _marked(model: ScannedModel, config: Config, baseline: Collection[str], today: date) -> Iterable[Finding]:
    for finding in findings_of(model):
        severity = config.severity.get(finding.rule, finding.severity)
        yield replace(finding, severity=severity, suppressed=_reason(model, finding, config, baseline, today))


def _reason(
    model: ScannedModel, finding: Finding, config: Config, baseline: Collection[str], today: date
) -> str:
    """Why a finding does not count; empty where it does."""
    if finding.suppressed:
        return finding.suppressed
    for entry in config.ignore:
        if entry.covers(model, finding) and today <= entry.expires:
            return f"{entry.reason} (until {entry.expires})"
    return "in the baseline" if fingerprint(model, finding) in baseline else ""


# --- reading ------------------------------------------------------------------------------------------------


def read_baseline(path: Path) -> frozenset[str]:
    """The fingerprints of an older JSON report."""
    remedy = "write one with `unhorse inspect PATHS --json FILE`"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the baseline {path} cannot be read ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the baseline {path} is not JSON: {remedy}") from error
    if not isinstance(document, dict) or document.get("schema") not in (SCHEMA, *_OLDER):
        raise ValueError(f"the baseline {path} is no report of the kind {SCHEMA}: {remedy}")
    try:
        found = [str(finding["fingerprint"]) for model in document["models"] for finding in model["findings"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the baseline {path} is damaged: {remedy}") from error
    return frozenset(found)


def read_config(path: Path | None = None) -> Config:
    """The configuration at `path`; without one, `unhorse.toml` of the working folder if there is one."""
    if path is None:
        path = Path(FILE)
        if not path.is_file():
            return Config()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name an existing file") from error
    except ValueError as error:
        raise ValueError(f"{path} is not TOML ({error}): write it as docs/integration.md shows") from error
    _known(document, ("ignore", "severity", "exclude", "include"), str(path))
    entries, severity = document.get("ignore", []), document.get("severity", {})
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: ignore is not a list of tables: write {_EXAMPLE}")
    if not isinstance(severity, dict):
        raise ValueError(f'{path}: severity is not a table: write [severity] and below it MD301 = "none"')
    ignore = tuple(_ignore(entry, f"{path}, entry {place}") for place, entry in enumerate(entries, 1))
    levels = {find_rule(str(rule)).id: _level(level, path) for rule, level in severity.items()}
    exclude, include = (_patterns(document.get(key, []), key, path) for key in ("exclude", "include"))
    return Config(ignore, levels, exclude, include)


def _patterns(value: object, key: str, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise ValueError(f'{path}: {key} is not a list of patterns: write {key} = ["data/*", "*.parquet"]')
    return tuple(value)


def _ignore(entry: Mapping[str, object], where: str) -> Ignore:
    _known(entry, _KEYS, where)
    texts = {key: entry.get(key, "") for key in ("rule", "reason", "sha256", "path")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} is {value!r}, not a text: write {_EXAMPLE}")
    missing = [key for key in ("rule", "reason", "expires") if not str(entry.get(key, "")).strip()]
    if not texts["sha256"] and not texts["path"]:
        missing.append("path or sha256")
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(missing)}: write {_EXAMPLE}")
    sha256 = str(texts["sha256"]).lower()
    if sha256 and (len(sha256) != 64 or set(sha256) - set("0123456789abcdef")):
        raise ValueError(f"{where}: sha256 is not 64 hexadecimal digits: copy it from a report")
    rule = find_rule(str(texts["rule"])).id
    path = str(texts["path"]).removeprefix("./")
    return Ignore(rule, str(texts["reason"]), _day(entry["expires"], where), sha256, path)


def _day(value: object, where: str) -> date:
    if type(value) is date:  # a datetime is a date too, and no day
        return value
    try:
        return date.fromisoformat(str(value))
    except ValueError as error:
        raise ValueError(f"{where}: expires is {value!r}, not a day: write expires = 2027-01-31") from error


def _level(level: object, path: Path) -> Severity:
    if level not in tuple(Severity):
        raise ValueError(f"{path}: {level!r} is no severity: use one of {', '.join(Severity)}")
    return Severity(str(level))


def _known(table: Mapping[str, object], keys: Iterable[str], where: str) -> None:
    allowed = tuple(keys)
    for key in table:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            meant = f"did you mean {close[0]}?" if close else f"known are {', '.join(allowed)}"
            raise ValueError(f"{where}: there is no key {key!r}: {meant}")
