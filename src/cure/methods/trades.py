"""TRADES: natural cross-entropy, and a prediction that does not change inside the ball."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from cure.attacks.losses import KL
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import trades_terms
from cure.methods.common.outputs import two_image_output
from cure.methods.step import AdversarialBatch, StepOutput


class TradesConfig(MethodConfig):
    """Settings of TRADES."""

    name: Literal["trades"] = "trades"
    """TRADES."""
    beta: NonNegativeFloat = 6.0
    """Weight of the KL term, the paper's 1/lambda: 6 for its main result; 1 keeps more natural
    accuracy."""


@METHODS.register("trades")
class TRADES(Method):
    """``min CE(f(x), y) + beta KL(p(x) || p(x_adv))``, x_adv climbing that KL: TRADES.

    Costs 13 forward and 12 backward passes with 10 attack steps: the natural logits that the
    attack compares with 1, its steps 10, the loss's two images 2 and 2.

    Source: Zhang et al., ICML 2019, Algorithm 1.
    Differs from the released code: that computes the natural logits again at every attack step
    (23 forward passes) and twice in the loss, so that BatchNorm sees x twice and x_adv once.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.TRADES(model, beta=6.0)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['accuracy', 'adversarial_loss', 'loss', 'natural_loss', 'robust_accuracy']
    """

    Config = TradesConfig
    tradeoff = (Tradeoff("beta", (1.0, 3.0, 6.0, 10.0), "robust"),)
    soft_labels = True

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Images that climb the KL divergence."""
        return AdversarialBatch(self.attack(batch, KL))

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Natural loss and KL term of one batch."""
        natural, adversarial = self.logits(batch.image), self.logits(attacked.image)
        terms = trades_terms(natural, adversarial, batch.label, self.config.beta, batch.target)
        return two_image_output(terms, natural, adversarial, batch.label)
