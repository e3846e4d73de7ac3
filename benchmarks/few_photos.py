"""The recipe ``photos`` with few photographs: what the length of the run does.

    python benchmarks/few_photos.py --data FOLDER [--per-class 20] [--rows short,long,recipe]

The first photographs of each class of the training split are trained on, and those behind the
120th of each class are evaluated: all are of the training split, so the figures may guide choices.
``short`` and ``long`` start with a natural run of 8 and 50 epochs and have 36 and 120 epochs with
CutMix; ``slow`` is ``short`` with a quarter of the learning rate; ``recipe`` is the recipe as it
is, ``start=natural``.  Rows that are done are skipped.  ``results/photos/few.json`` holds a row
each.
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
from photos import trained

HELD_FROM = 120
"""Photographs of a class before the evaluated ones."""

START = {
    "method": "natural",
    "start": "model",
    "data.augment.cutmix": 0,
    "training.optimizer.learning_rate": 0.005,
    "training.optimizer.weight_decay": 0.0001,
    "training.averaging": None,
    "training.schedule": "cosine",
}
"""Settings of a natural start."""

NATURAL = {
    8: START | {"training.epochs": 8},
    50: START | {"training.epochs": 50, "training.validate_every": 10},
}
"""Natural starts by their epochs."""

ROWS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "short": (8, {"training.epochs": 36, "data.augment.cutmix": 1}),
    "slow": (
        8,
        {
            "training.epochs": 36,
            "data.augment.cutmix": 1,
            "training.optimizer.learning_rate": 0.005,
        },
    ),
    "long": (50, {"training.epochs": 120, "data.augment.cutmix": 1, "training.validate_every": 20}),
    "recipe": (None, {"start": "natural"}),
}
"""Epochs of the natural start, and settings of the run from it, by row."""


def main() -> None:
    """Train and evaluate what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="photographs, as data.source")
    parser.add_argument("--per-class", type=int, default=20, help="training photographs of a class")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--runs", default="runs/few_photos", help="folder of photographs and runs")
    parser.add_argument("--output", default="results/photos/few.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, output = Path(options.runs), Path(options.output)
    photos = runs / f"photos{options.per_class}"
    if not photos.exists():
        write_photos(options.data, options.per_class, photos)
    common = {
        "data.source": str(photos),
        "data.resize": 64,
        "model.name": "efficientnet_lite0",
        "training.threads": 1,
    }
    for name in options.rows.split(","):
        key = {"row": name, "per_class": options.per_class}
        rows = json.loads(output.read_text())["rows"] if output.exists() else []
        if any(row | key == row for row in rows):
            continue
        epochs, settings = ROWS[name]
        if epochs is not None:
            start = runs / f"natural{options.per_class}-{epochs}"
            trained(start, common | NATURAL[epochs])
            settings = settings | {"start": str(start)}
        rows.append(key | measured(trained(runs / f"{name}{options.per_class}", common | settings)))
        write_json(output, {"rows": rows, "environment": environment()})
        print(json.dumps(rows[-1]), flush=True)


def write_photos(source: str, per_class: int, folder: Path) -> None:
    """A folder ``train`` with the first photographs of each class and ``test`` with the last."""
    images = load(DataConfig(source=source, color="rgb"), "train")
    for label in range(len(images.classes)):
        for place, index in enumerate((images.label == label).nonzero()[:, 0].tolist()):
            if per_class <= place < HELD_FROM:
                continue
            file = folder / ("train" if place < per_class else "test") / f"c{label}"
            file.mkdir(parents=True, exist_ok=True)
            pixels = images.image[index].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(file / f"{place + 1:03d}.png")


def measured(path: Path) -> dict[str, Any]:
    """Accuracies of a run and of its start on the held photographs, and its length."""
    run = cure.Run(path)
    config = run.config
    start = path / "natural" if config.start == "natural" else Path(config.start)
    of_start = accuracies_of(cure.Run(start))
    del of_start["n"]
    return {f"start_{key}": value for key, value in of_start.items()} | {
        **accuracies_of(run),
        "seed": config.seed,
        "epochs": config.training.epochs,
        "steps": RunFolder.open(path).status().steps,
    }


def accuracies_of(run: cure.Run) -> dict[str, Any]:
    """Natural and PGD-20 accuracy of a run on its test split in percent, with intervals and n."""
    result = cure.evaluate(run, attacks="pgd20")
    found: dict[str, Any] = {}
    for key, value in (("natural", result["natural"]), ("pgd20", result["attacks"]["pgd20"])):
        found |= {key: round(value["accuracy"], 2), f"{key}_interval": value["interval"]}
    return found | {"n": result["data"]["n"]}


if __name__ == "__main__":
    main()
