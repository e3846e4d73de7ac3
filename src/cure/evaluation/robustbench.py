"""Files that others read, and theirs that we check: RobustBench records, adversarial images."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks import Threat
from cure.data import ImageSet, batches
from cure.errors import ConfigError, DataError
from cure.evaluation.metrics import accuracy_of
from cure.evaluation.runner import Result
from cure.models.checks import check_outputs, predicted
from cure.utils.engine import Engine
from cure.utils.io import first_line

ADVERSARIAL_FORMAT = "cure-adversarial-1"
IMAGES = "adv_complete"
"""Key of the images in files of AutoAttack's and RobustBench's users, and in ours."""


def robustbench_record(result: Mapping[str, Any]) -> Result:
    """The record of a model in RobustBench's leaderboard (``model_info/DATA/THREAT/NAME.json``).

    Args:
        result: of an evaluation that holds "autoattack".

    Returns:
        Its fields; accuracies are percentages as text, as there.  What an evaluation cannot know
        (authors, link, venue, additional data) is empty or null, for its author to fill in.

    Raises:
        ConfigError: when AutoAttack was not run to its end.
    """
    part = result["attacks"].get("autoattack")
    if part is None:
        raise ConfigError(
            "RobustBench's record needs AutoAttack's accuracy; add autoattack to --attacks"
        )
    return {
        "link": "",
        "name": str(result["target"]),
        "authors": "",
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": result["data"]["name"],
        "venue": "",
        "architecture": result["model"]["name"],
        "eps": result["threat"]["epsilon_text"],
        "clean_acc": f"{result['natural']['accuracy']:.2f}",
        "reported": f"{part['accuracy']:.2f}",
        "autoattack_acc": f"{part['accuracy']:.2f}",
        "footnote": f"first {part['n']} images of the {result['data']['split']} split",
        "unreliable": False,
    }


def save_adversarial(
    path: Path, result: Mapping[str, Any], adversarial: Tensor, images: ImageSet
) -> None:
    """Write the worst case of an evaluation for others to check.

    Args:
        path: the file to make.
        result: the evaluation.
        adversarial: [N, C, H, W] in [0, 1], the natural image where nothing fooled.
        images: the natural ones, in the same order.
    """
    worst = result.get("worst_case", result["natural"])
    content = {
        "format": ADVERSARIAL_FORMAT,
        IMAGES: adversarial.cpu().contiguous(),
        "label": images.label.cpu(),
        "norm": result["threat"]["norm"],
        "epsilon": result["threat"]["epsilon"],
        "epsilon_text": result["threat"]["epsilon_text"],
        "attacks": list(result["attacks"]),
        "claimed_correct": worst["correct"],
        "data": f"{images.name} {images.split}",
        "natural_images": images.digest(),
    }
    torch.save(content, path)


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
