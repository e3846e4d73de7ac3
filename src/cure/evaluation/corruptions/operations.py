"""The corruptions: what each does to one image, as a pure function of image, severity and chance.

SciPy, NumPy and Pillow do what ImageMagick, OpenCV and scikit-image do in the released generators;
where those behave differently from their description, the behaviour is kept, since the benchmark's
images were made with it, and a comment says so.

Source: Hendrycks and Dietterich, ICLR 2019, ``make_cifar_c.py`` and ``imagenet_c/corruptions.py``.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from cure.errors import ConfigError, DataError, unknown
from cure.evaluation.corruptions.constants import constants
from cure.utils.random import derive

Pixels = NDArray[np.uint8]
Values = NDArray[np.float64]
"""[H, W, C] in [0, 1], C is 1 (grey) or 3 (RGB)."""

Function = Callable[[Values, int, np.random.Generator], Values]

SMALLEST_SIDE = 8
GROUPS = ("noise", "blur", "weather", "digital")


class Corruption(NamedTuple):
    """One entry of :data:`CORRUPTIONS`.

    Attributes:
        apply: the operation; its result may leave [0, 1].
        group: "noise", "blur", "weather" or "digital".
        extra: whether the benchmark's mean leaves it out.
        grey: whether it is defined on grey images.
    """

    apply: Function
    group: str
    extra: bool = False
    grey: bool = True


def corrupt(image: Pixels, name: str, severity: int, seed: int, index: int) -> Pixels:
    """One image, corrupted; the same for the same arguments, whatever else is corrupted.

    Values are clipped to [0, 1] and the fraction of ``255 value`` is cut off, as the benchmark's
    files had it (``np.uint8``), which is half a level darker on average than rounding.

    Args:
        image: [H, W, C] uint8, C of 1 or 3, sides of 8 or more.
        name: a key of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: with ``index``: which of all possible corruptions; chance is keyed by (seed,
            "corruption", name, severity, index).
        index: the image's position among its images.

    Raises:
        CureError: for an unknown name or severity, a colour corruption of a grey image, or an
            image of another type or shape.
    """
    corruption = _known(name)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise DataError(
            "expected an image [H, W, C] of uint8 with C of 1 or 3, got "
            f"{list(image.shape)} of {image.dtype}"
        )
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise DataError(
            f"expected images of {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels or more, got "
            f"{image.shape[1]}x{image.shape[0]}; enlarge them with data.resize"
        )
    if image.shape[2] == 1 and not corruption.grey:
        raise ConfigError(f"{name} changes colours and the images are grey; leave it out")
    random = np.random.default_rng(derive(seed, "corruption", name, severity, index))
    values = corruption.apply(image / 255.0, severity, random)
    # The small number keeps what is 17 but for rounding of floats from becoming 16.
    cut: Pixels = (np.clip(values, 0, 1) * 255 + 1e-6).astype(np.uint8)
    return cut


def _known(name: str) -> Corruption:
    if name not in CORRUPTIONS:
        raise ConfigError(unknown("corruption", name, CORRUPTIONS))
    return CORRUPTIONS[name]


def _constants(name: str, severity: int, image: Values) -> tuple[float, ...]:
    return constants(name, severity, min(image.shape[:2]))


# Noise.


def gaussian_noise(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``x + N(0, c)``."""
    (deviation,) = _constants("gaussian_noise", severity, image)
    return image + random.normal(scale=deviation, size=image.shape)


def shot_noise(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``Poisson(c x) / c``: c photons reach a white pixel on average."""
    (photons,) = _constants("shot_noise", severity, image)
    return random.poisson(image * photons) / photons


def impulse_noise(image: Values, severity: int, random: np.random.Generator) -> Values:
    """A share c of the values becomes 0 or 1, half and half; each channel on its own."""
    (share,) = _constants("impulse_noise", severity, image)
    hit = random.random(image.shape) <= share
    salt = random.random(image.shape) <= 0.5
    return np.where(hit, salt.astype(np.float64), image)


def speckle_noise(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``x + x N(0, c)``."""
    (deviation,) = _constants("speckle_noise", severity, image)
    return image + image * random.normal(scale=deviation, size=image.shape)


# Blur.


def _smooth(values: Values, sigma: float, truncate: float = 4.0, mode: str = "nearest") -> Values:
    """Gaussian of ``sigma`` pixels over height and width."""
    sigmas = (sigma, sigma, 0.0)[: values.ndim]
    smoothed: Values = ndimage.gaussian_filter(values, sigmas, truncate=truncate, mode=mode)
    return smoothed


def gaussian_blur(image: Values, severity: int, random: np.random.Generator) -> Values:
    """Gaussian of sigma c."""
    (sigma,) = _constants("gaussian_blur", severity, image)
    return _smooth(image, sigma)


@lru_cache(maxsize=32)
def disk(radius: float, softness: float) -> Values:
    """A filled circle that sums to 1, its edge softened by a Gaussian of sigma ``softness``.

    The Gaussian's kernel is 3x3 for a radius up to 8 and 5x5 above, as in the released code.
    Where the circle touches the edge of its grid (a radius of 8 or more) softening mirrors it there
    and the sum is up to 3 % above 1, which the benchmark's images have, too.
    """
    reach, half = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    steps = np.arange(-reach, reach + 1)
    circle = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float64)
    circle /= circle.sum()
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * softness**2))
    weights /= weights.sum()
    for axis in (0, 1):
        circle = ndimage.correlate1d(circle, weights, axis=axis, mode="mirror")
    return circle


def defocus_blur(image: Values, severity: int, random: np.random.Generator) -> Values:
    """A disk of radius c0, softened by c1."""
    kernel = disk(*_constants("defocus_blur", severity, image))
    blurred: Values = ndimage.correlate(image, kernel[:, :, None], mode="mirror")
    return blurred


def glass_blur(image: Values, severity: int, random: np.random.Generator) -> Values:
    """Blur of sigma c0; c2 times each pixel takes one at most c1 away; blur again.

    The paper says that two pixels are swapped.  The released code assigns views of one array to
    each other, so both get the value of the other one: a copy.  It reaches c1 up and left but only
    c1 - 1 down and right, leaves a border, goes from the last pixel to the first, and cuts the
    first blur down to 256 levels.
    """
    sigma, reach, rounds = _constants("glass_blur", severity, image)
    delta = int(reach)
    blurred = np.floor(_smooth(image, sigma) * 255 + 1e-6) / 255
    height, width = image.shape[:2]
    rows, columns = np.arange(height - delta, delta, -1), np.arange(width - delta, delta, -1)
    targets = (rows[:, None] * width + columns).ravel().tolist()
    # Which pixel each place shows; in plain integers, as every step may need the one before.
    source = list(range(height * width))
    for _ in range(int(rounds)):
        moves = random.integers(-delta, delta, (2, len(targets)))
        for place, move in zip(targets, (moves[0] * width + moves[1]).tolist(), strict=True):
            source[place] = source[place + move]
    shuffled = blurred.reshape(height * width, -1)[source].reshape(image.shape)
    return _smooth(shuffled, sigma)


def _move(values: Values, radius: float, sigma: float, degrees: float) -> Values:
    """Motion blur of ImageMagick: a half Gaussian of ``2 radius + 1`` points along a line.

    ``out(p) = sum_i k_i values(p + round(i d))`` with ``k_i ~ exp(-i^2 / (2 sigma^2))`` and d the
    direction of ``degrees``, clockwise from the right; pixels outside repeat the border.
    """
    steps = np.arange(2 * int(radius) + 1)
    steps = steps[steps <= 6 * sigma]  # Beyond, a weight is below 2e-8 of the first.
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    angle = math.radians(degrees)
    down = np.ceil(steps * math.sin(angle) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(angle) - 0.5).astype(int)
    height, width = values.shape[:2]
    margin = int(max(abs(down).max(), abs(right).max()))
    padded = np.pad(values, [(margin, margin)] * 2 + [(0, 0)] * (values.ndim - 2), mode="edge")
    moved = np.zeros_like(values)
    for weight, y, x in zip(weights, margin + down, margin + right, strict=True):
        moved += weight * padded[y : y + height, x : x + width]
    return moved


def motion_blur(image: Values, severity: int, random: np.random.Generator) -> Values:
    """Motion of radius c0 and sigma c1 at an angle of U(-45, 45) degrees."""
    radius, sigma = _constants("motion_blur", severity, image)
    return _move(image, radius, sigma, random.uniform(-45, 45))


@lru_cache(maxsize=256)
def _zoom_matrix(size: int, factor: float) -> Values:
    """[size, size]: what enlarges the middle of a line of ``size`` pixels by ``factor``, linearly.

    The released code crops ``ceil(size / factor)`` pixels, zooms them with SciPy and trims what is
    too much; zooming is linear, so zooming the unit vectors gives its matrix.
    """
    crop = math.ceil(size / factor)
    top = (size - crop) // 2
    matrix = ndimage.zoom(np.eye(size)[top : top + crop], (factor, 1), order=1)
    trim = (len(matrix) - size) // 2
    trimmed: Values = matrix[trim : trim + size]
    return trimmed


def zoom_blur(image: Values, severity: int, random: np.random.Generator) -> Values:
    """Mean of the image and of itself enlarged by 1, 1 + c1, ..., c0."""
    last, step = _constants("zoom_blur", severity, image)
    height, width, channels = image.shape
    # The very floats of the generators: SciPy rounds what 1.25 and 1.2500000000000002 give apart.
    factors = np.arange(1, last + step / 2, step)
    flat = image.reshape(height, width * channels)
    zoomed = np.zeros((width, height * channels))
    for factor in factors.tolist():
        rows = (_zoom_matrix(height, factor) @ flat).reshape(height, width, channels)
        zoomed += _zoom_matrix(width, factor) @ rows.transpose(1, 0, 2).reshape(width, -1)
    total = image + zoomed.reshape(width, height, channels).transpose(1, 0, 2)
    return total / (len(factors) + 1)


# Weather.


def _grey(image: Values) -> Values:
    """[H, W, 1]: the luminance of ITU-R BT.601; a grey image is its own."""
    if image.shape[2] == 1:
        return image
    luminance: Values = image @ np.array([0.299, 0.587, 0.114])
    return luminance[:, :, None]


def _in_channels(layer: Values, image: Values) -> Values:
    """An RGB layer as the image needs it: as it is, or its luminance."""
    return layer if image.shape[2] == 3 else _grey(layer)


def snow(image: Values, severity: int, random: np.random.Generator) -> Values:
    """Normal noise (mean c0, deviation c1), enlarged c2 times, 0 below c3, moving (c4, c5).

    The image becomes ``c6 x + (1 - c6) max(x, 1.5 grey + 0.5)``; the layer is added to it, and once
    more turned by 180 degrees.  The flakes move at U(-135, -45) degrees.
    """
    mean, deviation, zoom, threshold, radius, sigma, kept = _constants("snow", severity, image)
    height, width = image.shape[:2]
    layer = random.normal(mean, deviation, (height, width))
    layer = _zoom_matrix(height, zoom) @ layer @ _zoom_matrix(width, zoom).T
    layer[layer < threshold] = 0
    # The generators stored the layer as 8-bit pictures before and after it moved.
    layer = np.floor(np.clip(layer, 0, 1) * 255)
    layer = np.rint(_move(layer, radius, sigma, random.uniform(-135, -45))) / 255
    pale = kept * image + (1 - kept) * np.maximum(image, 1.5 * _grey(image) + 0.5)
    return pale + (layer + layer[::-1, ::-1])[:, :, None]


def frost_photographs() -> Path | None:
    """The folder of the package imagecorruptions that holds photographs of frost, if installed.

    The package is looked for and not imported: it no longer imports beside today's NumPy.
    """
    found = importlib.util.find_spec("imagecorruptions")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "frost"
    return folder if folder.is_dir() else None


# The generators draw among the first five of six.
_PHOTOGRAPHS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


@lru_cache(maxsize=16)
def _photograph(number: int, scale: float, height: int, width: int) -> Values:
    """A photograph of frost at ``scale``, or larger if it would not cover the image."""
    folder = frost_photographs()
    if folder is None:
        raise ConfigError(
            "frost needs the photographs of the package imagecorruptions, which is not installed; "
            "say `pip install --no-deps imagecorruptions` (it is read, not imported), or use "
            "frost_procedural"
        )
    try:
        with Image.open(folder / _PHOTOGRAPHS[number]) as file:
            photograph = np.asarray(file.convert("RGB")) / 255.0
    except OSError as error:
        raise DataError(
            f"the photograph {_PHOTOGRAPHS[number]} of imagecorruptions cannot be read "
            f"({type(error).__name__}); install the package again, or use frost_procedural"
        ) from None
    tall, wide = photograph.shape[:2]
    scale = max(scale, height / tall, width / wide)
    shape = max(height, round(scale * tall)), max(width, round(scale * wide))
    # Sampled between the four nearest pixels without smoothing, as OpenCV's default does.
    offset = 0.5 / scale - 0.5
    sampled: Values = ndimage.affine_transform(
        photograph,
        np.array([1 / scale, 1 / scale, 1.0]),
        offset=[offset, offset, 0.0],
        output_shape=(*shape, 3),
        order=1,
        mode="nearest",
    )
    return sampled


def frost(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``c0 x + c1 frost``: a random crop of one of five photographs, scaled by c2."""
    kept, added, scale = _constants("frost", severity, image)
    height, width = image.shape[:2]
    photograph = _photograph(int(random.integers(5)), scale, height, width)
    top = random.integers(photograph.shape[0] - height + 1)
    left = random.integers(photograph.shape[1] - width + 1)
    crop = photograph[top : top + height, left : left + width]
    return kept * image + added * _in_channels(crop, image)


def frost_procedural(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``c0 x + c1 frost`` like :func:`frost`, the frost made by a procedure instead of taken.

    Needles of ice in four directions: of four noises, each moved along a line, the highest, on an
    uneven bluish ground.  Its brightness and contrast are about those of the photographs (means
    from 0.4 to 0.8, deviations from 0.1 to 0.2).  It is not the benchmark's frost and has a name of
    its own.
    """
    kept, added, scale = _constants("frost_procedural", severity, image)
    height, width = image.shape[:2]
    # Up to 40 pixels long at the photographs' full size; made with a margin, as
    # needles that begin at the border would repeat its pixels.
    length = math.ceil(20 * scale)
    margin = 2 * length
    noises = random.normal(size=(4, height + 2 * margin, width + 2 * margin))
    angles = random.uniform(0, 360, len(noises))
    moved = [
        _move(noise, length, 12 * scale, angle) for noise, angle in zip(noises, angles, strict=True)
    ]
    needles = np.max(moved, axis=0)[margin : margin + height, margin : margin + width]
    needles = (needles - needles.mean()) / needles.std()
    side = 1 << (max(height, width) - 1).bit_length()
    ground = random.uniform(0.4, 0.85) + 0.4 * (plasma(side, 2, random)[:height, :width] - 0.5)
    ice = ground + 0.12 * needles
    layer = np.clip(ice[:, :, None] + np.array([-0.06, 0.01, 0.05]), 0, 1)
    return kept * image + added * _in_channels(layer, image)


def plasma(side: int, decay: float, random: np.random.Generator) -> Values:
    """[side, side] in [0, 1]: a height map by diamond-square on a torus.

    On grids twice as fine each time, a new point is the mean of its four neighbours plus
    ``w U(-w, w)``, w divided by ``decay`` from grid to grid, beginning with 100.

    Args:
        side: a power of two.
        decay: 1 is noise, larger is smoother.
        random: where chance comes from.
    """
    height_map = np.zeros((side, side))
    step, wobble = side, 100.0
    while step >= 2:
        half = step // 2

        def moved(sums: Values, wobble: float = wobble) -> Values:
            return sums / 4 + wobble * random.uniform(-wobble, wobble, sums.shape)

        corners = height_map[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        height_map[half::step, half::step] = moved(pairs + np.roll(pairs, -1, axis=1))
        centres = height_map[half::step, half::step]
        above = centres + np.roll(centres, 1, axis=0)
        beside = corners + np.roll(corners, -1, axis=1)
        height_map[::step, half::step] = moved(above + beside)
        above = corners + np.roll(corners, -1, axis=0)
        beside = centres + np.roll(centres, 1, axis=1)
        height_map[half::step, ::step] = moved(above + beside)
        step, wobble = half, wobble / decay
    height_map -= height_map.min()
    height_map /= height_map.max()
    return height_map


def fog(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``(x + c0 plasma) m / (m + c0)`` with m the largest value of x and a plasma of decay c1."""
    thickness, decay = _constants("fog", severity, image)
    height, width = image.shape[:2]
    side = 1 << (max(height, width) - 1).bit_length()
    layer = plasma(side, decay, random)[:height, :width, None]
    brightest = float(image.max())
    return (image + thickness * layer) * brightest / (brightest + thickness)


def brightness(image: Values, severity: int, random: np.random.Generator) -> Values:
    """c added to the value of HSV, up to 1.  The value of a grey image is the image."""
    (added,) = _constants("brightness", severity, image)
    value: Values = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + added, 1)
    # Hue and saturation stay when all three channels grow by one factor; black has neither.
    return np.where(value > 0, image * (brighter / np.where(value > 0, value, 1)), brighter)


def _edges(layer: Pixels, low: float, high: float) -> NDArray[np.bool_]:
    """[H, W]: Canny's edges of a picture, as OpenCV finds them (Sobel 3x3, sum of magnitudes)."""
    values = layer.astype(np.float64)
    dx = ndimage.sobel(values, axis=1, mode="nearest")
    dy = ndimage.sobel(values, axis=0, mode="nearest")
    size = np.abs(dx) + np.abs(dy)
    around = np.pad(size, 1)
    height, width = layer.shape

    def beside(y: int, x: int) -> Values:
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    # Thinned: an edge is higher than its neighbours across it, in one of four directions.
    flat = np.abs(dy) < math.tan(math.pi / 8) * np.abs(dx)
    steep = np.abs(dy) > math.tan(3 * math.pi / 8) * np.abs(dx)
    falling = dx * dy < 0
    horizontal = (size > beside(0, -1)) & (size >= beside(0, 1))
    vertical = (size > beside(-1, 0)) & (size >= beside(1, 0))
    rising = (size > beside(-1, -1)) & (size > beside(1, 1))
    sinking = (size > beside(-1, 1)) & (size > beside(1, -1))
    thin = np.select([flat, steep, falling], [horizontal, vertical, sinking], rising)
    weak = thin & (size > low)
    pieces, count = ndimage.label(weak, np.ones((3, 3)))
    strong = np.zeros(count + 1, dtype=np.bool_)
    strong[pieces[weak & (size > high)]] = True
    found: NDArray[np.bool_] = strong[pieces]
    return found


def _equalised(picture: Pixels) -> Pixels:
    """A picture whose levels are spread over 0..255 by rank, as OpenCV's ``equalizeHist``."""
    counts = np.bincount(picture.ravel(), minlength=256)
    first = int(picture.min())
    rest = picture.size - counts[first]
    if not rest:
        return picture
    ranks = np.cumsum(counts) - counts[first]
    levels: Pixels = np.clip(np.rint(ranks * (255 / rest)), 0, 255).astype(np.uint8)
    return levels[picture]


_LIGHT = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float64)
_WATER = np.array([175, 238, 238]) / 255  # Pale turquoise.
_MUD = np.array([63, 42, 20]) / 255


def spatter(image: Values, severity: int, random: np.random.Generator) -> Values:
    """Drops of water (severities 1 to 3) or splashes of mud (4 and 5).

    Normal noise (mean c0, deviation c1), smoothed by c2, makes drops where it is above c3.  Water
    is added, c4 strong, brighter on the side that faces the light; mud, its edge smoothed by c4,
    covers.  On grey images both have their luminance.
    """
    mean, deviation, sigma, threshold, strength, mud = _constants("spatter", severity, image)
    liquid = _smooth(random.normal(mean, deviation, image.shape[:2]), sigma)
    if mud:
        cover = _smooth((liquid > threshold).astype(np.float64), strength)
        cover[cover < 0.8] = 0
        colour = _in_channels(_MUD[None, None], image)
        return image * (1 - cover[:, :, None]) + colour * cover[:, :, None]
    liquid[liquid < threshold] = 0
    picture = (np.clip(liquid, 0, 1) * 255).astype(np.uint8)
    edges = _edges(picture, 50, 150)
    # Where no edge is, none is near.
    far = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(edges.shape, 20.0)
    far = ndimage.uniform_filter(np.minimum(far, 20), 3, mode="mirror").astype(np.uint8)
    lit = ndimage.correlate(_equalised(far).astype(np.float64), _LIGHT, mode="mirror")
    lit = np.rint(ndimage.uniform_filter(np.clip(lit, 0, 255), 3, mode="mirror"))
    drops: Values = picture * lit
    if drops.max() > 0:
        drops *= strength / drops.max()
    return image + drops[:, :, None] * _in_channels(_WATER[None, None], image)


# Digital.


def contrast(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``(x - mean) c + mean``, the mean of each channel."""
    (factor,) = _constants("contrast", severity, image)
    means: Values = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * factor + means


def elastic_transform(image: Values, severity: int, random: np.random.Generator) -> Values:
    """A random affine map, then a random smooth displacement.

    Three points about the middle move by U(-c2, c2) in x and y; each pixel is then taken from
    ``c0`` times uniform noise in [-1, 1], smoothed by c1, away.  All in sides of the image.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    strength, sigma, shift = (side * c for c in _constants("elastic_transform", severity, image))
    centre, reach = np.array([height // 2, width // 2], dtype=np.float64), side // 3
    before = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + random.uniform(-shift, shift, before.shape)
    # Rows of (y, x, 1) times this give where in the image a pixel of the result comes from.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    moved_y, moved_x = (y * back[0, i] + x * back[1, i] + back[2, i] for i in (0, 1))
    moved = _sampled(image, moved_y, moved_x, "mirror")
    if strength:
        noise = random.uniform(-1, 1, (2, height, width))
        dy, dx = (strength * _smooth(n, sigma, truncate=3, mode="reflect") for n in noise)
        moved = _sampled(moved, y + dy, x + dx, "reflect")
    return moved


def _sampled(image: Values, y: Values, x: Values, mode: str) -> Values:
    """The image at points between its pixels, linearly."""
    places = np.stack([y, x])
    channels = np.moveaxis(image, 2, 0)
    return np.stack(
        [ndimage.map_coordinates(c, places, order=1, mode=mode) for c in channels], axis=2
    )


def _picture(image: Values) -> Any:
    """An image as Pillow has it; the values are whole levels."""
    pixels = np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if image.shape[2] == 1 else pixels)


def _values(picture: Any, image: Values) -> Values:
    return (np.asarray(picture) / 255.0).reshape(image.shape)


def pixelate(image: Values, severity: int, random: np.random.Generator) -> Values:
    """Mean of boxes down to c of each side, and up again the same way."""
    (share,) = _constants("pixelate", severity, image)
    height, width = image.shape[:2]
    small = _picture(image).resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return _values(small.resize((width, height), Image.Resampling.BOX), image)


def jpeg_compression(image: Values, severity: int, random: np.random.Generator) -> Values:
    """JPEG of quality c, written and read by Pillow."""
    (quality,) = _constants("jpeg_compression", severity, image)
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=int(quality))
    with Image.open(file) as read:
        return _values(read, image)


def saturate(image: Values, severity: int, random: np.random.Generator) -> Values:
    """``c0 s + c1`` for the saturation s of HSV, in [0, 1]; hue and value stay."""
    factor, added = _constants("saturate", severity, image)
    value: Values = image.max(axis=2, keepdims=True)
    spread: Values = value - image.min(axis=2, keepdims=True)
    saturation = spread / np.where(value > 0, value, 1)
    wanted = np.clip(saturation * factor + added, 0, 1)
    # value - x grows with the saturation; a grey pixel has no hue, which counts as that of red.
    below = (value - image) / np.where(spread > 0, spread, 1)
    red = np.array([0.0, 1.0, 1.0])
    return value - value * wanted * np.where(spread > 0, below, red)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, "noise"),
    "shot_noise": Corruption(shot_noise, "noise"),
    "impulse_noise": Corruption(impulse_noise, "noise"),
    "speckle_noise": Corruption(speckle_noise, "noise", extra=True),
    "defocus_blur": Corruption(defocus_blur, "blur"),
    "glass_blur": Corruption(glass_blur, "blur"),
    "motion_blur": Corruption(motion_blur, "blur"),
    "zoom_blur": Corruption(zoom_blur, "blur"),
    "gaussian_blur": Corruption(gaussian_blur, "blur", extra=True),
    "snow": Corruption(snow, "weather"),
    "frost": Corruption(frost, "weather"),
    "frost_procedural": Corruption(frost_procedural, "weather"),
    "fog": Corruption(fog, "weather"),
    "brightness": Corruption(brightness, "weather"),
    "spatter": Corruption(spatter, "weather", extra=True),
    "contrast": Corruption(contrast, "digital"),
    "elastic_transform": Corruption(elastic_transform, "digital"),
    "pixelate": Corruption(pixelate, "digital"),
    "jpeg_compression": Corruption(jpeg_compression, "digital"),
    "saturate": Corruption(saturate, "digital", extra=True, grey=False),
}
"""All corruptions in the order of the groups; ``frost_procedural`` stands in for ``frost``."""
