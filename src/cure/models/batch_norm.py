"""BatchNorm layers whose running statistics are frozen, or left alone for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from cure.utils.modes import in_evaluation


class FrozenStatistics:
    """Mixin of a BatchNorm layer that stays in evaluation mode, whatever mode is asked for.

    Its weight and bias may still be trained.
    """

    def train(self: Any, mode: bool = True) -> Any:  # noqa: ARG002
        """Evaluation mode."""
        self.training = False
        return self


_frozen_classes: dict[type[_BatchNorm], type[_BatchNorm]] = {}


def frozen_class(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """The subclass of a BatchNorm class whose statistics are frozen."""
    if kind not in _frozen_classes:
        _frozen_classes[kind] = type(f"Frozen{kind.__name__}", (FrozenStatistics, kind), {})
    return _frozen_classes[kind]


def _frozen(norm: _BatchNorm) -> _BatchNorm:
    """A frozen layer with the parameters and buffers of ``norm``: the same tensors."""
    kind = frozen_class(type(norm))
    layer: _BatchNorm = kind.__new__(kind)
    layer.__dict__.update(norm.__dict__)
    return in_evaluation(layer)


def freeze_statistics(
    model: nn.Module, chosen: Callable[[str, _BatchNorm], bool] = lambda *_: True
) -> list[str]:
    """Replace BatchNorm layers by layers with frozen statistics; names and tensors stay.

    Args:
        model: changed in place.
        chosen: called with the name of a layer and the layer; by default all are frozen.

    Returns:
        The names of the layers that were frozen.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    >>> freeze_statistics(model)
    ['1']
    >>> model.train()[1].training
    False
    """
    names = []
    for prefix, parent in list(model.named_modules()):
        for key, child in list(parent.named_children()):
            name = f"{prefix}.{key}" if prefix else key
            if not isinstance(child, _BatchNorm) or isinstance(child, FrozenStatistics):
                continue
            if chosen(name, child):
                setattr(parent, key, _frozen(child))
                names.append(name)
    return names


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics alone during forward passes in training mode.

    Copying the old statistics back afterwards would not work where the pass is differentiated
    later: autograd refuses a buffer that was written to in the meantime.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The means and variances that training moves: those of layers in training mode."""
    norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.training]
    found = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    return [statistic for statistic in found if statistic is not None]
