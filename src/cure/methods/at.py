"""Adversarial training: cross-entropy on the worst images that gradient ascent finds."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy
from cure.methods.step import AdversarialBatch, StepOutput


class AdversarialConfig(MethodConfig):
    """Settings of adversarial training; the run's attack decides the rest."""

    name: Literal["at"] = "at"
    """Adversarial training (AT, PGD-AT)."""
    natural_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the loss that is the cross-entropy of the natural images; trades robust accuracy
    for natural accuracy, and costs one more forward and backward pass."""


@METHODS.register("at")
class AT(Method):
    """``min CE(f(x_adv), y)``, where x_adv climbs the same cross-entropy: adversarial training.

    Costs 11 forward and 11 backward passes with 10 attack steps: the attack's 10 and the loss's 1.

    Source: Madry et al., ICLR 2018, Eq. 2.1; recipe of Rice et al., ICML 2020.
    Differs from the released code (of Rice et al.): two more forward passes in training mode, of
    the attack's last image and of the natural image, move its BatchNorm statistics.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.AT(model)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['loss', 'robust_accuracy']
    """

    Config = AdversarialConfig
    tradeoff = (Tradeoff("natural_share", (0.0, 0.25, 0.5, 0.75), "natural"),)
    soft_labels = True
    graphs = 1

    def setup(self) -> None:
        """The natural images have a graph of their own."""
        if self.config.natural_share:
            self.graphs = 2  # type: ignore[misc]

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Images that climb the cross-entropy."""
        return AdversarialBatch(self.attack(batch, CROSS_ENTROPY))

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Mean cross-entropy of the adversarial images, and of the natural ones by their share."""
        adversarial = self.logits(attacked.image)
        loss = F.cross_entropy(adversarial, batch.target)
        metrics = {"robust_accuracy": accuracy(adversarial, batch.label)}
        if share := self.config.natural_share:
            natural = self.logits(batch.image)
            loss = (1 - share) * loss + share * F.cross_entropy(natural, batch.target)
            metrics["accuracy"] = accuracy(natural, batch.label)
        return StepOutput(loss=loss, metrics={"loss": loss.detach()} | metrics)
