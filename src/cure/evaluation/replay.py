"""An exported file against the float network that it was made from, attack by attack."""

from __future__ import annotations

from typing import Any

from torch import nn

from cure.attacks import Threat
from cure.attacks.registry import attack_label, evaluation_attack
from cure.data import ImageSet
from cure.evaluation.metrics import unpack
from cure.evaluation.runner import Progress, Result, measure, needs_gradient
from cure.utils.engine import Engine
from cure.utils.stats import paired_difference


def compared(
    measured: Result,
    float_network: nn.Module,
    images: ImageSet,
    threat: Threat,
    *,
    engine: Engine,
    batch_size: int,
    seed: int,
    ends: float,
    progress: Progress,
) -> Result:
    """The float network under the attacks whose images were replayed, and the differences.

    Args:
        measured: of the file, with ``right`` beside each accuracy.
        float_network: what the images were made on.
        images: as for the file.
        threat: the ball.
        engine: device.
        batch_size: images at once.
        seed: of random starts, the same.
        ends: when attacks stop: see :func:`~cure.evaluation.runner.measure`.
        progress: called with (attack, images done, images in all).

    Returns:
        {"natural", "attacks", "differences": {name: {"difference", "interval", "lost", "gained"}}}:
        points of accuracy of the file minus the float network, images paired.
    """
    names = [
        name
        for name in measured["attacks"]
        if needs_gradient(evaluation_attack(name, source=float_network))
    ]

    def tell(name: str, done: int, count: int) -> None:
        progress(f"float {name}", done, count)

    own = measure(
        float_network,
        images,
        names,
        threat,
        engine=engine,
        batch_size=batch_size,
        seed=seed,
        ends=ends,
        progress=tell,
        per_image=True,
    )
    pairs = {"natural": (own["natural"], measured["natural"])}
    pairs |= {name: (part, measured["attacks"][name]) for name, part in own["attacks"].items()}
    differences = {name: _difference(*pair) for name, pair in pairs.items()}
    return {
        "natural": own["natural"],
        "attacks": own["attacks"],
        "unfinished": own.get("unfinished", {}),
        "differences": differences,
    }


def _difference(before: dict[str, Any], after: dict[str, Any]) -> Result:
    """Points from the float network to the file, on the same images."""
    first, second = (unpack(part["right"], part["n"]) for part in (before, after))
    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    difference, low, high = paired_difference(lost, gained, len(first))
    return {"difference": difference, "interval": [low, high], "lost": lost, "gained": gained}


def masking_note(result: Result, gradient: bool) -> str:
    """What must be said of a network that gives no gradients: attacks without them are weak.

    Args:
        result: an evaluation of it.
        gradient: whether gradients reach its images.

    Returns:
        A sentence; empty for other networks.
    """
    if gradient:
        return ""
    attacks = result["attacks"]
    replayed = {n: part for n, part in attacks.items() if "made_on" in part["settings"]}
    own = {n: part for n, part in attacks.items() if n not in replayed}
    int8 = result["model"].get("precision") == "int8"
    if not attacks or (replayed and not int8):
        return ""
    said = (
        "int8 rounds what the layers compute, which masks the gradient and is no robustness: an "
        "accuracy under attacks without gradients is an upper bound"
        if int8
        else "the network gives no gradients: an accuracy under attacks without them is an upper "
        "bound of what gradients would leave"
    )
    if not replayed:
        return f"{said}; give the run with --float RUN to replay images made on the float network"
    worst = min(replayed, key=lambda name: replayed[name]["accuracy"])
    shown = f"images that {attack_label(worst)} made on the float network leave "
    shown += f"{replayed[worst]['accuracy']:.1f} %"
    if own:
        strongest = min(own, key=lambda name: own[name]["accuracy"])
        shown += f", {attack_label(strongest)} on the file {own[strongest]['accuracy']:.1f} %"
    return f"{said}; {shown}"
