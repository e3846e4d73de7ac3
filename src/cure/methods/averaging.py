"""Weight averaging, for any method: what is evaluated is a moving average of its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cure.config import AveragingConfig
from cure.data.images import Batch
from cure.methods.base import Method, Metrics, StepOutput


class Averaged(Method):
    """``average <- d average + (1 - d) weights`` after every step, once averaging has begun.

    BatchNorm's running statistics are averaged alike; counters are copied.  Until it begins, the
    method's own network is evaluated.

    Source: Izmailov et al., UAI 2018 (averaging); exponential form as in Rebuffi et al., 2021.
    """

    def __init__(self, inner: Method, config: AveragingConfig) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.config = config
        self.context = inner.context
        self.selection = inner.selection  # type: ignore[misc]
        self.first = round(config.start * inner.context.total_steps)
        self.average = copy.deepcopy(inner.inference_model()).requires_grad_(False)
        self.begun = False

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The network in training."""
        return self.inner.model

    def step(self, batch: Batch) -> StepOutput:
        """The method's own step."""
        return self.inner.step(batch)

    def on_epoch(self, epoch: int) -> None:
        """The method's own schedules."""
        self.inner.on_epoch(epoch)

    def warnings(self) -> list[str]:
        """The method's own."""
        return self.inner.warnings()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The method's own."""
        return self.inner.trainable()

    @torch.no_grad()
    def after_step(self, step: int) -> Metrics:
        """The method's own averages, then this one."""
        metrics = self.inner.after_step(step)
        if step < self.first:
            return metrics
        source = self.inner.inference_model()
        if step == self.first:
            self.average.load_state_dict(source.state_dict())
        share = 1 - self.config.decay
        theirs = dict(source.named_buffers()) | dict(source.named_parameters())
        ours = dict(self.average.named_buffers()) | dict(self.average.named_parameters())
        moving = [name for name, tensor in ours.items() if tensor.is_floating_point()]
        averages: list[Tensor] = [ours[name] for name in moving]
        torch._foreach_lerp_(averages, [theirs[name] for name in moving], share)
        for name in ours.keys() - set(moving):
            ours[name].copy_(theirs[name])
        self.begun = True
        return metrics

    def inference_model(self) -> nn.Module:
        """The average, once there is one."""
        return self.average if self.begun else self.inner.inference_model()

    def get_extra_state(self) -> bool:
        """Whether averaging has begun, for a restart."""
        return self.begun

    def set_extra_state(self, state: bool) -> None:
        """See :meth:`get_extra_state`."""
        self.begun = state
