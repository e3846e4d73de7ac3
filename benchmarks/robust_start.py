"""The recipe ``photos`` from a robust backbone, beside the same from a natural start.

    python benchmarks/robust_start.py --data FOLDER [--seeds 0,1,2] [--epochs 12,36]

The classes of the photographs are halved.  The first half trains the teacher: CURE from the
pretrained network, trained naturally on these classes first.  The second half is the task: CURE
from ``robust:TEACHER``, whose head is trained first, and CURE from a natural start, which is the
pretrained network trained naturally on the task; each with every number of epochs.
``training.min_steps`` is dropped, so that the budgets differ.
Every choice in training uses photographs carved from the training split; the figures are of the
test split.  Rows that are done are skipped.  ``results/photos/robust_start.json`` holds a row a
start, budget and seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import cure
from cure.config import DataConfig
from cure.data import load
from cure.runs.folder import RunFolder
from cure.utils.environment import environment
from cure.utils.io import write_json
from few_photos import accuracies_of
from photos import NATURAL, NATURAL_COMMON, NETWORKS, trained

NETWORK = "efficientnet-lite0"


def main() -> None:
    """Train and evaluate what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="photographs, as data.source")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", default="12,36", help="budgets of the task's runs")
    parser.add_argument("--teacher-epochs", type=int, default=36)
    parser.add_argument("--pixels", type=int, default=64, help="side of the resized photographs")
    parser.add_argument("--runs", default="runs/robust_start", help="photographs and runs")
    parser.add_argument("--output", default="results/photos/robust_start.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, output = Path(options.runs), Path(options.output)
    if not (runs / "task").exists():
        write_halves(options.data, runs)
    for seed in map(int, options.seeds.split(",")):
        for start, epochs in ((s, int(e)) for e in options.epochs.split(",") for s in ROWS):
            key = {"start": start, "epochs": epochs, "seed": seed}
            rows = json.loads(output.read_text())["rows"] if output.exists() else []
            if any(row | key == row for row in rows):
                continue
            path, facts = trained_from(options, runs, start, epochs, seed)
            rows.append(key | facts | accuracies_of(cure.Run(path)))
            write_json(output, {"rows": rows, "environment": environment()})
            print(json.dumps(rows[-1]), flush=True)


ROWS = ("natural", "robust")
"""What the task's runs begin with."""


def trained_from(
    options: argparse.Namespace, runs: Path, start: str, epochs: int, seed: int
) -> tuple[Path, dict[str, Any]]:
    """The run of a row, trained where it is missing, with what it begins with; its cost."""
    common = NETWORKS[NETWORK] | {
        "data.resize": options.pixels,
        "seed": seed,
        "training.threads": 1,
        "training.min_steps": None,
    }

    def begun(part: str) -> Path:
        """The pretrained network, trained naturally on one half of the classes."""
        settings = common | {"data.source": str(runs / part)} | NATURAL[NETWORK] | NATURAL_COMMON
        return trained(runs / f"natural-{part}-seed{seed}", settings)

    if start == "robust":
        of_teacher = {
            "data.source": str(runs / "teacher"),
            "start": str(begun("teacher")),
            "training.epochs": options.teacher_epochs,
        }
        teacher = trained(runs / f"teacher-seed{seed}", common | of_teacher)
        began = f"robust:{teacher}"
    else:
        began = str(begun("task"))
    task = {"data.source": str(runs / "task"), "start": began, "training.epochs": epochs}
    path = trained(runs / f"{start}-{epochs}-seed{seed}", common | task)
    lines = [line for each in (path, path / "head") if each.exists() for line in timing_of(each)]
    return path, {"processor_minutes": round(sum(lines) / 60, 1)}


def timing_of(path: Path) -> list[float]:
    """Processor seconds of each epoch of a run, without validation."""
    return [line.processor_seconds or 0 for line in RunFolder.open(path).timing()]


def write_halves(source: str, runs: Path) -> None:
    """Folders ``teacher`` and ``task``: the first and the last half of the classes, both splits."""
    for split in ("train", "test"):
        images = load(DataConfig(source=source, color="rgb"), split)
        half = len(images.classes) // 2
        for index, label in enumerate(images.label.tolist()):
            part = runs / ("teacher" if label < half else "task") / split / f"c{label}"
            part.mkdir(parents=True, exist_ok=True)
            pixels = images.image[index].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(part / f"{index:05d}.png")


if __name__ == "__main__":
    main()
