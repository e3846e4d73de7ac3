"""Readers: each kind of source as named splits of labels and images not yet decoded."""

from __future__ import annotations

import io
import os
import re
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cure.config import DataConfig
from cure.data.decode import EncodedImage, open_image
from cure.data.images import Skipped
from cure.errors import DataError
from cure.utils.io import first_line

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = (
    *("label", "labels", "fine_label", "class", "class_name", "category", "target", "species"),
    *("breed", "class_id", "y"),
)
IMAGE_ARRAYS = ("image", "images", "x", "img", "data")
LABEL_ARRAYS = ("label", "labels", "y")
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "testing")
VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "eval")
SPLIT_NAMES = frozenset((*TRAIN_SPLITS, *TEST_SPLITS, *VALIDATION_SPLITS))

UNLABELLED = -1
"""Label of an extra image that has none."""

_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)

# Rows of encoded images held at once while reading.
_ROWS = 256


def composed(name: str) -> str:
    """A name with composed characters, as most systems write it; macOS writes é as two.

    >>> composed("e\u0301") == "\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name)


def split_names(config: DataConfig) -> frozenset[str]:
    """Names of splits, in lower case, that are looked for."""
    named = (config.train_split, config.test_split, config.validation_split)
    return SPLIT_NAMES | {name.lower() for name in named if name is not None}


@dataclass(frozen=True)
class ImageTable:
    """One split before it is decoded.

    Attributes:
        label: [N] int64, as the source has them.
        classes: name of each class, by label, or None when the source names none.
        cells: the images at some rows; takes ascending rows.
        any_order: ``cells`` takes rows in any order, and a single row costs little.
        skipped: files that were left out.
        notes: sentences for the user, such as the order of classes.
    """

    label: NDArray[np.int64]
    classes: tuple[str, ...] | None
    cells: Callable[[Sequence[int]], Iterable[EncodedImage]]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    any_order: bool = False


Splits = Mapping[str, Callable[[], ImageTable]]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in order: by number where all are numbers, else as text.

    >>> in_order(["10", "9", "0"]), in_order(["b", "10", "9"])
    (('0', '9', '10'), ('10', '9', 'b'))
    """
    distinct = sorted(set(names))
    try:
        numbers = {name: float(name) for name in distinct}
    except ValueError:
        return tuple(distinct)
    if not np.isfinite(list(numbers.values())).all():
        return tuple(distinct)
    return tuple(sorted(distinct, key=lambda name: (numbers[name], name)))


def order_notes(classes: Sequence[str]) -> tuple[str, ...]:
    """Says where the order of numbers is not that of version 0.1."""
    if list(classes) == sorted(classes):
        return ()
    return (
        f"the classes {', '.join(map(repr, classes[:3]))}, ... are numbers and stand in the order "
        "of numbers; version 0.1 sorted them as text",
    )


def named_labels(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels of images whose class names are given, and the classes in order."""
    classes = in_order(names)
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[name] for name in names], dtype=np.int64), classes


def read_digits(config: DataConfig) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    def table() -> ImageTable:
        bunch = load_digits()
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        names = tuple(str(name) for name in bunch.target_names)
        label = bunch.target.astype(np.int64)
        return ImageTable(label, names, partial(array_cells, pixels, "digits"), any_order=True)

    return {config.train_split: table}


# Tables of encoded images: parquet files and the hub.


def find_parquet(folder: Path) -> list[Path]:
    """The parquet files of a folder: its own, or those in ``data/``."""
    return next(filter(None, (sorted(p.glob("*.parquet")) for p in (folder, folder / "data"))), [])


def find_parquet_below(folder: Path) -> list[Path]:
    """The parquet files anywhere below a folder.

    Raises:
        DataError: they lie in several folders that are no splits.
    """
    files = sorted(p for p in folder.rglob("*.parquet") if not p.name.startswith("."))
    places = list(dict.fromkeys(path.parent for path in files))
    if len(places) > 1 and not all(map(_split_of_folder, places)):
        names = listing([str(place.relative_to(folder)) for place in places[:5]])
        raise DataError(
            f"expected the parquet files of one data set in '{folder}', got some in {names}; give "
            "one of these folders"
        )
    return files


def hold_images(files: Sequence[Path]) -> bool:
    """Whether a parquet file has a column of encoded images, or cannot be read."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return any(_is_encoded(field.type) for field in pyarrow.parquet.read_schema(files[0]))
    except (pyarrow.ArrowException, OSError):
        return True


def _split_of_folder(folder: Path) -> str | None:
    """The split that a folder is named after (``train``, ``split=train``), if it is."""
    name = folder.name.lower().removeprefix("split=")
    return name if name in SPLIT_NAMES else None


def read_parquet(files: Sequence[Path], config: DataConfig) -> Splits:
    """Parquet files, whose names or folders begin with that of their split."""
    by_split: dict[str, list[Path]] = {}
    for path in files:
        # train-00000-of-00002.parquet and train.parquet both belong to "train".
        named = re.sub(r"-\d.*$", "", path.stem)
        whole = None if named.lower() in SPLIT_NAMES else _split_of_folder(path.parent)
        by_split.setdefault(whole or named, []).append(path)
    return {
        split: partial(_parquet_table, split, paths, config) for split, paths in by_split.items()
    }


def _parquet_table(split: str, files: Sequence[Path], config: DataConfig) -> ImageTable:
    import datasets
    import pyarrow
    import pyarrow.parquet

    def opened(path: Path) -> Any:
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"expected a parquet file in '{path}', which cannot be read "
                f"({first_line(error)}); copy it again"
            ) from error

    def batches(column: str) -> Iterator[Any]:
        for path in files:
            with opened(path) as file:
                if column not in file.schema_arrow.names:
                    raise DataError(
                        f"expected the columns of '{files[0].name}' in every file of split "
                        f"'{split}', but '{path}' has no '{column}'; remove or correct that file"
                    )
                try:
                    for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                        yield batch.column(0)
                except (pyarrow.ArrowException, OSError) as error:
                    raise DataError(
                        f"the parquet file '{path}' is damaged ({first_line(error)}); copy it again"
                    ) from error

    with opened(files[0]) as file:
        schema = file.schema_arrow
    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"the column types that '{files[0]}' declares for Hugging Face datasets cannot be used "
            f"({first_line(error)}); write the file again"
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
            f"({type(error).__name__}: {first_line(error)}); {otherwise}"
        ) from error
    return {split: partial(dataset_table, name, split, found[split], config) for split in found}


def dataset_table(name: str, split: str, dataset: Any, config: DataConfig) -> ImageTable:
    """A split of Hugging Face ``datasets``."""
    import datasets

    features = dataset.features

    def batches(column: str) -> Iterator[Any]:
        part = dataset.select_columns([column])
        if isinstance(features[column], datasets.Image):
            part = part.cast_column(column, datasets.Image(decode=False))
        for table in part.with_format("arrow").iter(batch_size=_ROWS):
            yield table.column(0).combine_chunks()

    where = f"split '{split}' of '{name}'"
    table = _arrow_table(features, features.arrow_schema, batches, where, split, config)
    if dataset.format["type"] == "custom":
        note = "its transform (set_transform, with_transform) is not applied"
        table = replace(table, notes=(*table.notes, note))
    return table


def _arrow_table(
    features: Any,
    schema: Any,
    batches: Callable[[str], Iterator[Any]],
    where: str,
    split: str,
    config: DataConfig,
) -> ImageTable:
    """A table of which ``batches(column)`` gives the arrow arrays of a column in order."""
    import datasets
    import pyarrow

    columns: list[str] = schema.names
    holds_images = [c for c in columns if _is_encoded(schema.field(c).type)]
    class_labels = [c for c in columns if isinstance(features[c], datasets.ClassLabel)]
    integers = [c for c in columns if pyarrow.types.is_integer(schema.field(c).type)]
    texts = [c for c in columns if _is_text(schema.field(c).type)]
    image = _choose("image", config.image_column, IMAGE_COLUMNS, [holds_images], columns, where)
    others = [c for c in columns if c not in holds_images]
    only = [c for c in others if len(others) == 1 and c in (*integers, *texts)]
    label = _choose(
        "label", config.label_column, LABEL_COLUMNS, [class_labels, only], columns, where
    )
    guessed = config.label_column is None and label in only and label not in LABEL_COLUMNS
    if image not in holds_images:
        raise DataError(
            f"expected encoded images (bytes) in column '{image}' of {where}, got "
            f"{schema.field(image).type}; set data.image_column to one of {listing(columns)}"
        )
    kind = schema.field(label).type
    # Tables written from data frames often hold whole numbers as floats.
    numbers = pyarrow.types.is_boolean(kind) or pyarrow.types.is_floating(kind)
    if label not in integers and label not in texts and not numbers:
        raise DataError(
            f"expected whole numbers or class names in column '{label}' of {where}, got "
            f"{kind}; set data.label_column to one of {listing(columns)}, or number the classes"
        )

    def cells(rows: Sequence[int]) -> Iterator[EncodedImage]:
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

    arrays: list[Any] = []
    read = 0
    for array in batches(label):
        if array.null_count:
            missing = read + array.is_null().to_pylist().index(True)
            raise DataError(
                f"expected a label in every row of {where}, got none in row {missing} of column "
                f"'{label}'; remove the row or choose another data.label_column"
            )
        arrays.append(array)
        read += len(array)
    notes = (f"labels are the column '{label}'",) if guessed else ()
    if guessed and not labels_repeat(str(v) for array in arrays for v in array.to_pylist()):
        raise DataError(
            f"expected a column of labels in {where}, which has the columns {listing(columns)}, "
            f"got nearly as many values as rows in '{label}'; set data.label_column to the one "
            "with the labels"
        )
    if label in texts:
        values = [str(value) for array in arrays for value in array.to_pylist()]
        named, classes = named_labels(values)
        return ImageTable(named, classes, cells, notes=(*notes, *order_notes(classes)))
    given = [array.to_numpy(zero_copy_only=False) for array in arrays]
    found = np.concatenate(given or [np.empty(0, np.int64)])
    whole = found.astype(np.int64)
    if (broken := np.flatnonzero(whole != found)).size:
        raise DataError(
            f"expected whole numbers or class names in column '{label}' of {where}, got "
            f"{kind} with {found[broken[0]]:g} in row {broken[0]}; set data.label_column to "
            "another column, or number the classes"
        )
    names = tuple(features[label].names) if label in class_labels else None
    return ImageTable(whole, names, cells, notes=notes)


def labels_repeat(labels: Iterable[str]) -> bool:
    """Whether labels are of classes: two rows or more for each, on average."""
    counts = Counter(labels)
    return 2 * len(counts) <= counts.total()


def _is_text(kind: Any) -> bool:
    """Whether an arrow type is that of text."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _is_encoded(kind: Any) -> bool:
    """Whether an arrow type is that of encoded images: bytes, or a struct that has ``bytes``."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _encoded_cell(value: Any, name: str) -> EncodedImage:
    content, path = (value, None) if not isinstance(value, dict) else _bytes_and_path(value)
    if path:
        name = f"{name} ('{os.path.basename(path)}')"

    def encoded() -> bytes:
        if content is not None:
            return content
        if path:
            # Hub data sets made of plain files have the path of the cached file alone.
            return Path(path).read_bytes()
        raise ValueError("the row holds no image")

    return encoded_cell(encoded, name)


def encoded_cell(content: Callable[[], bytes], name: str) -> EncodedImage:
    """The cell of an image of which ``content`` gives the encoded bytes."""
    return EncodedImage(lambda: open_image(io.BytesIO(content())), name, content)


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
            f"{listing(columns)}; name one of those"
        )
    for name in usual:
        if name in columns:
            return name
    for found in candidates:
        if len(found) == 1:
            return found[0]
    raise DataError(
        f"expected a column '{usual[0]}' in {where}, which has the columns {listing(columns)}; "
        f"set data.{kind}_column to the one with the {kind}s"
    )


# Arrays.


def read_npz(path: Path, config: DataConfig, unlabelled: bool = False) -> Splits:
    """The arrays of a ``.npz`` file, by name: ``image``/``label``, ``x_train``/``y_train``, ...

    Args:
        path: the file.
        config: names of arrays.
        unlabelled: whether images may have no labels; these are :data:`UNLABELLED` then.

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
    splits = {
        split: pair
        for split, pair in found.items()
        if "image" in pair and (unlabelled or "label" in pair)
    }
    if not splits:
        raise DataError(
            f"expected arrays 'image' and 'label' (or x_train, y_train, x_test, y_test) in "
            f"'{path}', got {listing(names) or 'none'}; rename them or set data.image_column "
            "and data.label_column"
        )
    return {
        split: partial(_npz_table, path, split, pair["image"], pair.get("label"))
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
        for rest in (name.removesuffix(base), name.removeprefix(base)):
            if rest in SPLIT_NAMES:
                return rest
    return None


def _npz_table(path: Path, split: str, image: str, label: str | None) -> ImageTable:
    with _open_npz(path) as file:
        pixels = _array(file, image, path)
        none = np.full(len(pixels), UNLABELLED)
        labels: NDArray[Any] = none if label is None else _array(file, label, path)
    pixels = _as_nhwc(_as_uint8(pixels, image, path), image, path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iuU" or labels.ndim != 1:
        raise DataError(
            f"expected whole numbers or class names, one an image, in array '{label}' of '{path}', "
            f"got {labels.dtype} of shape {labels.shape}; store class numbers, not one-hot rows"
        )
    if len(labels) != len(pixels):
        raise DataError(
            f"expected as many labels as images in '{path}', got {len(pixels)} images in "
            f"'{image}' and {len(labels)} labels in '{label}'; store one label an image"
        )
    cells = partial(array_cells, pixels, split)
    if labels.dtype.kind == "U":
        numbers, classes = named_labels(labels.tolist())
        return ImageTable(numbers, classes, cells, notes=order_notes(classes), any_order=True)
    return ImageTable(labels.astype(np.int64), None, cells, any_order=True)


def _open_npz(path: Path) -> Any:
    try:
        file = np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise DataError(
            f"expected a .npz file in '{path}', which cannot be read ({first_line(error)}); write "
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
            f"array '{name}' of '{path}' cannot be read ({first_line(error)}); expected plain "
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


def array_cells(
    pixels: NDArray[np.uint8], split: str, rows: Sequence[int]
) -> Iterator[EncodedImage]:
    """The cells of some rows of an array [N, H, W] or [N, H, W, C]."""
    for row in rows:
        one = np.ascontiguousarray(pixels[row])
        content = partial(_array_content, one)
        yield EncodedImage(partial(Image.fromarray, one), f"row {row} of {split}", content)


def _array_content(pixels: NDArray[np.uint8]) -> bytes:
    return repr(pixels.shape).encode() + pixels.tobytes()


def listing(names: Iterable[str]) -> str:
    """Names in quotes."""
    return ", ".join(f"'{name}'" for name in names)
