"""Accuracy on the validation split during training."""

from __future__ import annotations

import torch
from torch import nn

from cure.attacks import PGD, Threat
from cure.attacks.losses import CROSS_ENTROPY
from cure.config import Ratio, RunConfig
from cure.data import ImageSet, batches
from cure.models.checks import predicted
from cure.utils.engine import Engine
from cure.utils.modes import evaluating


def validation_attack(config: RunConfig, engine: Engine, steps: int | None = None) -> PGD:
    """The attack that measures robust accuracy while training.

    Its step is that of the training attack where that is a fifth to a half of the radius; else a
    quarter, as in the evaluation's PGD.  Ten shorter steps hardly cross the ball, and longer ones,
    of training with a single step, jump from edge to edge and miss what lies between.

    Args:
        config: the run.
        engine: where it runs.
        steps: steps of PGD; by default ``training.validation_steps``.
    """
    epsilon, step = config.threat.epsilon, config.attack.step_size
    fits = epsilon / 5 * (1 - 1e-9) <= step <= epsilon / 2 * (1 + 1e-9)
    return PGD(
        Threat.of(config.threat),
        steps=config.training.validation_steps if steps is None else steps,
        step_size=step if fits else Ratio(epsilon / 4),
        start="uniform",
        precision=engine.attack_precision,
        fold=True,
    )


def validate(
    model: nn.Module,
    images: ImageSet,
    config: RunConfig,
    engine: Engine,
    steps: int | None = None,
    balanced: bool = False,
) -> dict[str, float]:
    """Natural and robust accuracy in percent.

    Robust: PGD on cross-entropy, uniform start, the steps of :func:`validation_attack`, the same
    random numbers at every call so that epochs compare.  The ranks share the batches and sum their
    counts, so that the figures are those of one process.

    Args:
        model: its modes are restored afterwards.
        images: the validation split, on the engine's device.
        config: the run.
        engine: where it runs.
        steps: steps of PGD; by default ``training.validation_steps``.
        balanced: add ``natural_balanced`` and ``robust_balanced``, the means over the classes that
            have images.
    """
    attack = validation_attack(config, engine, steps)
    counts = torch.bincount(images.label, minlength=len(images.classes))
    right = torch.zeros(2, len(counts), dtype=torch.int64, device=counts.device)
    with evaluating(model):
        for batch in batches(images, config.evaluation.batch_size):
            if batch.step % engine.world != engine.rank:
                continue
            image = engine.arrange(batch.image)
            draws = engine.generator(0, "validation", batch.step)
            adversarial = attack(model, image, batch.label, CROSS_ENTROPY, draws)
            with torch.no_grad():
                for row, shown in zip(right, (image, adversarial), strict=True):
                    hit = batch.label[predicted(model(shown)) == batch.label]
                    row += torch.bincount(hit, minlength=len(counts))
    by_class = engine.total(right).cpu()
    names = ("natural", "robust")
    found = {
        name: 100 * int(row.sum()) / len(images) for name, row in zip(names, by_class, strict=True)
    }
    if balanced:
        having = counts.cpu() > 0
        shares = by_class[:, having].double() / counts.cpu()[having]
        means = (100 * shares.mean(dim=1)).tolist()
        found |= {f"{name}_balanced": mean for name, mean in zip(names, means, strict=True)}
    return found
