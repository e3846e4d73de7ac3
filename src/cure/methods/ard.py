"""ARD: match on adversarial images the prediction of a robust teacher for the natural ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import MethodConfig, TeacherConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy, distillation
from cure.methods.common.teacher import Teacher
from cure.methods.step import AdversarialBatch, StepOutput


class ArdConfig(MethodConfig):
    """Settings of ARD; alpha and temperature are the defaults of its released code.

    The released script trains a MobileNetV2; the network, schedule and attack are the recipe's.
    """

    name: Literal["ard"] = "ard"
    """Adversarially robust distillation."""
    teacher: TeacherConfig
    """The robust network to imitate (original: a WRN-34-10 trained by TRADES)."""
    alpha: float = Field(default=1.0, gt=0, le=1)
    """Weight of the distillation, in (0, 1]; the rest goes to the cross-entropy of natural images.
    """
    temperature: PositiveFloat = 30.0
    """Temperature t of both predictions (released code: 30; as IAD repeats ARD: 1)."""
    divide_by_classes: bool = False
    """Released code: divide the KL term by the number of classes."""


@dataclass(frozen=True)
class ArdBatch(AdversarialBatch):
    """Adversarial images, and ``teacher_logits`` [B, K] of the natural images."""

    teacher_logits: Tensor


@METHODS.register("ard")
class ARD(Method[ArdBatch]):
    """``min alpha t^2 KL(p_T^t(x) || p^t(x_adv)) + (1 - alpha) CE(f(x), y)``: ARD.

    x_adv climbs CE.  T is a frozen robust teacher in evaluation mode, which sees the natural
    images; ``p^t`` is the softmax of logits over t.

    Costs 11 forward and 11 backward passes with 10 attack steps and 1 forward pass of the teacher;
    12 and 12 when alpha is below 1.

    Source: Goldblum et al., AAAI 2020.
    Differs from the released code: the KL term is a mean over the samples, there also over the
    classes (``divide_by_classes``); with alpha = 1 no forward pass of the natural images, which
    there moves the BatchNorm statistics and nothing else.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.ARD(model, teacher=teacher)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['distillation', 'loss', 'robust_accuracy']
    """

    Config = ArdConfig
    tradeoff = (Tradeoff("alpha", (0.25, 0.5, 0.75, 1.0), "robust"),)

    def setup(self) -> None:
        """The teachers."""
        self.teacher = Teacher(self.context, "teacher")

    def make_adversarial(self, batch: Batch) -> ArdBatch:
        """Images that climb the cross-entropy; the teacher's prediction for natural ones."""
        return ArdBatch(self.attack(batch, CROSS_ENTROPY), self.teacher.logits(batch.image))

    def compute_loss(self, batch: Batch, attacked: ArdBatch) -> StepOutput:
        """Distillation, and natural cross-entropy where it has a weight."""
        config, label = self.config, batch.label
        adversarial = self.logits(attacked.image)
        distilled = distillation(attacked.teacher_logits, adversarial, config.temperature).mean()
        if config.divide_by_classes:
            distilled = distilled / adversarial.shape[1]
        loss = config.alpha * distilled
        metrics = {
            "distillation": distilled.detach(),
            "robust_accuracy": accuracy(adversarial, label),
        }
        if config.alpha < 1:
            natural = self.logits(batch.image)
            natural_loss = F.cross_entropy(natural, label)
            loss = loss + (1 - config.alpha) * natural_loss
            metrics |= {
                "natural_loss": natural_loss.detach(),
                "accuracy": accuracy(natural, label),
            }
        return StepOutput(loss=loss, metrics={"loss": loss.detach(), **metrics})
