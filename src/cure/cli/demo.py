"""The demonstrations: digits in a minute, photographs in a few."""

from __future__ import annotations

import os
from pathlib import Path

from cure.analysis.cka import cka
from cure.analysis.gradients import gradients
from cure.analysis.landscape import landscape
from cure.analysis.minimal_perturbation import minimal_perturbation
from cure.analysis.overfitting import overfitting
from cure.analysis.prediction_flips import prediction_flips
from cure.errors import DataError
from cure.evaluation.corruptions.measure import corruptions
from cure.evaluation.evaluate import evaluate
from cure.evaluation.runner import Progress, Result, no_progress
from cure.exporters.export import export
from cure.report.page import write_report
from cure.runs.run import Run
from cure.training.run import train

SETTINGS = ("training.keep_every=8", "training.record_gradients=20")
"""What a run must record for the studies."""


PHOTOS = "imagenette224"
"""Folder of photographs that is looked for in CURE_DATA."""

PHOTO_SETTINGS: dict[str, object] = {
    "name": "photos-demo",
    "model.name": "efficientnet_lite0",
    "start": "natural",
    "natural.epochs": 4,
    "natural.learning_rate": 0.01,
    "data.resize": 64,
    "training.epochs": 4,
    "training.validate_every": 4,
}
"""The recipe ``photos`` made so small that the demonstration takes a few minutes."""


def begin(path: str | Path | None = None) -> Run:
    """Train naturally, then make robust with CURE.

    Args:
        path: folder to make for the run; by default a new one in ``runs``.
    """
    return train("digits", SETTINGS, run=path)


def begin_photos(folder: str | Path | None = None, path: str | Path | None = None) -> Run:
    """Fine-tune a pretrained network on photographs, then make it robust with recipe ``photos``.

    Args:
        folder: photographs, one sub-folder a class; by default ``$CURE_DATA/imagenette224``.
        path: folder to make for the run; by default a new one in ``runs``.

    Raises:
        DataError: when there are no photographs.
        ModelError: when the network is not installed.
    """
    if folder is None:
        root = os.environ.get("CURE_DATA")
        folder = Path(root).expanduser() / PHOTOS if root else PHOTOS
        if not Path(folder).is_dir():
            raise DataError(
                f"expected photographs for the demonstration in the folder {PHOTOS} of CURE_DATA, "
                "got none; give a folder of your own, with one sub-folder of photographs a class: "
                "cure demo --photos --data FOLDER"
            )
    return train("photos", PHOTO_SETTINGS | {"data.source": str(folder)}, run=path)


def examine_photos(run: Run, progress: Progress = no_progress) -> tuple[list[Result], Path]:
    """Evaluate the network and its natural start on the test photographs; write the report."""
    results = [
        evaluate(folder, attacks=["pgd20"], progress=progress)
        for folder in (run.path / "natural", run.path)
    ]
    return results, write_report([run.path])


def examine(run: Run, progress: Progress = no_progress) -> tuple[list[Result], Path]:
    """Evaluate and study the network and its natural start, and write the report.

    Args:
        run: from :func:`begin`.
        progress: called with (attack or study, images done, images in all).

    Returns:
        The evaluations of both, the start's first; the report.
    """
    start = run.path / "natural"
    both = (start, run.path)
    results = [
        evaluate(folder, curve="pgd20", output=folder / "evaluation.json", progress=progress)
        for folder in both
    ]
    for folder in both:
        corruptions(folder, severity="3", limit=100, progress=progress)
    prediction_flips(run.path, progress=progress)
    overfitting(run.path, limit=200, progress=progress)
    gradients([run.path])
    # Kept with the first run among them, which is the one that the page is of.
    cka(run.path, start, limit=300, progress=progress)
    minimal_perturbation(run.path, start, limit=100, progress=progress)
    landscape(run.path, start, limit=100, progress=progress)
    return results, write_report([run.path])


def deploy(run: Run, progress: Progress = no_progress) -> tuple[Path, Result]:
    """Export the network to ONNX, and evaluate the file.

    Args:
        run: from :func:`begin`.
        progress: called with (attack, images done, images in all).

    Returns:
        The file; its evaluation on images made on the run.

    Raises:
        ModelError: when the packages of the extra ``export`` are missing.
    """
    made = export(run, "onnx", run.path / "deploy")
    result = evaluate(
        made,
        data=run.config.data.source,
        attacks="noise,pgd20",
        float_network=run,
        limit=200,
        output=made.with_name("evaluation.json"),
        progress=progress,
    )
    return made, result
