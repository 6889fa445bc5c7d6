"""Converts transcribed tables of papers into the names, columns and fractions of our rows.

    python benchmarks/convert_published.py FOLDER_OF_TRANSCRIPTS [benchmarks/published]

Options that a paper does not state are left out. Digits are kept as printed: 99.50 % becomes 0.9950.
"""

from __future__ import annotations

import csv
import json
import sys
from decimal import Decimal
from pathlib import Path

COLUMNS = ("table", "dataset", "method", "options", "attack", "mode", "metric", "value", "source")
DATASETS = {"MNIST": "mnist", "CIFAR10": "cifar10", "GTSRB": "gtsrb", "CelebA": "celeba"}
ATTACKS = {
    "Benign": "benign",
    "BadNet+": "badnet-plus",
    "noise-BI+": "noise-blend-plus",
    "image-BI+": "image-blend-plus",
    "InpAwAtk": "input-aware",
    "WaNet": "wanet",
}
METHODS = {
    "none": "none",
    "Februus": "februus",
    "NAD": "nad",
    "IF": "if",
    "VIF": "vif",
    "AIF": "aif",
    "IFtC": "if-contrast",
    "VIFtC": "vif-contrast",
    "AIFtC": "aif-contrast",
    "ulp": "litmus-patterns",
    "convolution": "signature-convolution",
    "transformer": "signature-transformer",
}
METRICS = {
    "clean_acc": "clean_accuracy",
    "trojan_acc": "trojan_accuracy",
    "cross_acc": "cross_accuracy",
    "noise_acc": "noise_accuracy",
    "drop_clean": "clean_drop",
    "drop_recovery": "recovery_drop",
    "FPR": "fpr",
    "FNR": "fnr",
}


def convert_filtering(line: dict[str, str]) -> dict[str, str]:
    """A line of Do et al. (ECCV 2022), tables 1 to 3: single-target attacks, percentages."""
    return {
        "table": f"do2022-table{line['table']}",
        "dataset": DATASETS[line["dataset"]],
        "method": METHODS[line["defense"]],
        "options": "{}",
        "attack": ATTACKS[line["attack"]],
        "mode": "" if line["attack"] == "Benign" else "single-target",
        "metric": METRICS[line["metric"]],
        "value": str(Decimal(line["value"]).scaleb(-2)),
        "source": f"Do et al., ECCV 2022, Table {line['table']}",
    }


def convert_signatures(line: dict[str, str]) -> dict[str, str]:
    """A line of Hussein et al. (arXiv 2306.04877), Table 2: patches on ULP's populations, fractions."""
    return {
        "table": line["table"],
        "dataset": line["dataset"],
        "method": METHODS[line["method"]],
        "options": json.dumps({"maps": line["maps"]} if line["maps"] else {}),
        "attack": "badnet",
        "mode": "",
        "metric": line["metric"],
        "value": line["value"],
        "source": "Hussein et al., arXiv 2306.04877, Table 2",
    }


CONVERSIONS = {
    "do2022_table1": convert_filtering,
    "do2022_table2": convert_filtering,
    "do2022_table3": convert_filtering,
    "hussein2023_table2": convert_signatures,
}


def convert(transcripts: Path, destination: Path) -> None:
    """Writes one file per table, named for it."""
    destination.mkdir(parents=True, exist_ok=True)
    for name, conversion in CONVERSIONS.items():
        with (transcripts / f"{name}.csv").open(newline="") as file:
            lines = [conversion(line) for line in csv.DictReader(file)]
        with (destination / f"{name.replace('_', '-')}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    convert(
        Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent / "published"
    )
