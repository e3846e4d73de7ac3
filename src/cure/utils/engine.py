"""What a computation runs on: a device, and the ranks that share it.

Methods ask the engine for gradients and never call ``backward``, so that gradients are averaged
over ranks before anything is computed from them.  The model is not wrapped:
``DistributedDataParallel`` averages only what ``backward`` accumulates, and ignores
``torch.autograd.grad`` and a second backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cure.config import TrainingConfig
from cure.errors import ConfigError
from cure.utils.device import Device, pick_device
from cure.utils.distributed import PATIENCE_WITH_ATTACKS, Ranks, join
from cure.utils.launcher import launched

Grads = dict[str, Tensor]


def configure(training: TrainingConfig, device: torch.device) -> None:
    """Set the number of threads and the determinism of this process for a training."""
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    if device.type == "cuda":
        if training.deterministic:
            # Read when cuBLAS is first used; without it, its products need not repeat.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(training.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not training.deterministic


@dataclass(frozen=True)
class Engine(Ranks, Device):
    """A :class:`~cure.utils.device.Device` and the :class:`~cure.utils.distributed.Ranks` on it.

    Attributes:
        device: where tensors live.
        precision: "fp32", "bf16_attack" or "bf16" (see ``training.precision``).
        channels_last: whether images are stored with the channel innermost.
        rank: number of this process among those that train together, 0 the first.
        world: how many these are; each has an equal part of every batch.
        traffic: number and size of the exchanges of this process so far.
    """

    @classmethod
    def of(cls, training: TrainingConfig) -> Engine:
        """The engine that a training section describes; sets threads and determinism.

        Under a launcher such as ``torchrun`` it meets the other ranks.

        Raises:
            ConfigError: when the device is not on this machine, or the ranks cannot share the
                batches evenly.
            RanksLost: when the other ranks do not come.
        """
        launch = launched()
        device = pick_device(training.device, launch)
        configure(training, device)
        join(device, launch)
        engine = cls(device, training.precision, training.channels_last, launch.rank, launch.world)
        engine.check_batch(training.batch_size)
        return engine

    @classmethod
    def for_evaluation(
        cls, device: str, precision: Literal["fp32", "bf16_attack"] = "fp32"
    ) -> Engine:
        """The engine of an evaluation: in the layout that is fastest, with all ranks.

        Args:
            device: a device of PyTorch, or "auto".
            precision: of the attacks; what they find is judged in float32.

        Raises:
            ConfigError: when the device is not on this machine or the precision is unknown.
            RanksLost: when the other ranks do not come.
        """
        if precision not in ("fp32", "bf16_attack"):
            raise ConfigError(f"precision: expected fp32 or bf16_attack, got '{precision}'")
        launch = launched()
        picked = pick_device(device, launch)
        join(picked, launch, PATIENCE_WITH_ATTACKS)
        return cls(picked, precision, True, launch.rank, launch.world)

    def check_batch(self, size: int) -> None:
        """Refuse a batch of ``size`` images that the ranks cannot share evenly.

        Raises:
            ConfigError: in one sentence.
        """
        if size % self.world:
            nearest = max(1, size // self.world) * self.world
            raise ConfigError(
                f"training.batch_size: expected a multiple of the {self.world} ranks that share "
                f"each batch, got {size}; say {nearest} or {nearest + self.world}"
            )

    def gradients(
        self, loss: Tensor, parameters: Mapping[str, Tensor], retain: bool = False
    ) -> Grads:
        """Gradient of a 0-dim ``loss`` by parameter name; zero where the loss does not depend.

        With several ranks it is the mean of theirs: the gradient of the mean over the whole batch,
        the same bits on every rank.

        Args:
            loss: mean over the samples at hand.
            parameters: what to differentiate by.
            retain: keep the graph for another call.
        """
        grads = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=retain, allow_unused=True
        )
        found = {
            name: torch.zeros_like(parameter) if grad is None else grad
            for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
        }
        if self.world == 1:
            return found
        return dict(zip(found, self.average(found.values(), parameters.values()), strict=True))
