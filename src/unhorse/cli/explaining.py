"""`explain`: what a rule means, why it matters, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from unhorse.rules import Rule

FAMILIES = {
    "BD": "Behaviour of the model",
    "LD": "Loading the file",
    "MD": "What the file says of the model",
}


def explain(
    rule: Annotated[str | None, Parameter(help="Such as LD205; without one all rules are listed.")] = None,
    /,
    *,
    markdown: Annotated[bool, Parameter(negative="", help="All rules, as docs/rules.md has them.")] = False,
) -> int:
    """Say what a rule means, why it matters, and what to do."""
    from rich.console import Console, Group
    from rich.text import Text

    from unhorse.rulebook import RULES, find_rule

    if markdown:
        print(as_markdown(), end="")
        return 0
    if rule is None:
        lines = [Text(f"{known.id}  {known.severity:<6}  {known.title}") for known in RULES.values()]
        Console().print(Group(*lines))
        return 0
    found = find_rule(rule)
    parts = [Text(f"{found.id}  {found.title}", "bold"), Text(f"severity {found.severity}\n", "dim")]
    parts += [Text(found.why), Text(f"\nWhat to do: {found.remedy}")]
    parts += [Text(f"  {reference}", "dim") for reference in found.references]
    Console().print(Group(*parts))
    return 0


def as_markdown() -> str:
    """All rules as docs/rules.md has them: `unhorse explain --markdown > docs/rules.md`."""
    from unhorse.rulebook import RULES

    lines = ["# Rules", "", "Every finding names one of these rules. `unhorse explain RULE` prints one.", ""]
    lines += ["Written by `unhorse explain --markdown` from src/unhorse/rules.toml: change it there.", ""]
    lines += ["PATH stands for the model's file. `none` is the severity of what is only worth knowing.", ""]
    for family, title in FAMILIES.items():
        lines += [f"## {title}", ""]
        for rule in RULES.values():
            if rule.id.startswith(family):
                lines += _section(rule)
    return "\n".join(lines).rstrip() + "\n"


def _section(rule: Rule) -> list[str]:
    lines = [f"### {rule.id} {rule.title}", "", f"Severity {rule.severity}. {rule.why}", ""]
    remedy = f"`{rule.remedy}`" if rule.remedy.startswith(("unhorse ", "pip ")) else rule.remedy
    lines += [f"What to do: {remedy}", ""]
    return lines + ([f"See {', '.join(map(_link, rule.references))}.", ""] if rule.references else [])


def _link(reference: str) -> str:
    """A page of docs/ as a link beside docs/rules.md; anything else as it is."""
    name = reference.removeprefix("docs/")
    return reference if name == reference else f"[{name}]({name})"
