"""Check adversarial images that somebody made, and the accuracy that is claimed of them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from cure.attacks import Threat
from cure.data import ImageSet, batches
from cure.errors import DataError
from cure.evaluation.metrics import Result, accuracy_of
from cure.evaluation.options import TargetKeywords
from cure.evaluation.robustbench import IMAGES
from cure.evaluation.target import Target, TargetLike
from cure.models.checks import check_outputs, predicted
from cure.models.failure import network_errors
from cure.utils.engine import Engine
from cure.utils.environment import environment
from cure.utils.io import check_free, first_line, user_path, write_json
from cure.utils.modes import in_evaluation


def verify(
    file: str | Path,
    target: TargetLike,
    *,
    epsilon: str | float | None = None,
    norm: str | None = None,
    output: str | Path | None = None,
    **options: Unpack[TargetKeywords],
) -> Result:
    """Recompute an accuracy that is claimed of adversarial images, and check the images.

    Args:
        file: what ``evaluate(adversarial=...)`` wrote, ``{"adv_complete": images}`` as AutoAttack's
            users save it, or a tensor alone; images of the first N natural ones, in their order.
        target: the network, as in :func:`cure.evaluate`.
        epsilon: radius of the ball; by default what the file says, else the run's.
        norm: as ``epsilon``.
        output: JSON file to write; must not exist.
        options: as in :func:`cure.evaluate`.

    Returns:
        ``format`` "cure-verification-1" and what :func:`check_claim` returns.

    Raises:
        CureError: for every mistake a user can correct.

    >>> import torch
    >>> import cure
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> asked = {"data": "digits", "epsilon": "8/255", "limit": 50}
    >>> made = cure.evaluate(network, attacks=["pgd20"], adversarial="worst.pt", **asked)
    >>> checked = cure.verify("worst.pt", network, **asked)
    >>> checked["holds"], checked["n"]
    (True, 50)
    """
    output, file = check_free(output), user_path(file)
    claim = read_claim(file)
    chosen = Target.of(target, **options)
    if claim.threat is not None:
        epsilon = claim.threat.epsilon if epsilon is None else epsilon
        norm = claim.threat.norm if norm is None else norm
    threat = chosen.threat(epsilon, norm)
    engine = Engine.for_evaluation(chosen.options.device)
    images, model = chosen.load()
    model = in_evaluation(engine.place(model))
    with network_errors():
        checked = check_claim(claim, model, images, threat, engine, chosen.batch_size)
    result = {
        "format": "cure-verification-1",
        "target": chosen.name,
        "file": str(file),
        **checked,
        "threat": {"norm": threat.norm, "epsilon": float(threat.epsilon)},
        "environment": environment(),
    }
    if output is not None:
        write_json(Path(output), result)
    return result


@dataclass(frozen=True)
class Claim:
    """Adversarial images, and what is said of them.

    Attributes:
        images: [N, C, H, W].
        threat: the ball they should lie in, if the file says so.
        correct: how many of them the network should get right, if the file says so.
        natural: digest of the natural images, if the file says so.
    """

    images: Tensor
    threat: Threat | None = None
    correct: int | None = None
    natural: str | None = None


def read_claim(path: str | Path) -> Claim:
    """Adversarial images from a file: ours, ``{"adv_complete": ...}``, or a tensor alone.

    Raises:
        DataError: when the file is none of these; nothing in it is executed.
    """
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist; name a .pt file of adversarial images")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read as tensors ({first_line(error)[:100]}); expected a "
            f"file written by torch.save that holds a tensor or {{'{IMAGES}': tensor}}"
        ) from None
    said = content if isinstance(content, dict) else {IMAGES: content}
    images = said.get(IMAGES)
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        came = (
            f"shape {list(images.shape)}, {images.dtype}" if isinstance(images, Tensor) else "none"
        )
        raise DataError(
            f"{path}: expected images [N, C, H, W] of floating numbers in [0, 1], got {came}"
        )
    threat = None
    if said.get("norm") in ("Linf", "L2", "L1") and isinstance(said.get("epsilon"), float | int):
        threat = Threat(said["norm"], float(said["epsilon"]))
    correct, natural = said.get("claimed_correct"), said.get("natural_images")
    return Claim(
        images.float(),
        threat,
        correct if isinstance(correct, int) else None,
        natural if isinstance(natural, str) else None,
    )


@torch.no_grad()
def check_claim(
    claim: Claim,
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    engine: Engine,
    batch_size: int,
) -> Result:
    """What a network makes of adversarial images, and whether they are allowed.

    Args:
        claim: of :func:`read_claim`.
        model: in evaluation mode.
        images: the natural ones, at least as many, in the same order.
        threat: the ball.
        engine: device and memory layout.
        batch_size: images at once.

    Returns:
        {"accuracy", "interval", "correct", "n", "outside", "largest_change", "claimed_correct",
        "holds"}: ``outside`` counts images that leave the ball or [0, 1] beyond float rounding;
        ``holds`` is whether none does and as many are right as claimed, one more or less for
        rounding on another machine.

    Raises:
        DataError: when the images do not fit the natural ones.
        ModelError: when the model's output is no logits.
    """
    count = len(claim.images)
    if count > len(images) or claim.images.shape[1:] != (images.channels, *images.size):
        raise DataError(
            f"expected adversarial images like the first {count} of {images.name} "
            f"{images.split}, {len(images)} images of {[images.channels, *images.size]}, got "
            f"{list(claim.images.shape)}; name the data they were made from"
        )
    chosen = images.subset(slice(0, count)).to(engine.device)
    if claim.natural is not None and claim.natural != chosen.digest():
        raise DataError(
            f"the file was made from other images than the first {count} of {images.name} "
            f"{images.split}; name the data, split and limit it was made with"
        )
    first = next(batches(chosen, batch_size))
    check_outputs(model, engine.arrange(first.image), len(images.classes))
    right = torch.zeros(count, dtype=torch.bool)
    outside, furthest = 0, 0.0
    for batch in batches(chosen, batch_size):
        changed = claim.images[batch.index.cpu()].to(engine.device)
        lengths = threat.distance(changed - batch.image)
        beyond = ~threat.within(lengths)
        beyond |= ((changed < 0) | (changed > 1) | changed.isnan()).flatten(1).any(dim=1)
        outside += int(beyond.sum())
        furthest = max(furthest, float(lengths.max()))
        named = predicted(model(engine.arrange(changed)))
        right[batch.index.cpu()] = (named == batch.label).cpu()
    result = accuracy_of(right, 0.0)
    del result["seconds"]
    agrees = claim.correct is None or abs(result["correct"] - claim.correct) <= 1
    return result | {
        "outside": outside,
        "largest_change": furthest,
        "claimed_correct": claim.correct,
        "holds": outside == 0 and agrees,
    }
