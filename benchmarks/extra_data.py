"""What extra images buy that are made here: the training images, strongly augmented and mixed.

    python benchmarks/extra_data.py [--recipe cifar10-mini] [--seeds 0,1,2] [KEY=VALUE ...]

Writes ``extra.npz``: random parts of training images, recoloured, half of them mixed in pairs
(MixUp or CutMix), without labels.  A natural network trained on the training images labels them.
Then the method is trained with and without them, from the same start, in the same number of steps,
and both are measured on test images.  They hold nothing that the training images do not: this
measures augmentation and distillation, not generated data.  What is done is skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from cure.config import AugmentConfig, DataConfig
from cure.data import load_split
from cure.data.augment import augmented, mixed
from cure.experiments.compare.sources import no_place
from cure.experiments.plan import Measurement, Plan, PlanRow, entries
from cure.experiments.plan_work import results_of
from cure.recipe import parse_override
from cure.utils.environment import environment
from cure.utils.io import write_atomically
from cure.utils.random import generator
from cure.utils.stats import student_t
from planned import arguments, carry_out, keep

MEASURED = ("natural", "pgd20")


def make_extra(config: DataConfig, count: int, file: Path) -> None:
    """Write ``count`` images made from the training split, in the same bits each time."""
    images = load_split(config, "train")
    strong = AugmentConfig(resized_crop=0.35, color_jitter=0.3)
    made = []
    for first in range(0, count, 500):
        draws = generator("cpu", 0, "extra data", first)
        size = min(500, count - first)
        image = images.rows(torch.randint(len(images), (size,), generator=draws))
        image = augmented(image, strong, draws)
        for part in range(0, size // 2, 10):
            # Ten images at a time share one share of the mix.
            mix = AugmentConfig(mixup=1.0) if part % 20 else AugmentConfig(cutmix=1.0)
            some = slice(part, min(part + 10, size // 2))
            image[some] = mixed(image[some], torch.zeros(some.stop - some.start), mix, draws)[0]
        made.append((255 * image).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

    def write(temporary: Path) -> None:
        with temporary.open("wb") as opened:
            np.savez_compressed(opened, image=np.concatenate(made))

    write_atomically(file, write)


def plan_of(options: argparse.Namespace, extra: Path) -> Plan:
    """The method with and without the extra images, and the network that labels them."""
    natural = {"method": "natural", "start": "scratch", "training.epochs": options.natural_epochs}
    more = {"extra": str(extra), "extra_share": options.share, "extra_labels": "run:natural"}
    rows = {
        "natural": PlanRow(settings=natural),
        "without": PlanRow(),
        "with": PlanRow(settings={f"data.{key}": value for key, value in more.items()}),
    }
    settings = {
        "method": options.method,
        "start": "run:natural",
        "data.limit": options.images + options.validation,
        "data.validation": options.validation,
        "training.epochs": options.epochs,
        "training.threads": 1,
    }
    settings |= dict(map(parse_override, options.settings))
    rows["natural"] = PlanRow(settings=settings | natural)
    return Plan(
        name="extra-data",
        recipe=options.recipe,
        runs=str(options.folder / "trained"),
        settings=settings,
        seeds=tuple(map(int, options.seeds.split(","))),
        evaluations=(Measurement(attacks=("pgd20",), limit=options.limit),),
        rows=rows,
        reference="without",
    )


def write(plan: Plan, folder: Path, output: Path) -> dict[str, Any]:
    """Write the figures of the runs that are done, and the differences seed by seed."""
    done = results_of(plan, folder)
    figures: dict[tuple[str, int], dict[str, float]] = {}
    rows = []
    for entry in entries(plan):
        if entry.label == "natural" or entry.name not in done:
            continue
        found = done[entry.name].evaluations[0]
        parts = {"natural": found.natural, "pgd20": found.attacks["pgd20"]}
        row: dict[str, Any] = {"row": entry.label, "seed": entry.seed, "n": found.natural.n}
        for name, part in parts.items():
            row |= {name: part.accuracy, f"{name}_interval": part.interval}
        rows.append(row)
        figures[entry.label, entry.seed] = {name: row[name] for name in MEASURED}
    gains = {}
    both = [seed for label, seed in figures if label == "with" and ("without", seed) in figures]
    for name in MEASURED:
        each = [figures["with", seed][name] - figures["without", seed][name] for seed in both]
        if each:
            interval = list(student_t(each)) if len(each) > 1 else None
            gains[name] = {"mean": fmean(each), "interval": interval, "seeds": len(each)}
    result = {
        "rows": rows,
        "with_minus_without": gains,
        "recipe": plan.recipe,
        "settings": no_place(plan.settings),
        "extra": no_place(plan.rows["with"].settings),
        "environment": environment(),
    }
    keep(output, result)
    return result


def main() -> None:
    """Train and evaluate what is missing."""
    parser = arguments(__doc__, "extra_data", epochs=60)
    parser.add_argument("--method", default="at")
    parser.add_argument("--images", type=int, default=2000, help="training images")
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--extra", type=int, default=10000, help="extra images to make")
    parser.add_argument("--share", type=float, default=0.5, help="of each batch")
    options = parser.parse_args()
    extra = options.folder / f"extra-{options.images}-{options.extra}.npz"
    plan = plan_of(options, extra)
    if not extra.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        make_extra(entries(plan)[0].config.data, options.extra, extra)
    carry_out(plan, options, write, "with_minus_without")


if __name__ == "__main__":
    main()
