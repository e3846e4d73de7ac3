"""What goes around a method: it does as the method does, but for what a wrapper overrides."""

from __future__ import annotations

from torch import nn

from cure.data.images import Batch
from cure.methods.base import AdversarialBatch, Method, Metrics, StepOutput


class Wrapper(Method):
    """A method around another, ``inner``; by itself it changes nothing."""

    def __init__(self, inner: Method) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.config = inner.config
        self.context = inner.context
        self.selection = inner.selection  # type: ignore[misc]

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The network in training."""
        return self.inner.model

    def step(self, batch: Batch) -> StepOutput:
        """The method's own step."""
        return self.inner.step(batch)

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """The method's own adversarial images."""
        attacked: AdversarialBatch = self.inner.make_adversarial(batch)
        return attacked

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """The method's own loss or gradients."""
        return self.inner.compute_loss(batch, attacked)

    def after_step(self, step: int) -> Metrics:
        """The method's own averages."""
        return self.inner.after_step(step)

    def on_epoch(self, epoch: int) -> None:
        """The method's own schedules."""
        self.inner.on_epoch(epoch)

    def after_epoch(self, epoch: int) -> None:
        """What the method does after an epoch."""
        self.inner.after_epoch(epoch)

    def inference_model(self) -> nn.Module:
        """The network that the method evaluates."""
        return self.inner.inference_model()

    def warnings(self) -> list[str]:
        """The method's own."""
        return self.inner.warnings()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The method's own."""
        return self.inner.trainable()
