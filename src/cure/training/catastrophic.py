"""Detect catastrophic overfitting of single-step adversarial training.

A network can learn to mask its gradient at the images of a single-step attack: it withstands that
attack, and PGD leaves nothing.

Source of the phenomenon: Wong, Rice, Kolter, "Fast is better than free", ICLR 2020.  The rule is
this project's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from cure.attacks import PGD
from cure.attacks.losses import CROSS_ENTROPY
from cure.config import RunConfig
from cure.data import Batch
from cure.methods import Method
from cure.models.checks import predicted
from cure.utils.modes import evaluating

STEPS = 10
"""Steps of the PGD that the single step is compared with."""


class CatastrophicOverfitting:
    """Compares the single-step attack with PGD on training batches.

    It is found where PGD leaves less than half of what the single step leaves, by more than three
    standard errors, and the single step leaves more than twice the accuracy of guessing (of two
    classes: more than half of the way from guessing to 100 %).

    Attributes:
        single_step: accuracy under the training attack at the last check, in percent.
        pgd: accuracy under PGD at the last check, in percent.
    """

    def __init__(self, method: Method, every: int) -> None:
        self.method = method
        self.every = every
        self.single_step = self.pgd = 0.0

    def overfits(self, batch: Batch, parts: int = 1) -> bool:
        """Check after the step on ``batch``, where a check is due; False after the fallback.

        ``parts`` equal parts of the batch are worked on one after another.

        Costs ``STEPS`` + 3 forward passes and ``STEPS`` + 1 backward passes of a batch.
        """
        context = self.method.context
        if (batch.step + 1) % self.every or context.fallback:
            return False
        attack = context.attack_at(batch.step)
        if attack.threat.epsilon == 0:
            return False
        pgd = PGD(
            attack.threat,
            STEPS,
            attack.threat.epsilon / 4,
            "uniform",
            attack.mode,
            attack.precision,
            attack.fold,
        )
        split = batch.split(parts) if parts > 1 else [batch]
        self.single_step = sum(self._accuracy(attack, part) for part in split) / parts
        self.pgd = sum(self._accuracy(pgd, part) for part in split) / parts
        count = len(batch.label) * context.engine.world
        error = math.sqrt(self.single_step * (100 - self.single_step) / count)
        chance = 100 / context.classes
        learnt = self.single_step > min(2 * chance, (100 + chance) / 2)
        return learnt and self.pgd < min(self.single_step / 2, self.single_step - 3 * error)

    def _accuracy(self, attack: PGD, batch: Batch) -> float:
        """Share, in percent, of attacked images that are given their class.

        That of a mixed image is the one with the largest share in it.
        """
        context, model = self.method.context, self.method.model
        batch = replace(batch, image=context.engine.arrange(batch.image))
        draws, target = context.generator_for("catastrophic", batch), batch.attack_target
        label = target if target.dim() == 1 else target.argmax(dim=1)
        image = attack(model, batch.image, target, CROSS_ENTROPY, draws)
        with evaluating(model), torch.no_grad():
            right = (predicted(model(image)) == label).float().mean()
        return 100 * float(context.engine.average([right])[0])


def detector_of(config: RunConfig, method: Method) -> CatastrophicOverfitting | None:
    """The detector of a run, where ``attack.check_every`` asks for one."""
    every = config.attack.check_every
    if config.attack.name != "n-fgsm" or every is None or method.selection == "natural":
        return None
    return CatastrophicOverfitting(method, every)
