"""TRADES: natural cross-entropy, and a prediction that does not change inside the ball."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from cure.attacks.losses import KL
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, AdversarialBatch, Method, StepOutput
from cure.methods.common.losses import accuracy, kl_divergence


def trades(
    natural: Tensor,
    adversarial: Tensor,
    label: Tensor,
    beta: float,
    target: Tensor | None = None,
) -> StepOutput:
    """``CE(x) + beta KL(p(x) || p(x_adv))`` with its parts as metrics.

    Args:
        natural: logits [B, K] of the natural images.
        adversarial: logits [B, K] of the adversarial images.
        label: [B].
        beta: weight of the KL term, whose gradient flows through both predictions.
        target: soft labels [B, K] of the cross-entropy; by default ``label``.

    Source: TRADES, ICML 2019 (beta is its 1 / lambda).
    """
    natural_loss = F.cross_entropy(natural, label if target is None else target)
    adversarial_loss = kl_divergence(natural, adversarial)
    loss = natural_loss + beta * adversarial_loss
    return StepOutput(
        loss=loss,
        metrics={
            "loss": loss.detach(),
            "natural_loss": natural_loss.detach(),
            "adversarial_loss": adversarial_loss.detach(),
            "accuracy": accuracy(natural, label),
            "robust_accuracy": accuracy(adversarial, label),
        },
    )


class TradesConfig(MethodConfig):
    """Settings of TRADES."""

    name: Literal["trades"] = "trades"
    """TRADES."""
    beta: NonNegativeFloat = 6.0
    """Weight of the KL term, the paper's 1/lambda: 6 for its main result; 1 keeps more natural
    accuracy."""


@METHODS.register("trades")
class Trades(Method):
    """``min CE(f(x), y) + beta KL(p(x) || p(x_adv))``, x_adv climbing that KL: TRADES.

    Costs 13 forward and 12 backward passes with 10 attack steps: the natural logits that the
    attack compares with 1, its steps 10, the loss's two images 2 and 2.

    Source: Zhang et al., ICML 2019, Algorithm 1.
    Differs from the released code: that computes the natural logits again at every attack step
    (23 forward passes) and twice in the loss, so that BatchNorm sees x twice and x_adv once.
    """

    Config = TradesConfig
    soft_labels = True

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Images that climb the KL divergence."""
        return AdversarialBatch(self.attack(batch, KL))

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Natural loss and KL term of one batch."""
        natural, adversarial = self.logits(batch.image), self.logits(attacked.image)
        return trades(natural, adversarial, batch.label, self.config.beta, batch.target)
