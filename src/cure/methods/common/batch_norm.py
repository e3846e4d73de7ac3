"""Forward passes in training mode that BatchNorm does not remember."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of ``model`` alone: BatchNorm in training uses the batch's only.

    Writing the old statistics back afterwards would not do where the pass is differentiated later:
    autograd refuses a buffer that was written to in the meantime.
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
