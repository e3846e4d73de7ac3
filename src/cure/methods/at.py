"""Adversarial training: cross-entropy on the worst images that gradient ascent finds."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, AdversarialBatch, Method, StepOutput
from cure.methods.common.losses import accuracy


class AdversarialConfig(MethodConfig):
    """Adversarial training has no settings of its own; the run's attack decides."""

    name: Literal["at"] = "at"
    """Adversarial training (AT, PGD-AT)."""


@METHODS.register("at")
class Adversarial(Method):
    """``min CE(f(x_adv), y)``, where x_adv climbs the same cross-entropy: adversarial training.

    Costs 11 forward and 11 backward passes with 10 attack steps: the attack's 10 and the loss's 1.

    Source: Madry et al., ICLR 2018, Eq. 2.1; recipe of Rice et al., ICML 2020.
    Differs from the released code (of Rice et al.): two more forward passes in training mode, of
    the attack's last image and of the natural image, move its BatchNorm statistics.
    """

    Config = AdversarialConfig

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Images that climb the cross-entropy."""
        return AdversarialBatch(self.attack(batch, CROSS_ENTROPY))

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Mean cross-entropy of the batch's adversarial images."""
        adversarial = self.logits(attacked.image)
        loss = F.cross_entropy(adversarial, batch.label)
        return StepOutput(
            loss=loss,
            metrics={
                "loss": loss.detach(),
                "robust_accuracy": accuracy(adversarial, batch.label),
            },
        )
