"""Records sizes of gradients, and which weights a mask conserves, while a run trains.

On at ``training.record_gradients``: every N steps a line of ``gradients.jsonl``, and how often each
weight was conserved in ``gradients.safetensors``.  It only reads: training does not depend on it,
and steps that are not recorded do nothing and wait for no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cure.methods import Masking
from cure.runs.folder import RunFolder
from cure.runs.records import GradientLine
from cure.utils.engine import Grads
from cure.utils.io import write_atomically

COUNTS = "gradients.safetensors"

SIZES = (1e-5, 1e-4, 1e-3)
"""Fixed sizes; the share of gradients beyond each is recorded."""


class GradientLogger:
    """Writes what one step in ``every`` does to the weights.

    Lines of ``gradients.jsonl``, lists in the order of the tensors:

    - the first: ``tensors``, ``shapes``, ``every``;
    - at steps 0, N, 2N, ...: ``before`` and ``after``: mean \\|gradient\\| of all weights of the
      tensor before and after the method's mask, ahead of clipping, momentum and weight decay;
      ``above``: share of weights whose gradient is larger than a fixed size before the mask; and
      of a method with a mask ``conserved``: how many weights a threshold a tensor ("layer") and
      one for the network ("global") conserve, from the same scores; ``mask``: how many the method
      did; ``again``: how many of them it also had N steps before;
    - of a method with a mask, a step later: ``mask``, and ``again``: since the step before.

    Args:
        every: steps between two records.
        parameters: that train, by name.
        folder: the run's.
    """

    def __init__(
        self, every: int, parameters: Mapping[str, nn.Parameter], folder: RunFolder
    ) -> None:
        self.every = every
        self.shapes = {name: list(weight.shape) for name, weight in parameters.items()}
        self.folder = folder
        self.samples = 0
        self.counts: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def start(self) -> None:
        """Write the first line where there is none."""
        if not self.folder.gradients():
            header = {"tensors": list(self.shapes), "shapes": list(self.shapes.values())}
            self._append({"step": -1, **header, "every": self.every})

    @torch.no_grad()
    def step(self, number: int, gradients: Grads, masking: Masking | None) -> None:
        """Record step ``number`` if it is its turn, before the optimiser uses ``gradients``."""
        turn = number % self.every
        if turn == 0:
            self._record(number, gradients, masking)
        elif turn == 1 and masking is not None and self.masks:
            line = {"mask": self._counted(masking.mask), "again": self._again(masking.mask)}
            self._append({"step": number, **line})

    def _record(self, number: int, gradients: Grads, masking: Masking | None) -> None:
        before = gradients if masking is None else masking.unmasked
        line: dict[str, Any] = {"step": number, "before": self._means(before)}
        line["after"] = line["before"] if masking is None else self._means(gradients)
        line["above"] = {
            f"{size:g}": _numbers(
                [(before[name].abs() > size).double().mean() for name in self.shapes]
            )
            for size in SIZES
        }
        if masking is not None:
            line["conserved"] = {
                scope: self._counted(masks) for scope, masks in masking.by_scope.items()
            }
            line["mask"] = self._counted(masking.mask)
            if self.masks:
                line["again"] = self._again(masking.mask)
            self.masks = masking.mask
            self.samples += 1
            for name, mask in masking.mask.items():
                if name not in self.counts:
                    self.counts[name] = torch.zeros_like(mask, dtype=torch.int32)
                self.counts[name] += mask
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self.folder.append(GradientLine.model_validate(line))

    def _means(self, gradients: Grads) -> list[float]:
        return _numbers([gradients[name].abs().double().mean() for name in self.shapes])

    def _counted(self, masks: Mapping[str, Tensor]) -> list[int | None]:
        """How many weights of each tensor a mask holds, None where it has no say."""
        found = iter(_numbers([mask.sum() for mask in masks.values()]))
        counted = dict(zip(masks, found, strict=True))
        return [int(counted[name]) if name in counted else None for name in self.shapes]

    def _again(self, masks: Mapping[str, Tensor]) -> list[int | None]:
        return self._counted({name: mask & self.masks[name] for name, mask in masks.items()})

    def save(self) -> None:
        """Write how often each weight was conserved; the header says of how many records."""
        if not self.counts or not self.folder.writes:
            return
        tensors = {name: count.cpu().contiguous() for name, count in self.counts.items()}
        content = safetensors.torch.save(tensors, metadata={"samples": str(self.samples)})
        path = self.folder.path / COUNTS
        write_atomically(path, lambda temporary: temporary.write_bytes(content))

    def state(self) -> dict[str, Any]:
        """For :meth:`restore`."""
        return {"samples": self.samples, "counts": self.counts, "masks": self.masks}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state` described."""
        self.samples = state["samples"]
        self.counts = {name: count.to(device) for name, count in state["counts"].items()}
        self.masks = {name: mask.to(device) for name, mask in state["masks"].items()}


def _numbers(values: list[Tensor]) -> list[float]:
    """0-dim tensors as numbers, in one copy from the device."""
    numbers: list[float] = torch.stack(values).tolist() if values else []
    return numbers
