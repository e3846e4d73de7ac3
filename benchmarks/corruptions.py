"""Our corruptions beside those of the package imagecorruptions, on the same photographs.

``python benchmarks/corruptions.py [--data imagenette224] [--images 20] [--output FILE.md]``

Needs, in an environment of its own, ``pip install imagecorruptions==1.1.2 'setuptools<81'``.  That
package has the ImageNet constants, so images of 224 pixels are compared.  For every corruption and
severity: mean and standard deviation of the change of a value, in levels of 256, here and there,
and, where no chance is involved, the mean distance of the two results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cure.config import DataConfig
from cure.data import load
from cure.evaluation.corruptions.operations import CORRUPTIONS, corrupt

Pixels = NDArray[np.uint8]

CERTAIN = (
    *("defocus_blur", "gaussian_blur", "zoom_blur", "brightness", "contrast", "pixelate"),
    *("jpeg_compression", "saturate"),
)
"""Corruptions that draw nothing."""

DIFFERENT = {
    "elastic_transform": "other constants there, and no affine map",
    "frost": "photographs scaled by 1.1 there",
}


def reference() -> Callable[..., Pixels]:
    """``imagecorruptions.corrupt``, with what newer libraries dropped put back."""
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]
    import imagecorruptions.corruptions as theirs  # type: ignore[import-not-found]
    from imagecorruptions import corrupt as found

    smooth = theirs.gaussian

    def gaussian(*positional: Any, multichannel: bool = False, **named: Any) -> Any:
        return smooth(*positional, channel_axis=-1 if multichannel else None, **named)

    theirs.gaussian = gaussian
    return found


def photographs(name: str, count: int) -> list[Pixels]:
    """So many test images [H, W, C], evenly from the whole split."""
    image = load(DataConfig(source=name, color="rgb"), "test").image
    chosen = image[:: max(1, len(image) // count)][:count]
    return list(chosen.permute(0, 2, 3, 1).contiguous().numpy())


def measured(
    images: list[Pixels], name: str, severity: int, theirs: Callable[..., Pixels]
) -> dict[str, float]:
    """Change of a value here and there, and the distance of the two results."""
    ours = [corrupt(image, name, severity, 0, index) for index, image in enumerate(images)]
    other = [theirs(image, severity, name) for image in images]
    here, there = (
        np.stack([np.subtract(a, b, dtype=np.float64) for a, b in zip(found, images, strict=True)])
        for found in (ours, other)
    )
    return {
        "mean": here.mean(),
        "mean there": there.mean(),
        "deviation": here.std(),
        "deviation there": there.std(),
        "apart": float(np.abs(here - there).mean()),
    }


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="imagenette224")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    theirs = reference()
    images = photographs(options.data, options.images)
    lines = [
        "| corruption | severity | mean | there | deviation | there | ratio | apart |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print(*lines, sep="\n")
    names = [name for name in CORRUPTIONS if name != "frost_procedural"]
    for name in options.only.split(",") if options.only else names:
        np.random.seed(0)
        for severity in range(1, 6):
            found = measured(images, name, severity, theirs)
            apart = f"{found['apart']:.2f}" if name in CERTAIN else ""
            ratio = found["deviation"] / found["deviation there"]
            line = (
                f"| {name} | {severity} | {found['mean']:.2f} | {found['mean there']:.2f} "
                f"| {found['deviation']:.2f} | {found['deviation there']:.2f} | {ratio:.3f} "
                f"| {apart} |"
            )
            print(line, flush=True)
            lines.append(line)
    notes = [f"- {name}: {note}" for name, note in DIFFERENT.items()]
    size = "x".join(map(str, images[0].shape[:2]))
    packages = ("imagecorruptions", "scikit-image", "numpy", "scipy", "pillow")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines += [
        "",
        f"{len(images)} images of {options.data}, {size} pixels; levels of 256. Mean and standard "
        "deviation of the change of a value, here and there; apart: mean distance of the two "
        f"results, where no chance is involved. {versions}.",
        "",
        *notes,
    ]
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
