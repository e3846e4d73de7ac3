"""IAD: distillation from a robust teacher, weighted by how reliable its prediction is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from cure.attacks.losses import CROSS_ENTROPY, kl_divergence_per_sample
from cure.config import MethodConfig, TeacherConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy, distillation
from cure.methods.common.teacher import Teacher
from cure.methods.step import AdversarialBatch, StepOutput

Form = Literal["I", "II"]

ALPHA: dict[Form, float] = {"I": 1.0, "II": 0.5}
"""Weight of the robust teacher and of introspection together (released code)."""
BEGIN: dict[Form, float] = {"I": 60 / 200, "II": 40 / 200}
"""When introspection begins, as a share of the run (released code)."""


def _in_roman(form: object) -> object:
    """1 and 2 for the forms I and II, as numbers or text."""
    return {"1": "I", "2": "II"}.get(str(form), form)


class IadConfig(MethodConfig):
    """Settings of IAD; the defaults are those of its released code, ResNet-18 on CIFAR-10."""

    name: Literal["iad"] = "iad"
    """Introspective adversarial distillation."""
    form: Annotated[Form, BeforeValidator(_in_roman)] = "I"
    """``I`` (or 1): one robust teacher, after ARD; ``II`` (or 2): a natural teacher as well, after
    AKD2."""
    teacher: TeacherConfig
    """The robust network to imitate (original: trained by AT, of the student's architecture)."""
    natural_teacher: TeacherConfig = TeacherConfig(path="natural")
    """Form ``II``: the naturally trained network to imitate."""
    alpha: float | None = Field(default=None, gt=0, le=1)
    """Weight of the robust teacher and of introspection together, in (0, 1]; by default 1 in form
    ``I`` and 0.5 in form ``II``.  The rest goes to cross-entropy."""
    natural_teacher_weight: float = Field(default=0.25, gt=0, lt=1)
    """Form ``II``: weight of the natural teacher, in (0, 1)."""
    beta: PositiveFloat = 0.1
    """Exponent of the reliability; smaller trusts the teacher more."""
    begin: float | None = Field(default=None, ge=0, le=1)
    """Share of the run after which introspection begins, in [0, 1]; by default 60/200 in form ``I``
    and 40/200 in form ``II``.  1: never."""
    weight_teacher: bool = False
    """Form ``I``: weight its teacher term by the reliability too, which form ``II`` always does."""
    temperature: PositiveFloat = 1.0
    """Temperature T of the teachers' terms; introspection is always at 1."""

    @property
    def distillation_weight(self) -> float:
        """``alpha``, or that of the form."""
        return ALPHA[self.form] if self.alpha is None else self.alpha

    def needs_length(self) -> bool:
        """Whether introspection begins later than at once."""
        return self.begin != 0

    def introspects(self, epoch: int, epochs: int) -> bool:
        """Whether introspection has begun in epoch number ``epoch`` (0 the first) of ``epochs``."""
        return epoch / epochs >= (BEGIN[self.form] if self.begin is None else self.begin)

    def teachers(self) -> dict[str, TeacherConfig]:
        """The robust teacher, and in form ``II`` the natural one."""
        asked = super().teachers()
        if self.form == "I":
            del asked["natural_teacher"]
        return asked

    @model_validator(mode="after")
    def _weights_leave_something(self) -> IadConfig:
        if self.form == "II" and self.distillation_weight + self.natural_teacher_weight > 1:
            raise PydanticCustomError(
                "weights", "alpha and natural_teacher_weight together are above 1"
            )
        return self


@dataclass(frozen=True)
class IadBatch(AdversarialBatch):
    """Adversarial images, and what the teachers predict.

    Attributes:
        teacher_logits: of the robust teacher [B, K], for the natural images in form ``I`` and for
            the adversarial images in form ``II``.
        natural_teacher_logits: form ``II``: of the natural teacher [B, K], for the adversarial
            images.
        reliability: A [B], see :func:`teacher_reliability`; None before introspection begins.
    """

    teacher_logits: Tensor
    natural_teacher_logits: Tensor | None = None
    reliability: Tensor | None = None


@METHODS.register("iad")
class IAD(Method[IadBatch]):
    """Introspective adversarial distillation (IAD), x_adv climbing CE.

    ``A_i = p_T(y_i | x_adv_i)^beta``, a constant, is the reliability of the robust teacher T; 1
    until introspection begins.  With ``I = mean_i (1 - A_i) KL(p(x_i) || p(x_adv_i))``, whose
    gradient flows through both predictions, S the natural teacher, a and b the weights of the
    teachers, and ``KL_t`` the KL divergence at temperature t times t^2:

    form I: ``a [mean_i KL_t(p_T(x_i) || p(x_adv_i)) + I] + (1 - a) CE(f(x), y)``

    form II: ``a [mean_i A_i KL_t(p_T(x_adv_i) || p(x_adv_i)) + t^2 I]
    + b KL_t(p_S(x_adv) || p(x_adv)) + (1 - a - b) CE(f(x_adv), y)``

    Costs with 10 attack steps 12 forward and 12 backward passes; form I 2 forward passes of the
    teacher, form II 1 of each teacher.  Before introspection begins 11 and 11 (form I with alpha
    below 1: 12 and 12), and 1 forward pass of each teacher.

    Source: Zhu et al., ICLR 2022; both forms are those of its released code.
    Differs from the released code: passes whose result it does not use or has already are left out,
    so that BatchNorm sees x_adv once and x once, and x not before introspection begins unless the
    cross-entropy needs it.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.IAD(model, teacher=teacher, steps=1000)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['distillation', 'loss', 'robust_accuracy']
    """

    Config = IadConfig
    tradeoff = (Tradeoff("alpha", (0.25, 0.5, 0.75, 1.0), None),)

    def setup(self) -> None:
        """The teachers."""
        self.teacher = Teacher(self.context, "teacher")
        self.natural_teacher = (
            Teacher(self.context, "natural_teacher") if self.config.form == "II" else None
        )

    def make_adversarial(self, batch: Batch) -> IadBatch:
        """Images that climb the cross-entropy, and the predictions of the teachers."""
        image = self.attack(batch, CROSS_ENTROPY)
        epoch = batch.step // self.context.steps_per_epoch
        introspects = self.config.introspects(epoch, self.context.epochs)
        reliable = None
        if self.natural_teacher is None:
            teacher = self.teacher.logits(batch.image)
            if introspects:
                reliable = teacher_reliability(
                    self.teacher.logits(image), batch.label, self.config.beta
                )
            return IadBatch(image, teacher, None, reliable)
        teacher = self.teacher.logits(image)
        natural = self.natural_teacher.logits(image)
        if introspects:
            reliable = teacher_reliability(teacher, batch.label, self.config.beta)
        return IadBatch(image, teacher, natural, reliable)

    def compute_loss(self, batch: Batch, attacked: IadBatch) -> StepOutput:
        """The form's loss."""
        config, label = self.config, batch.label
        alpha, temperature = config.distillation_weight, config.temperature
        reliable = attacked.reliability
        adversarial = self.logits(attacked.image)
        distilled = distillation(attacked.teacher_logits, adversarial, temperature)
        if reliable is not None and (config.form == "II" or config.weight_teacher):
            distilled = reliable * distilled
        total = distilled.mean()
        metrics = {
            "distillation": total.detach(),
            "robust_accuracy": accuracy(adversarial, label),
        }

        natural = None
        if reliable is not None or (config.form == "I" and alpha < 1):
            natural = self.logits(batch.image)
            metrics["accuracy"] = accuracy(natural, label)
        if reliable is not None and natural is not None:
            own = ((1 - reliable) * kl_divergence_per_sample(natural, adversarial)).mean()
            total = total + (own if config.form == "I" else temperature**2 * own)
            metrics |= {"introspection": own.detach(), "reliability": reliable.mean()}

        loss = alpha * total
        if attacked.natural_teacher_logits is not None:
            second = distillation(attacked.natural_teacher_logits, adversarial, temperature).mean()
            rest = 1 - alpha - config.natural_teacher_weight
            labelled = F.cross_entropy(adversarial, label)
            loss = loss + config.natural_teacher_weight * second + rest * labelled
            metrics |= {
                "natural_distillation": second.detach(),
                "adversarial_loss": labelled.detach(),
            }
        elif natural is not None and alpha < 1:
            labelled = F.cross_entropy(natural, label)
            loss = loss + (1 - alpha) * labelled
            metrics["natural_loss"] = labelled.detach()
        return StepOutput(loss=loss, metrics={"loss": loss.detach(), **metrics})


def teacher_reliability(opinion: Tensor, label: Tensor, beta: float) -> Tensor:
    """``A_i = p_T(y_i | x_adv_i)^beta`` of each sample, [B] in [0, 1].

    Args:
        opinion: the robust teacher's logits [B, K] for the adversarial images, without a graph.
        label: [B].
        beta: exponent above 0.

    Source: Zhu et al. (IAD), ICLR 2022.
    """
    return F.softmax(opinion, dim=1).gather(1, label[:, None]).squeeze(1).pow(beta)
