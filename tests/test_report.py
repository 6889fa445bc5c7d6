"""The report: what it says, what it must never let through, and that its pictures are drawn."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import unhorse.report
from unhorse.core import (
    Bars,
    Curve,
    Histogram,
    ImageGrid,
    ReconstructedTrigger,
    Reference,
    ScanResult,
    Table,
    Verdict,
)
from unhorse.exhibits import ACCENT, FRAME, axis, contact_sheet, evidence
from unhorse.findings import findings_of, fingerprint
from unhorse.guard_report import MEASURES, Estimate, GuardedModel
from unhorse.repair_report import MEASURES as CHANGES
from unhorse.repair_report import Change, RepairedModel, summary
from unhorse.report import (
    Report,
    ScannedModel,
    dumps,
    exit_code,
    save,
    to_html,
    to_json,
    to_terminal,
)
from unhorse.rules import Confidence, Finding, Severity
from unhorse.wording import plain

SCHEMA = json.loads(Path(unhorse.report.__file__).with_suffix(".schema.json").read_text())
NAMES = ("cat", "dog", "ship")


def scanned(
    verdict: Verdict = Verdict.NO_SIGN_FOUND, names: tuple[str, ...] = NAMES, **result
) -> ScannedModel:
    facts = {
        "path": "model.safetensors",
        "sha256": "ab" * 32,
        "architecture": "VGG",
        "image_shape": (3, 8, 8),
    }
    return ScannedModel(
        **facts, class_names=names, result=ScanResult(verdict, "outlier", **result), seconds=1.5
    )


def infected(**changes) -> ScannedModel:
    mask = torch.zeros(1, 8, 8)
    mask[:, :2, :4] = 1
    found = {
        "score": 7.0,
        "threshold": 3.0,
        "p_value": 0.05,
        "class_scores": (0.5, 7.0, -1.0),
        "target": 1,
        "reached": (0.1, 0.9, 0.2),
        "triggers": {1: ReconstructedTrigger(mask, torch.ones(3, 8, 8), 0.75)},
        "reference": Reference("nineteen", tuple(float(value) for value in range(19))),
        "warnings": ("few restarts",),
    }
    return scanned(Verdict.INFECTED, **(found | changes))


FAILED = ScannedModel("broken.bin", error="The file is truncated: download it again.", error_rule="truncated")


def inspected(**changes) -> ScannedModel:
    """A file that was looked at, and not run."""
    found = {
        "path": "net.onnx",
        "sha256": "cd" * 32,
        "size": 4096,
        "format": "onnx",
        "opened": "in the sandbox (landlock+seccomp+limits)",
        "inspected": True,
    }
    return ScannedModel(**(found | changes))


def refused(rule: str = "LD205", **changes) -> ScannedModel:
    error = f"{rule} the pickle calls posix.system: ask for safetensors"
    return inspected(path="evil.pt", format="pytorch", error=error, error_rule=rule, **changes)


DAMAGED = inspected(path="half.onnx", error="the file ends early: download it again", error_rule="LD230")


def guarded(*measured: str, **changes) -> GuardedModel:
    """A guard of which those measures are known."""
    found = {
        "path": "model.safetensors",
        "folder": "guard",
        "sha256": "ab" * 32,
        "image_shape": (1, 8, 8),
        "class_names": NAMES,
        "filter": "vif",
        "options": {"kl_weight": 0.003, "network": "tiny"},
        "threshold": -0.5,
        "fpr": 0.05,
        "calibration": Estimate(0.04, 0.02, 0.09, 120),
        "fitted_on": 280,
        "measures": {name: Estimate(0.125, 0.0625, 0.25, 1199) for name in measured},
    }
    return GuardedModel(**(found | changes))


def repaired(*measured: str, **changes) -> RepairedModel:
    """A repair of which those changes are known."""
    drop = Change(
        Estimate(0.875, 0.75, 0.9375, 90), Estimate(0.125, 0.0625, 0.25, 90), Estimate(0.75, 0.5, 0.8, 90)
    )
    agreement = Change(None, drop.after, None)
    found = {
        "path": "model.safetensors",
        "folder": "cured",
        "sha256": "ab" * 32,
        "repaired_sha256": "cd" * 32,
        "image_shape": (1, 8, 8),
        "class_names": NAMES,
        "method": "fine-pruning",
        "options": {"clean_drop": 0.1, "fine_tune_epochs": 20},
        "facts": {"channels_pruned": 7},
        "before": ScanResult(Verdict.INFECTED, "outlier", score=7.0, threshold=3.0, target=1),
        "after": ScanResult(Verdict.NO_SIGN_FOUND, "outlier", score=math.nan, threshold=3.0),
        "target": 1,
        "trigger_found_by": "outlier",
        "repaired_on": 210,
        "held_out": 90,
        "measures": {name: agreement if name == "agreement" else drop for name in measured},
    }
    return RepairedModel(**(found | changes))


def page(*models: ScannedModel) -> str:
    return to_html(
        Report(models, ("unhorse", "scan", "a b.safetensors"), {"torch": "2.13.0"}, "2025-01-31T12:00Z")
    )


def terminal(*models: ScannedModel) -> str:
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(to_terminal(Report(models)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


# --- JSON


def test_json_of_every_verdict_follows_the_schema():
    models = (
        infected(),
        scanned(),
        scanned(Verdict.SUSPICIOUS),
        scanned(Verdict.UNDECIDED, reason="one class"),
        FAILED,
    )
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(dumps(Report(models))), SCHEMA)


def test_the_schema_rejects_a_clean_verdict():
    document = to_json(Report((scanned(),)))
    document["models"][0]["verdict"] = "CLEAN"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_json_states_the_finding():
    model = to_json(Report((infected(),)))["models"][0]
    assert (model["verdict"], model["severity"], model["score"], model["p_value"]) == (
        "INFECTED",
        "high",
        7.0,
        0.05,
    )
    assert model["target"] == {"index": 1, "name": "dog"}
    assert model["triggers"] == [{"target": 1, "name": "dog", "flip_rate": 0.75, "mask_share": 0.125}]
    assert model["reference"] == {"name": "nineteen", "n": 19}


def test_json_numbers_that_are_not_finite_are_null():
    facts = {"ratio": math.inf, "series": torch.tensor([1.0, math.nan]), "count": np.int64(3)}
    model = to_json(Report((scanned(score=math.nan, class_scores=(1.0, -math.inf), facts=facts),)))["models"][
        0
    ]
    assert model["score"] is None and model["class_scores"] == [1.0, None]
    assert model["facts"] == {"ratio": None, "series": [1.0, None], "count": 3}


def test_a_failed_model_is_never_reported_as_scanned():
    model = to_json(Report((replace(scanned(), error="NaN weights"), ScannedModel("x"))))["models"]
    assert [entry["verdict"] for entry in model] == ["FAILED", "FAILED"]
    assert model[0]["reason"] == "NaN weights" and model[1]["reason"]


# --- exit codes


@pytest.mark.parametrize(
    ("models", "high", "medium", "none"),
    [
        ((), 3, 3, 3),
        ((scanned(),), 0, 0, 0),
        ((scanned(Verdict.SUSPICIOUS),), 0, 1, 0),
        ((infected(),), 1, 1, 0),
        ((scanned(), FAILED), 2, 2, 2),
        ((scanned(Verdict.UNDECIDED),), 2, 2, 2),
        ((FAILED, infected()), 1, 1, 2),
        ((FAILED, scanned(Verdict.SUSPICIOUS)), 2, 1, 2),
    ],
)
def test_exit_codes(models, high, medium, none):
    assert [exit_code(Report(models), level) for level in ("high", "medium", "none")] == [high, medium, none]


def test_an_unknown_fail_on_level_is_named():
    with pytest.raises(ValueError, match="'loud': use one of high, medium, low, none"):
        exit_code(Report(()), "loud")


@pytest.mark.parametrize(
    ("models", "high", "medium", "low", "none"),
    [
        ((inspected(),), 0, 0, 0, 0),
        ((refused("LD205"),), 1, 1, 1, 2),
        ((refused("LD207"),), 2, 1, 1, 2),
        ((refused("LD201"),), 2, 2, 1, 2),
        ((DAMAGED,), 2, 2, 1, 2),
        ((inspected(assumptions=("MD301 input size assumed 8x8: pass --size",)),), 0, 0, 1, 0),
        ((inspected(assumptions=("MD302 class names absent",)),), 0, 0, 0, 0),
        ((replace(refused("LD205"), inspected=False),), 1, 1, 1, 2),
        ((infected(), scanned(Verdict.UNDECIDED)), 1, 1, 1, 2),
    ],
)
def test_findings_decide_the_exit_code(models, high, medium, low, none):
    codes = [exit_code(Report(models), level) for level in ("high", "medium", "low", "none")]
    assert codes == [high, medium, low, none]


def test_what_is_suppressed_does_not_count():
    model = refused("LD205")
    (finding,) = findings_of(model)
    accepted = replace(model, findings=(replace(finding, suppressed="known"),))
    assert exit_code(Report((accepted,)), "low") == 0
    assert findings_of(accepted) == accepted.findings
    assert to_json(Report((accepted,)))["incomplete"] is False


# --- findings


def rules_of(model: ScannedModel) -> list[tuple[str, str, str]]:
    return [(finding.rule, finding.severity, finding.confidence) for finding in findings_of(model)]


def test_an_infected_model_has_a_trigger_and_a_score():
    assert rules_of(infected()) == [("BD101", "high", "high"), ("BD102", "high", "high")]
    trigger, score = findings_of(infected())
    assert trigger.where == score.where == "class 1"
    assert (
        trigger.message == "A trigger found from the model sends 75.0% of unseen inputs to class dog (no. 1)."
    )
    assert "7 is past its threshold 3 (p = 0.05 against 19 benign models)" in score.message


def test_no_score_below_its_threshold_is_called_past_it():
    """Beside a demonstrated trigger the generalist asks for less."""
    model = infected()
    assert model.result is not None and model.result.threshold is not None
    lower = replace(model.result, score=model.result.threshold - 1, reference=None, p_value=None)
    assert rules_of(replace(model, result=lower)) == [("BD101", "high", "high")]


def test_a_score_without_a_reference_is_held_less_surely():
    model = infected()
    assert model.result is not None
    alone = replace(model.result, reference=None, p_value=None)
    assert rules_of(replace(model, result=alone)) == [("BD101", "high", "high"), ("BD102", "high", "medium")]


def test_a_suspicious_model_has_one_of_the_two():
    past = {"score": 7.0, "threshold": 3.0, "target": 1}
    assert rules_of(scanned(Verdict.SUSPICIOUS, **past)) == [("BD102", "medium", "low")]
    trigger = {1: ReconstructedTrigger(torch.zeros(1, 8, 8), torch.ones(3, 8, 8), 0.95)}
    below = scanned(Verdict.SUSPICIOUS, score=2.0, threshold=3.0, triggers=trigger)
    assert rules_of(below) == [("BD101", "medium", "medium")]
    assert rules_of(scanned(Verdict.SUSPICIOUS, **past, triggers=trigger))[0][0] == "BD102"
    unlikely = Reference("r", tuple(float(value) for value in range(30)))
    against = {"reference": unlikely, "p_value": 0.5, "triggers": trigger}
    assert rules_of(scanned(Verdict.SUSPICIOUS, **past, **against))[0][0] == "BD101"


def test_a_model_without_a_sign_has_no_finding():
    assert findings_of(scanned(score=1.0, threshold=3.0)) == ()


def test_what_was_not_judged_and_what_was_assumed_are_findings():
    assert rules_of(scanned(Verdict.UNDECIDED, reason="one class")) == [("BD103", "low", "high")]
    assert rules_of(FAILED) == [("BD104", "low", "high")]
    assert rules_of(refused()) == [("LD205", "high", "high")]
    assert findings_of(refused())[0].message == "the pickle calls posix.system: ask for safetensors"
    lines = (
        "MD301 input size assumed 8x8: the weights fit others too; pass --size",
        "MD301 input normalisation assumed mean 0.5 for pixels in 0..1: pass --mean/--std/--range",
        "MD999 not a rule",
        "classes counted from the last layer",
    )
    size, normalisation = findings_of(replace(scanned(), assumptions=lines))
    assert (size.where, normalisation.where) == ("input size", "input normalisation")
    assert size.remedy.endswith("--size HEIGHT WIDTH") and "--mean MEAN --std STD" in normalisation.remedy


def test_a_remedy_is_a_command_that_a_shell_takes_as_it_is():
    path = "my models/$(touch x); 'net'.pt"
    remedy = findings_of(replace(infected(), path=path))[0].remedy
    assert remedy.startswith("""unhorse repair 'my models/$(touch x); '"'"'net'"'"'.pt' --clean""")
    assert findings_of(replace(infected(), path="--html=x"))[0].remedy.startswith(
        "unhorse repair ./--html=x "
    )


def test_an_attached_finding_stands_for_the_derived_one_and_the_gravest_comes_first():
    low = Finding("MD304", "no Landlock", "use Linux", Severity.LOW)
    own = Finding("LD205", "calls os.system", "ask", Severity.HIGH, Confidence.MEDIUM, "data.pkl")
    assert findings_of(refused(findings=(low, own))) == (own, low)


def test_a_fingerprint_depends_on_file_rule_and_place_and_nothing_else():
    model = infected()
    first, second = findings_of(model)
    moved = replace(model, path="elsewhere.pt")
    same = fingerprint(moved, replace(first, message="other words", severity=Severity.LOW))
    assert same == fingerprint(model, first) and len(same) == 64
    assert len({same, fingerprint(model, second), fingerprint(replace(model, sha256="0"), first)}) == 3


def test_an_inspected_file_is_not_scanned_and_no_failure():
    assert inspected().verdict == refused().verdict == "NOT SCANNED" and inspected().reason == ""
    assert DAMAGED.verdict == "FAILED"
    document = json.loads(dumps(Report((inspected(), refused(), DAMAGED))))
    jsonschema.validate(document, SCHEMA)
    first = document["models"][0]
    assert (first["format"], first["size"], first["findings"]) == ("onnx", 4096, [])
    assert first["opened"] == "in the sandbox (landlock+seccomp+limits)"
    assert document["summary"]["NOT SCANNED"] == 2 and document["incomplete"] is True
    assert document["models"][1]["findings"][0]["rule"] == "LD205"


def test_reports_of_inspected_files_need_no_torch():
    code = """
import sys
from unhorse.report import Report, ScannedModel, dumps, exit_code, to_terminal
from unhorse.report import to_cyclonedx, to_junit, to_sarif
from unhorse.suppression import Config, apply
report = apply(Report((ScannedModel("a.pt", inspected=True),)), Config())
dumps(report), to_sarif(report), to_junit(report), to_cyclonedx(report), to_terminal(report)
print(exit_code(report), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("0 False", 0), done.stderr


# --- text from attackers


class Tags(HTMLParser):
    """What a browser would see: the names of all tags and attributes, and where links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.attributes, self.links = set(), set(), set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value for name, value in attrs if name == "href"}


def test_markup_in_names_and_paths_is_inert():
    evil = '<script>alert(1)</script><img src="https://evil.example/x">'
    grid = ImageGrid(evil, torch.rand(1, 3, 8, 8), (evil,), note=evil)
    table = Table(evil, (evil,), ((evil,),))
    model = replace(
        infected(names=(evil, evil, evil), exhibits=(grid, table)), path=evil, assumptions=(evil,)
    )
    html = page(model, replace(FAILED, error=evil, error_rule=evil))
    tags = Tags()
    tags.feed(html)
    assert html.count("&lt;script&gt;") > 10
    assert not tags.names & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    assert not [
        name for name in tags.attributes if name.startswith("on") or name in ("src", "action", "srcset")
    ]
    assert {link[:11] for link in tags.links} == {
        "data:image/",
        "#model-1",
        "#model-2",
        "#sheet-1-1",
        "#sheet-1-4",
    }
    assert "url(" not in html and "@import" not in html


def test_the_page_forbids_every_fetch():
    html = page(infected())
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html.replace("&#39;", "'")
    assert "http:" not in html and "https:" not in html


@pytest.mark.parametrize(
    "evil", ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07red", "\x9b2Jred", "\u202ered\u2066", "r\x00ed\u200b"]
)
def test_escape_sequences_and_invisible_characters_are_removed(evil):
    assert plain(evil) == "red"
    assert "\x1b]" not in terminal(replace(FAILED, path=evil, error=evil)).replace("\x1b[", "")
    assert not re.search("[\x00\x07\x1b\x9b\u202e\u2066\u200b]", page(infected(names=(evil,) * 3)))


def test_hostile_findings_are_inert_on_the_page_and_in_the_terminal():
    evil = "<script>alert(1)</script>\x1b[2J\u202e\x00" + "A" * 1_000_000
    finding = Finding("LD205", evil, evil, Severity.HIGH, where=evil, suppressed="")
    muted = replace(finding, where="b", suppressed=evil)
    model = inspected(path=evil, format=evil, opened=evil, findings=(finding, muted))
    html = to_html(Report((model,), warnings=(evil,)))
    tags = Tags()
    tags.feed(html)
    assert not tags.names & {"script", "img", "link", "iframe"} and "&lt;script&gt;" in html
    assert not re.search("[\x00\x1b\u202e]", html) and len(html) < 60_000
    text = terminal(model)
    assert "\x1b[2J" not in text and "\u202e" not in text and len(text) < 30_000
    document = dumps(Report((model,), warnings=(evil,)))
    assert document.isascii() and "\\u202e" not in document.split('"findings"')[1]


def test_rich_markup_in_names_does_not_act():
    assert "[link=https://evil.example]x" in terminal(replace(FAILED, path="[link=https://evil.example]x"))


@pytest.mark.parametrize(
    "text", ["", " a  b ", "x" * 118, "tab\tand\nline", "<&>'", "a" * 100 + "  " + "b" * 17]
)
def test_plain_text_is_cleaned_in_the_same_way_with_and_without_other_letters(text):
    assert plain(f"é {text}") == f"é {plain(text)}".rstrip()


def test_long_names_keep_both_ends():
    assert plain("a" * 100 + "b" * 100 + ".safetensors").endswith("bb.safetensors")
    assert len(plain("x" * 1_000_000)) == 120


def test_names_of_a_megabyte_do_not_fill_the_page():
    names = tuple(letter * 1_000_000 for letter in "<&x")
    html = page(replace(infected(names=names), path="p" * 1_000_000))
    assert len(html) < 100_000
    assert len(terminal(infected(names=names))) < 10_000


# --- the page


def test_the_page_of_an_inspection_says_what_was_looked_at_and_found():
    low = "MD301 input size assumed 8x8: pass --size"
    html = page(inspected(assumptions=(low,)), refused(), DAMAGED)
    for words in (
        "Inspection of 3 models",
        "<strong>NOT SCANNED</strong>",
        "<code>LD205</code>",
        "confidence high",
        "the pickle calls posix.system",
        "in the sandbox (landlock+seccomp+limits)",
        "0.0041 MB",
        "cd" * 32,
        "unhorse scan net.onnx --size HEIGHT WIDTH",
        "scan it",
    ):
        assert words in html, words
    assert "Trojan scan of" not in html
    assert html.index("evil.pt") < html.index("half.onnx") < html.index("net.onnx")
    assert re.findall(r'<article id="model-\d" class="([^"]*)"', html) == [
        "not-scanned high",
        "failed low",
        "not-scanned low",
    ]
    assert html.count("breaks a rule and was not opened") == 1 and "Do not use this file" in html


def test_the_page_shows_findings_with_severity_confidence_and_remedy():
    muted = replace(findings_of(infected())[1], suppressed="accepted by the board (until 2030-01-01)")
    html = page(replace(infected(), findings=(muted,)))
    title = "<b>A trigger was demonstrated</b>"
    assert f'class="finding high"><p><code>BD101</code> {title} <span class="level">high</span>' in html
    assert "unhorse repair model.safetensors --clean IMAGES --method unlearning -o cured" in html
    assert 'class="finding high quiet"' in html and "Suppressed: accepted by the board" in html


def test_thousands_of_findings_leave_the_page_small():
    many = tuple(
        Finding("LD217", f"node {place}", "ask", Severity.HIGH, where=f"n{place}") for place in range(5000)
    )
    html = page(inspected(findings=many))
    assert html.count('class="finding high"') == 50 and "50 of 5000 findings" in html


def test_warnings_of_a_report_are_shown():
    report = Report((scanned(),), warnings=("an entry expired",))
    console = Console(width=100, file=io.StringIO())
    console.print(to_terminal(report))
    assert "an entry expired" in to_html(report) and "warning: an entry expired" in console.file.getvalue()
    assert to_json(report)["warnings"] == ["an entry expired"]


def test_the_page_states_verdict_target_reference_and_command():
    html = page(infected())
    for words in (
        "<strong>INFECTED</strong>",
        "dog",
        "19 benign models",
        "75.0%",
        "few restarts",
        "unhorse scan &#39;a b",
    ):
        assert words in html


def test_no_verdict_promises_safety():
    html = page(scanned(), scanned(Verdict.UNDECIDED, reason="one class"))
    assert "does not prove that there is none" in html
    assert not re.search(r"\bclean\b|\bharmless\b", html)


def test_a_summary_lists_the_worst_model_first():
    html = page(scanned(), FAILED, infected())
    assert re.findall(r'class="word">([A-Z ]+)<', html) == ["INFECTED", "FAILED", "NO SIGN FOUND"]
    assert 'class="word"' not in page(scanned())


def test_thousands_of_pictures_stay_under_three_megabytes():
    noise = torch.rand(200, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = scanned(exhibits=(ImageGrid("noise", noise, marked=(199,)),) * 3)
    html = page(*(model for _ in range(4)))
    assert len(html.encode()) < 3_000_000
    assert len(pictures(html)) == 12
    assert "120 of 200 images" in html


def test_details_of_the_least_serious_models_give_way_first():
    model = scanned(exhibits=(Table("t", ("c",), tuple((f"{'x' * 119}{row}",) for row in range(60))),) * 20)
    html = page(*(model for _ in range(20)), infected())
    assert len(html.encode()) < 3_000_000
    assert html.count("<article") < 21 and html.count('class="word"') == 21
    assert html.index("<strong>INFECTED") < html.index("<strong>NO SIGN FOUND")


# --- guards


def test_json_of_guards_follows_the_schema_and_what_was_not_measured_is_null():
    report = Report((infected(),), guards=(guarded("clean_drop", "fpr"), guarded(*MEASURES, fpr=None)))
    document = json.loads(dumps(report))
    jsonschema.validate(document, SCHEMA)
    some, all_of_them = document["guards"]
    assert some["measures"]["clean_drop"] == {"value": 0.125, "low": 0.0625, "high": 0.25, "n": 1199}
    assert some["measures"]["trojan_accuracy"] is None
    assert set(some["measures"]) == set(MEASURES)
    assert None not in all_of_them["measures"].values() and all_of_them["fpr"] is None
    assert some["calibration"]["n"] == 120 and some["filter"]["options"]["kl_weight"] == 0.003


def test_a_scan_without_guards_is_written_as_before():
    assert "guards" not in to_json(Report((infected(),)))


def test_the_schema_rejects_a_share_above_one():
    document = to_json(Report(guards=(guarded(calibration=Estimate(4.0, 2.0, 9.0, 120)),)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


def test_the_page_of_a_guard_states_rule_costs_and_what_is_unknown():
    html = to_html(Report(guards=(guarded("clean_accuracy", "clean_drop", "fpr"),)))
    for words in (
        "<strong>GUARDED</strong>",
        "score is above -0.5, set for 5.0% of clean images",
        "gets no label and waits for a person",
        "12.5%",
        "[6.2, 25.0]",
        "1,199",
        "Trojan accuracy, alarms and recovery",
        "no Trojan image was given",
        "120 clean images",
        "does not make a model safe",
    ):
        assert words in html, words
    assert html.count("not measured") >= 4
    assert "No model was found" not in html and "INFECTED" not in html


def test_the_page_of_a_measured_guard_has_a_row_for_every_measure():
    html = to_html(Report(guards=(guarded(*MEASURES, fpr=None, policy="replace"),)))
    for words in MEASURES.values():
        assert words in html
    assert "filtering an image changes its class" in html and "another one may pass" in html


def test_guards_come_after_the_scanned_models_and_draw_their_exhibits():
    grid = ImageGrid("pairs", torch.rand(4, 1, 8, 8), ("a", "b", "c", "d"))
    html = to_html(Report((infected(),), guards=(guarded("fpr", exhibits=(grid,)),)))
    assert html.index("<strong>INFECTED") < html.index("<strong>GUARDED")
    assert "guard-sheet-1-1" in html and len(pictures(html)) == 2
    assert "Trojan scan of 1 model, 1 guarded model" in html


def test_markup_in_a_guards_names_is_inert():
    evil = '<script>alert(1)</script><img src="https://evil.example/x">'
    html = to_html(
        Report(
            guards=(
                guarded(path=evil, folder=evil, clean_images=evil, warnings=(evil,), options={evil: evil}),
            )
        )
    )
    tags = Tags()
    tags.feed(html)
    assert html.count("&lt;script&gt;") >= 6 and not tags.names & {"script", "img"}


def test_the_terminal_shows_a_guards_measures():
    console = Console(width=160, file=io.StringIO())
    console.print(to_terminal(Report(guards=(guarded("fpr", warnings=("few images",)),))))
    text = console.file.getvalue()
    assert re.search(r"clean images that alarm +12.5% +\[6.2, 25.0\] +1,199", text)
    assert re.search(r"Trojan accuracy, alarms and recovery +not measured", text)
    assert "few images" in text and "4.0% [2.0, 9.0] of 120 clean images alarm" in text
    assert "verdict" not in text


# --- repairs


def test_json_of_repairs_follows_the_schema_and_what_was_not_measured_is_null():
    report = Report(
        (infected(),), repairs=(repaired("agreement"), repaired(*CHANGES, before=None, target=None))
    )
    document = json.loads(dumps(report))
    jsonschema.validate(document, SCHEMA)
    some, all_of_them = document["repairs"]
    assert some["measures"]["agreement"]["after"] == {"value": 0.125, "low": 0.0625, "high": 0.25, "n": 90}
    assert some["measures"]["agreement"]["before"] is None and some["measures"]["trojan_accuracy"] is None
    assert set(some["measures"]) == set(CHANGES) and None not in all_of_them["measures"].values()
    assert (some["before"]["verdict"], some["after"]["verdict"]) == ("INFECTED", "NO SIGN FOUND")
    assert some["before"]["target"] == some["target"] == {"index": 1, "name": "dog"}
    assert some["after"]["score"] is None and all_of_them["before"] is None and all_of_them["target"] is None
    assert some["method"] == {"name": "fine-pruning", "options": {"clean_drop": 0.1, "fine_tune_epochs": 20}}
    assert "repairs" not in to_json(Report((infected(),)))


def test_the_page_of_a_repair_states_both_verdicts_and_what_changed():
    curve = Curve("Clean accuracy while pruning", {"a": ((0, 1), (1.0, 0.5))})
    html = to_html(Report(repairs=(repaired(*CHANGES, exhibits=(curve,), warnings=("few images",)),)))
    for words in (
        "<strong>INFECTED → NO SIGN FOUND</strong>",
        "does not prove that there is none",
        "repaired by fine-pruning",
        "87.5% [75.0, 93.8]",
        "12.5% [6.2, 25.0]",
        "75.0% [50.0, 80.0]",
        "towards dog, found by outlier",
        "Clean accuracy while pruning",
        "another trigger may still work",
        "few images",
        "channels_pruned",
        "None of them means that a model is safe",
    ):
        assert words in html, words
    assert html.count('class="no-sign-found"') == 1 and "not measured" not in html.replace(
        "<dd><bdi>not m", ""
    )
    assert "No model was found" not in html and "Trojan scan of" not in html and "1 repaired model" in html


def test_a_cured_model_that_was_not_scanned_is_not_called_an_inspected_file():
    html = to_html(Report(repairs=(repaired("agreement", after=None),)))
    assert "INFECTED → NOT SCANNED" in html and "nothing of it was run" not in html


def test_the_page_of_a_repair_says_what_is_not_known():
    html = to_html(
        Report(repairs=(repaired("agreement", after=ScanResult(Verdict.INFECTED, "outlier"), target=None),))
    )
    assert "INFECTED → INFECTED" in html and 'class="infected"' in html
    assert "whether an attack still works is not known" in html and html.count("not measured") >= 6


def test_repairs_come_last_and_draw_their_exhibits():
    grid = ImageGrid("pairs", torch.rand(4, 1, 8, 8), ("a", "b", "c", "d"))
    done = (guarded("fpr"),), (repaired("agreement", exhibits=(grid,)),)
    html = to_html(Report((infected(),), guards=done[0], repairs=done[1]))
    places = [html.index(words) for words in ("<strong>INFECTED<", "<strong>GUARDED", "<strong>INFECTED →")]
    assert places == sorted(places)
    assert "repair-sheet-1-1" in html and len(pictures(html)) == 2
    assert "Trojan scan of 1 model, 1 guarded model, 1 repaired model" in html


def test_markup_in_a_repairs_names_is_inert():
    evil = '<script>alert(1)</script><img src="https://evil.example/x">'
    names = {"path": evil, "folder": evil, "clean_images": evil, "method": evil, "trigger_found_by": evil}
    texts = {"warnings": (evil,), "assumptions": (evil,), "options": {evil: evil}, "facts": {evil: (evil,)}}
    grid = ImageGrid(evil, torch.rand(1, 1, 8, 8), (evil,), note=evil)
    html = to_html(
        Report(repairs=(repaired(*CHANGES, class_names=(evil,) * 3, exhibits=(grid,), **names, **texts),))
    )
    tags = Tags()
    tags.feed(html)
    assert html.count("&lt;script&gt;") >= 12 and not tags.names & {"script", "img"}
    assert "https://evil.example" in html and not any("evil" in link for link in tags.links)


def test_the_terminal_shows_a_repair_within_80_columns():
    console = Console(width=80, file=io.StringIO())
    console.print(to_terminal(Report(repairs=(repaired(*CHANGES, warnings=("few images",)),))))
    text = console.file.getvalue()
    assert re.search(r"verdict +INFECTED +NO SIGN FOUND", text)
    assert re.search(r"Trojan accuracy +87.5% +12.5% \[6.2, 25.0\] +75.0% \[50.0, 80.0\]", text)
    assert re.search(r"trigger +towards dog, found by outlier", text) and "few images" in text
    assert "score / threshold" not in text
    console.print(to_terminal(Report(repairs=(repaired("agreement"),))))
    assert re.search(r"Trojan accuracy +not measured +not measured", console.file.getvalue())


def test_a_repair_is_summed_up_in_a_line():
    assert summary(repaired(*CHANGES)) == (
        "repaired by fine-pruning: Trojan accuracy 87.5% -> 12.5%, reversed trigger 87.5% -> 12.5%, clean "
        "drop 75.0% [50.0, 80.0]"
    )


# --- exhibits


def test_image_grid_is_one_picture_with_a_frame_round_the_marked():
    grid = ImageGrid("maps", torch.full((5, 1, 8, 8), 0.5), ("a", "b", "c", "d", "e"), marked=(3,), columns=3)
    html = page(scanned(exhibits=(grid,)))
    (picture,) = pictures(html)
    pixels = np.asarray(picture)
    framed = (pixels == (*ACCENT, 255)).all(-1)
    sheet = contact_sheet(grid)
    across, down, width, height = map(int, sheet.view(3).split())
    assert framed.any()
    assert framed[down : down + height, across : across + width].sum() == framed.sum()
    inner = pixels[down + FRAME : down + height - FRAME, across + FRAME : across + width - FRAME]
    assert inner.shape == (128, 128, 4) and (inner == (128, 128, 128, 255)).all()
    assert html.count("<figcaption>") == 5 and html.count('figure class="marked"') == 1


def test_large_images_are_shrunk_and_keep_their_proportions():
    sheet = contact_sheet(ImageGrid("large", torch.rand(1, 3, 112, 224)))
    assert (sheet.width - 2 * FRAME, sheet.height - 2 * FRAME) == (128, 64)


def test_a_picture_over_its_budget_is_left_out_with_a_word():
    assert contact_sheet(ImageGrid("noise", torch.rand(50, 3, 16, 16)), budget=2000) is None


def test_pixels_that_are_not_finite_are_drawn_black_or_white():
    images = torch.tensor([math.nan, math.inf, -math.inf]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    (picture,) = pictures(page(scanned(exhibits=(ImageGrid("odd", images),))))
    assert {tuple(colour) for colour in np.asarray(picture).reshape(-1, 4)} == {
        (0, 0, 0, 0),
        (0, 0, 0, 255),
        (255,) * 4,
    }


def test_bars_are_drawn_to_scale_with_threshold_and_mark():
    html = page(
        scanned(exhibits=(Bars("b", ("p", "q", "r"), (2.0, 4.0, math.nan), threshold=3.0, marked=(1,)),))
    )
    assert re.findall(r'<rect x="([\d.]+)%" width="([\d.]+)%"', html) == [("0.0", "50.0"), ("0.0", "100.0")]
    assert html.count('class="threshold" x1="75.0%"') == 3
    assert re.search(r'class="bar marked"><bdi class="name">q<', html)


def test_negative_bars_end_at_zero():
    html = page(scanned(exhibits=(Bars("b", ("p", "q"), (-1.0, 1.0)),)))
    assert re.findall(r'<rect x="([\d.]+)%" width="([\d.]+)%"', html) == [("0.0", "50.0"), ("50.0", "50.0")]


def test_of_a_thousand_bars_the_highest_and_the_marked_are_drawn():
    values = tuple(float(value) for value in range(1000))
    html = page(scanned(exhibits=(Bars("b", tuple(map(str, range(1000))), values, marked=(3,)),)))
    labels = re.findall(r'class="name">(\d+)<', html)
    assert labels == ["3", *map(str, range(961, 1000))]


def test_curves_are_drawn_as_one_line_per_series():
    curve = Curve("c", {"a": ((0, 1, 2), (0.0, 1.0, math.nan)), "b": ((0, 2), (1.0, 0.0))}, "steps", "loss")
    html = page(scanned(exhibits=(curve,)))
    assert re.findall(r'<polyline class="(s\d)" points="([^"]*)"', html) == [
        ("s0", "0.0,100.00 50.0,0.00"),
        ("s1", "0.0,0.00 100.0,100.00"),
    ]


def test_histogram_draws_bins_a_single_value_as_a_line_and_the_threshold():
    histogram = Histogram("h", {"benign": (0.0, 0.0, 0.0, 1.0), "this": (2.0,)}, threshold=1.5)
    html = page(scanned(exhibits=(histogram,)))
    assert re.findall(r'<rect class="s0" x="([\d.]+)%"[^>]* height="([\d.]+)%"', html) == [
        ("0.0", "96.0"),
        ("50.0", "32.0"),
    ]
    assert '<line class="single s1" x1="100.0%"' in html and '<line class="threshold" x1="75.0%"' in html


def test_tables_are_drawn_with_every_cell():
    html = page(scanned(exhibits=(Table("t", ("class", "rate"), (("dog", 0.123456), ("cat", None))),)))
    assert '<td class="number">0.123</td>' in html and "<bdi>dog</bdi>" in html


def test_class_scores_triggers_and_reference_are_drawn_without_the_scanner_asking():
    assert [type(exhibit) for exhibit in evidence(infected().result, NAMES)] == [Bars, ImageGrid, Histogram]
    drawn = Bars("own", ("a",), (1.0,))
    assert [type(exhibit) for exhibit in evidence(infected(exhibits=(drawn,)).result)] == [
        Bars,
        ImageGrid,
        Histogram,
    ]


def test_empty_exhibits_are_drawn_empty():
    nothing = (
        ImageGrid("i", torch.zeros(0, 3, 8, 8)),
        Bars("b", (), ()),
        Curve("c", {}),
        Histogram("h", {"a": ()}),
    )
    assert page(scanned(exhibits=(*nothing, Table("t", (), ())))).count("<h3>") == 7


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.0, 7.4), (0, 2, 4, 6, 8)),
        ((), (0.0, 0.5)),
        ((5.0, 5.0), (4, 6)),
        ((0, 1e-9), None),
        ((-1e29, 1e29), None),
    ],
)
def test_axes_hold_their_values_between_round_ticks(values, ticks):
    scale = axis(values)
    assert scale.low <= min(values, default=0) and max(values, default=0) <= scale.high
    assert 2 <= len(scale.ticks) <= 6
    assert ticks is None or scale.ticks == ticks


# --- terminal and files


def test_the_terminal_shows_one_row_per_model_and_what_to_do():
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal(infected(), FAILED))
    assert re.search(r"INFECTED +7 / 3 +0.05 +dog +75.0% +1.5", text)
    assert re.search(r"broken.bin +FAILED", text)
    for words in ("few restarts", "download it again. [truncated]", "Do not deploy."):
        assert words in text


def test_the_terminal_shows_findings_and_what_was_inspected():
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal(inspected(), refused()))
    assert re.search(r"net.onnx +NOT SCANNED +onnx +0.0041 +cdcdcdcdcdcd", text)
    assert re.search(r"finding +LD205 high, confidence high: the pickle calls posix.system: ask", text)
    assert "reason" not in text
    assert "score / threshold" not in text and "ask the publisher" in text
    assert re.search(r"opened +in the sandbox", text)
    found = re.sub(r"\x1b\[[\d;]*m", "", terminal(infected()))
    assert re.search(r"finding +BD101 high, confidence high: A trigger found", found)
    assert "unhorse repair model.safetensors" in found


def test_all_five_files_are_written_at_once(tmp_path):
    paths = {name: tmp_path / name for name in ("html", "json", "sarif", "junit", "cyclonedx")}
    save(Report((infected(), refused())), **paths)
    starts = {name: path.read_text()[:60].lstrip()[:1] for name, path in paths.items()}
    assert starts == {"html": "<", "json": "{", "sarif": "{", "junit": "<", "cyclonedx": "{"}
    assert json.loads(paths["sarif"].read_text())["version"] == "2.1.0"
    assert json.loads(paths["cyclonedx"].read_text())["bomFormat"] == "CycloneDX"


def test_saving_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    html, document = tmp_path / "new" / "report.html", tmp_path / "new" / "report.json"
    html.parent.mkdir()
    html.write_text("old")
    save(Report((infected(),)), html=html, json=document)
    assert html.read_text().rstrip().endswith("</html>")
    assert json.loads(document.read_text())["schema"] == "unhorse-report-3"
    assert sorted(path.name for path in html.parent.iterdir()) == ["report.html", "report.json"]


def test_a_write_that_breaks_off_keeps_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    whole = Path.write_bytes
    touched = []

    def half(self: Path, text: str, **_: object) -> None:
        touched.append(self)
        whole(self, text[:100].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        save(Report((infected(),)), html=path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path] and len(touched) == 1


def test_the_final_name_is_never_written_in_parts(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    names = []
    whole = Path.write_text
    monkeypatch.setattr(
        Path, "write_text", lambda self, *a, **b: names.append(self.name) or whole(self, *a, **b)
    )
    save(Report((infected(),)), html=path)
    assert path.exists() and names and "report.html" not in names
