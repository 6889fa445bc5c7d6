"""The page in a real browser: nothing complains, nothing is fetched, hostile names stay text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from test_report import guarded, infected, inspected, refused, repaired, scanned
from unhorse.core import Curve, Histogram, ImageGrid
from unhorse.guard_report import MEASURES
from unhorse.repair_report import MEASURES as CHANGES
from unhorse.report import Report, save
from unhorse.rules import Finding, Severity

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium is installed"),
]
# what the browser asks of its maker on its own account; no page of ours names these hosts
OWN = re.compile(r"https?://([a-z0-9-]+\.)*(google|googleapis|gvt1)\.com/")
EVIL = (
    "<script>document.title='owned';fetch('https://evil.example/s')</script>",
    '"><img src=https://evil.example/i onerror="fetch(\'https://evil.example/e\')">',
    "\x1b[31mred\x1b[0m\u202etxt.exe\u2066" + "A" * 1_000_000,
)


def hostile_report() -> Report:
    """A scan, a refused file, a guard and a repair, of which every text is an attacker's."""
    grid = ImageGrid(EVIL[1], torch.rand(12, 3, 16, 16), EVIL * 4, marked=(1,), note=EVIL[0])
    curve = Curve(EVIL[0], {EVIL[1]: ((0, 1, 2), (0.9, 0.8, 0.2))}, EVIL[2], EVIL[0])
    histogram = Histogram(EVIL[1], {EVIL[0]: (1.0, 2.0, 2.0), EVIL[1]: (5.0,)}, 4.0)
    scan = replace(infected(names=EVIL, exhibits=(grid, curve, histogram)), path=EVIL[0], assumptions=EVIL)
    finding = Finding("LD205", EVIL[0], EVIL[1], Severity.HIGH, where=EVIL[2])
    texts = {
        "class_names": EVIL,
        "warnings": EVIL,
        "exhibits": (grid,),
        "options": dict.fromkeys(EVIL, EVIL[0]),
    }
    return Report(
        (
            scan,
            refused(findings=(finding,)),
            inspected(path=EVIL[1], opened=EVIL[0], format=EVIL[0]),
            scanned(),
        ),
        ("unhorse", "scan", *EVIL),
        {"platform": EVIL[1]},
        "2026-01-31T12:00:00+00:00",
        (guarded(*MEASURES, path=EVIL[0], **texts),),
        (repaired(*CHANGES, path=EVIL[1], assumptions=EVIL, **texts),),
        EVIL,
    )


def browse(page: Path, folder: Path, size: str = "1000,1600") -> tuple[list[str], set[str], Image.Image]:
    """Opens a page: the console's lines, the addresses that it asked the network for, and a picture."""
    net, picture = folder / "net.json", folder / "page.png"
    quiet = ("background-networking", "component-update", "default-apps", "extensions", "gpu", "sync")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{name}" for name in quiet),
        f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--v=0",
        f"--log-net-log={net}",
        f"--window-size={size}",
        f"--screenshot={picture}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(net.read_text(encoding="utf-8", errors="replace"))["events"]
    urls = {str(event["params"]["url"]) for event in events if "url" in event.get("params", {})}
    urls = {url for url in urls if not OWN.match(url) and not url.startswith(("file:", "data:", "chrome"))}
    return console, urls, Image.open(picture).convert("RGB")


def written(report: Report, folder: Path) -> Path:
    save(report, html=folder / "report.html")
    return folder / "report.html"


def test_a_hostile_report_shows_without_a_message_and_fetches_nothing(tmp_path):
    page = written(hostile_report(), tmp_path)
    console, urls, picture = browse(page, tmp_path)
    assert console == []
    assert urls == set() and not OWN.search(page.read_text(encoding="utf-8"))
    assert picture.size == (1000, 1600) and len(picture.getcolors(1 << 24) or ()) > 200
    assert page.stat().st_size < 3_000_000


def test_a_page_that_does_fetch_or_run_code_is_caught(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<p>x<script>console.error('ran')</script><img src='http://evil.example/i'>")
    console, urls, _ = browse(page, tmp_path)
    assert any("ran" in line for line in console) and urls == {"http://evil.example/i"}


def test_the_policy_stops_code_even_if_it_got_into_the_page(tmp_path):
    page = written(Report((infected(),)), tmp_path)
    text = page.read_text(encoding="utf-8")
    script = "<script>console.error('ran')</script><img src='http://evil.example/i'></main>"
    page.write_text(text.replace("</main>", script), encoding="utf-8")
    console, urls, _ = browse(page, tmp_path)
    assert console and all("Content Security Policy" in line for line in console)
    assert urls == set()


def test_a_verdict_is_a_coloured_banner_of_the_page(tmp_path):
    _, _, picture = browse(written(Report((infected(),)), tmp_path), tmp_path, "1000,600")
    colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    assert colours.get((0xB3, 0x26, 0x1E), 0) > 20_000  # --infected
    _, _, other = browse(written(Report((inspected(),)), tmp_path), tmp_path, "1000,600")
    colours = {colour: count for count, colour in other.getcolors(1 << 24)}
    assert colours.get((0x4A, 0x61, 0x73), 0) > 20_000  # --not-scanned


def test_the_picture_in_the_documentation_is_one_of_a_page():
    picture = Path(__file__).parents[1] / "docs" / "report.png"
    with Image.open(picture) as image:
        assert image.width >= 800 and image.height >= 800
    assert picture.stat().st_size <= 300_000
    integration = (picture.parent / "integration.md").read_text(encoding="utf-8")
    assert re.search(r"\(report\.png\)", integration)
