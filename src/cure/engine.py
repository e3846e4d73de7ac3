"""Where computing happens: device, precision, gradients.

A method asks the engine for gradients and never calls ``backward``; what several processes must
agree on is averaged here, before a method scores it.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cure.config import TrainingConfig
from cure.errors import ConfigError
from cure.randomness import generator

Grads = dict[str, Tensor]


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA when there is one.

    Raises:
        ConfigError: when the name means nothing or the device is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"training.device: '{name}' cannot be used here ({first}); say auto or cpu"
        ) from None
    return device


@dataclass(frozen=True)
class Engine:
    """Device and precision of a run, and the only way to a gradient.

    Attributes:
        device: where tensors live.
        precision: "fp32", "bf16_attack" or "bf16" (see ``training.precision``).
        channels_last: whether images are stored with the channel innermost.
    """

    device: torch.device
    precision: Literal["fp32", "bf16_attack", "bf16"] = "fp32"
    channels_last: bool = False

    @classmethod
    def of(cls, training: TrainingConfig) -> Engine:
        """The engine that a training section describes; sets threads and determinism."""
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        device = pick_device(training.device)
        if device.type == "cuda":
            torch.use_deterministic_algorithms(training.deterministic, warn_only=True)
            torch.backends.cudnn.benchmark = not training.deterministic
        return cls(device, training.precision, training.channels_last)

    def training_precision(self) -> AbstractContextManager[object]:
        """Context of the forward passes whose gradients train the weights."""
        return self._autocast(self.precision == "bf16")

    def attack_precision(self) -> AbstractContextManager[object]:
        """Context of the attack's passes."""
        return self._autocast(self.precision != "fp32")

    def _autocast(self, lower: bool) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if lower else nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        """``module`` on the device, in the run's memory layout."""
        module = module.to(self.device)
        if self.channels_last:
            # A tensor layout for four dimensions; parameters of other shapes stay as they are.
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def arrange(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in the run's memory layout."""
        if self.channels_last:
            return image.contiguous(memory_format=torch.channels_last)
        return image

    def logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """Logits [B, K] of ``model`` in training precision, returned in the image's own type."""
        with self.training_precision():
            return model(image).to(image.dtype)  # type: ignore[no-any-return]

    def gradients(
        self, loss: Tensor, parameters: Mapping[str, Tensor], retain: bool = False
    ) -> Grads:
        """Gradient of a 0-dim ``loss`` by parameter name; zero where the loss does not depend.

        Args:
            loss: mean over the samples.
            parameters: what to differentiate by.
            retain: keep the graph for another call.
        """
        grads = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=retain, allow_unused=True
        )
        return {
            name: torch.zeros_like(parameter) if grad is None else grad
            for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
        }

    def generator(self, seed: int, *key: str | int) -> torch.Generator:
        """A generator on this device, keyed by purpose and step."""
        return generator(self.device, seed, *key)

    def peak_memory(self) -> float:
        """The most memory used so far, in MiB: by tensors on a GPU, by the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / (2**20 if sys.platform == "darwin" else 2**10)
