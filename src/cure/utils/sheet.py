"""A sheet of pictures with names beside and above them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cure.utils.io import write_atomically

_GAP, _SMALLEST, _LEFT, _TOP = 4, 96, 150, 24

SheetRow = tuple[str, Sequence[NDArray[np.uint8]]]
"""A name and its pictures, [H, W, C] each, all of one size."""


def write_sheet(path: Path, heads: Sequence[str], rows: Sequence[SheetRow]) -> None:
    """Write a picture of pictures.

    Args:
        path: a ``.png`` file.
        heads: names of the columns.
        rows: at least one, with a picture for each column.
    """
    some = rows[0][1][0]
    # Small images are enlarged by a whole number, so that their pixels stay squares.
    zoom = max(1, round(_SMALLEST / min(some.shape[:2])))
    height, width = (zoom * side + _GAP for side in some.shape[:2])
    size = (_LEFT + len(heads) * width, _TOP + len(rows) * height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, head in enumerate(heads):
        draw.text((_LEFT + column * width, 4), head, "black", font)
    for row, (name, cells) in enumerate(rows):
        top = _TOP + row * height
        draw.text((6, top + height // 2 - 10), name, "black", font)
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell[:, :, 0] if cell.shape[2] == 1 else cell)
            enlarged = picture.resize((width - _GAP, height - _GAP), Image.Resampling.NEAREST)
            sheet.paste(enlarged.convert("RGB"), (_LEFT + column * width, top))
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG"))
