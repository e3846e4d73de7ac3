"""Add the epochs of a run to a CSV file: accuracies on validation images and seconds.

Usage: python results/curves.py RUN SEED PART FILE. Epochs that the file has already are replaced.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from cure.runs.folder import RunFolder

HEADER = ("seed", "part", "epoch", "natural", "robust", "seconds", "validation_seconds")


def rows_of(run: str, seed: str, part: str) -> list[tuple[str, ...]]:
    folder = RunFolder.open(run)
    timing = {line.epoch: line for line in folder.timing()}
    rows = []
    for line in folder.metrics():
        measured = line.validation
        accuracies = ("", "") if measured is None else (measured.natural, measured.robust)
        cost = timing[line.epoch]
        seconds = (f"{cost.seconds:.3f}", f"{cost.validation_seconds:.3f}")
        rows.append((seed, part, str(line.epoch), *map(str, accuracies), *seconds))
    return rows


if __name__ == "__main__":
    run, seed, part, file = sys.argv[1:]
    path = Path(file)
    old: list[tuple[str, ...]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as opened:
            old = [tuple(row) for row in list(csv.reader(opened))[1:]]
    kept = [row for row in old if row[:2] != (seed, part)]
    with path.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows(
            [HEADER, *kept, *rows_of(run, seed, part)]
        )
