"""Encoded images to one uint8 tensor: opened, converted, resized and compared, once."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from cure.config import DataConfig
from cure.data.images import Findings
from cure.data.lazy import THREADS, LazyImages
from cure.errors import DataError

Color = Literal["keep", "rgb", "grey"]
Pixels = NDArray[np.uint8]

# Formats of one picture; this keeps Pillow from handing a file to Ghostscript, and saves time: not
# every plugin is tried on each of 50,000 images.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "DIB", "JPEG2000", "AVIF", "HEIF"),
    *("ICO", "ICNS", "PCX", "SGI", "QOI", "PSD", "DDS"),
)
SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo", ".webp", ".bmp", ".dib"),
        *(".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga"),
    )
)
HEIC_SUFFIXES = frozenset([".heic", ".heif", ".hif"])
HEIC_ADVICE = "pip install pillow-heif"

# The start of a file identifies these formats: a file that has it is an image, or was one.
_MAGIC = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF")
_HEIC_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])
_GREY_MODES = frozenset(["1", "L", "LA", "La"])
_ALPHA_MODES = frozenset(["RGBA", "RGBa", "LA", "La", "PA"])
_WIDE_MODES = frozenset(["I", "F"])
_TOO_WIDE = "it has more than 8 bits a channel; convert it to an 8-bit PNG, scaled as you see fit"
_ORIENTATION = 0x0112
_MOVING = "cure: several pictures"
_CHUNK = 32
_NAMED = 10
_NUMBER = re.compile(r"-?\d[\d.e+-]*")


@dataclass(frozen=True)
class EncodedImage:
    """One image before it is decoded.

    Attributes:
        open: returns the Pillow image; may raise what Pillow raises.
        name: what an error calls the image, for example ``row 3 of train ('a.png')``.
        content: the bytes that decide what ``open`` returns; None for Python objects.
    """

    open: Callable[[], Any]
    name: str
    content: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Treatment:
    """What is done to every image: the settings of the same names in the ``data`` section."""

    color: Color = "keep"
    resize: int | None = None
    fit: Literal["stretch", "crop"] = "stretch"
    background: str = "white"

    @classmethod
    def of(cls, config: DataConfig) -> Treatment:
        """The settings of a recipe."""
        return cls(config.color, config.resize, config.fit, config.background)

    @property
    def nothing(self) -> bool:
        """Whether opaque images of one kind and size come out as they went in."""
        return self.color == "keep" and self.resize is None


@dataclass(frozen=True)
class Failure:
    """An image that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Decoded:
    """Images of one split.

    Attributes:
        image: [n, C, H, W] uint8, those that could be read.
        kept: [n] int64, their positions among all.
        findings: sizes and conversions.
        failures: those that could not be read.
        lazy: where they are when they are not in memory; ``image`` has no values then.
    """

    image: Tensor
    kept: NDArray[np.int64]
    findings: Findings
    failures: tuple[Failure, ...]
    lazy: LazyImages | None = None


class Sink(Protocol):
    """Where decoded images go, one after the other."""

    def begin(self, count: int, shape: tuple[int, int, int]) -> None:
        """Make room for ``count`` images of shape (H, W, C)."""

    def widen(self, images: int, channels: int) -> None:
        """Make the first ``images``, which are grey, images of so many equal channels."""

    def put(self, place: int, pixels: Pixels) -> None:
        """Take image number ``place``, [H, W, C]."""


class MemorySink:
    """Decoded images in one array [N, H, W, C]."""

    def __init__(self) -> None:
        self.pixels: Pixels = np.empty((0, 0, 0, 1), dtype=np.uint8)

    def begin(self, count: int, shape: tuple[int, int, int]) -> None:
        """See :class:`Sink`."""
        self.pixels = np.empty((count, *shape), dtype=np.uint8)

    def widen(self, images: int, channels: int) -> None:  # noqa: ARG002
        """See :class:`Sink`."""
        self.pixels = np.repeat(self.pixels, channels, axis=3)

    def put(self, place: int, pixels: Pixels) -> None:
        """See :class:`Sink`."""
        self.pixels[place] = pixels


@dataclass(frozen=True)
class Picture:
    """A decoded image [H, W, C], its size (height, width) as it was, and what was converted."""

    pixels: Pixels
    size: tuple[int, int]
    converted: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.pixels.shape
        return height, width, channels


@cache
def formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this Pillow opens; HEIF where pillow_heif is installed."""
    Image.init()
    try:
        import pillow_heif  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: Any, more: Sequence[str] = ()) -> Any:
    """A Pillow image from a path or binary file, upright as its EXIF data says.

    Args:
        file: path or binary file.
        more: formats to try besides :func:`formats`.

    Raises:
        ValueError: its pixels have more than 8 bits a channel.
        OSError: it is not an image, or is damaged.
    """
    try:
        opened = Image.open(file, formats=(*formats(), *more))
    except UnidentifiedImageError:
        if is_heic(_head(file)):
            raise ValueError(f"it is an HEIC image: {HEIC_ADVICE}") from None
        named = ", ".join(formats()[:6])
        raise ValueError(f"it is damaged, or none of {named} and what else is read") from None
    # Entered, Pillow closes a file it opened by name; the pixels are loaded by then.
    with opened as image:
        if image.mode[:1] in _WIDE_MODES or _is_cut(image):
            raise ValueError(_TOO_WIDE)
        # An MPO file holds one picture and its preview.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            image.info[_MOVING] = True
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
        return image


def _is_cut(image: Any) -> bool:
    """Whether Pillow would cut 16-bit RGB to 8 bits without a word.

    The raw mode tells in time; of PPM the largest value beside it.
    """
    tile = getattr(image, "tile", [])
    levels = [one[3][1] for one in tile if image.format == "PPM" and isinstance(one[3], tuple)]
    return ";16" in str(tile) or max(levels, default=0) > 255


def file_kind(path: Path) -> Literal["image", "heic", "other"]:
    """Whether a file is an image: by its suffix, else by its first bytes and Pillow.

    Returns:
        ``heic`` for an HEIC image that cannot be read because pillow_heif is not installed.
    """
    heic: Literal["image", "heic"] = "image" if "HEIF" in formats() else "heic"
    suffix = path.suffix.lower()
    if suffix in HEIC_SUFFIXES:
        return heic
    if suffix in SUFFIXES:
        return "image"
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError:
        return "image"  # Why it cannot be read is said when it is decoded.
    if is_heic(head):
        return heic
    if any(name in formats() and Image.OPEN[name][1](head[:16]) for name in _MAGIC):
        return "image"
    try:
        with warnings.catch_warnings(), Image.open(path, formats=formats()):
            return "image"
    except Exception:  # A plugin may raise anything on bytes that are not its own.
        return "other"


def is_heic(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an HEIC image."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


def _head(file: Any) -> bytes:
    """The first bytes of a path or binary file."""
    if isinstance(file, str | Path):
        with Path(file).open("rb") as opened:
            return opened.read(32)
    file.seek(0)
    head: bytes = file.read(32)
    return head


def _convert(image: Any, treatment: Treatment) -> Picture:
    """A Pillow image as [H, W, C] uint8; C is 1 for grey, else 3."""
    if image.mode[:1] in _WIDE_MODES:  # a Pillow image that was given as it is
        raise ValueError(_TOO_WIDE)
    size = (image.height, image.width)
    converted = []
    if image.info.get(_MOVING):
        converted.append("moving or paged to their first picture")
    opaque = _on_background(image, treatment.background)
    if opaque is not image:
        converted.append(f"transparent to {treatment.background} behind")
        image = opaque
    color = treatment.color
    grey = image.mode in _GREY_MODES if color == "keep" else color == "grey"
    mode = "L" if grey else "RGB"
    if image.mode != mode:
        if (image.mode in _GREY_MODES) != grey:
            converted.append("colour to grey" if grey else "grey to RGB")
        elif image.mode not in ("1", "P", "LA", "La", "RGBA", "RGBa", "PA"):
            converted.append(f"{image.mode} to {mode}")
        # All opaque here; Pillow would warn of it, and threads cannot turn a warning off.
        if "transparency" in image.info:
            image = image.copy()
            del image.info["transparency"]
        if image.mode in ("RGBa", "La"):
            image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
        image = image.convert(mode)
    if treatment.resize is not None:
        image = _resized(image, treatment.resize, treatment.fit)
    pixels: Pixels = np.asarray(image, dtype=np.uint8)
    return Picture(pixels[:, :, None] if grey else pixels, size, tuple(converted))


def _on_background(image: Any, background: str) -> Any:
    """A transparent image on a colour; the same object where every pixel is opaque."""
    if image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return image
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    rgba = (image.convert(straight) if straight else image).convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return image
    color = ImageColor.getrgb(background)[:3]
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (*color, 255)), rgba)
    stays_grey = image.mode in _GREY_MODES and len(set(color)) == 1
    return flat.getchannel("R") if stays_grey else flat.convert("RGB")


def _resized(image: Any, side: int, fit: str) -> Any:
    """An image of ``side`` x ``side`` pixels (bicubic, antialiased)."""
    width, height = image.size
    if fit == "crop" and width != height:
        # As torchvision's Resize and CenterCrop.
        longer = int(side * max(width, height) / min(width, height))
        size = (longer, side) if width > height else (side, longer)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((pixels - side) / 2) for pixels in size)
        return image.crop((left, top, left + side, top + side))
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return image


def decode(cells: Iterable[EncodedImage], count: int, treatment: Treatment) -> Decoded:
    """Decode ``count`` images in a few threads into one tensor.

    Args:
        cells: the images, in order; taken a chunk at a time, so encoded images need not all be
            in memory.
        count: how many there are.
        treatment: what is done to every image.

    Raises:
        DataError: two images differ in size.
    """
    sink = MemorySink()
    decoded = decode_to(sink, cells, count, treatment)
    pixels = sink.pixels[: len(decoded.kept)]
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return replace(decoded, image=image)


def decode_to(
    sink: Sink, cells: Iterable[EncodedImage], count: int, treatment: Treatment
) -> Decoded:
    """:func:`decode` into a sink; the images of the result have no values."""

    def decode_chunk(chunk: list[EncodedImage]) -> list[Picture | Failure]:
        return [decode_one(cell, treatment) for cell in chunk]

    stack = _Stack(count, sink)
    iterator = iter(cells)
    with ThreadPoolExecutor(THREADS) as pool:
        # One round of chunks at a time: pool.map submits all its input at once.
        while chunks := [c for c in (list(islice(iterator, _CHUNK)) for _ in range(THREADS)) if c]:
            for chunk, decoded in zip(chunks, pool.map(decode_chunk, chunks), strict=True):
                for cell, one in zip(chunk, decoded, strict=True):
                    stack.add(cell.name, one)
    if stack.read != count:
        raise DataError(
            f"expected {count} images, read {stack.read}: the file changed while it was read; try "
            "again"
        )
    return stack.result()


class _Stack:
    """Decoded images one behind the other: what they have in common, and what went wrong."""

    def __init__(self, count: int, sink: Sink) -> None:
        self.count, self.sink = count, sink
        self.read = 0
        self.kept: list[int] = []
        self.failures: list[Failure] = []
        self.converted: Counter[str] = Counter()
        self.sizes: set[tuple[int, int]] = set()
        self.shape = (0, 0, 1)
        self.first_name = ""

    def add(self, name: str, one: Picture | Failure) -> None:
        position, place = self.read, len(self.kept)
        self.read += 1
        if isinstance(one, Failure):
            self.failures.append(one)
            return
        if not place:
            self.shape, self.first_name = one.shape, name
            self.sink.begin(self.count, self.shape)
        height, width, channels = self.shape
        if one.shape[:2] != (height, width):
            raise DataError(
                f"expected images of one size, but {self.first_name} is {width}x{height} and "
                f"{name} is {one.shape[1]}x{one.shape[0]} pixels; "
                f"{set_side(min(height, width))}"
            )
        theirs = one.shape[2]
        if theirs > channels:
            self.sink.widen(place, theirs)
            self.shape = one.shape
            self.converted["grey to RGB"] += place
        elif theirs < channels:
            self.converted["grey to RGB"] += 1
        self.sink.put(place, one.pixels)
        self.kept.append(position)
        self.sizes.add(one.size)
        self.converted.update(one.converted)

    def result(self) -> Decoded:
        height, width, channels = self.shape
        image = torch.empty(
            (len(self.kept), channels, height, width), dtype=torch.uint8, device="meta"
        )
        sizes = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        ends = (sizes[0], sizes[-1]) if sizes else None
        findings = Findings(ends, dict(self.converted))
        return Decoded(image, np.array(self.kept, dtype=np.int64), findings, tuple(self.failures))


def damaged(cells: Iterable[EncodedImage]) -> list[Failure]:
    """The images that cannot be read."""
    return [one for cell in cells if isinstance(one := decode_one(cell, Treatment()), Failure)]


def file_cell(path: Path) -> EncodedImage:
    """The cell of an image file."""
    # TGA has no mark of its own: any file might be one.
    more = ("TGA",) if path.suffix.lower() == ".tga" else ()
    return EncodedImage(lambda: open_image(path, more), f"'{path}'", path.read_bytes)


def set_side(side: int) -> str:
    """What to do about images of several sizes."""
    return (
        f"set data.resize={side} (of an evaluation --data-option resize={side}) or another side in "
        "pixels"
    )


def failures_text(failures: Sequence[Failure]) -> str:
    """The sentence for images that cannot be used."""
    if len(failures) == 1:
        one = failures[0]
        return (
            f"image {one.name} cannot be used: {one.reason}; repair it or take it out, or set "
            "data.damaged=skip"
        )
    alike = dict[str, list[Failure]]()
    for one in failures[:_NAMED]:
        alike.setdefault(_NUMBER.sub("", one.reason), []).append(one)
    named = "; ".join(
        f"{one.name}: {one.reason}"
        + (f"; likewise {', '.join(other.name for other in others)}" if others else "")
        for one, *others in alike.values()
    )
    more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    return (
        f"{len(failures)} images cannot be used ({named}{more}); repair them or take them out, or "
        "set data.damaged=skip"
    )


def decode_one(cell: EncodedImage, treatment: Treatment) -> Picture | Failure:
    """One image, or why it cannot be used."""
    try:
        return _convert(cell.open(), treatment)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins have no common error for damaged files.
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Failure(cell.name, text)
