"""HAT: TRADES with helper images beyond the ball, which reduce an excessive margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from cure.attacks.losses import KL
from cure.config import MethodConfig, TeacherConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy, trades_terms
from cure.methods.common.outputs import two_image_output
from cure.methods.common.teacher import Teacher
from cure.methods.step import AdversarialBatch, StepOutput


def helper_image(image: Tensor, adversarial: Tensor, scale: float) -> Tensor:
    """``x + scale (x_adv - x)``, [B, C, H, W]: neither projected on the ball nor clamped to [0, 1].

    Source: Rade and Moosavi-Dezfooli (HAT), ICLR 2022.
    """
    return image + scale * (adversarial - image)


class HatConfig(MethodConfig):
    """Settings of HAT; the defaults are ResNet-18 on CIFAR-10."""

    name: Literal["hat"] = "hat"
    """Helper-based adversarial training."""
    beta: NonNegativeFloat = 2.5
    """Weight of the KL term, as in TRADES."""
    gamma: PositiveFloat = 0.5
    """Weight of the cross-entropy on helper images; without that term the method is ``trades``."""
    helper_scale: PositiveFloat = 2.0
    """h: length of the helper's change relative to the adversarial one; above 1 it leaves the
    ball."""
    natural_teacher: TeacherConfig = TeacherConfig(path="natural")
    """Network of standard training that labels the helpers; by default the run's natural start."""


@dataclass(frozen=True)
class HatBatch(AdversarialBatch):
    """Adversarial images, and ``helper_label`` [B] that the natural teacher gives them."""

    helper_label: Tensor


@METHODS.register("hat")
class HAT(Method[HatBatch]):
    """``min CE(x, y) + beta KL(p(x) || p(x_adv)) + gamma CE(x_h, y_h)``: HAT.

    ``x_h = x + h (x_adv - x)`` lies beyond the adversarial image, and ``y_h`` is the
    prediction of a frozen, naturally trained network for x_adv.  x_adv climbs the KL term.

    Costs 14 forward and 13 backward passes with 10 attack steps, and 1 forward pass of the
    teacher: the natural logits that the attack compares with 1, its steps 10, the loss's three
    images 3 and 3.

    Source: Rade and Moosavi-Dezfooli, ICLR 2022.
    Differs from the released code: a random start is projected on the ball.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.HAT(model, natural_teacher=teacher)
    >>> step = method(images, labels)
    >>> step.metrics["loss"].shape
    torch.Size([])
    """

    Config = HatConfig
    tradeoff = (
        Tradeoff("gamma", (0.1, 0.25, 0.5, 1.0), "natural"),
        Tradeoff("beta", (1.0, 2.5, 5.0), "robust"),
    )
    graphs = 3

    def setup(self) -> None:
        """The teachers."""
        self.teacher = Teacher(self.context, "natural_teacher")

    def make_adversarial(self, batch: Batch) -> HatBatch:
        """Images that climb the KL divergence, and the teacher's labels for the helpers."""
        adversarial = self.attack(batch, KL)
        return HatBatch(adversarial, self.teacher.logits(adversarial).argmax(dim=1))

    def compute_loss(self, batch: Batch, attacked: HatBatch) -> StepOutput:
        """The loss of TRADES and the helper's cross-entropy."""
        adversarial_image, helper_label = attacked.image, attacked.helper_label
        natural, adversarial = self.logits(batch.image), self.logits(adversarial_image)
        helper = self.logits(helper_image(batch.image, adversarial_image, self.config.helper_scale))
        terms = trades_terms(natural, adversarial, batch.label, self.config.beta)
        out = two_image_output(terms, natural, adversarial, batch.label)
        assert out.loss is not None
        helper_loss = F.cross_entropy(helper, helper_label)
        loss = out.loss + self.config.gamma * helper_loss
        metrics = {
            "loss": loss.detach(),
            "helper_loss": helper_loss.detach(),
            "helper_accuracy": accuracy(helper, helper_label),
        }
        return StepOutput(loss=loss, metrics=out.metrics | metrics)
