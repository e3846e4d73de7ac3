"""Natural training: cross-entropy on unchanged images."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F

from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method
from cure.methods.common.losses import accuracy
from cure.methods.step import AdversarialBatch, StepOutput


class NaturalConfig(MethodConfig):
    """Natural training has no settings of its own."""

    name: Literal["natural"] = "natural"
    """Natural training."""


@METHODS.register("natural")
class Natural(Method):
    """``min CE(f(x), y)``: the start of a robust recipe, and the accuracy it has to keep.

    Costs one forward and one backward pass a step.  Source: CURE, ICLR 2024, Sec. 3 (standard
    training).

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.Natural(model)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['accuracy', 'loss']
    """

    Config = NaturalConfig
    selection = "natural"
    soft_labels = True
    graphs = 1

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """The natural images themselves."""
        return AdversarialBatch(batch.image)

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Mean cross-entropy of the batch."""
        logits = self.logits(attacked.image)
        loss = F.cross_entropy(logits, batch.target)
        metrics = {"loss": loss.detach(), "accuracy": accuracy(logits, batch.label)}
        return StepOutput(loss=loss, metrics=metrics)
