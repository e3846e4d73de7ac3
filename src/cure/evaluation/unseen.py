"""Accuracy under threats that a network was not trained for: the other norms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from cure.attacks import Threat
from cure.config import Ratio
from cure.data import ImageSet
from cure.evaluation.journal import Journal, JournalPart
from cure.evaluation.metrics import Result, accuracy_of, unpack
from cure.evaluation.runner import Progress, chosen_attacks, measure, no_progress
from cure.evaluation.shards import Shard
from cure.utils.engine import Engine

ATTACKS = ("apgd-ce", "apgd-t")
"""What runs in each unseen norm; of fewer than four classes, the first alone."""

_VALUES = {"small": 3 * 32 * 32, "photo": 3 * 224 * 224}
_LARGEST_SMALL = 3 * 64 * 64


def customary(norm: Literal["Linf", "L2", "L1"], values: int) -> Threat:
    """The radius that papers use in a norm, for images of so many values (channels x pixels).

    CIFAR-10: 8/255, 0.5 and 12; ImageNet: 4/255, 2 and 255.  Other sizes take those of CIFAR-10 up
    to 64x64 RGB, else of ImageNet: in L2 times the root of the ratio of values, in L1 times the
    ratio.

    Source: Croce and Hein, "Adversarial robustness against multiple and single lp-threat models via
    quick fine-tuning of robust classifiers", ICML 2022.

    >>> customary("L2", 3 * 32 * 32).epsilon, customary("L1", 32 * 32).epsilon
    (0.5, 4.0)
    """
    kind = "small" if values <= _LARGEST_SMALL else "photo"
    ratio = values / _VALUES[kind]
    if norm == "Linf":
        return Threat(norm, Ratio("8/255" if kind == "small" else "4/255"))
    if norm == "L2":
        return Threat(norm, Ratio(f"{(0.5 if kind == 'small' else 2) * ratio**0.5:.4g}"))
    return Threat(norm, Ratio(f"{(12 if kind == 'small' else 255) * ratio:.4g}"))


def unseen_threats(threat: Threat, images: ImageSet) -> dict[str, Threat]:
    """The threats of the norms that ``threat`` has not, by norm.

    >>> import torch
    >>> pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    >>> images = ImageSet.of(pixels, torch.tensor([0]), ("a",))
    >>> list(unseen_threats(Threat("Linf", 8 / 255), images))
    ['L2', 'L1']
    """
    norms: tuple[Literal["Linf", "L2", "L1"], ...] = ("Linf", "L2", "L1")
    values = images.image[0].numel()
    return {norm: customary(norm, values) for norm in norms if norm != threat.norm}


def _attacks(images: ImageSet) -> tuple[str, ...]:
    return ATTACKS if len(images.classes) >= 4 else ATTACKS[:1]


def check_unseen(
    model: nn.Module, images: ImageSet, threat: Threat, replay: nn.Module | None
) -> None:
    """Refuse a network that :func:`attack_unseen` cannot attack; the arguments are as there.

    Raises:
        ConfigError: in one sentence.
    """
    for other in unseen_threats(threat, images).values():
        chosen_attacks(_attacks(images), images, other, None, model, replay)


def attack_unseen(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    *,
    engine: Engine,
    batch_size: int,
    seed: int = 0,
    ends: float = math.inf,
    progress: Progress = no_progress,
    journal: Journal | None = None,
    shard: Shard | None = None,
    replay: nn.Module | None = None,
) -> Result:
    """What :func:`~cure.evaluation.runner.measure` says of each unseen threat, by norm.

    Args:
        model: as for :func:`~cure.evaluation.runner.measure`.
        images: as there.
        threat: the threat that is not unseen.
        engine: in bfloat16 attacks it is used in float32 here.
        batch_size: images attacked at once.
        seed: of random starts.
        ends: when attacks stop, as there.
        progress: called as there.
        journal: of the whole evaluation.
        shard: see there.
        replay: see there.
    """
    attacks = _attacks(images)
    journal = journal or Journal()
    found: Result = {}
    for norm, other in unseen_threats(threat, images).items():

        def tell(name: str, done: int, count: int, norm: str = norm) -> None:
            progress(f"{norm} {name}", done, count)

        found[norm] = measure(
            model,
            images,
            attacks,
            other,
            engine=replace(engine, precision="fp32"),
            batch_size=batch_size,
            seed=seed,
            ends=ends,
            progress=tell,
            journal=JournalPart(journal, norm),
            per_image=True,
            shard=shard,
            replay=replay,
        )
    return found


def with_all_threats(measured: Result, found: Result, threats: dict[str, Threat]) -> Result:
    """The result's part on unseen threats.

    Args:
        measured: what :func:`~cure.evaluation.runner.measure` gave under the threat itself, with
            ``per_image``.
        found: what :func:`attack_unseen` gave.
        threats: what :func:`unseen_threats` gave.

    Returns:
        By norm ``threat``, ``attacks``, ``worst_case`` and, out of time, ``unfinished``; and
        ``all_threats``, images that are right under every attack in every norm.
    """
    result: Result = {}
    rights = [unpack(part["right"], part["n"]) for part in measured["attacks"].values()]
    for norm, own in found.items():
        other = threats[norm]
        rights += [unpack(part.pop("right"), part["n"]) for part in own["attacks"].values()]
        result[norm] = {
            "threat": {
                "norm": norm,
                "epsilon": float(other.epsilon),
                "epsilon_text": str(other.epsilon),
            },
            **{k: own[k] for k in ("attacks", "worst_case", "unfinished") if k in own},
        }
    complete = not any("unfinished" in part for part in (measured, *result.values()))
    if complete and rights:
        union = torch.stack([torch.from_numpy(right) for right in rights]).all(0)
        result["all_threats"] = accuracy_of(union, 0.0)
        del result["all_threats"]["seconds"]
    return result
