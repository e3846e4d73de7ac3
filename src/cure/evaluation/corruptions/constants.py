"""How strong each corruption is at each severity, for images of every size.

The tables are those of the released generators for CIFAR (32x32) and ImageNet (224x224).  Sizes in
between are interpolated; the rule was chosen because it gives, at 64x64, about what the released
generator for Tiny ImageNet has (docs/corruptions.md).

Source: Hendrycks and Dietterich, ICLR 2019, ``make_cifar_c.py`` and ``imagenet_c/corruptions.py``.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from cure.errors import ConfigError

CIFAR_SIDE, IMAGENET_SIDE = 32, 224
SEVERITIES = (1, 2, 3, 4, 5)

Kind = Literal["length", "amount", "count", "whole length", "whole amount"]
"""How a constant goes from one size to the other.

- ``length``: in pixels, linear in the side;
- ``amount``: without unit, linear in the logarithm of the side;
- ``count``: of photons, geometric in the logarithm of the side;
- ``whole ...``: the same, rounded to a whole number.
"""

SeverityRow = tuple[float, ...]


class SeverityTable(NamedTuple):
    """The constants of one corruption: what kind each is, and five rows for each of two sizes."""

    kinds: tuple[Kind, ...]
    cifar: tuple[SeverityRow, ...]
    imagenet: tuple[SeverityRow, ...]


def _single(kind: Kind, cifar: SeverityRow, imagenet: SeverityRow) -> SeverityTable:
    return SeverityTable((kind,), tuple((c,) for c in cifar), tuple((c,) for c in imagenet))


# The generator for ImageNet counts in 244 pixels where its images have 224.
_SLIP = 244 / 224

TABLES: dict[str, SeverityTable] = {
    # Standard deviation.
    "gaussian_noise": _single(
        "amount", (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    # Photons of a white pixel.
    "shot_noise": _single("count", (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    # Share of values that become 0 or 1.
    "impulse_noise": _single(
        "amount", (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    # Standard deviation, in parts of the value.
    "speckle_noise": _single(
        "amount", (0.06, 0.10, 0.12, 0.16, 0.20), (0.15, 0.20, 0.35, 0.45, 0.60)
    ),
    # Sigma.
    "gaussian_blur": _single("length", (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    # Radius of the disk, sigma that softens its edge.
    "defocus_blur": SeverityTable(
        ("length", "amount"),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    # Sigma, longest way a pixel comes from, rounds.
    "glass_blur": SeverityTable(
        ("length", "whole length", "whole amount"),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    # Radius, sigma.
    "motion_blur": SeverityTable(
        ("whole length", "length"),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    # Largest factor, step.  ``np.arange(1, 1.06, 0.01)`` of the generators ends with 1.06, as
    # rounding has it, and ``np.arange(1, 1.11, 0.01)`` with 1.11; the others end a step earlier.
    "zoom_blur": SeverityTable(
        ("amount", "amount"),
        ((1.06, 0.01), (1.11, 0.01), (1.15, 0.01), (1.20, 0.01), (1.25, 0.01)),
        ((1.11, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03)),
    ),
    # Mean and deviation of the flakes, zoom, threshold, radius and sigma of their fall, share of
    # the image that stays.
    "snow": SeverityTable(
        ("amount", "amount", "amount", "amount", "whole length", "length", "amount"),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    # Weight of the image, weight of the frost, scale of its photograph.
    "frost": SeverityTable(
        ("amount", "amount", "length"),
        ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
        ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    ),
    # Thickness, decay of the heights from one grid to the next finer one.
    "fog": SeverityTable(
        ("amount", "amount"),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    # What is added to the value of HSV.
    "brightness": _single("amount", (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    # Mean, deviation and sigma of the liquid, threshold, strength (water) or sigma (mud), mud or
    # not.
    "spatter": SeverityTable(
        ("amount", "amount", "length", "amount", "amount", "whole amount"),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    # Factor.
    "contrast": _single("amount", (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # Strength and sigma of the displacement, shift of the affine map's points, in sides.
    "elastic_transform": SeverityTable(
        ("amount", "amount", "amount"),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            (_SLIP * strength, _SLIP * sigma, _SLIP * shift)
            for strength, sigma, shift in (
                *((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02)),
                *((0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
            )
        ),
    ),
    # Side of the small image in parts of the side.
    "pixelate": _single("amount", (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    # Quality.
    "jpeg_compression": _single("whole amount", (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    # Factor of the saturation of HSV, what is added to it.
    "saturate": SeverityTable(
        ("amount", "amount"),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
}
TABLES["frost_procedural"] = TABLES["frost"]


def constants(name: str, severity: int, side: int) -> SeverityRow:
    """The constants of one corruption.

    With CIFAR's c and ImageNet's C: c up to a side of 32, C from 224 on, and in between
    ``c + t (C - c)`` with ``t = (side - 32) / 192`` for lengths in pixels and
    ``t = log(side / 32) / log 7`` for all else; numbers of photons are ``c (C / c)^t``.

    Args:
        name: a key of :data:`TABLES`.
        severity: 1 to 5.
        side: the shorter side of the image in pixels.

    Raises:
        ConfigError: for another severity.
    """
    if severity not in SEVERITIES:
        raise ConfigError(f"expected a severity from 1 to 5, got {severity}")
    table = TABLES[name]
    side = min(max(side, CIFAR_SIDE), IMAGENET_SIDE)
    linear = (side - CIFAR_SIDE) / (IMAGENET_SIDE - CIFAR_SIDE)
    logarithmic = math.log(side / CIFAR_SIDE) / math.log(IMAGENET_SIDE / CIFAR_SIDE)
    found = []
    rows = zip(table.kinds, table.cifar[severity - 1], table.imagenet[severity - 1], strict=True)
    for kind, small, large in rows:
        t = linear if "length" in kind else logarithmic
        # Written so that both ends give the tables' own numbers, to the bit.
        value = small ** (1 - t) * large**t if kind == "count" else (1 - t) * small + t * large
        found.append(float(round(value)) if kind.startswith("whole") else value)
    return tuple(found)
