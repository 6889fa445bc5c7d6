"""The rules: every id that the code raises is explained, and the documentation says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import unhorse
from unhorse.cli.explaining import as_markdown, explain
from unhorse.rulebook import RULES, find_rule
from unhorse.rules import Severity

SOURCE = Path(unhorse.__file__).parent
IDS = [
    *(f"BD10{number}" for number in range(1, 5)),
    *(f"LD{number}" for number in (*range(201, 229), *range(230, 238), 239, 240)),
    *(f"MD30{number}" for number in range(1, 9)),
]


def test_the_rules_are_those_agreed_on():
    assert list(RULES) == IDS


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_a_rule_says_why_and_what_to_do(rule):
    assert 5 < len(rule.title) < 80 and not rule.title.endswith(".")
    assert 1 <= len(re.findall(r"[.!](?:\s|$)", rule.why)) <= 4 and "\n" not in rule.why
    assert rule.remedy and rule.why.endswith(".")
    for reference in rule.references:
        page = SOURCE.parents[1] / reference
        assert re.fullmatch(r"https://\S+|CVE-\d{4}-\d{4,6}", reference) or page.is_file(), reference


def test_every_rule_that_the_source_names_is_explained():
    named = set()
    for path in SOURCE.rglob("*.py"):
        named |= set(re.findall(r"\b(?:BD1|LD2|MD3)\d\d\b", path.read_text(encoding="utf-8")))
    assert "LD205" in named and named <= set(RULES)


def test_signs_of_an_attack_are_high_and_what_is_only_missing_is_low():
    high = {
        "LD203",
        "LD204",
        "LD205",
        "LD206",
        *(f"LD{number}" for number in range(213, 221)),
        "LD222",
        "LD227",
    }
    assert {rule.id for rule in RULES.values() if rule.severity is Severity.HIGH} == high | {"BD101"}
    for name in ("LD201", "LD202", "LD210", "LD211", "LD224", "LD230"):
        assert RULES[name].severity is Severity.LOW


def test_the_documentation_is_written_from_the_rules():
    written = (SOURCE.parents[1] / "docs" / "rules.md").read_text(encoding="utf-8")
    assert written == as_markdown(), "write it again: unhorse explain --markdown > docs/rules.md"


def test_explain_prints_one_rule_in_either_case(capsys):
    assert explain("ld205") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert (
        words.startswith("LD205 The pickle calls what runs code") and "What to do: Do not open PATH" in words
    )
    assert "CVE-2025-32434" in words


def test_explain_lists_every_rule(capsys):
    assert explain() == 0
    assert re.findall(r"^([A-Z]{2}\d{3}) ", capsys.readouterr().out, re.MULTILINE) == IDS


def test_explain_writes_the_documentation(capsys):
    assert explain(markdown=True) == 0
    assert capsys.readouterr().out == as_markdown()


def test_an_unknown_rule_is_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match="no rule 'LD2O5': the nearest is LD205; `unhorse explain` lists all"
    ):
        find_rule("LD2O5")
    with pytest.raises(ValueError, match=r"no rule '\[2Jquestion'; `unhorse"):
        find_rule("\x1b[2Jquestion")
