"""Adversarial weight perturbation (AWP) around any method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cure.config import WeightPerturbationConfig
from cure.data.images import Batch
from cure.methods.base import Method
from cure.methods.step import AdversarialBatch, Metrics, PartMean, StepOutput
from cure.methods.wrappers.base import MethodWrapper
from cure.utils.engine import Grads

TINY = 1e-20
"""Keeps a tensor without a gradient from dividing by 0 (released code)."""


def weight_perturbation(weights: Mapping[str, Tensor], gradients: Grads, gamma: float) -> Grads:
    """The change of each weight tensor towards higher loss, ``gamma`` times as long as the tensor.

    ``v = gamma ||w||_F g / ||g||_F`` for tensors named ``weight`` of two or more dimensions
    (convolutions, linear layers); the others are left out.

    Args:
        weights: by parameter name.
        gradients: of the loss, same names.
        gamma: relative size.

    Source: Wu et al. (AWP), NeurIPS 2020, Eqs. 7-10.
    """
    return {
        name: gamma * weight.norm() / (gradients[name].norm() + TINY) * gradients[name]
        for name, weight in weights.items()
        if weight.dim() > 1 and name.endswith("weight")
    }


class AWP(MethodWrapper):
    """Gradients at ``theta + v``, where v makes the method's own loss larger: AWP.

    After the attack on theta, the loss is computed once at theta, which gives v, and once at
    theta + v, which gives the gradients.  The optimiser's step, weight decay included, happens at
    theta + v, then v is taken back: with a step of length 0 the weights are what they were, to
    the bit.

    ``cure.methods.AWP(method, gamma=0.01)`` with the settings of ``training.weight_perturbation``.

    Costs one more loss of the method: 1 forward and 1 backward pass for AT, 2 and 2 for TRADES.

    Source: Wu et al., NeurIPS 2020, Algorithm 1.
    Differs from the released code: v comes from the gradient itself, not from a step of a copy of
    the network, whose learning rate cancels.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> method = cure.methods.AWP(cure.methods.TRADES(model), gamma=0.005)
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method(images, labels).backward()
    >>> optimizer.step()
    >>> metrics = method.update()
    >>> method.inference_model() is model
    True
    """

    Settings = WeightPerturbationConfig
    settings: WeightPerturbationConfig

    def __init__(
        self, inner: Method, settings: WeightPerturbationConfig | None = None, **given: Any
    ) -> None:
        super().__init__(inner, settings, **given)
        self._before: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, batch: Batch) -> StepOutput:
        """The method's step, its gradients taken at the perturbed weights."""
        # Of several batches before one step of the optimiser, each is attacked at theta.
        self._take_back()
        return Method.step(self, batch)

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Gradients at the perturbed weights, where the weights are left for the optimiser."""
        if not self._begun(batch.step):
            return self.inner.compute_loss(batch, attacked)
        with keeping_buffers(self.inner):
            plain = self.inner.compute_loss(batch, attacked)
            gradients = self._gradients(plain)
        with self._perturbed(gradients):
            worst = self.inner.compute_loss(batch, attacked.without_graph())
            gradients = self._gradients(worst)
        metrics = plain.metrics | {"perturbed_loss": worst.metrics["loss"]}
        return replace(worst, loss=None, grads=gradients, metrics=metrics)

    def step_in_parts(self, batch: Batch, parts: int) -> StepOutput:
        """The perturbation of the whole batch, then its gradients, each added over the parts."""
        self._take_back()
        if not self._begun(batch.step):
            return self.inner.step_in_parts(batch, parts)
        split, attacked, mean = batch.split(parts), [], PartMean(self.inner)
        for part in split:
            made = self.inner.make_adversarial(part)
            with keeping_buffers(self.inner):
                mean.add(self.inner.compute_terms(part, made))
            attacked.append(made.without_graph())
        plain = self.inner.finish(mean.result(), batch)
        with self._perturbed(self._gradients(plain)):
            mean = PartMean(self.inner)
            for part, made in zip(split, attacked, strict=True):
                mean.add(self.inner.compute_terms(part, made))
            worst = self.inner.finish(mean.result(), batch)
        return replace(worst, metrics=plain.metrics | {"perturbed_loss": worst.metrics["loss"]})

    @property
    def _first(self) -> int:
        """Number of the first epoch with a perturbation."""
        return round(self.settings.start * self.context.epochs)

    def _begun(self, step: int) -> bool:
        return step >= self._first * self.context.steps_per_epoch

    def warnings(self) -> list[str]:
        """The method's own, and that no weights will be perturbed."""
        told = self.inner.warnings()
        if self._first >= self.context.epochs:
            told.append(
                f"training.weight_perturbation.start: {self.settings.start:g} of the run is after "
                "the beginning of its last epoch, so no weights are perturbed; set a smaller one, "
                "or more training.epochs"
            )
        return told

    @contextmanager
    def _perturbed(self, gradients: Grads) -> Iterator[None]:
        """Move the weights to theta + v, where they stay unless what is done inside fails."""
        parameters = self.trainable()
        with torch.no_grad():
            changes = weight_perturbation(parameters, gradients, self.settings.gamma)
            for name, change in changes.items():
                before = parameters[name].clone()
                parameters[name].add_(change)
                self._before[name] = before, parameters[name].clone()
        torch.clear_autocast_cache()  # it holds the weights before, in another precision
        try:
            yield
        except BaseException:
            self._take_back()
            raise

    def _gradients(self, out: StepOutput) -> Grads:
        if out.grads is not None:
            return out.grads
        assert out.loss is not None
        return self.context.engine.gradients(out.loss, self.trainable())

    @torch.no_grad()
    def _take_back(self) -> None:
        """Undo the perturbation, keeping what the optimiser changed since."""
        parameters = self.trainable()
        for name, (before, perturbed) in self._before.items():
            # Not `weight - v`: (w + v) - v is not w in floating point.
            parameters[name].copy_(before + (parameters[name] - perturbed))
        self._before = {}
        torch.clear_autocast_cache()

    def after_step(self, step: int) -> Metrics:
        """Take the perturbation back; then the method's own averages."""
        self._take_back()
        return self.inner.after_step(step)


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Restore every buffer at the end: a loss computed inside leaves BatchNorm statistics alone."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
