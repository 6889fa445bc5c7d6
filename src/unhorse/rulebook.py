"""Every rule that a finding may name: what it means, why it matters, what to do, and where to read more."""

from __future__ import annotations

import tomllib
from operator import eq
from pathlib import Path

from unhorse.rules import Rule, Severity


def _read(path: Path) -> dict[str, Rule]:
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["rule"]
    rules = [
        Rule(
            id=entry["id"],
            title=entry["title"],
            severity=Severity(entry["severity"]),
            why=entry["why"],
            remedy=entry["remedy"],
            references=tuple(entry.get("references", ())),
        )
        for entry in entries
    ]
    return {rule.id: rule for rule in rules}


RULES = _read(Path(__file__).with_name("rules.toml"))


def find_rule(name: str) -> Rule:
    """The rule with that id, in either case; ValueError that names the nearest where there is none."""
    rule = RULES.get(name.strip().upper())
    if rule is not None:
        return rule
    shown = "".join(letter for letter in name[:40] if letter.isprintable())
    alike = {rule_id: sum(map(eq, rule_id, shown.upper())) for rule_id in RULES}
    close = max(alike, key=lambda rule_id: alike[rule_id])
    nearest = f": the nearest is {close}" if alike[close] > 2 else ""
    raise ValueError(f"there is no rule {shown!r}{nearest}; `unhorse explain` lists all")
