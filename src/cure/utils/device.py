"""The device of a run: where tensors live, in what precision and memory layout."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure.errors import ConfigError
from cure.utils import memory
from cure.utils.io import first_line
from cure.utils.launcher import Launch
from cure.utils.random import generator

Precision = Literal["fp32", "bf16_attack", "bf16"]

SLOW = 2.0
"""Time of bfloat16 over that of float32 from which it is told."""


def pick_device(name: str, launch: Launch | None = None) -> torch.device:
    """The device called ``name``; "auto" is CUDA when there is one.

    Args:
        name: "auto", or a device of PyTorch.
        launch: which of several ranks this is: each takes the GPU of its number on its machine.

    Raises:
        ConfigError: when the name means nothing or the device is not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launch is not None and launch.world > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f"training.device: '{name}' would be the device of every rank; say cuda, and each "
                "rank takes one of its own"
            )
        if launch.local >= torch.cuda.device_count():
            raise ConfigError(
                f"expected a GPU for each rank, got {torch.cuda.device_count()} for rank number "
                f"{launch.local} of this machine; lower --nproc-per-node"
            )
        name = f"cuda:{launch.local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = first_line(error)
        raise ConfigError(
            f"training.device: '{name}' cannot be used here ({first}); say auto or cpu"
        ) from None
    return device


def convolution_time(kind: torch.dtype) -> float:
    """Seconds that a small convolution takes on the processor, the shortest of five times."""
    image, weight = torch.ones((16, 16, 16, 16), dtype=kind), torch.ones((16, 16, 3, 3), dtype=kind)
    found = []
    for _ in range(5):
        began = time.perf_counter()
        F.conv2d(image, weight, padding=1)
        found.append(time.perf_counter() - began)
    return min(found)


@dataclass(frozen=True)
class Device:
    """Device, precision and memory layout of a computation.

    Attributes:
        device: where tensors live.
        precision: "fp32", "bf16_attack" or "bf16" (see ``training.precision``).
        channels_last: whether images are stored with the channel innermost.
    """

    device: torch.device
    precision: Precision = "fp32"
    channels_last: bool = False

    def training_precision(self) -> AbstractContextManager[object]:
        """Context of the forward passes whose gradients train the weights."""
        return self._autocast(self.precision == "bf16")

    def attack_precision(self) -> AbstractContextManager[object]:
        """Context of the attack's passes."""
        return self._autocast(self.precision != "fp32")

    def slow_precision(self) -> str | None:
        """A sentence where bfloat16 saves no time: processors may have no instructions for it."""
        if self.precision == "fp32" or self.device.type != "cpu":
            return None
        ratio = convolution_time(torch.bfloat16) / convolution_time(torch.float32)
        if ratio < SLOW:
            return None
        return (
            f"a convolution takes {ratio:.0f} times as long in bfloat16 as in float32 on this "
            "processor; precision fp32 is faster here, and attacks are stronger in it"
        )

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

    def generator(self, seed: int, *key: str | int) -> torch.Generator:
        """A generator on this device, keyed by purpose and step."""
        return generator(self.device, seed, *key)

    def peak_memory(self) -> float:
        """The most memory used so far, in MiB: by tensors on a GPU, by the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return memory.peak()
