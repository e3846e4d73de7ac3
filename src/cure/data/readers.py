"""Readers: each kind of source as named splits of labels and images not yet decoded."""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cure.config import DataConfig
from cure.data.decode import SUFFIXES, Cell, file_cell, open_image
from cure.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
IMAGE_ARRAYS = ("image", "images", "x", "img", "data")
LABEL_ARRAYS = ("label", "labels", "y")
TEST_SPLITS = ("test", "validation", "val")

_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

# Rows of encoded images held at once while reading.
_ROWS = 1024


@dataclass(frozen=True)
class Table:
    """One split before it is decoded.

    Attributes:
        label: [N] int64, as the source has them.
        classes: name of each class, by label, or None when the source names none.
        cells: the images at some rows; takes ascending rows.
    """

    label: NDArray[np.int64]
    classes: tuple[str, ...] | None
    cells: Callable[[Sequence[int]], Iterable[Cell]]


Splits = Mapping[str, Callable[[], Table]]


def read_digits(config: DataConfig) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    def table() -> Table:
        bunch = load_digits()
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        names = tuple(str(name) for name in bunch.target_names)
        label = bunch.target.astype(np.int64)
        return Table(label, names, partial(_array_cells, pixels, "digits"))

    return {config.train_split: table}


def read_folder(folder: Path, config: DataConfig) -> Splits:
    """A folder of parquet files or of images.

    Raises:
        DataError: it holds neither.
    """
    for place in (folder, folder / "data"):
        files = sorted(place.glob("*.parquet")) if place.is_dir() else []
        if files:
            return _read_parquet(files, config)
    return _read_images(folder, config)


# Images in folders.  The imagefolder builder of `datasets` is not used: it takes path names for
# patterns, guesses splits from any word in a path, and copies what it found into a cache.


def _read_images(folder: Path, config: DataConfig) -> Splits:
    expected = (
        f"expected parquet files or one sub-folder of images a class in '{folder}' "
        f"({folder.name}/class/*.png or {folder.name}/train/class/*.png)"
    )
    if not any(folder.iterdir()):
        raise DataError(f"{expected}, got an empty folder; give another folder")
    known = {config.train_split, config.test_split, "train", *TEST_SPLITS}
    # A class may be called "train" as well; only a split has folders inside.
    splits = [path for path in _folders(folder) if path.name in known and _folders(path)]
    if splits:
        return {path.name: partial(_image_table, path) for path in splits}
    if not any(_images(path) for path in _folders(folder)):
        found = "images outside class folders" if _images(folder) else "no images"
        raise DataError(f"{expected}, got {found}; arrange the files that way")
    return {config.train_split: partial(_image_table, folder)}


def _image_table(folder: Path) -> Table:
    classes = _folders(folder)
    files = [_images(path) for path in classes]
    empty = [path.name for path, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise DataError(
            f"expected images in every class folder of '{folder}', got none in "
            f"{_listing(empty)}; fill or remove it"
        )
    # The first image of each class, then the second of each: the order of a folder is ours to
    # choose, and this one lets data.limit keep every class.
    dealt = [
        (path, label)
        for turn in zip_longest(*files)
        for label, path in enumerate(turn)
        if path is not None
    ]

    def cells(rows: Sequence[int]) -> Iterator[Cell]:
        return (file_cell(dealt[row][0]) for row in rows)

    label = np.array([label for _, label in dealt], dtype=np.int64)
    return Table(label, tuple(path.name for path in classes), cells)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


# Tables of encoded images: parquet files and the hub.


def _read_parquet(files: Sequence[Path], config: DataConfig) -> Splits:
    by_split: dict[str, list[Path]] = {}
    for path in files:
        # train-00000-of-00002.parquet and train.parquet both belong to "train".
        split = re.sub(r"-\d.*$", "", path.stem)
        by_split.setdefault(split, []).append(path)
    return {
        split: partial(_parquet_table, split, paths, config) for split, paths in by_split.items()
    }


def _parquet_table(split: str, files: Sequence[Path], config: DataConfig) -> Table:
    import datasets
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    def opened(path: Path) -> Any:
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"expected a parquet file in '{path}', which cannot be read "
                f"({_first_line(error)}); copy it again"
            ) from error

    def batches(column: str) -> Iterator[Any]:
        for path in files:
            with opened(path) as file:
                if column not in file.schema_arrow.names:
                    raise DataError(
                        f"expected the columns of '{files[0].name}' in every file of split "
                        f"'{split}', but '{path}' has no '{column}'; remove or mend that file"
                    )
                try:
                    for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                        yield batch.column(0)
                except (pyarrow.ArrowException, OSError) as error:
                    raise DataError(
                        f"the parquet file '{path}' is damaged ({_first_line(error)}); copy it "
                        "again"
                    ) from error

    with opened(files[0]) as file:
        schema = file.schema_arrow
    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"the column types that '{files[0]}' declares for Hugging Face datasets cannot be used "
            f"({_first_line(error)}); write the file again"
        ) from error
    where = f"split '{split}' of '{files[0].parent}'"
    return _arrow_table(features, schema, batches, where, split, config)


def read_hub(name: str, subset: str | None, config: DataConfig, otherwise: str) -> Splits:
    """A data set of the Hugging Face hub, through its ordinary cache.

    Args:
        name: ``owner/name``.
        subset: the configuration of the data set, or None for its only one.
        config: column names.
        otherwise: what to do without a network, for the error.

    Raises:
        DataError: it cannot be had.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, subset)
    # What goes wrong inside is raised as the errors of four libraries with no common base.
    except Exception as error:
        raise DataError(
            f"expected the data set '{name}' from the Hugging Face hub, which could not be had "
            f"({type(error).__name__}: {_first_line(error)}); {otherwise}"
        ) from error
    return {split: partial(_hub_table, name, split, found[split], config) for split in found}


def _hub_table(name: str, split: str, dataset: Any, config: DataConfig) -> Table:
    import datasets

    features = dataset.features

    def batches(column: str) -> Iterator[Any]:
        part = dataset.select_columns([column])
        if isinstance(features[column], datasets.Image):
            part = part.cast_column(column, datasets.Image(decode=False))
        for table in part.with_format("arrow").iter(batch_size=_ROWS):
            yield table.column(0).combine_chunks()

    where = f"split '{split}' of '{name}'"
    return _arrow_table(features, features.arrow_schema, batches, where, split, config)


def _arrow_table(
    features: Any,
    schema: Any,
    batches: Callable[[str], Iterator[Any]],
    where: str,
    split: str,
    config: DataConfig,
) -> Table:
    """A table of which ``batches(column)`` gives the arrow arrays of a column in order."""
    import datasets
    import pyarrow

    columns: list[str] = schema.names
    holds_images = [c for c in columns if _is_encoded(schema.field(c).type)]
    class_labels = [c for c in columns if isinstance(features[c], datasets.ClassLabel)]
    integers = [c for c in columns if pyarrow.types.is_integer(schema.field(c).type)]
    image = _choose("image", config.image_column, IMAGE_COLUMNS, [holds_images], columns, where)
    label = _choose(
        "label", config.label_column, LABEL_COLUMNS, [class_labels, integers], columns, where
    )
    if image not in holds_images:
        raise DataError(
            f"expected encoded images (bytes) in column '{image}' of {where}, got "
            f"{schema.field(image).type}; set data.image_column to one of {_listing(columns)}"
        )
    if label not in integers:
        raise DataError(
            f"expected whole numbers in column '{label}' of {where}, got "
            f"{schema.field(label).type}; set data.label_column to one of {_listing(columns)}, or "
            "number the classes"
        )

    def cells(rows: Sequence[int]) -> Iterator[Cell]:
        wanted = iter(rows)
        row = next(wanted, None)
        start = 0
        for array in batches(image):
            stop = start + len(array)
            while row is not None and row < stop:
                yield _encoded_cell(array[row - start].as_py(), f"row {row} of {split}")
                row = next(wanted, None)
            if row is None:
                return
            start = stop

    arrays = []
    read = 0
    for array in batches(label):
        if array.null_count:
            missing = read + array.is_null().to_pylist().index(True)
            raise DataError(
                f"expected a label in every row of {where}, got none in row {missing} of column "
                f"'{label}'; remove the row or choose another data.label_column"
            )
        arrays.append(array.to_numpy(zero_copy_only=False).astype(np.int64))
        read += len(array)
    names = tuple(features[label].names) if label in class_labels else None
    return Table(np.concatenate(arrays or [np.empty(0, np.int64)]), names, cells)


def _is_encoded(kind: Any) -> bool:
    """Whether an arrow type is that of encoded images: bytes, or a struct that has ``bytes``."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _encoded_cell(value: Any, name: str) -> Cell:
    content, path = (value, None) if not isinstance(value, dict) else _bytes_and_path(value)
    if path:
        name = f"{name} ('{os.path.basename(path)}')"

    def opened() -> Any:
        if content is not None:
            return open_image(io.BytesIO(content))
        if path:
            # Hub data sets made of plain files have the path of the cached file alone.
            return open_image(path)
        raise ValueError("the row holds no image")

    return Cell(opened, name)


def _bytes_and_path(value: Mapping[str, Any]) -> tuple[bytes | None, str | None]:
    return value.get("bytes"), value.get("path")


def _choose(
    kind: str,
    given: str | None,
    usual: Sequence[str],
    candidates: Sequence[Sequence[str]],
    columns: Sequence[str],
    where: str,
) -> str:
    """The column that was given, else a usual one, else the only candidate of the first kind."""
    if given is not None:
        if given in columns:
            return given
        raise DataError(
            f"expected column '{given}' (data.{kind}_column) in {where}, which has the columns "
            f"{_listing(columns)}; name one of those"
        )
    for name in usual:
        if name in columns:
            return name
    for found in candidates:
        if len(found) == 1:
            return found[0]
    raise DataError(
        f"expected a column '{usual[0]}' in {where}, which has the columns {_listing(columns)}; "
        f"set data.{kind}_column to the one with the {kind}s"
    )


# Arrays.


def read_npz(path: Path, config: DataConfig) -> Splits:
    """The arrays of a ``.npz`` file, by name: ``image``/``label``, ``x_train``/``y_train``, ...

    Raises:
        DataError: the file cannot be read without pickle, or has no images and labels by name.
    """
    images = (config.image_column.lower(),) if config.image_column else IMAGE_ARRAYS
    labels = (config.label_column.lower(),) if config.label_column else LABEL_ARRAYS
    with _open_npz(path) as file:
        names = list(file.files)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for kind, bases in (("image", images), ("label", labels)):
            split = _npz_split(name.lower(), bases)
            if split is not None:
                found.setdefault(split or config.train_split, {}).setdefault(kind, name)
    splits = {split: pair for split, pair in found.items() if len(pair) == 2}
    if not splits:
        raise DataError(
            f"expected arrays 'image' and 'label' (or x_train, y_train, x_test, y_test) in "
            f"'{path}', got {_listing(names) or 'none'}; rename them or set data.image_column "
            "and data.label_column"
        )
    return {
        split: partial(_npz_table, path, split, pair["image"], pair["label"])
        for split, pair in splits.items()
    }


def _npz_split(name: str, bases: Sequence[str]) -> str | None:
    """Which split an array belongs to: "" when its name says none, None when it is none of ours."""
    for base in bases:
        if name == base:
            return ""
        if name.endswith(f"_{base}"):
            return name.removesuffix(f"_{base}")
        if name.startswith(f"{base}_"):
            return name.removeprefix(f"{base}_")
    return None


def _npz_table(path: Path, split: str, image: str, label: str) -> Table:
    with _open_npz(path) as file:
        pixels, labels = _array(file, image, path), _array(file, label, path)
    pixels = _as_nhwc(_as_uint8(pixels, image, path), image, path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"expected whole numbers, one a image, in array '{label}' of '{path}', got "
            f"{labels.dtype} of shape {labels.shape}; store class numbers, not names or one-hot "
            "rows"
        )
    if len(labels) != len(pixels):
        raise DataError(
            f"expected as many labels as images in '{path}', got {len(pixels)} images in "
            f"'{image}' and {len(labels)} labels in '{label}'; store one label an image"
        )
    return Table(labels.astype(np.int64), None, partial(_array_cells, pixels, split))


def _open_npz(path: Path) -> Any:
    try:
        file = np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise DataError(
            f"expected a .npz file in '{path}', which cannot be read ({_first_line(error)}); write "
            "it with numpy.savez"
        ) from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise DataError(
            f"expected a .npz file in '{path}', got a single array; write images and labels with "
            "numpy.savez"
        )
    return file


def _array(file: Any, name: str, path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = file[name]
    except _DAMAGED as error:
        raise DataError(
            f"array '{name}' of '{path}' cannot be read ({_first_line(error)}); expected plain "
            "numbers of one shape: write it again as such"
        ) from error
    return array


def _as_uint8(pixels: NDArray[Any], name: str, path: Path) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    expected = f"expected uint8 (0..255) or floats k/255 in [0, 1] in array '{name}' of '{path}'"
    if pixels.dtype.kind != "f":
        raise DataError(f"{expected}, got {pixels.dtype}; convert it with .astype('uint8')")
    result = np.empty(pixels.shape, dtype=np.uint8)
    for start in range(0, len(pixels), _ROWS):
        scaled = pixels[start : start + _ROWS].astype(np.float64) * 255
        # Written so that a NaN, for which every comparison fails, is refused as well.
        if not ((scaled >= -1e-3) & (scaled <= 255 + 1e-3)).all():
            low, high = float(pixels.min()), float(pixels.max())
            raise DataError(
                f"{expected}, got floats from {low:g} to {high:g}, outside [0, 1]; undo the "
                "normalisation or store uint8"
            )
        levels = np.rint(scaled)
        if np.abs(scaled - levels).max(initial=0) > 1e-3:
            raise DataError(
                f"{expected}, got floats between the 256 levels, which uint8 would change; round "
                "them to uint8 yourself if that is meant"
            )
        result[start : start + _ROWS] = levels.astype(np.uint8)
    return result


def _as_nhwc(pixels: NDArray[np.uint8], name: str, path: Path) -> NDArray[np.uint8]:
    if pixels.ndim == 3:
        return pixels
    last = pixels.ndim == 4 and pixels.shape[3] in (1, 3)
    first = pixels.ndim == 4 and pixels.shape[1] in (1, 3)
    if last == first:
        raise DataError(
            f"expected an array [N, H, W], [N, H, W, C] or [N, C, H, W] with C of 1 or 3 in "
            f"'{name}' of '{path}', got shape {pixels.shape}"
            f"{', which could be either of the last two' if last else ''}; reshape it"
        )
    nhwc = pixels if last else pixels.transpose(0, 2, 3, 1)
    return nhwc[..., 0] if nhwc.shape[3] == 1 else nhwc


def _array_cells(pixels: NDArray[np.uint8], split: str, rows: Sequence[int]) -> Iterator[Cell]:
    for row in rows:
        one = np.ascontiguousarray(pixels[row])
        yield Cell(partial(Image.fromarray, one), f"row {row} of {split}")


def _listing(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
