"""What does not count: entries with a reason and a day, and what an older report already had."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from test_report import infected, inspected, refused, scanned
from unhorse.findings import counted, findings_of
from unhorse.report import Report, dumps, exit_code
from unhorse.rules import Severity
from unhorse.suppression import Config, Ignore, apply, read_baseline, read_config

TODAY = date(2026, 6, 1)
ENTRY = '[[ignore]]\nrule = "LD205"\npath = "*.pt"\nreason = "ours, from 2019"\nexpires = 2026-06-01\n'


def ignoring(**changes) -> Config:
    entry = Ignore("LD205", "ours", date(2026, 6, 1), path="evil.pt")
    return Config((replace(entry, **changes),))


def reasons(report: Report) -> list[str]:
    return [finding.suppressed for model in report.models for finding in findings_of(model)]


# --- applying


def test_an_entry_suppresses_its_finding_until_the_end_of_its_day():
    report = Report((refused(),))
    accepted = apply(report, ignoring(), today=TODAY)
    assert reasons(accepted) == ["ours (until 2026-06-01)"] and accepted.warnings == ()
    assert (exit_code(report), exit_code(accepted)) == (1, 0)
    assert reasons(report) == [""]


def test_an_expired_entry_warns_and_does_not_apply():
    late = apply(Report((refused(),)), ignoring(), today=date(2026, 6, 2))
    assert reasons(late) == [""] and exit_code(late) == 1
    (warning,) = late.warnings
    assert "LD205" in warning and "expired on 2026-06-01" in warning and "renew or delete" in warning


def test_an_expired_entry_that_concerns_nothing_is_silent():
    assert apply(Report((scanned(),)), ignoring(), today=date(2030, 1, 1)).warnings == ()


@pytest.mark.parametrize(
    ("changes", "suppressed"),
    [
        ({"path": "*.pt"}, True),
        ({"path": "", "sha256": "cd" * 32}, True),
        ({"sha256": "cd" * 32}, True),
        ({"sha256": "00" * 32}, False),
        ({"path": "*.onnx"}, False),
        ({"path": "vil.pt"}, False),
        ({"rule": "LD204"}, False),
    ],
)
def test_rule_hash_and_path_must_all_fit(changes, suppressed):
    (reason,) = reasons(apply(Report((refused(),)), ignoring(**changes), today=TODAY))
    assert bool(reason) is suppressed


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("./a/b.pt", "a/*.pt", True),
        ("/home/me/a/b.pt", "a/*.pt", True),
        ("a/c/b.pt", "a/*.pt", True),
        ("ba/b.pt", "a/*.pt", False),
        ("a/b.pt", "A/*.pt", False),
    ],
)
def test_a_path_is_a_pattern_that_may_leave_out_leading_folders(path, pattern, fits):
    model = replace(refused(), path=path)
    assert ignoring(path=pattern).ignore[0].covers(model, findings_of(model)[0]) is fits


def test_other_findings_of_the_same_file_still_count():
    report = apply(Report((infected(),)), ignoring(rule="BD102", path="*"), today=TODAY)
    assert [finding.rule for finding in counted(report.models[0])] == ["BD101"] and exit_code(report) == 1


def test_a_severity_is_replaced():
    config = Config(severity={"MD301": Severity.HIGH})
    model = inspected(assumptions=("MD301 input size assumed 8x8",))
    report = apply(Report((model,)), config, today=TODAY)
    assert exit_code(Report((model,)), "high") == 0 and exit_code(report, "high") == 1


def test_applying_twice_changes_nothing():
    once = apply(Report((refused(), infected())), ignoring(), today=TODAY)
    assert apply(once, ignoring(), today=TODAY) == once


def test_what_a_baseline_has_does_not_count_and_what_is_new_does(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(dumps(Report((refused(),))))
    moved = replace(refused(), path="elsewhere/evil.pt")
    other = replace(refused(), sha256="11" * 32)
    report = apply(Report((moved, other)), Config(), read_baseline(old), TODAY)
    assert reasons(report) == ["in the baseline", ""]
    assert exit_code(apply(Report((moved,)), Config(), read_baseline(old), TODAY)) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "no report of the kind unhorse-report-3"),
        ('{"schema": "unhorse-report-1", "models": []}', "no report of the kind"),
        ('{"schema": "unhorse-report-3", "models": [{}]}', "damaged"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_baseline_that_is_none_is_refused_with_a_remedy(tmp_path, text, words):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ValueError, match=f"{words}.*|write one with"):
        read_baseline(tmp_path / "old.json")


def test_a_baseline_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"old.json cannot be read \(No such file"):
        read_baseline(tmp_path / "old.json")


# --- reading


def config(tmp_path, text: str) -> Config:
    path = tmp_path / "unhorse.toml"
    path.write_text(text)
    return read_config(path)


def test_the_file_gives_entries_and_severities(tmp_path):
    text = ENTRY + '[[ignore]]\nrule = "bd103"\nsha256 = "' + "AB" * 32
    text += '"\nreason = "constant on purpose"\nexpires = "2027-01-31"\n[severity]\nmd301 = "none"\n'
    assert config(tmp_path, text) == Config(
        (
            Ignore("LD205", "ours, from 2019", date(2026, 6, 1), path="*.pt"),
            Ignore("BD103", "constant on purpose", date(2027, 1, 31), sha256="ab" * 32),
        ),
        {"MD301": Severity.NONE},
    )


def test_without_a_file_nothing_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config() == Config()
    (tmp_path / "unhorse.toml").write_text(ENTRY)
    assert len(read_config().ignore) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("reason", "raeson"), "no key 'raeson': did you mean reason?"),
        (("[[ignore]]", "[[ignored]]"), "no key 'ignored': did you mean ignore?"),
        (('reason = "ours, from 2019"\n', ""), "lacks reason: write"),
        (('"ours, from 2019"', '" "'), "lacks reason: write"),
        (("expires = 2026-06-01\n", ""), "lacks expires: write"),
        (('path = "*.pt"\n', ""), "lacks path or sha256: write"),
        (("2026-06-01", '"soon"'), "expires is 'soon', not a day"),
        (("2026-06-01", "2026-06-01T10:00:00"), "not a day"),
        (("LD205", "LD255"), "no rule 'LD255': the nearest is LD2"),
        (('"*.pt"', "7"), "path is 7, not a text"),
        (('path = "*.pt"', 'sha256 = "abc"'), "not 64 hexadecimal digits"),
        (("[[ignore]]", "[ignore]"), "not a list of tables"),
        (("[[ignore]]", "[[ignore"), "is not TOML"),
        (
            ("expires = 2026-06-01", 'expires = 2026-06-01\n[severity]\nMD301 = "loud"'),
            "'loud' is no severity: use",
        ),
    ],
)
def test_a_mistake_is_named_with_what_to_write(tmp_path, change, words):
    assert change[0] in ENTRY
    with pytest.raises(ValueError) as raised:
        config(tmp_path, ENTRY.replace(*change))
    assert (
        words in str(raised.value) and "unhorse.toml" in str(raised.value) or "no rule" in str(raised.value)
    )


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(ValueError, match="name an existing file"):
        read_config(tmp_path / "missing.toml")
