"""What passes through a step: adversarial images, a loss or gradients, and what stays frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from cure.errors import ConfigError
from cure.utils.engine import Engine, Grads

if TYPE_CHECKING:
    from cure.methods.base import Method

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class AdversarialBatch:
    """What a loss needs besides the natural batch; methods that need more derive from it.

    Attributes:
        image: adversarial images [B, C, H, W] in [0, 1], without an autograd graph.
    """

    image: Tensor

    def without_graph(self) -> Self:
        """The same for a second loss: without tensors whose graph serves one backward pass."""
        return self


@dataclass(frozen=True)
class Masking:
    """The mask of a step, for the gradient logger; all by parameter name.

    Attributes:
        unmasked: the gradients before they are masked.
        mask: True where the gradient is set to 0.
        by_scope: the mask that one threshold a tensor ("layer") and that one threshold for the
            network ("global") give with the scores of this step.
    """

    unmasked: Grads
    mask: dict[str, Tensor]
    by_scope: dict[str, dict[str, Tensor]]


@dataclass
class StepOutput:
    """What a step hands to the trainer.

    Attributes:
        loss: 0-dim mean over the samples at hand, which the trainer differentiates; or
        grads: finished gradients by parameter name, as the engine gives them: averaged over ranks.
        terms: gradients of means over the samples at hand, by name and parameter name, of which
            :meth:`Method.finish` makes ``grads``; in place of both (see
            :meth:`Method.compute_terms`).
        frozen: by parameter name, True where the optimiser must not move a weight at all, neither
            by the gradient nor by momentum or weight decay.
        masking: the mask, at the steps that :attr:`Context.observed` selects.
        metrics: detached 0-dim tensors, ``loss`` among them; averaged over the epoch and read only
            when it ends.
        adversarial: the adversarial images [B, C, H, W] of the step.
    """

    loss: Tensor | None = None
    grads: Grads | None = None
    terms: dict[str, Grads] | None = None
    frozen: dict[str, Tensor] | None = None
    masking: Masking | None = None
    metrics: Metrics = field(default_factory=dict)
    adversarial: Tensor | None = None


class Step:
    """One step of a method, ready for an optimiser.

    Attributes:
        adversarial: the adversarial images [B, C, H, W], detached.
        metrics: detached 0-dim tensors by name, ``loss`` among them.
        frozen: by parameter name, True where the optimiser must not move a weight at all, see
            :meth:`Method.freeze`.
        masking: the mask of the step, where the context observes it.
    """

    def __init__(self, out: StepOutput, parameters: dict[str, nn.Parameter], engine: Engine):
        if (out.loss is None) == (out.grads is None):
            raise TypeError("a method's step returned neither or both of loss and grads")
        self._out = out
        self._parameters = parameters
        self._engine = engine
        self.adversarial = out.adversarial
        self.metrics = out.metrics
        self.frozen = out.frozen or {}
        self.masking = out.masking

    @property
    def loss(self) -> Tensor:
        """The loss, 0-dim, whose ``backward()`` gives the method's gradients.

        Also for methods with gradients of their own (CURE's masked gradients, AWP), so that
        ``accelerator.backward(step.loss)``, ``manual_backward(step.loss)`` and gradient scalers
        work: there it is the value of the loss plus a term that is 0 and whose gradient is theirs.
        """
        if self._out.loss is not None:
            return self._out.loss
        assert self._out.grads is not None
        terms = [
            (self._out.grads[name] * (parameter - parameter.detach())).sum()
            for name, parameter in self._parameters.items()
        ]
        return self.metrics["loss"] + torch.stack(terms).sum()

    def gradients(self) -> Grads:
        """The gradients by parameter name, averaged over ranks; once a step."""
        if self._out.grads is not None:
            return self._out.grads
        assert self._out.loss is not None
        return self._engine.gradients(self._out.loss, self._parameters)

    def backward(self, scale: float = 1.0) -> None:
        """Add the gradients, times ``scale``, to ``.grad`` of the parameters, as a loss would.

        For gradient accumulation over n batches say ``step.backward(1 / n)``.
        """
        for name, gradient in self.gradients().items():
            parameter = self._parameters[name]
            gradient = gradient if scale == 1 else scale * gradient
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class PartMean:
    """Mean of the outputs of equal parts of a batch, as terms."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._terms: dict[str, Grads] = {}
        self._metrics: list[Metrics] = []

    def add(self, out: StepOutput) -> None:
        """Add the output of one part; its graph is freed.

        Raises:
            ConfigError: when the method returns finished gradients, whose mean is not that of the
                batch.
        """
        if out.loss is not None:
            parameters = self._method.trainable()
            terms = {"loss": self._method.context.engine.gradients(out.loss, parameters)}
        elif out.terms is not None:
            terms = out.terms
        else:
            raise ConfigError(
                f"training.accumulation_steps: {type(self._method).__name__} returns finished "
                "gradients, which cannot be added over parts of a batch; say 1, or return terms "
                "from its compute_terms"
            )
        self._metrics.append(out.metrics)
        for name, gradients in terms.items():
            if name not in self._terms:
                self._terms[name] = {key: value.clone() for key, value in gradients.items()}
            else:
                own = self._terms[name]
                torch._foreach_add_(list(own.values()), [gradients[key] for key in own])

    def result(self) -> StepOutput:
        """The mean of what was added."""
        count = len(self._metrics)
        for gradients in self._terms.values():
            torch._foreach_div_(list(gradients.values()), count)
        metrics = {
            name: torch.stack([metrics[name] for metrics in self._metrics]).mean(dim=0)
            for name in self._metrics[0]
        }
        return StepOutput(terms=self._terms, metrics=metrics)


@dataclass
class LoopState:
    """Where a method is in a training loop of the user's.

    Attributes:
        done: optimiser steps done.
        part: batches seen since the last of them.
        frozen: by parameter name, True where every one of these batches freezes a weight.
        version: of the first parameter after the last of these batches, which every change raises.
    """

    done: int = 0
    part: int = 0
    frozen: dict[str, Tensor] = field(default_factory=dict)
    version: int = 0

    def hold(self, frozen: Mapping[str, Tensor]) -> None:
        """Add what one more batch freezes."""
        if self.part:
            frozen = {k: mask & self.frozen[k] for k, mask in frozen.items() if k in self.frozen}
        self.frozen = dict(frozen)


@contextmanager
def holding(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    frozen: Mapping[str, Tensor],
) -> Iterator[None]:
    """Undo what an optimiser step does to frozen weights and to their momentum.

    Args:
        optimizer: the optimiser that steps inside.
        parameters: by name.
        frozen: by name, True where nothing may change.
    """
    before = {
        name: (parameters[name].detach().clone(), _moments(optimizer, parameters[name], clone=True))
        for name in frozen
    }
    yield
    with torch.no_grad():
        for name, (weight, moments) in before.items():
            parameter, mask = parameters[name], frozen[name]
            parameter.copy_(torch.where(mask, weight, parameter))
            for key, moment in _moments(optimizer, parameter).items():
                old = moments.get(key, torch.zeros_like(moment))
                moment.copy_(torch.where(mask, old, moment))


def _moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, clone: bool = False
) -> dict[str, Tensor]:
    """The optimiser's tensors of the shape of the weights: momentum and its like."""
    return {
        key: value.clone() if clone else value
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
