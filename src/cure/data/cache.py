"""Decoded images in memory, in a file, or nowhere: ``data.cache``."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from cure.config import DataConfig
from cure.data.decode import (
    Decoded,
    EncodedImage,
    Failure,
    Pixels,
    Treatment,
    decode,
    decode_one,
    decode_to,
    formats,
)
from cure.data.images import Findings
from cure.data.lazy import LazyImages
from cure.data.readers import ImageTable, encoded_cell
from cure.errors import CheckpointError, DataError
from cure.utils.io import read_json, user_path, write_atomically, write_json

FOLDER = "decoded-images"
"""Name of the folder beside a run."""

SMALL = 256
"""So many images or fewer are always held in memory."""

_FORMAT = "cure-decoded-1"


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def no_words(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class CachePlace:
    """Where decoded images are kept, unless ``data.cache_folder`` says it.

    Attributes:
        folder: the folder; made when it is needed.
        say: receives a line with the size before a file is written.
    """

    folder: Path = Path("runs") / FOLDER
    say: Callable[[str], None] = _print

    @classmethod
    def beside(cls, run: str | Path | None, say: Callable[[str], None] = _print) -> CachePlace:
        """In the folder that holds a run; ``runs`` where it has no name yet."""
        parent = Path("runs") if run is None else user_path(run).absolute().parent
        return cls(parent / FOLDER, say)


def decode_rows(
    table: ImageTable, rows: NDArray[np.int64], config: DataConfig, place: CachePlace
) -> Decoded:
    """The images of some rows, where ``data.cache`` wants them; every one is decoded once here.

    Raises:
        DataError: two images differ in size, or the disk is too small.
        CheckpointError: the file cannot be written.
    """
    treatment = Treatment.of(config)
    if config.cache == "memory" or len(rows) <= SMALL:
        return decode(table.cells(rows.tolist()), len(rows), treatment)
    if config.cache_folder is not None:
        place = replace(place, folder=Path(config.cache_folder).expanduser())
    wanted = _Wanted(table, rows, treatment)
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.folder).close()
    except OSError as error:
        raise DataError(
            f"the folder '{place.folder}' for decoded images cannot be used ({error.strerror}); "
            "name another one with data.cache_folder"
        ) from None
    return _in_file(wanted, place) if config.cache == "disk" else _on_demand(wanted, place)


@dataclass(frozen=True)
class _Wanted:
    """Some rows of a table and what is done to them."""

    table: ImageTable
    rows: NDArray[np.int64]
    treatment: Treatment

    def cells(self) -> Iterable[EncodedImage]:
        return self.table.cells(self.rows.tolist())


# A file of pixels.


def _in_file(wanted: _Wanted, place: CachePlace) -> Decoded:
    """Images in ``KEY.bin``, [n, C, H, W] of uint8, which ``KEY.json`` describes.

    The description is written last: a file without one was cut off and is written again.
    """
    key, names = _key(wanted)
    file, about = place.folder / f"{key}.bin", place.folder / f"{key}.json"
    with _alone(place.folder / f".{key}.lock", file):
        found = _kept(file, about, names)
        if found is not None:
            return found
        decoded = _write(file, wanted, place.say)
        if not len(decoded.kept):
            return decoded
        position = {name: number for number, name in enumerate(names)}
        content = {
            "format": _FORMAT,
            "shape": list(decoded.image.shape),
            "kept": decoded.kept.tolist(),
            "sizes": decoded.findings.sizes,
            "converted": dict(decoded.findings.converted),
            "failures": [[position[one.name], one.reason] for one in decoded.failures],
        }
        write_json(about, content, compact=True)
        return replace(decoded, lazy=_lazy(file, decoded.image.shape))


def _key(wanted: _Wanted) -> tuple[str, list[str]]:
    """A name for the decoded images, from the encoded ones and their treatment; names of cells."""
    total = hashlib.blake2b(digest_size=16)
    # Where more formats are read, images that failed may be read now.
    known = (_FORMAT, PIL.__version__, formats(), asdict(wanted.treatment))
    total.update(repr(known).encode())
    names = []
    for cell in wanted.cells():
        content = _content(cell) or b""
        total.update(len(content).to_bytes(8, "big") + content)
        names.append(cell.name)
    return total.hexdigest(), names


def _content(cell: EncodedImage) -> bytes | None:
    """The encoded image; None where it cannot be read, which is said when it is decoded."""
    assert cell.content is not None, "only sources are cached, not Python objects"
    try:
        return cell.content()
    except MemoryError:
        raise
    except Exception:
        return None


@contextmanager
def _alone(lock: Path, file: Path) -> Iterator[None]:
    """Let one process at a time write a file, and remove what a killed one left.

    Where the file system has no locks, all write files of their own and the last one is kept:
    their contents are equal.
    """
    with lock.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        for left in file.parent.glob(f".{file.name}.*.tmp"):
            with suppress(OSError):
                left.unlink()
        yield


def _kept(file: Path, about: Path, names: Sequence[str]) -> Decoded | None:
    """What an earlier call has written, or None where it is incomplete."""
    if not about.is_file():
        return None
    try:
        content: dict[str, Any] = read_json(about)
        if content["format"] != _FORMAT or file.stat().st_size != np.prod(content["shape"]):
            return None
        ends = content["sizes"]
        sizes = ((ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]))
        failures = tuple(Failure(names[place], reason) for place, reason in content["failures"])
        lazy = _lazy(file, content["shape"])
        kept = np.array(content["kept"], dtype=np.int64)
        findings = Findings(sizes, content["converted"])
        return Decoded(lazy.stand_in(), kept, findings, failures, lazy)
    except (CheckpointError, OSError, KeyError, TypeError, IndexError):
        return None


def _write(file: Path, wanted: _Wanted, say: Callable[[str], None]) -> Decoded:
    found: list[Decoded] = []

    def fill(temporary: Path) -> None:
        with temporary.open("wb+", buffering=0) as opened:
            sink = _FileSink(opened.fileno(), file, say)
            found.append(decode_to(sink, wanted.cells(), len(wanted.rows), wanted.treatment))
            opened.truncate(int(np.prod(found[0].image.shape)))

    write_atomically(file, fill)
    if not len(found[0].kept):
        file.unlink()
    return found[0]


class _FileSink:
    """Decoded images one behind the other in a file, [N, C, H, W]."""

    def __init__(self, descriptor: int, file: Path, say: Callable[[str], None]) -> None:
        self.descriptor, self.file, self.say = descriptor, file, say
        self.count, self.shape = 0, (0, 0, 1)

    def begin(self, count: int, shape: tuple[int, int, int]) -> None:
        """Say the size, and refuse a disk without room."""
        self.count, self.shape = count, shape
        size = count * self._size
        free = shutil.disk_usage(self.file.parent).free
        needed = f"{size / 1e9:.2f} GB for {count:,} decoded images"
        if size > free:
            raise DataError(
                f"expected {needed} in '{self.file.parent}', where {free / 1e9:.2f} GB are free; "
                "name another folder with data.cache_folder, or set data.cache=none"
            )
        self.say(f"data.cache=disk: {needed} in {self.file}")

    def widen(self, images: int, channels: int) -> None:
        """Grey images become RGB, the last one first: nothing is overwritten before it is read."""
        narrow = self._size
        height, width, _ = self.shape
        self.begin(self.count, (height, width, channels))
        for place in reversed(range(images)):
            grey = os.pread(self.descriptor, narrow, place * narrow)
            _write_at(self.descriptor, grey * channels, place * self._size)

    def put(self, place: int, pixels: Pixels) -> None:
        """Write one image."""
        whole = np.broadcast_to(pixels, self.shape).transpose(2, 0, 1)
        _write_at(self.descriptor, whole.tobytes(), place * self._size)

    @property
    def _size(self) -> int:
        return int(np.prod(self.shape))


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _lazy(file: Path, shape: Sequence[int]) -> LazyImages:
    """Images of a file, read one at a time: mapped pages would count as memory of the process."""
    count, channels, height, width = shape
    opened = _Opened(file)

    def read(row: int) -> NDArray[np.uint8]:
        size = channels * height * width
        content = opened.read(size, row * size)
        return np.frombuffer(content, np.uint8).reshape(channels, height, width)

    return LazyImages(read, np.arange(count), (channels, height, width))


class _Opened:
    """A file that is open as long as something reads it, also when its name is removed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, size: int, offset: int) -> bytes:
        """So many bytes at a place."""
        content = os.pread(self.descriptor, size, offset)
        if len(content) != size:
            raise DataError(
                f"the decoded images in '{self.file}' were cut off while they were used; remove "
                "the file and start again"
            )
        return content


# Decoded when needed.


class _NoSink:
    """Drops decoded images: only their shape and what went wrong is wanted."""

    def begin(self, count: int, shape: tuple[int, int, int]) -> None:
        """See :class:`~cure.data.decode.Sink`."""

    def widen(self, images: int, channels: int) -> None:
        """See :class:`~cure.data.decode.Sink`."""

    def put(self, place: int, pixels: Pixels) -> None:
        """See :class:`~cure.data.decode.Sink`."""


def _on_demand(wanted: _Wanted, place: CachePlace) -> Decoded:
    """Images that are decoded each time, after each was tried once."""
    cells, cell_at = wanted.cells(), _looked_up(wanted)
    if not wanted.table.any_order:
        # One row of a parquet file costs as much as a whole group of rows.
        spool = _Spool(place.folder)
        cells, cell_at = spool.taken(cells), spool.cell
    decoded = decode_to(_NoSink(), cells, len(wanted.rows), wanted.treatment)
    _, *shape = decoded.image.shape
    channels, height, width = shape

    def read(row: int) -> NDArray[np.uint8]:
        cell = cell_at(row)
        one = decode_one(cell, wanted.treatment)
        if isinstance(one, Failure):
            raise DataError(
                f"image {one.name} can be read no longer ({one.reason}); data.cache=none needs the "
                "images as they were at the beginning"
            )
        if one.shape[:2] != (height, width) or one.shape[2] > channels:
            raise DataError(
                f"image {cell.name} has another size or other colours than at the beginning; "
                "data.cache=none needs the images as they were"
            )
        return one.pixels.transpose(2, 0, 1)

    return replace(decoded, lazy=LazyImages(read, decoded.kept, (channels, height, width)))


def _looked_up(wanted: _Wanted) -> Callable[[int], EncodedImage]:
    return lambda row: next(iter(wanted.table.cells([int(wanted.rows[row])])))


class _Spool:
    """Encoded images in a file without a name, which ends with the process."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        self.ends = [0]
        self.names: list[str] = []

    def taken(self, cells: Iterable[EncodedImage]) -> Iterator[EncodedImage]:
        """The same cells, once their content is in the file."""
        for cell in cells:
            content = _content(cell) or b""
            _write_at(self.file.fileno(), content, self.ends[-1])
            self.ends.append(self.ends[-1] + len(content))
            self.names.append(cell.name)
            yield cell

    def cell(self, row: int) -> EncodedImage:
        """The cell of an image, from the file."""
        first, end = self.ends[row : row + 2]
        return encoded_cell(
            lambda: os.pread(self.file.fileno(), end - first, first), self.names[row]
        )
