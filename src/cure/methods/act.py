"""ACT: a robust and a natural network, trained together; each imitates the other."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from cure.attacks.losses import Objective, cross_entropy, kl_divergence_per_sample
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.errors import ConfigError
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy, distillation
from cure.methods.step import AdversarialBatch, Metrics, StepOutput
from cure.models.batch_norm import untracked

Reduction = Literal["released", "even"]


def concurrent_loss(
    logits: Tensor, other: Tensor, label: Tensor, alpha: float, temperature: float
) -> Tensor:
    """``(1 - alpha) CE + alpha T^2 KL(p_other^T || p^T)``, a mean over the samples, 0-dim.

    Args:
        logits: [B, K] of the network that learns.
        other: logits [B, K] of the network that it imitates, a constant.
        label: [B].
        alpha: weight of the KL term, in [0, 1].
        temperature: T, by which both logits are divided in the KL term.

    Source: ACT, BMVC 2020, and its released code.
    """
    imitation = distillation(other.detach(), logits, temperature).mean()
    return (1 - alpha) * F.cross_entropy(logits, label) + alpha * imitation


def concurrent_objective(
    target: Tensor, alpha: float, reduction: Reduction, world: int = 1
) -> Objective:
    """What the attack on the robust network climbs, of sample i in a batch of B.

    ``(1 - alpha) w CE_i + alpha KL(p_target,i || p_i)`` where w is 1 (``even``) or 1 / B
    (``released``): the released code adds a mean of CE to a sum of KL.

    Args:
        target: logits [B, K] of the natural network on the natural images, without a graph.
        alpha: weight of the KL term, in [0, 1].
        reduction: "released" or "even".
        world: parts of the size of ``target`` that the batch consists of.
    """
    weight = (1 - alpha) / (len(target) * world if reduction == "released" else 1)
    return Objective(
        lambda logits, label, natural: (  # noqa: ARG005
            weight * cross_entropy(logits, label) + alpha * kl_divergence_per_sample(target, logits)
        )
    )


class ActConfig(MethodConfig):
    """Settings of ACT."""

    name: Literal["act"] = "act"
    """Adversarial concurrent training."""
    robust_alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of the KL term of the robust network, in its loss and in its attack; the rest is
    cross-entropy."""
    natural_alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of the KL term of the natural network's loss; the rest is cross-entropy."""
    temperature: PositiveFloat = 4.0
    """T of the KL terms of both losses; the attack's has 1."""
    attack_reduction: Reduction = "released"
    """How the attack adds its two terms: ``released`` the mean of the cross-entropy and the sum of
    the KL over the batch, ``even`` both alike."""


@dataclass(frozen=True)
class ActBatch(AdversarialBatch):
    """Adversarial images for F, and what G predicts.

    Attributes:
        natural_logits: logits [B, K] of G on the natural images with their autograd graph, which
            serves one backward pass; None where G is to be computed again.
    """

    natural_logits: Tensor | None

    def without_graph(self) -> ActBatch:
        """The same images without the logits of G."""
        return replace(self, natural_logits=None)


@METHODS.register("act")
class ACT(Method[ActBatch]):
    """Adversarial concurrent training (ACT): robust network F and natural network G together.

    ``L_F = (1 - a_F) CE(F(x_adv), y) + a_F T^2 KL(p_G^T(x) || p_F^T(x_adv))``
    ``L_G = (1 - a_G) CE(G(x), y) + a_G T^2 KL(p_F^T(x_adv) || p_G^T(x))``

    x_adv climbs ``(1 - a_F) CE(F(x_adv), y) + a_F KL(p_G(x) || p_F(x_adv))``.  F is ``model``, what
    is evaluated; G begins as a copy of it.  In each loss the other network is a constant, so one
    optimiser over the weights of both with the loss L_F + L_G does what two would: SGD moves each
    weight by its own gradient.

    Costs 12 forward and 12 backward passes with 10 attack steps: of F the attack's 10 and the
    loss's 1, of G 1.  The pass of G serves the attack and both losses, and its graph is in memory
    during the attack.

    Source: Arani, Sarfraz, Zonooz, BMVC 2020, in the form of the released code.
    Differs from the released code: that starts the two networks from weights of their own unless
    told otherwise by an option; a random start is projected on the ball.

    In a loop of one's own the optimiser takes ``method.trainable().values()``: the weights of both.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.ACT(model)
    >>> step = method(images, labels)
    >>> step.metrics["loss"].shape
    torch.Size([])
    """

    Config = ActConfig
    tradeoff = (Tradeoff("robust_alpha", (0.3, 0.6, 0.9, 1.0), None),)

    def setup(self) -> None:
        """G, a copy of F."""
        self.natural = copy.deepcopy(self.model)
        self._before = self._versions()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights of F by their names in the model, those of G by theirs after ``natural/``."""
        others = {
            f"natural/{name}": parameter
            for name, parameter in self.natural.named_parameters()
            if parameter.requires_grad
        }
        return super().trainable() | others

    def after_step(self, step: int) -> Metrics:  # noqa: ARG002
        """Check that the optimiser moved both networks."""
        moved = [now != before for now, before in zip(self._versions(), self._before, strict=True)]
        if moved == [True, False]:
            raise ConfigError(
                "ACT trains two networks and the optimiser moved one; give it "
                "method.trainable().values()"
            )
        return {}

    def _versions(self) -> list[int]:
        """How often the first parameter of each network was changed."""
        networks = (self.model, self.natural)
        return [next(p._version for p in network.parameters()) for network in networks]

    def _natural_logits(self, image: Tensor) -> Tensor:
        return self.context.engine.logits(self.natural, image)

    def make_adversarial(self, batch: Batch) -> ActBatch:
        """Adversarial images for F, and the logits of G with their graph."""
        self._before = self._versions()
        natural, config = self._natural_logits(batch.image), self.config
        objective = concurrent_objective(
            natural.detach(),
            config.robust_alpha,
            config.attack_reduction,
            self.context.engine.world * batch.parts,
        )
        return ActBatch(self.attack(batch, objective), natural)

    def compute_loss(self, batch: Batch, attacked: ActBatch) -> StepOutput:
        """The losses of both networks.

        Without the logits of G in ``attacked`` they are computed again (1 more forward pass),
        without updating BatchNorm's running statistics a second time.
        """
        natural = attacked.natural_logits
        if natural is None:
            with untracked(self.natural):
                natural = self._natural_logits(batch.image)
        adversarial = self.logits(attacked.image)
        label, config = batch.label, self.config
        robust_loss = concurrent_loss(
            adversarial, natural, label, config.robust_alpha, config.temperature
        )
        natural_loss = concurrent_loss(
            natural, adversarial, label, config.natural_alpha, config.temperature
        )
        loss = robust_loss + natural_loss
        return StepOutput(
            loss=loss,
            metrics={
                "loss": loss.detach(),
                "robust_network_loss": robust_loss.detach(),
                "natural_network_loss": natural_loss.detach(),
                "natural_network_accuracy": accuracy(natural, label),
                "robust_accuracy": accuracy(adversarial, label),
            },
        )
