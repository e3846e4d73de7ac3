"""Weight averaging around any method: the average of its weights over time is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cure.config import AveragingConfig
from cure.methods.base import Method
from cure.methods.step import Metrics
from cure.methods.wrappers.base import MethodWrapper
from cure.utils.modes import modes_kept


class Averaging(MethodWrapper):
    """``average <- average + share (weights - average)``, once averaging has begun.

    ``exponential``: share ``1 - decay``.  ``equal``: share ``1 / (n + 1)`` after n weights, which
    makes the plain mean.  BatchNorm's running statistics are averaged alike, or computed anew from
    the training images; counters are copied.  Until it begins, the method's own network is
    evaluated.

    ``cure.methods.Averaging(method, decay=0.999)`` with the settings of ``training.averaging``.

    Source: Izmailov et al., UAI 2018 (equal weights, SWA); Rebuffi et al., 2021 (exponential).

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> method = cure.methods.Averaging(cure.methods.AT(model), decay=0.99)
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method(images, labels).backward()
    >>> optimizer.step()
    >>> metrics = method.update()
    >>> method.inference_model() is model
    False
    """

    Settings = AveragingConfig
    settings: AveragingConfig

    def __init__(
        self, inner: Method, settings: AveragingConfig | None = None, **given: Any
    ) -> None:
        super().__init__(inner, settings, **given)
        self.average = copy.deepcopy(inner.inference_model()).requires_grad_(False)
        self.count = 0
        """Weights that went into the average."""
        self.stale = True
        """Whether BatchNorm's statistics are older than the averaged weights."""

    @property
    def _length(self) -> int:
        """How often weights could be taken in the whole run."""
        by_step = self.settings.every == "step"
        return self.context.total_steps if by_step else self.context.epochs

    @property
    def _first(self) -> int:
        """Number of the step or epoch after which weights are taken first."""
        return round(self.settings.start * self._length)

    def warnings(self) -> list[str]:
        """The method's own, and that no weights will be taken."""
        told = self.inner.warnings()
        if self._first >= self._length:
            told.append(
                f"training.averaging.start: {self.settings.start:g} of the run is after its last "
                f"{self.settings.every}, so no weights are averaged; set a smaller one, or more "
                "training.epochs"
            )
        return told

    def after_step(self, step: int) -> Metrics:
        """The method's own averages, then this one."""
        metrics = self.inner.after_step(step)
        if self.settings.every == "step" and step >= self._first:
            self._take()
        return metrics

    def after_epoch(self, epoch: int) -> None:
        """The average over epochs, and BatchNorm statistics that fit the averaged weights."""
        self.inner.after_epoch(epoch)
        if self.settings.every == "epoch" and epoch >= self._first:
            self._take()
        # In one's own loop without epochs this is called after every step.
        own = self.context.has_epochs is False
        if self.settings.batch_norm == "recomputed" and self.count and not own:
            recompute_statistics(self.average, self.context.natural_images())

    @torch.no_grad()
    def _take(self) -> None:
        """Add the weights as they are to the average."""
        source = self.inner.inference_model()
        if self.count == 0:
            self.average.load_state_dict(source.state_dict())
        share = 1 / (self.count + 1) if self.settings.kind == "equal" else 1 - self._decay()
        theirs = dict(source.named_buffers()) | dict(source.named_parameters())
        ours = dict(self.average.named_buffers()) | dict(self.average.named_parameters())
        moving = [n for n, t in ours.items() if t.is_floating_point() or t.is_complex()]
        averages: list[Tensor] = [ours[name] for name in moving]
        torch._foreach_lerp_(averages, [theirs[name] for name in moving], share)
        for name in ours.keys() - set(moving):
            ours[name].copy_(theirs[name])
        self.count += 1
        self.stale = True

    def _decay(self) -> float:
        """Share of the average that stays when weights are added."""
        decay = self.settings.decay
        return min(decay, self.count / (9 + self.count)) if self.settings.warmup else decay

    def inference_model(self) -> nn.Module:
        """The average, once there is one."""
        if not self.count:
            return self.inner.inference_model()
        own = self.context.has_epochs is False
        if self.settings.batch_norm == "recomputed" and own and self.stale:
            recompute_statistics(self.average, self.context.natural_images())
            self.stale = False
        return self.average

    def get_extra_state(self) -> Tensor:
        """How many weights are in the average, for a restart."""
        return torch.tensor(self.count)

    def set_extra_state(self, state: Tensor) -> None:
        """See :meth:`get_extra_state`."""
        self.count = int(state)


@torch.no_grad()
def recompute_statistics(model: nn.Module, images: Iterable[Tensor]) -> None:
    """BatchNorm's running statistics as means over all images, one forward pass each.

    A batch counts by its size.  A last batch of one image is left out, since a layer with one value
    a channel has no variance there.

    Args:
        model: its BatchNorm buffers change, its modes do not; frozen statistics stay.
        images: batches [B, C, H, W], as the model takes them.

    Raises:
        ValueError: when there are no images.

    Source: Izmailov et al. (SWA), UAI 2018, Sec. 3.2.
    """
    with modes_kept(model):
        model.train()
        # Those that stay in evaluation mode are frozen (layers.statistics).
        norms = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats and module.training
        ]
        momenta = [(norm, norm.momentum) for norm in norms]
        size = seen = 0
        try:
            model.eval()  # Dropout stays in evaluation mode.
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
            for image in images if norms else ():
                size = size or len(image)
                if len(image) == 1 < size:
                    continue
                seen += len(image)
                for norm in norms:
                    norm.momentum = len(image) / seen
                model(image)
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum
    if norms and not seen:
        raise ValueError("BatchNorm statistics are to be computed anew, but there are no images")
