"""Sets norms and threshold of the default scan for networks of two classes, in the card of the package.

They are those of the benign models of benchmarks/specs/zoo-pairs.toml. The AUROC that decides whether there
is a verdict at all is of zoo-pairs-held-out.toml: other pairs, architectures, seeds and triggers. What is
measured of each model is kept in --work. Run it in a clean clone: python benchmarks/fit_two_classes.py
"""

import argparse
import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

import unhorse.scanners
from unhorse import jobs
from unhorse.benchmark.populations import Cast
from unhorse.benchmark.trials import provenance
from unhorse.metrics import auroc
from unhorse.models.classifier import load_classifier
from unhorse.scanners.generalist import CARD
from unhorse.scanners.two_classes import TwoClasses
from unhorse.zoo import Member

SPECS = Path(__file__).parent / "specs"
FITTED, HELD_OUT = "zoo-pairs.toml", "zoo-pairs-held-out.toml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs"), help="Where the populations are.")
    parser.add_argument("--output", type=Path, default=Path(unhorse.scanners.__file__).parent / CARD)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    cast = Cast(SPECS, options.work)
    cast.build([FITTED, HELD_OUT], options.jobs)
    benign = [(name, member) for name, member in _members(cast, FITTED) if not member.trojaned]
    held_out = [member for _, member in _members(cast, HELD_OUT)]
    features = _features([member for _, member in benign], options)
    scanner = TwoClasses().fitted(features, [name for name, _ in benign])
    scores = scanner.scores(_features(held_out, options))
    trojaned = torch.tensor([member.trojaned for member in held_out])
    past = scores >= scanner.threshold
    card = json.loads(options.output.read_text(encoding="utf-8"))
    card["two classes"] = {
        "norms": scanner.norms,
        "threshold": scanner.threshold,
        "auroc": round(auroc(scores, trojaned), 4),
        "fitted_on": {"populations": "zoo-pairs", "benign": len(benign)},
        "judged_on": {
            "populations": "zoo-pairs-held-out",
            "benign": int((~trojaned).sum()),
            "trojaned": int(trojaned.sum()),
            "benign past the threshold": int(past[~trojaned].sum()),
            "trojaned past the threshold": int(past[trojaned].sum()),
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": provenance(),
    }
    options.output.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(card["two classes"], indent=1))


def _members(cast: Cast, spec: str) -> list[tuple[str, Member]]:
    return [
        (population.zoo.name, member)
        for population in cast.named(spec)
        for members in population.register.values()
        for member in members
    ]


def _features(members: list[Member], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The readings of each model, from where an earlier run left them."""
    folder = options.work / "two-classes"
    todo = [partial(_measure, member.folder, folder) for member in members]
    outcomes = list(jobs.track("readings", jobs.run(jobs.call, todo, workers=options.jobs), len(todo)))
    if failed := [outcome for outcome in outcomes if outcome.error is not None]:
        raise RuntimeError(f"{len(failed)} models have no readings; first: {failed[0].error!r}")
    return [json.loads(_place(member.folder, folder).read_text("utf-8")) for member in members]


def _measure(model: Path, folder: Path) -> None:
    place = _place(model, folder)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(".draft")
        draft.write_text(json.dumps(TwoClasses().features(load_classifier(model))), encoding="utf-8")
        draft.replace(place)


def _place(model: Path, folder: Path) -> Path:
    return folder / f"{model.parent.parent.name}-{model.parent.name}-{model.name}.json"


if __name__ == "__main__":
    main()
