"""Small things that many tests need."""

from __future__ import annotations

import pytest
import torch

from cure.data import ImageSet


def bright_or_dark(count: int = 96, split: str = "train", classes: int = 2) -> ImageSet:
    """Grey 8x8 images whose brightness tells their class, with noise: learnt in a few steps."""
    draws = torch.Generator().manual_seed(count)
    label = torch.arange(count) % classes
    level = 40 + 170 * label.float() / (classes - 1)
    noise = 25 * torch.randn((count, 1, 8, 8), generator=draws)
    image = (level[:, None, None, None] + noise).clamp(0, 255).to(torch.uint8)
    names = tuple(f"level {number}" for number in range(classes))
    return ImageSet(image, label, names, "brightness", split)


@pytest.fixture
def brightness() -> ImageSet:
    """96 training images of two classes."""
    return bright_or_dark()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests share a small machine."""
    torch.set_num_threads(1)
