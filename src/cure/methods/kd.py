"""KD: adversarial training with soft labels of a natural and a robust teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import MethodConfig, TeacherConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy, soft_cross_entropy
from cure.methods.common.teacher import Teacher
from cure.methods.step import AdversarialBatch, StepOutput


class KdConfig(MethodConfig):
    """Settings of KD; the defaults are those of its released code."""

    name: Literal["kd"] = "kd"
    """Knowledge distillation from two teachers (the KD of KD+SWA)."""
    teacher: TeacherConfig
    """The robust network to imitate (original: the best of an AT run of the same network)."""
    natural_teacher: TeacherConfig = TeacherConfig(path="natural")
    """The naturally trained network to imitate."""
    cross_entropy_weight: NonNegativeFloat = 0.3
    """Weight of the cross-entropy with the labels."""
    teacher_weight: PositiveFloat = 0.6
    """Weight of the robust teacher."""
    natural_teacher_weight: PositiveFloat = 0.1
    """Weight of the natural teacher."""
    temperature: PositiveFloat = 2.0
    """Temperature T of the teachers' terms."""


@dataclass(frozen=True)
class KdBatch(AdversarialBatch):
    """Adversarial images, and what the teachers predict for them.

    Attributes:
        teacher_logits: of the robust teacher [B, K].
        natural_teacher_logits: of the natural teacher [B, K].
    """

    teacher_logits: Tensor
    natural_teacher_logits: Tensor


@METHODS.register("kd")
class KD(Method[KdBatch]):
    """``min c CE(f(x_adv), y) + b KD_S(x_adv) + a KD_T(x_adv)``, x_adv climbing CE: KD of KD+SWA.

    ``KD_N`` is the :func:`soft_cross_entropy` with the prediction of N for the same adversarial
    images; S is a natural teacher and T a robust one, both frozen and in evaluation mode.  SWA is
    no part of it but the setting ``training.averaging``.

    Costs 11 forward and 11 backward passes with 10 attack steps, and 1 forward pass of each
    teacher.

    Source: Chen et al., ICLR 2021; the form and weights are those of its released code.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.KD(model, teacher=teacher, natural_teacher=teacher)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['adversarial_loss', 'distillation', 'loss', 'natural_distillation', 'robust_accuracy']
    """

    Config = KdConfig
    tradeoff = (Tradeoff("natural_teacher_weight", (0.1, 0.3, 0.6, 1.2), "natural"),)
    graphs = 1

    def setup(self) -> None:
        """The teachers."""
        self.teacher = Teacher(self.context, "teacher")
        self.natural_teacher = Teacher(self.context, "natural_teacher")

    def make_adversarial(self, batch: Batch) -> KdBatch:
        """Images that climb the cross-entropy, and the predictions of both teachers."""
        image = self.attack(batch, CROSS_ENTROPY)
        return KdBatch(image, self.teacher.logits(image), self.natural_teacher.logits(image))

    def compute_loss(self, batch: Batch, attacked: KdBatch) -> StepOutput:
        """Cross-entropy with the labels and with both teachers."""
        config = self.config
        adversarial = self.logits(attacked.image)
        labelled = F.cross_entropy(adversarial, batch.label)
        robust = soft_cross_entropy(attacked.teacher_logits, adversarial, config.temperature)
        natural = soft_cross_entropy(
            attacked.natural_teacher_logits, adversarial, config.temperature
        )
        loss = (
            config.cross_entropy_weight * labelled
            + config.teacher_weight * robust
            + config.natural_teacher_weight * natural
        )
        return StepOutput(
            loss=loss,
            metrics={
                "loss": loss.detach(),
                "adversarial_loss": labelled.detach(),
                "distillation": robust.detach(),
                "natural_distillation": natural.detach(),
                "robust_accuracy": accuracy(adversarial, batch.label),
            },
        )
