"""Base of wrappers: every call goes to the method inside unless a wrapper overrides it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from cure.config import Section
from cure.data.images import Batch
from cure.errors import ConfigError
from cure.methods.base import Method
from cure.methods.context import Context
from cure.methods.standalone import settings_of
from cure.methods.step import AdversarialBatch, LoopState, Metrics, StepOutput


class MethodWrapper(Method):
    """A method around another, ``inner``; by itself it changes nothing."""

    settings: Any
    Settings: ClassVar[type[Section]] = Section

    def __init__(self, inner: Method, settings: Any = None, **given: Any) -> None:
        nn.Module.__init__(self)
        if not isinstance(inner, Method):
            raise ConfigError(
                f"{type(self).__name__}: expected a method, such as cure.methods.AT(model), got "
                f"{type(inner).__name__}"
            )
        if settings is None:
            settings = settings_of(type(self).__name__, self.Settings, given)
        self.check(settings, inner.context)
        self.inner = inner
        self.settings = settings
        self.progress = LoopState()
        self.config = inner.config
        self.context = inner.context
        self.soft_labels = inner.soft_labels  # type: ignore[misc]
        self.selection = inner.selection  # type: ignore[misc]
        self.splits = inner.splits  # type: ignore[misc]
        self.graphs = inner.graphs  # type: ignore[misc]

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The network in training."""
        return self.inner.model

    def check(self, settings: Any, context: Context) -> None:
        """Refuse settings that need more than the context knows."""
        if context.has_epochs is None:
            return
        needs = []
        if getattr(settings, "start", 0) and context.total_steps == 1:
            needs.append("steps=len(loader) * epochs, for its start is a share of the training")
        if getattr(settings, "every", "step") == "epoch" and not context.has_epochs:
            needs.append("epochs, at whose ends it takes the weights")
        if needs:
            name = type(self).__name__
            raise ConfigError(f"{name}: give the method inside {' and '.join(needs)}")

    def step(self, batch: Batch) -> StepOutput:
        """The method's own step."""
        return self.inner.step(batch)

    def step_in_parts(self, batch: Batch, parts: int) -> StepOutput:
        """The method's own step, in parts."""
        return self.inner.step_in_parts(batch, parts)

    def compute_terms(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """The method's own terms."""
        return self.inner.compute_terms(batch, attacked)

    def finish(self, out: StepOutput, batch: Batch) -> StepOutput:
        """The method's own gradients."""
        return self.inner.finish(out, batch)

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

    @property
    def period(self) -> int:
        """That of the method inside."""
        return self.inner.period

    def warnings(self) -> list[str]:
        """The method's own."""
        return self.inner.warnings()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The method's own."""
        return self.inner.trainable()
