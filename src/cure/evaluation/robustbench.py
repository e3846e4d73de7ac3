"""Files that others read: RobustBench's records, and adversarial images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cure.data import ImageSet
from cure.errors import ConfigError
from cure.evaluation.runner import Result

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
