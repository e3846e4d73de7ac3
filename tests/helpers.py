"""What many tests call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Command = Callable[..., Ended]


def refused(ended: Ended, *words: str) -> None:
    """One message, on stderr, after notes at most, that names these words, and status 2."""
    assert ended.status == 2, ended
    assert "Traceback" not in ended.err
    notes, error, _ = ended.err.partition("error: ")
    assert error, ended.err
    assert all(line.startswith("note: ") for line in notes.splitlines()), ended.err
    assert ended.err.count("error: ") == 1
    assert ended.out == ""
    for word in words:
        assert word in ended.err, f"'{word}' is not in: {ended.err}"
