"""A training method of your own, in one class: python add_a_method.py

As half.py in your folder, commands know it: ``CURE_PLUGINS=half cure train digits method=half``.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field

import cure
from cure.attacks.losses import CROSS_ENTROPY
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods import METHODS, AdversarialBatch, Method, StepOutput


class HalfConfig(MethodConfig):
    """Settings, checked when a recipe is read."""

    name: Literal["half"] = "half"
    natural_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the natural loss; the rest goes to the adversarial one."""


@METHODS.register("half")
class Half(Method):
    """``w CE(f(x), y) + (1 - w) CE(f(x_adv), y)`` (Goodfellow et al., ICLR 2015)."""

    Config = HalfConfig

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Images that climb the cross-entropy, by the run's attack."""
        return AdversarialBatch(self.attack(batch, CROSS_ENTROPY))

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Loss of one batch at the present weights."""
        weight = self.config.natural_weight
        natural = F.cross_entropy(self.logits(batch.image), batch.label)
        adversarial = F.cross_entropy(self.logits(attacked.image), batch.label)
        loss = weight * natural + (1 - weight) * adversarial
        return StepOutput(loss=loss, metrics={"loss": loss.detach()})


if __name__ == "__main__":
    import tempfile

    settings = {
        "method": {"name": "half", "natural_weight": 0.3},
        "start": "scratch",
        "training.epochs": 3,
    }
    run = cure.train("digits", settings, run=tempfile.mkdtemp() + "/run")
    print(cure.evaluate(run, attacks=["pgd20"])["attacks"]["pgd20"]["accuracy"])
