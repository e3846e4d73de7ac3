"""The demonstration: train on handwritten digits, evaluate, study, and write a page."""

from __future__ import annotations

from pathlib import Path

from cure.analysis.cka import cka
from cure.analysis.gradients import gradients
from cure.analysis.landscape import landscape
from cure.analysis.minimal_perturbation import minimal_perturbation
from cure.analysis.overfitting import overfitting
from cure.analysis.prediction_flips import prediction_flips
from cure.evaluation.corruptions.measure import corruptions
from cure.evaluation.evaluate import evaluate
from cure.evaluation.runner import Progress, Result, no_progress
from cure.report.page import write_report
from cure.runs.run import Run
from cure.training.run import train

SETTINGS = ("training.keep_every=8", "training.record_gradients=20")
"""What a run must record for the studies."""


def begin(path: str | Path | None = None) -> Run:
    """Train naturally, then make robust with CURE.

    Args:
        path: folder to make for the run; by default a new one in ``runs``.
    """
    return train("digits", SETTINGS, run=path)


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
