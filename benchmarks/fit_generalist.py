"""Sets norms and thresholds of the scanner in the box, and writes its card into the package.

They are those of the benign models of benchmarks/specs/ours-random-networks.toml: networks drawn at random.
What is measured of each model is kept beside it, and is what `unhorse benchmark` leaves. The card also says
how many models of each fold the thresholds of the others would flag. Run it in a clean clone:
python benchmarks/fit_generalist.py --work runs
"""

import argparse
import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import unhorse.scanners
from unhorse.benchmark.model_scores import measure_models
from unhorse.benchmark.populations import Cast
from unhorse.benchmark.scanning_specs import ScanningSpec
from unhorse.benchmark.scanning_table import ScanningTable
from unhorse.benchmark.scanning_trials import Trial
from unhorse.benchmark.trials import provenance
from unhorse.metrics import auroc
from unhorse.models.classifier import read_card
from unhorse.scanners.generalist import CARD, Generalist

SPEC = Path(__file__).parent / "specs" / "ours-random-networks.toml"
FAILS_ON = (
    "what was measured is in benchmarks/README.md, tables ours-random-networks and ours-default-scan; "
    "nothing larger than 10 MMAC, no image above 28x28, no transformer and no WaNet or Input-Aware Trojan "
    "was fitted on; all-to-all, source-target and blended Trojans are often missed, and networks that see "
    "one class in whatever is unlike their data are reported"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs"), help="Where the populations are.")
    parser.add_argument("--output", type=Path, default=Path(unhorse.scanners.__file__).parent / CARD)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    spec = ScanningSpec.model_validate(tomllib.loads(SPEC.read_text(encoding="utf-8")))
    cast = Cast(SPEC.parent, options.work)
    cast.build([part.population for part in spec.judged_parts], options.jobs)
    folds = ScanningTable(spec, cast, 1).judged
    members = [(number, member) for number, fold in enumerate(folds) for member in fold.members]
    trial = Trial("generalist", (), spec.seeds[0], (), tuple(member for _, member in members))
    todo = trial.measurements()
    measure_models(todo, workers=options.jobs)
    features = [one.read()["features"] for one in todo]
    trojaned = torch.tensor([member.trojaned for _, member in members])
    benign = torch.tensor([flag for fold in folds for flag in fold.benign])

    scanner = Generalist().fit(features, trojaned.tolist())
    flagged = torch.zeros(len(members), dtype=torch.bool)
    for number in range(len(folds)):
        own = [place for place, (other, _) in enumerate(members) if other == number]
        rest = [place for place, (other, _) in enumerate(members) if other != number]
        stranger = Generalist().fit(
            [features[place] for place in rest], [bool(trojaned[place]) for place in rest]
        )
        flagged[own] = stranger.scores([features[place] for place in own]) >= stranger.threshold
    cards: list[Any] = [read_card(member.folder) for _, member in members]
    classes = [len(card["class_names"]) for card in cards]
    card = {
        "norms": scanner.norms,
        "threshold": scanner.threshold,
        "corroborated": scanner.corroborated,
        "method": "docs/methods/generalist.md",
        "fitted_on": {
            "populations": "zoo-random",
            "data": sorted({Path(card["spec"]["data"]["source"]).name for card in cards}),
            "architectures": sorted({card["architecture"]["name"] for card in cards}),
            "image_sizes": sorted({card["image_shape"][1] for card in cards}),
            "classes": [min(classes), max(classes)],
            "benign": int(benign.sum()),
            "trojaned": int(trojaned.sum()),
        },
        "flagged_by_the_threshold_of_the_other_folds": {
            "benign": round(float(flagged[benign].double().mean()), 3),
            "trojaned": round(float(flagged[trojaned].double().mean()), 3),
        },
        "auroc": auroc(scanner.scores(features), trojaned),
        "fails_on": FAILS_ON,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": provenance(),
    }
    options.output.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(f"{len(members)} models in {len(folds)} folds, threshold {scanner.threshold:.3f}")
    print(options.output)


if __name__ == "__main__":
    main()
