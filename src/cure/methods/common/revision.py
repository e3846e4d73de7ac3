"""The revision model: a slow, randomly timed average of the network in training."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cure.config import Section
from cure.methods.context import Context
from cure.utils.random import generator

PAPER_DECAY = 0.999


class RevisionConfig(Section):
    """Settings of the revision model (CURE, Eq. 7).

    Its memory is ``1 / (rate * (1 - decay))`` steps: 5,000 in the paper, 6 % of its 78,200.
    """

    rate: float = Field(default=0.2, gt=0, le=1)
    """r: probability that a step updates the revision model (Table 9)."""
    decay: float | None = Field(default=None, ge=0, lt=1)
    """d: share of the revision model that an update keeps; the paper's 0.999 unless ``horizon``
    is given."""
    horizon: float | None = Field(default=None, gt=0, le=1)
    """The memory as a share of the run's steps, from which the decay follows (paper: 0.064).  A
    short run needs it: with the paper's decay its revision model would stay natural."""
    update: Literal["before_losses", "after_step"] = "before_losses"
    """When the update happens: Algorithm 1, or the released code."""
    ramp: bool = False
    """Released code: decay ``min(1 - 1/(t + 1), d)`` at step t, counted from 1 at the first step
    after a natural warm-up."""
    batch_norm: Literal["batch", "copied"] = "batch"
    """Statistics of its BatchNorm: the batch's own (released code), or copied from the network."""
    halve_rate_after: float | None = Field(default=None, ge=0, lt=1)
    """Share of the run after which every step halves the rate (released code's dynamic option:
    0.5); the paper says that the rate decays, not how."""

    @field_validator("horizon")
    @classmethod
    def _one_of_two(cls, horizon: float | None, info: object) -> float | None:
        if horizon is not None and getattr(info, "data", {}).get("decay") is not None:
            raise PydanticCustomError("decay_or_horizon", "give decay or horizon, not both")
        return horizon

    def decay_for(self, total_steps: int) -> float:
        """The decay d of a run of ``total_steps`` optimiser steps.

        A horizon that is shorter than one expected update is taken as one: d is then 0, and the
        revision model is the network as it was at the last update.
        """
        if self.horizon is None:
            return PAPER_DECAY if self.decay is None else self.decay
        return 1 - 1 / max(1.0, self.updates(total_steps))

    def updates(self, total_steps: int) -> float:
        """Expected updates within the horizon."""
        return self.rate * (self.horizon or 0.0) * total_steps

    def warnings(self, total_steps: int) -> list[str]:
        """What to say of a run so short that its horizon holds no update."""
        if self.horizon is None or self.updates(total_steps) >= 1:
            return []
        return [
            f"method.revision.horizon: {self.horizon:g} of {total_steps} steps holds "
            f"{self.updates(total_steps):.2f} updates at rate {self.rate:g}; one is used, so the "
            "revision model is a recent copy of the network; train longer for an average"
        ]

    def memory(self, total_steps: int) -> float:
        """Steps after which an update has faded to 1/e, on average."""
        return 1 / (self.rate * (1 - self.decay_for(total_steps)))


class RevisionModel(nn.Module):
    """``theta_rev <- d * theta_rev + (1 - d) * theta`` with probability r (CURE, Eq. 7).

    Args:
        model: what it is a copy of.
        config: its settings.
        context: seed and length of the run.
        first: the first step after a natural warm-up.

    Only parameters are averaged.  With ``batch_norm: batch`` its BatchNorm normalises by the batch
    at hand, because running statistics do not fit averaged weights; nothing else about it is in
    training mode.

    Differs from the released code: built without an autograd graph.
    """

    def __init__(
        self, model: nn.Module, config: RevisionConfig, context: Context, first: int = 0
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).requires_grad_(False)
        self.config = config
        self.context = context
        self.first = first
        self.decay = config.decay_for(context.total_steps)
        self.train(False)

    def train(self, mode: bool = True) -> RevisionModel:  # noqa: ARG002
        """Keep the revision model's own mode, whatever its owner is switched to."""
        super().train(False)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.train(self.config.batch_norm == "batch")
        return self

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Become a copy of ``model``."""
        self.network.load_state_dict(model.state_dict())

    def _drawn(self, step: int) -> bool:
        rate = self.config.rate
        if self.config.halve_rate_after is not None:
            # The first step of the part has half the rate.
            late = step + 1 - int(self.config.halve_rate_after * self.context.total_steps)
            rate *= 0.5 ** max(0, late)
        # Drawn on the host, so that the device is not waited for.
        draws = generator("cpu", self.context.seed, "revision", step)
        return torch.rand((), generator=draws).item() < rate

    @torch.no_grad()
    def maybe_update(self, model: nn.Module, step: int) -> bool:
        """Draw once for ``step`` and move towards ``model`` with probability r."""
        if not self._drawn(step):
            return False
        steps = step - self.first
        decay = min(1 - 1 / (steps + 2), self.decay) if self.config.ramp else self.decay
        averages: list[Tensor] = list(self.network.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        return True

    @torch.no_grad()
    def logits(self, model: nn.Module, *images: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, K] for each batch of images, without a graph."""
        if self.config.batch_norm == "copied":
            for own, other in zip(self.network.buffers(), model.buffers(), strict=True):
                own.copy_(other)
        return tuple(self.context.engine.logits(self.network, image) for image in images)
