"""Runs the checks of the table and puts their findings together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cure.attacks import Threat
from cure.data import ImageSet
from cure.evaluation.diagnosis.context import CheckContext
from cure.evaluation.diagnosis.table import CHECKS, worst
from cure.evaluation.runner import Progress, no_progress
from cure.utils.engine import Engine

CHEAP_IMAGES = 64


def run_checks(
    context: CheckContext,
    names: Iterable[str] | None = None,
    *,
    progress: Progress = no_progress,
    no_gradient: str = "",
) -> dict[str, Any]:
    """Run checks and put their findings together.

    Args:
        context: the network, its images and the threat.
        names: which checks; by default all.
        progress: called with (check, images done, images in all).
        no_gradient: why the network gives no gradients, as an exported file: checks of attacks are
            left out then, and the verdict is "warn" at best.

    Returns:
        {"verdict": the worst status, "checks": [{"name", "status", "measured", "meaning"}],
        "left_out": {name: why}}.

    Raises:
        ModelError: when the network's output has not the shape of logits.
    """
    chosen = set(CHECKS if names is None else names)
    found: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    count, finite = context.count, True
    with context.evaluating():
        for row in CHECKS.values():
            if row.name not in chosen:
                continue
            if row.attacks and (no_gradient or not finite):
                left_out[row.name] = no_gradient or "what the network returns is not finite"
                continue
            progress(row.name, 0, count)
            finding = row.run(context)
            progress(row.name, count, count)
            if isinstance(finding, str):
                left_out[row.name] = finding
                continue
            finite &= row.name != "finite" or finding.status != "fail"
            found.append({"name": row.name, **vars(finding)})
    verdict = worst(*(item["status"] for item in found), "warn" if no_gradient else "pass")
    return {"verdict": verdict, "checks": found, "left_out": left_out}


def cheap_checks(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    *,
    engine: Engine,
    seed: int = 0,
    expected: float | None = None,
    gradients: bool = True,
) -> dict[str, Any]:
    """The checks that cost a few passes, on at most 64 images from all over the set.

    Args:
        model: as for :class:`CheckContext`; nothing of it changes.
        images: those that are evaluated.
        threat: the ball.
        engine: device and memory layout.
        seed: of draws.
        expected: natural accuracy that is known of the network on such images, percent.
        gradients: also those that need gradients, which an exported file never has.

    Returns:
        What :func:`run_checks` returns.
    """
    count = min(CHEAP_IMAGES, len(images))
    spread = torch.linspace(0, len(images) - 1, count).long()
    few = images.subset(spread.to(images.device))
    context = CheckContext(
        model, few, threat, engine=engine, seed=seed, batch_size=count, expected=expected
    )
    return run_checks(
        context, (r.name for r in CHECKS.values() if r.cheap and (gradients or not r.attacks))
    )
