"""Modes of networks: training or evaluation, kept and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Restore the mode of every layer at the end; frozen TorchScript has none to restore."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


def in_evaluation(network: Network) -> Network:
    """The same network, put into evaluation mode; its own ``train`` may return nothing."""
    network.eval()
    return network


@contextmanager
def evaluating(network: Network) -> Iterator[Network]:
    """The network in evaluation mode; the mode of every layer is restored at the end.

    >>> network = nn.Sequential(nn.Dropout().eval(), nn.Linear(1, 1))
    >>> with evaluating(network) as placed:
    ...     placed.training
    False
    >>> network.training, network[0].training
    (True, False)
    """
    with modes_kept(network):
        network.eval()
        yield network
