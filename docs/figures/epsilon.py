"""The picture of what an epsilon looks like: `make figures` writes docs/figures/epsilon.jpg.

The photograph is a sample image of scikit-learn (flower.jpg, CC BY, by dany13).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

HERE = Path(__file__).parent
EPSILONS = (0, 2, 4, 8, 16)
SIZES = (96, 224)
SIDE, LABEL = 224, 18


def changed(photo: np.ndarray, epsilon: int, draws: np.random.Generator) -> np.ndarray:
    """The photograph with every value moved by ``epsilon`` of 255, up or down at random."""
    signs = draws.choice([-epsilon, epsilon], photo.shape)
    return np.clip(photo.astype(int) + signs, 0, 255).astype(np.uint8)


def main() -> None:
    """Rows: pixels a side; columns: epsilon."""
    whole = Image.fromarray(load_sample_image("flower.jpg"))
    side = min(whole.size)
    left = (whole.width - side) // 2
    square = whole.crop((left, 0, left + side, side))
    width, height = SIDE * len(EPSILONS), (SIDE + LABEL) * len(SIZES)
    sheet = Image.new("RGB", (width, height), "white")
    text = ImageDraw.Draw(sheet)
    draws = np.random.default_rng(0)
    for row, pixels in enumerate(SIZES):
        photo = np.asarray(square.resize((pixels, pixels), Image.Resampling.BICUBIC))
        for column, epsilon in enumerate(EPSILONS):
            tile = Image.fromarray(changed(photo, epsilon, draws))
            place = column * SIDE, row * (SIDE + LABEL)
            title = f"{pixels} px, " + (f"epsilon {epsilon}/255" if epsilon else "unchanged")
            text.text((place[0] + 3, place[1] + 3), title, fill="black")
            tile = tile.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (place[0], place[1] + LABEL))
    sheet.save(HERE / "epsilon.jpg", quality=90, subsampling=0)


if __name__ == "__main__":
    main()
