"""Encoded images to one uint8 tensor: opened, converted, resized and compared, once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cure.errors import DataError

Color = Literal["keep", "rgb", "grey"]
Pixels = NDArray[np.uint8]

# Only formats that hold one still picture; this also keeps Pillow from handing a file to
# Ghostscript, and saves time: not every plugin is tried on each of 50,000 images.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"]
)

_GREY_MODES = frozenset(["1", "L", "LA", "La"])
_WIDE_MODES = frozenset(["I", "F"])
_CHANNELS = {1: "grey", 3: "RGB"}
_ORIENTATION = 0x0112
_CHUNK = 256
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Cell:
    """One image before it is decoded.

    Attributes:
        open: returns the Pillow image; may raise what Pillow raises.
        name: what an error calls the image, for example ``row 3 of train ('a.png')``.
    """

    open: Callable[[], Any]
    name: str


def open_image(file: Any) -> Any:
    """A Pillow image from a path or binary file, upright as its EXIF data says.

    Raises:
        ValueError: its pixels have more than 8 bits a channel.
        OSError: it is not an image, or is damaged.
    """
    # Entered, Pillow closes a file it opened by name; the pixels are loaded by then.
    with Image.open(file, formats=FORMATS) as image:
        # Pillow would cut 16-bit RGB to 8 bits without a word; the raw mode tells in time.
        wide = image.mode[:1] in _WIDE_MODES or ";16" in str(getattr(image, "tile", ""))
        if wide:
            raise ValueError(
                "it has more than 8 bits a channel; convert it to an 8-bit PNG, scaled as you see "
                "fit"
            )
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
        return image


def to_pixels(image: Any, color: Color, resize: int | None) -> Pixels:
    """A Pillow image as [H, W, C] uint8; C is 1 for grey, else 3.

    Transparency is dropped, palettes are looked up.  ``resize`` makes the image that many pixels
    wide and high (bicubic, antialiased); the shape of an oblong image is not kept.
    """
    grey = image.mode in _GREY_MODES if color == "keep" else color == "grey"
    mode = "L" if grey else "RGB"
    if image.mode != mode:
        with warnings.catch_warnings():
            # "Palette images with Transparency ... should be converted to RGBA": it is dropped.
            warnings.simplefilter("ignore", UserWarning)
            image = image.convert(mode)
    if resize is not None and image.size != (resize, resize):
        image = image.resize((resize, resize), Image.Resampling.BICUBIC)
    pixels: Pixels = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if grey else pixels


def decode(cells: Iterable[Cell], count: int, color: Color, resize: int | None) -> Tensor:
    """Decode ``count`` images in a few threads into one tensor.

    Args:
        cells: the images, in order; taken a chunk at a time, so encoded images need not all be
            in memory.
        count: how many there are.
        color: convert every image to ``rgb`` or ``grey``, or ``keep`` what they are.
        resize: side in pixels, or None to keep the size.

    Returns:
        [count, C, H, W] uint8.

    Raises:
        DataError: an image is damaged or of more than 8 bits, or two differ in size or channels.
    """
    threads = min(8, os.cpu_count() or 1)

    def decode_chunk(chunk: list[Cell]) -> list[Pixels]:
        return [_decode_one(cell, color, resize) for cell in chunk]

    pixels: NDArray[np.uint8] | None = None
    first_name = ""
    position = 0
    iterator = iter(cells)
    with ThreadPoolExecutor(threads) as pool:
        # One round of chunks at a time: pool.map submits all its input at once.
        while chunks := [c for c in (_take(iterator) for _ in range(threads)) if c]:
            for chunk, decoded in zip(chunks, pool.map(decode_chunk, chunks), strict=True):
                for cell, one in zip(chunk, decoded, strict=True):
                    if pixels is None:
                        pixels = np.empty((count, *one.shape), dtype=np.uint8)
                        first_name = cell.name
                    elif one.shape != pixels.shape[1:]:
                        raise DataError(_differ(first_name, pixels.shape[1:], cell.name, one.shape))
                    pixels[position] = one
                    position += 1
    if pixels is None or position != count:
        raise DataError(
            f"expected {count} images, read {position}: the file changed while it was read; try "
            "again"
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def file_cell(path: Path) -> Cell:
    """The cell of an image file."""
    return Cell(lambda: open_image(path), f"'{path}'")


def _take(iterator: Iterator[Cell]) -> list[Cell]:
    return list(islice(iterator, _CHUNK))


def _decode_one(cell: Cell, color: Color, resize: int | None) -> Pixels:
    try:
        return to_pixels(cell.open(), color, resize)
    except _UNREADABLE as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify image file" in text:
            text = f"it is none of {', '.join(FORMATS)}"
        raise DataError(
            f"image {cell.name} cannot be used: {text}; mend it or take it out"
        ) from error


def _differ(name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> str:
    """The sentence for two images that cannot stand in one tensor; shapes are [H, W, C]."""
    if shape[2] != other_shape[2]:
        return (
            f"expected images of one kind, but {name} is {_CHANNELS[shape[2]]} and {other} is "
            f"{_CHANNELS[other_shape[2]]}; set data.color=rgb (or data.color=grey)"
        )
    return (
        f"expected images of one size, but {name} is {shape[1]}x{shape[0]} and {other} is "
        f"{other_shape[1]}x{other_shape[0]} pixels; set data.resize={min(shape[0], shape[1])} "
        "or another side in pixels"
    )
