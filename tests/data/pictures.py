"""Pictures of noise, for tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image


def picture(value: int, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> Any:
    """A picture of noise that depends on ``value``; size is width, height."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.frombytes(mode, size, noise.tobytes())


def encoded(image: Any, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def pixels_of(image: Any) -> torch.Tensor:
    """[C, H, W] uint8 of a grey or RGB picture."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
