"""Networks and images that the attack tests share: small, seeded, trained in a moment."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Noisy copies of one fixed picture a class, [count, 2, 8, 8] in [0, 1], with labels."""
    draws = torch.Generator().manual_seed(1234)
    pictures = torch.rand(CLASSES, 2, 8, 8, generator=draws, dtype=torch.float64)
    draws = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=draws)
    noise = torch.randn(count, 2, 8, 8, generator=draws, dtype=torch.float64)
    return (pictures[label] + 0.6 * noise).clamp(0, 1).to(dtype), label


def untrained(seed: int = 0) -> nn.Sequential:
    """A convolutional network with BatchNorm and dropout, [B, 2, 8, 8] to [B, 4]."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 16, CLASSES),
    )


@functools.cache
def _trained_state() -> dict[str, Tensor]:
    model = untrained().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        image, label = images(64, seed=step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(image), label).backward()
        optimizer.step()
    return model.state_dict()


def trained(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same network after sixty steps, in evaluation mode."""
    model = untrained()
    model.load_state_dict(_trained_state())
    return model.to(dtype).eval()


def linear_network(weight: Tensor, bias: Tensor) -> nn.Sequential:
    """``z = W x + b`` on flattened images."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return nn.Sequential(nn.Flatten(), layer).to(weight.dtype)
