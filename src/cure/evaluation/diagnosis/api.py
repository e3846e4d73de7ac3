"""The function ``cure.diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch

from cure.evaluation.diagnosis.context import CheckContext
from cure.evaluation.diagnosis.report import run_checks
from cure.evaluation.options import TargetKeywords
from cure.evaluation.runner import Progress, Result, no_progress
from cure.evaluation.target import Target, TargetLike
from cure.models import describe
from cure.models.failure import network_errors
from cure.models.onnx_network import NO_GRADIENT
from cure.runs.results import DiagnosisRecord
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import check_free
from cure.utils.modes import in_evaluation


@torch.inference_mode(False)  # of a caller, whose tensors would have no gradient
def diagnose(
    target: TargetLike,
    *,
    epsilon: str | float | None = None,
    norm: str | None = None,
    transfer: TargetLike | None = None,
    output: str | Path | None = None,
    progress: Progress = no_progress,
    **options: Unpack[TargetKeywords],
) -> Result:
    """Check whether an accuracy under attack can be believed.

    Args:
        target: as for :func:`cure.evaluate`.
        epsilon: radius of the threat, "8/255" or a number; by default the run's, else 8/255.
        norm: "Linf", "L2" or "L1"; by default the run's, else Linf.
        transfer: another network for the same images (a run, or a network in Python); images made
            on it are tried on the target.
        output: JSON file to write; must not exist.
        progress: called with (check, images done, images in all).
        options: see :class:`~cure.evaluation.options.TargetOptions`; ``limit`` is 200 by default
            (None: all images).  More images make a check sharper: of 200, seven are significantly
            more than one percent.

    Returns:
        The diagnosis, as documented in docs/diagnose.md.

    Raises:
        CureError: for every mistake a user can correct; nothing is written then.

    >>> import torch
    >>> import cure
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> found = cure.diagnose(network, data="digits", epsilon="8/255", limit=50)
    >>> found["verdict"] in ("pass", "warn", "fail")
    True
    """
    output = check_free(output)
    chosen = Target.of(target, **(TargetKeywords(limit=200) | options))
    threat = chosen.threat(epsilon, norm)
    engine = Engine.for_evaluation(chosen.options.device)
    images, model = chosen.load()
    other = None
    if transfer is not None:
        other = in_evaluation(engine.place(Target.of(transfer).build(images)))
    context = CheckContext(
        engine.place(model),
        images,
        threat,
        engine=engine,
        seed=chosen.options.seed,
        batch_size=chosen.batch_size,
        expected=chosen.validation_accuracy(),
        other=other,
    )
    with network_errors():
        reason = NO_GRADIENT if chosen.is_onnx else ""
        found = run_checks(context, progress=progress, no_gradient=reason)
    result = {
        "format": "cure-diagnosis-1",
        "target": chosen.name,
        **found,
        "n": len(images),
        "seed": chosen.options.seed,
        "norm": threat.norm,
        "epsilon": float(threat.epsilon),
        "epsilon_text": str(threat.epsilon),
        "data": {"name": images.name, "split": images.split},
        "model": describe(model) | chosen.facts,
        "environment": environment(),
    }
    if output is not None:
        DiagnosisRecord.parse(result, output).write(Path(output))
    if chosen.folder is not None:
        chosen.folder.keep("diagnoses", result)
    return result
