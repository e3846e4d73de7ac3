"""Images that are read from a file, or decoded, when a batch needs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Index = Tensor | slice

THREADS = min(8, os.cpu_count() or 1)
"""Threads that read or decode."""

_TOGETHER = 8


@cache
def _pool(process: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """The threads of a process: those of another one do not exist after a fork."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="cure-images")


@dataclass(frozen=True)
class LazyImages:
    """Images outside memory.

    Attributes:
        read: gives the image [C, H, W] at a row; C may be 1 where ``shape`` says 3 (grey as RGB).
            Called from several threads.
        index: [N] rows, in the order of the images.
        shape: (C, H, W) of every image.
    """

    read: Callable[[int], NDArray[np.uint8]]
    index: NDArray[np.int64]
    shape: tuple[int, int, int]

    def part(self, index: Index) -> LazyImages:
        """The images at ``index``, in that order."""
        return replace(self, index=self._rows(index))

    def request(self, index: Index) -> Callable[[], Tensor]:
        """Start to read the images at ``index`` in other threads.

        Returns:
            Waits for them and returns them, [B, C, H, W] uint8 on the CPU; raises what ``read``
            raises.
        """
        rows = self._rows(index)
        pixels = np.empty((len(rows), *self.shape), dtype=np.uint8)

        def fill(first: int) -> None:
            for place in range(first, min(first + _TOGETHER, len(rows))):
                pixels[place] = self.read(int(rows[place]))

        pool = _pool(os.getpid())
        pending = [pool.submit(fill, first) for first in range(0, len(rows), _TOGETHER)]

        def wait() -> Tensor:
            for each in pending:
                each.result()
            return torch.from_numpy(pixels)

        return wait

    def stand_in(self) -> Tensor:
        """A tensor of the shape of all images, without data: whatever reads values of it fails."""
        return torch.empty((len(self.index), *self.shape), dtype=torch.uint8, device="meta")

    def _rows(self, index: Index) -> NDArray[np.int64]:
        return self.index[index if isinstance(index, slice) else index.cpu().numpy()]
