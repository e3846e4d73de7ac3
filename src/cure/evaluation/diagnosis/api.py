"""The function ``cure.diagnose``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cure.attacks import Threat
from cure.config import ThreatConfig
from cure.data import ImageSet
from cure.evaluation.diagnosis.context import Examination
from cure.evaluation.diagnosis.report import examine
from cure.evaluation.runner import Progress, Result, silent
from cure.evaluation.target import ModelOptions, Split, check_counts, subject_of, threat_of
from cure.models import describe
from cure.runs.run import Run
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import check_free, write_json


def diagnose(
    target: str | Path | Run | nn.Module,
    *,
    data: str | Path | ImageSet | None = None,
    split: Split = "test",
    limit: int | None = 200,
    epsilon: str | float | None = None,
    norm: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    transfer: str | Path | Run | nn.Module | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    output: str | Path | None = None,
    progress: Progress = silent,
) -> Result:
    """Check whether an accuracy under attack can be believed.

    Args:
        target: as for :func:`cure.evaluate`, and so are all arguments that are not named here.
        limit: only the first so many images; all with None.  A check is as sharp as images are
            many: of 200, seven tell more than one percent from chance.
        transfer: another network for the same images (a run, or a network in Python); images made
            on it are tried on the target.
        progress: told (check, images done, images in all).

    Returns:
        The diagnosis, as documented in docs/diagnose.md.

    Raises:
        CureError: for every mistake a user can mend; nothing is written then.
    """
    check_free(output)
    check_counts(limit=limit, batch_size=batch_size)
    how = ModelOptions(mean, std, dict(options or {}))
    subject = subject_of(target, checkpoint, weights, how)
    config = subject.config
    threat = threat_of(config.threat if config else ThreatConfig(), epsilon, norm)
    engine = Engine.for_evaluation(device)
    images, model = subject.load(data, split, data_options or {})
    images = images if limit is None else images.subset(slice(0, limit))
    other = None
    if transfer is not None:
        other = engine.place(
            subject_of(transfer, "best", None, ModelOptions()).build(images)
        ).eval()
    # Of other images a run knows nothing.
    same = data is None and not data_options
    examination = Examination(
        engine.place(model),
        images,
        Threat(threat.norm, threat.epsilon),
        engine=engine,
        seed=seed,
        batch_size=batch_size or (config.evaluation.batch_size if config else 256),
        expected=subject.validation_accuracy() if same else None,
        other=other,
    )
    result = {
        "format": "cure-diagnosis-1",
        "target": subject.name,
        **examine(examination, progress=progress),
        "n": len(images),
        "seed": seed,
        "norm": threat.norm,
        "epsilon": float(threat.epsilon),
        "epsilon_text": threat.epsilon.text,
        "data": {"name": images.name, "split": images.split},
        "model": describe(model) | subject.facts,
        "environment": environment(),
    }
    if output is not None:
        write_json(Path(output), result)
    if subject.folder is not None:
        subject.folder.keep("diagnoses", result)
    return result
