"""A teacher: a trained network whose predictions a method imitates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cure.methods.context import Context


class Teacher(nn.Module):
    """The trained network of one role, frozen, always in evaluation mode.

    Args:
        context: holds the network.
        role: name of the setting that asked for it, for example "teacher".
    """

    def __init__(self, context: Context, role: str) -> None:
        super().__init__()
        self.network = context.teachers[role].requires_grad_(False)
        self.context = context
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        """Logits [B, K] for images [B, C, H, W], without a graph."""
        return self.context.engine.logits(self.network, image)
