"""MART: adversarial training with more weight on images that the network misclassifies."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from cure.attacks.losses import CROSS_ENTROPY
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import mart_terms
from cure.methods.common.outputs import two_image_output
from cure.methods.step import AdversarialBatch, StepOutput


class MartConfig(MethodConfig):
    """Settings of MART; the defaults are ResNet-18 on CIFAR-10."""

    name: Literal["mart"] = "mart"
    """MART."""
    beta: NonNegativeFloat = 5.0
    """Weight of the KL term, the paper's lambda: 5 for ResNet-18, 6 for WRN-34-10 (released
    code)."""
    constants: bool = False
    """Released code: the constants 1.0001, 1.0000001 and 1e-12 in the logarithms and the weight,
    which bound the margin term by 9.2."""


@METHODS.register("mart")
class MART(Method):
    """``min BCE(x_adv, y) + beta (1 - p_y(x)) KL(p(x) || p(x_adv))``, x_adv climbing CE: MART.

    ``BCE = - log p_y(x_adv) - log(1 - max_{k != y} p_k(x_adv))``.  Nothing is detached.

    Costs 12 forward and 12 backward passes with 10 attack steps: the attack's 10 and 10, the
    loss's two images 2 and 2.

    Source: Wang et al., ICLR 2020.
    Differs from the released code: its constants are the setting ``constants``.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.MART(model, beta=5.0)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['accuracy', 'boosted_loss', 'loss', 'robust_accuracy', 'weighted_kl']
    """

    Config = MartConfig
    tradeoff = (Tradeoff("beta", (1.0, 2.5, 5.0, 10.0), "robust"),)

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Images that climb the cross-entropy."""
        return AdversarialBatch(self.attack(batch, CROSS_ENTROPY))

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Boosted cross-entropy and weighted KL of one batch."""
        natural, adversarial = self.logits(batch.image), self.logits(attacked.image)
        beta, constants = self.config.beta, self.config.constants
        terms = mart_terms(natural, adversarial, batch.label, beta, constants=constants)
        return two_image_output(terms, natural, adversarial, batch.label)
