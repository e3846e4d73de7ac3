"""A sheet of pictures: what the corruptions do to one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cure.evaluation.corruptions.operations import Pixels
from cure.utils.io import write_atomically

_GAP, _SMALLEST, _LEFT, _TOP = 4, 96, 150, 24


def write_sheet(
    path: Path,
    natural: Pixels | None,
    corrupted: Callable[[str, int], Pixels],
    names: Sequence[str],
    severities: Sequence[int],
) -> None:
    """Write a picture whose rows are corruptions and whose columns are severities.

    Args:
        path: a ``.png`` file.
        natural: the image itself, [H, W, C] uint8, for a column of its own; None where unknown.
        corrupted: gives the image of one corruption and severity.
        names: the rows.
        severities: the columns.
    """
    some = corrupted(names[0], severities[0])
    # Small images are enlarged by a whole number, so that their pixels stay squares.
    zoom = max(1, round(_SMALLEST / min(some.shape[:2])))
    height, width = (zoom * side + _GAP for side in some.shape[:2])
    heads = (["natural"] if natural is not None else []) + [f"severity {s}" for s in severities]
    size = (_LEFT + len(heads) * width, _TOP + len(names) * height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, head in enumerate(heads):
        draw.text((_LEFT + column * width, 4), head, "black", font)
    for row, name in enumerate(names):
        top = _TOP + row * height
        draw.text((6, top + height // 2 - 10), name, "black", font)
        cells = [natural] if natural is not None else []
        cells += [corrupted(name, severity) for severity in severities]
        for column, cell in enumerate(cells):
            picture = Image.fromarray(cell[:, :, 0] if cell.shape[2] == 1 else cell)
            enlarged = picture.resize((width - _GAP, height - _GAP), Image.Resampling.NEAREST)
            sheet.paste(enlarged.convert("RGB"), (_LEFT + column * width, top))
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG"))
