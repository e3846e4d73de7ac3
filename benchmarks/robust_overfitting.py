"""Robust overfitting: few images, many epochs; best minus last robust accuracy of each method.

    python benchmarks/robust_overfitting.py [--recipe cifar10-mini] [--seeds 0,1,2] [KEY=VALUE ...]
    python benchmarks/robust_overfitting.py --photos FOLDER --images 300 --validation 200 \\
        --limit 300 --epochs 100 --natural-epochs 20

Trains AT, TRADES, AT with averaged weights, and CURE with and without revision and mask on 2,000
images until training robust accuracy is high; with ``--photos`` from a pretrained network on the
first photographs of each class, with the recipe ``photos`` but for what hides the effect (CutMix,
and averaged weights in all rows); the best checkpoint is chosen on validation images
and both checkpoints are measured on test images.  What is done is skipped.  The output has a row a
run with its curves, and the mean of best minus last over seeds; ``.svg`` and ``.png`` beside it
show the robust accuracy of every method over the epochs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import photos
from cure.config import DataConfig
from cure.data import load
from cure.errors import DataError
from cure.experiments.compare.sources import no_place
from cure.experiments.plan import Measurement, Plan, PlanRow, entries
from cure.experiments.plan_work import results_of
from cure.recipe import parse_override
from cure.runs.results import RunRecord
from cure.utils.environment import environment
from cure.utils.io import write_bytes, write_text
from cure.utils.plotting import Chart, Panel, Series
from cure.utils.stats import student_t
from few_photos import START, write_photos
from planned import arguments, carry_out, keep

METHODS: dict[str, dict[str, Any]] = {
    "at": {"method": "at"},
    "trades": {"method": "trades"},
    "at-averaged": {"method": "at", "training.averaging": {"decay": 0.98}},
    "cure": {},
    "cure-no-revision": {"method.gamma": 0},
    "cure-no-mask": {"method.mask.kind": "none"},
    "cure-no-mask-no-revision": {"method.mask.kind": "none", "method.gamma": 0},
}


PHOTOS: dict[str, Any] = {
    "model.name": "efficientnet_lite0",
    "data.resize": 64,
    "data.augment.cutmix": 0,
    "training.averaging": None,
    "training.min_steps": 1,
}
"""Settings of all rows with ``--photos``."""

ON_PHOTOS = {
    "at": photos.METHODS["at"],
    "trades": photos.METHODS["trades"],
    "at-averaged": photos.METHODS["at"] | METHODS["at-averaged"],
}
"""Settings of rows that differ with ``--photos``, as in ``benchmarks/photos.py``."""


def plan_of(options: argparse.Namespace) -> Plan:
    """All methods and seeds."""
    chosen = options.methods.split(",") if options.methods else METHODS
    natural = {"method": "natural", "start": "scratch"}
    common: dict[str, Any] = {}
    if options.photos:
        natural = START
        common = PHOTOS | {"data.source": str(photographs(options))}
    rows = {"natural": PlanRow(settings=natural | {"training.epochs": options.natural_epochs})}
    for name in chosen:
        settings = ON_PHOTOS.get(name) if options.photos else None
        rows[name] = PlanRow(settings=settings or METHODS[name])
    settings = common | {
        "start": "run:natural",
        "data.limit": options.images + options.validation,
        "data.validation": options.validation,
        "training.epochs": options.epochs,
        "training.validate_every": options.validate_every,
        "training.threads": 1,
    }
    return Plan(
        name="robust-overfitting",
        recipe="photos" if options.photos else options.recipe,
        runs=str(options.folder / "trained"),
        settings=settings | dict(map(parse_override, options.settings)),
        seeds=tuple(map(int, options.seeds.split(","))),
        evaluations=(
            Measurement(attacks=("pgd20",), limit=options.limit, checkpoints=("best", "last")),
        ),
        rows=rows,
    )


def photographs(options: argparse.Namespace) -> Path:
    """The folder of the photographs that are trained on, validate and test; written once."""
    classes = len(load(DataConfig(source=options.photos, color="rgb"), "test", limit=1).classes)
    per_class, rest = divmod(options.images + options.validation, classes)
    if rest:
        raise DataError(
            f"--images and --validation: expected a multiple of the {classes} classes in all, got "
            f"{options.images + options.validation}"
        )
    folder: Path = options.folder / f"photos{per_class}"
    if not folder.exists():
        write_photos(options.photos, per_class, folder)
    return folder


def row_of(name: str, seed: int, record: RunRecord) -> dict[str, Any]:
    """Best and last checkpoint on test images, and the curves of one run."""
    by_checkpoint = {str(found.model.checkpoint): found for found in record.evaluations}
    best = by_checkpoint["best"].attacks["pgd20"]
    # The best epoch can be the last, which is then measured once.
    last = by_checkpoint.get("last", by_checkpoint["best"]).attacks["pgd20"]
    curve = [
        {
            "epoch": line.epoch,
            "train": round(100 * line.train["robust_accuracy"], 2)
            if "robust_accuracy" in line.train
            else None,
            "validation": None if line.validation is None else line.validation.robust,
        }
        for line in record.metrics
    ]
    return {
        "method": name,
        "seed": seed,
        "best_epoch": record.best_epoch,
        "natural": by_checkpoint["best"].natural.accuracy,
        "best": best.accuracy,
        "best_interval": best.interval,
        "last": last.accuracy,
        "last_interval": last.interval,
        "best_minus_last": best.accuracy - last.accuracy,
        "n": best.n,
        "curve": curve,
    }


def chart(rows: list[dict[str, Any]]) -> Chart:
    """Robust accuracy on training and validation images over the epochs, means over seeds."""
    panels = []
    for kind in ("train", "validation"):
        series = []
        for style, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            curves = [row["curve"] for row in rows if row["method"] == name]
            by_epoch: dict[int, list[float]] = {}
            for point in (point for curve in curves for point in curve):
                if point[kind] is not None:
                    by_epoch.setdefault(point["epoch"], []).append(point[kind])
            x = sorted(epoch for epoch, found in by_epoch.items() if len(found) == len(curves))
            series.append(Series(name, x, [fmean(by_epoch[epoch]) for epoch in x], style=style))
        panels.append(Panel(series, "epoch", f"robust accuracy on {kind} images, %"))
    text = "Means over seeds; a gap that opens between the panels is robust overfitting."
    title = "Robust accuracy over the epochs"
    return Chart("robust-overfitting", title, text, panels, columns=2, width=9.6)


def write(plan: Plan, folder: Path, output: Path) -> dict[str, Any]:
    """Write the rows that are done, their means, and the picture."""
    done = results_of(plan, folder)
    rows = [
        row_of(entry.label, entry.seed, done[entry.name])
        for entry in entries(plan)
        if entry.label != "natural" and entry.name in done
    ]
    means: dict[str, Any] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        each = [row["best_minus_last"] for row in rows if row["method"] == name]
        interval = list(student_t(each)) if len(each) > 1 else None
        means[name] = {"best_minus_last": fmean(each), "interval": interval, "seeds": len(each)}
    found = {
        "rows": rows,
        "means": means,
        "recipe": plan.recipe,
        "settings": no_place(plan.settings),
        "environment": environment(),
    }
    keep(output, found)
    if rows:
        write_text(output.with_suffix(".svg"), chart(rows).draw().svg)
        write_bytes(output.with_suffix(".png"), chart(rows).png())
    return found


def main() -> None:
    """Train and evaluate what is missing."""
    parser = arguments(__doc__, "robust_overfitting", epochs=150)
    parser.add_argument("--methods", help=f"only these of {', '.join(METHODS)}")
    parser.add_argument("--photos", help="photographs, as data.source, in place of --recipe")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--validate-every", type=int, default=5)
    options = parser.parse_args()
    carry_out(plan_of(options), options, write, "means")


if __name__ == "__main__":
    main()
