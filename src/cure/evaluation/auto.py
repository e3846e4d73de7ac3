"""``--attacks auto``: the strongest set of attacks that fits into a time limit."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import nn

from cure.attacks import Threat
from cure.attacks.registry import evaluation_attack
from cure.data import ImageSet, batches
from cure.models.trial import traits_of
from cure.utils.engine import Engine

AUTO = "auto"

LADDER = (("pgd20",), ("apgd-ce", "apgd-t"), ("autoattack",))
"""Sets of attacks, from the weakest to the strongest."""


def passes(names: tuple[str, ...], classes: int, threat: Threat) -> int:
    """About how many passes an image takes that no attack of the set fools.

    >>> passes(("pgd20",), 10, Threat("Linf", 8 / 255))
    20
    """
    chosen = [evaluation_attack(name).defined(classes, threat) for name in names]
    return sum(part.passes for attack in chosen for part in attack.parts.values())


def choose_attacks(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    engine: Engine,
    batch_size: int,
    seconds: float,
) -> tuple[tuple[str, ...], str]:
    """The strongest set whose estimated time is within ``seconds``; the weakest in any case.

    The estimate is an upper bound: a pass forward and backward is timed on one batch, and every
    image is counted as if no attack fooled it.

    Args:
        model: in evaluation mode, on the engine's device.
        images: all that will be attacked.
        threat: the ball.
        engine: device and precision.
        batch_size: images at once.
        seconds: the time limit.

    Returns:
        Names of attacks, and a sentence that says what was chosen and what was left out.
    """
    if not traits_of(model).gradient:
        return ("square",), "attacks chosen: square, since no gradient reaches the image"
    each = seconds_per_pass(model, images, engine, batch_size) * len(images) / engine.world
    sets = [names for names in LADDER if _possible(names, images, threat)]
    costs = {names: each * passes(names, len(images.classes), threat) for names in sets}
    fitting = [names for names in sets if costs[names] <= seconds]
    chosen = fitting[-1] if fitting else sets[0]
    left_out = [
        f"{' and '.join(names)} (up to {costs[names] / 60:.1f} minutes)"
        for names in sets[sets.index(chosen) + 1 :]
    ]
    sentence = (
        f"attacks chosen for a time limit of {seconds:g} s: {' and '.join(chosen)} (up to "
        f"{costs[chosen] / 60:.1f} minutes)"
    )
    return chosen, sentence + (f"; left out: {', '.join(left_out)}" if left_out else "")


def seconds_per_pass(model: nn.Module, images: ImageSet, engine: Engine, batch_size: int) -> float:
    """Seconds an image of one pass forward and backward to the image; the second of two."""
    batch = next(batches(images, min(batch_size, len(images))))
    image = engine.arrange(batch.image.to(engine.device))
    label = batch.label.to(engine.device)
    elapsed = 0.0
    for _ in range(2):
        began = time.perf_counter()
        leaf = image.detach().clone().requires_grad_()
        loss = F.cross_entropy(model(leaf), label)
        (gradient,) = torch.autograd.grad(loss, leaf)
        float(gradient.sum())  # Waits for the device.
        elapsed = time.perf_counter() - began
    return elapsed / len(image)


def _possible(names: tuple[str, ...], images: ImageSet, threat: Threat) -> bool:
    """Whether every attack of the set is defined for the classes and the norm."""
    attacks = [evaluation_attack(name) for name in names]
    least = max(min(part.least_classes for part in attack.parts.values()) for attack in attacks)
    return len(images.classes) >= least and all(threat.norm in a.norms for a in attacks)
