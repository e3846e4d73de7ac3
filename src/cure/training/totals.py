"""Metrics of an epoch, summed on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cure.methods import Metrics


class Totals:
    """Sums of the metrics of an epoch, on the device; nothing waits for it until it is read."""

    def __init__(self, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bad = torch.full((), -1, device=device)

    def add(self, metrics: Metrics, step: int) -> None:
        """Add one step's metrics; remember the first step whose loss was not finite."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1
        fresh = (self.bad < 0) & ~metrics["loss"].isfinite()
        self.bad = torch.where(fresh, torch.full_like(self.bad, step), self.bad)

    def first_bad(self) -> int | None:
        """The first step whose loss was not finite."""
        step = int(self.bad)
        return step if step >= 0 else None

    def means(self) -> dict[str, float]:
        """Mean of each metric over the steps that gave it."""
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}

    def state(self) -> dict[str, Any]:
        """For :meth:`of`."""
        return {"sums": self.sums, "counts": self.counts}

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> Totals:
        """The totals that :meth:`state` described."""
        totals = cls(device)
        totals.sums = {name: value.to(device) for name, value in state["sums"].items()}
        totals.counts = dict(state["counts"])
        return totals
