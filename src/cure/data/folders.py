"""Folders: images in class folders, images with a table of labels, and the folders of others.

The imagefolder builder of ``datasets`` is not used: it takes path names for patterns, guesses
splits from any word in a path, and copies what it found into a cache.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from cure.config import DataConfig
from cure.data.decode import EncodedImage, file_cell, file_kind
from cure.data.images import Skipped
from cure.data.labels_file import LabelRow, read_label_files, same_place, unread_tables
from cure.data.original import read_original
from cure.data.readers import (
    TEST_SPLITS,
    TRAIN_SPLITS,
    UNLABELLED,
    VALIDATION_SPLITS,
    ImageTable,
    Splits,
    find_parquet,
    find_parquet_below,
    hold_images,
    in_order,
    listing,
    order_notes,
    read_parquet,
    split_names,
)
from cure.data.walk import (
    Reasons,
    as_skipped,
    files_in,
    folders_in,
    holds_image,
    images_below,
    other_file,
    outside_classes,
)
from cure.errors import DataError

_NO_CLASSES = ("images", "image", "imgs", "img", "jpegimages", "unknown")
"""Names, in lower case, of folders that hold images of all classes."""


def read_folder(folder: Path, config: DataConfig) -> Splits:
    """A folder of parquet files, of images, or of a known form of another library.

    Raises:
        DataError: it holds none of these.
    """
    if config.labels == "file_names":
        return _named_images(folder, config)
    if (files := find_parquet(folder)) and (hold_images(files) or not holds_image(folder)):
        return read_parquet(files, config)
    original = read_original(folder, config)
    if original is not None:
        return original
    if not holds_image(folder) and (files := find_parquet_below(folder)):
        return read_parquet(files, config)
    return read_images(folder, config)


def read_images(folder: Path, config: DataConfig) -> Splits:
    """Images in class folders, or with a table of labels.

    Raises:
        DataError: no labelled images are found, or a folder could be a split and is none.
    """
    expected = (
        f"expected parquet files, one sub-folder of images a class in '{folder}' "
        f"({folder.name}/class/*.png or {folder.name}/train/class/*.png) or a table of labels "
        f"({folder.name}/labels.csv)"
    )
    if not any(folder.iterdir()):
        raise DataError(f"{expected}, got an empty folder; give another folder")
    top = _descended(folder, config)
    labelled = labelled_images(top, config)
    if labelled is not None:
        return labelled
    splits = [path for path in folders_in(top) if _is_split(path, config)]
    if splits:
        return _split_folders(top, splits, config)
    _check_not_inside_out(top, config)
    _check_no_unknown_splits(top, config)
    beside = outside_classes(top)
    if not any(images_below(path)[0] for path in folders_in(top)):
        raise DataError(f"{expected}, got {_found_instead(top, config)}")
    if len(folders_in(top)) == 1:
        (alone,) = folders_in(top)
        unread, by_name = unread_tables(top, config), _or_by_name(images_below(alone)[0])
        if unread or by_name:
            raise DataError(
                f"expected images of at least two classes in '{top}', got only the folder "
                f"'{alone.name}'; {unread or 'add another class'}{by_name}"
            )
    _check_column(top, config)
    return {config.train_split: partial(_class_table, top, beside, True)}


def _check_column(folder: Path, config: DataConfig) -> None:
    """Refuse class folders where a column of labels is named.

    Raises:
        DataError: one is.
    """
    for name in ("label_column", "image_column"):
        if (column := getattr(config, name)) is not None:
            unread = unread_tables(folder, config) or "no table of labels is there"
            raise DataError(
                f"data.{name}={column}: expected a table with this column in '{folder}'; {unread}; "
                "correct it, or leave it out to take the class folders"
            )


def _found_instead(top: Path, config: DataConfig) -> str:
    """What a folder without class folders holds, and what to do."""
    loose = any(file_kind(path) == "image" for path in files_in(top))
    images, reasons = images_below(top)
    left_out = "".join(f" ({one})" for one in as_skipped(reasons)[:3])
    found = f"{'images outside class folders' if loose else 'no images'}{left_out}"
    return "; ".join(filter(None, [found, unread_tables(top, config), _arranged(images)]))


def read_loose(folder: Path, config: DataConfig) -> Splits | None:
    """Images that lie in a folder itself, without labels but those that ``data.labels`` finds.

    None where the folder has any other form.
    """
    files = files_in(folder)
    images = [path for path in files if file_kind(path) == "image"]
    other = any(images_below(path)[0] for path in folders_in(folder))
    if other or not images or read_label_files(folder, config) is not None:
        return None
    if config.labels == "file_names" and any(class_in_name(path) for path in images):
        return _named_images(folder, config)
    label = np.full(len(images), UNLABELLED)
    reasons = Counter(other_file(path) for path in files if file_kind(path) == "other")
    table = ImageTable(
        label, None, partial(path_cells, images), as_skipped(reasons), any_order=True
    )
    return {config.train_split: lambda: table}


# Splits.


def _is_split(path: Path, config: DataConfig) -> bool:
    """Whether a folder has the name and the content of a split: classes, or a table of labels.

    A class may be called "train" as well; it holds more images itself than folders inside it do.
    """
    if path.name.lower() not in split_names(config):
        return False
    if read_label_files(path, config) is not None:
        return True
    direct = sum(file_kind(file) == "image" for file in files_in(path))
    if not direct:
        return bool(folders_in(path))
    return sum(len(images_below(folder)[0]) for folder in folders_in(path)) > direct


def _split_folders(top: Path, splits: Sequence[Path], config: DataConfig) -> Splits:
    """The splits of a folder.

    Raises:
        DataError: a folder beside them has the same classes but no name of a split.
    """
    train = [path for path in splits if path.name.lower() in (config.train_split, *TRAIN_SPLITS)]
    trained = {path.name for split in train for path in folders_in(_inner(split))}
    unlabelled = [
        one for one in splits if one not in train and _is_unlabelled(one, trained, config)
    ]
    splits = [path for path in splits if path not in unlabelled]
    classes = {path.name for split in splits for path in folders_in(_inner(split))}
    for other in folders_in(top):
        shared = classes & {path.name for path in folders_in(_inner(other))}
        if other not in (*splits, *unlabelled) and shared:
            names = ", ".join((*TRAIN_SPLITS[:1], *VALIDATION_SPLITS, *TEST_SPLITS[:1]))
            raise DataError(
                f"the folder '{other.name}' in '{top}' has the classes of '{splits[-1].name}' but "
                f"not the name of a split ({names}); rename it, set data.test_split={other.name} "
                f"or data.validation_split={other.name}, or move it away"
            )
    beside = outside_classes(top)
    for other in folders_in(top):
        if other not in splits:
            found, reasons = images_below(other)
            reasons["images", f"'{other.name}' is no split with class folders"] += len(found)
            beside.update(reasons)
    found_splits: dict[str, Callable[[], ImageTable]] = {}
    for path in splits:
        labelled = labelled_images(path, config, path.name)
        if labelled is not None:
            found_splits[path.name] = _only_split(labelled, path)
            continue
        _check_column(path, config)
        left_out = outside_classes(path)
        if path == (train or splits)[0]:
            left_out.update(beside)
        found_splits[path.name] = partial(_class_table, _inner(path), left_out, path in train)
    return found_splits


def _is_unlabelled(split: Path, classes: set[str], config: DataConfig) -> bool:
    """Whether all of a split lies in one folder such as ``images``, without a table of labels."""
    inside = [path.name for path in folders_in(split)]
    if len(inside) != 1 or inside[0] in classes or folders_in(split / inside[0]):
        return False
    whole = inside[0].lower() in (*_NO_CLASSES, split.name.lower())
    return whole and read_label_files(split, config) is None


def _inner(folder: Path) -> Path:
    """The folder, or the one in it that holds all folders of classes (``train/train/cat``)."""
    while (deeper := _only(folder)) is not None:
        folder = deeper
    return folder


def _only(folder: Path) -> Path | None:
    """The only folder in a folder, where it holds folders and no image lies beside them."""
    inside = folders_in(folder)
    if len(inside) != 1 or not folders_in(inside[0]):
        return None
    beside = (*files_in(folder), *files_in(inside[0]))
    return None if any(file_kind(file) != "other" for file in beside) else inside[0]


def _only_split(splits: Splits, folder: Path) -> Callable[[], ImageTable]:
    """The split that a table of labels in the folder of a split names.

    Raises:
        DataError: it names several.
    """
    if len(splits) > 1:
        raise DataError(
            f"expected a table of one split in '{folder}', which is the folder of a split, got "
            f"{listing(sorted(splits))}; remove the table's column of splits, or move the table "
            "and the images up"
        )
    (table,) = splits.values()
    return table


def _check_not_inside_out(top: Path, config: DataConfig) -> None:
    """Refuse class/split folders, whose splits would be mixed."""
    names = split_names(config)
    classes = folders_in(top)
    inside = [{path.name for path in folders_in(folder)} for folder in classes]
    if not inside or any(files_in(folder) for folder in classes):
        return
    if all(found and all(name.lower() in names for name in found) for found in inside):
        raise DataError(
            f"expected splits that hold classes in '{top}', got the classes "
            f"{listing([path.name for path in classes[:5]])} that hold the splits "
            f"{listing(sorted(set.union(*inside)))}; arrange the files as split/class/image"
        )


def _check_no_unknown_splits(top: Path, config: DataConfig) -> None:
    """Refuse folders such as train_set/ and test_set/, which would be read as classes."""
    names = split_names(config)
    inside = {p.name: {each.name for each in folders_in(_inner(p))} for p in folders_in(top)}
    named = {name: set(re.split(r"[\W_\d]+", name.lower())) & names for name in inside}
    if len(inside) > 1 and all(named.values()) and not any(inside.values()):
        raise DataError(
            f"expected splits that hold one folder a class in '{top}', got "
            f"{listing(sorted(inside))}, which hold images; "
            + "".join(f"{one}; " for one in _unread(folders_in(top), config)[:1])
            + _arranged(images_below(top)[0])
        )
    for name, classes in inside.items():
        words = named[name]
        alike = [other for other in inside if other != name and len(inside[other] & classes) > 1]
        if words and alike:
            raise DataError(
                f"the folders {listing([name, *alike])} in '{top}' hold the same folders, as "
                f"splits hold classes, but '{name}' is not the name of a split; rename them to "
                "train and test, or name them with data.train_split and data.test_split"
            )


def _unread(folders: Sequence[Path], config: DataConfig) -> list[str]:
    """Why tables in these folders are not read."""
    return [f"{folder.name}/{why}" for folder in folders if (why := unread_tables(folder, config))]


def _descended(folder: Path, config: DataConfig) -> Path:
    """The folder, or the only folder in it where that holds everything."""
    while True:
        inside = folders_in(folder)
        alone = len(inside) == 1 and inside[0].name.lower() not in split_names(config)
        if not alone or read_label_files(folder, config) is not None:
            return folder
        if (deeper := _only(folder)) is None:
            return folder
        folder = deeper


# Class folders.


def _class_table(folder: Path, beside: Reasons, complete: bool) -> ImageTable:
    """One split of images in class folders.

    Args:
        folder: holds the class folders.
        beside: files left out outside of the classes.
        complete: refuse a class without images.
    """
    names = in_order(path.name for path in folders_in(folder))
    notes = order_notes(names)
    inside = [path.name for path in folders_in(folder / names[0])] if complete and names else []
    if len(inside) > 1 and all(
        [path.name for path in folders_in(folder / name)] == inside for name in names[1:]
    ):
        notes += (
            f"the folders {listing(names[:5])} are taken as classes; they hold the same folders "
            f"{listing(inside[:5])}, whose images are all read: if these are the classes, and "
            f"{listing(names[:5])} are splits, set data.train_split and data.test_split to their "
            "names; otherwise move what is no image of the class away",
        )
    reasons = Counter(beside)
    files = []
    for name in names:
        found, left_out = images_below(folder / name)
        if not found and complete:
            why = "".join(f" ({one})" for one in as_skipped(left_out))
            held = {other: images_below(folder / other)[0] for other in names}
            empty = [other for other, images in held.items() if not images]
            others = [images for images in held.values() if images]
            raise DataError(
                f"expected images in every class folder of '{folder}', got none in "
                f"{listing(empty)}{why}; fill or remove it"
                + (_or_by_name(others[0]) if len(others) == 1 else "")
            )
        files.append(found)
        reasons.update(left_out)
    paths, labels = dealt(files)
    return ImageTable(
        np.array(labels, dtype=np.int64),
        names,
        partial(path_cells, paths),
        as_skipped(reasons),
        notes,
        any_order=True,
    )


def dealt(files: Sequence[Sequence[Path]]) -> tuple[list[Path], list[int]]:
    """The first image of each class, then the second of each, and so on, with their labels.

    The order of a folder is ours to choose, and this one lets ``data.limit`` keep every class.
    """
    pairs = [
        (path, label)
        for turn in zip_longest(*files)
        for label, path in enumerate(turn)
        if path is not None
    ]
    return [path for path, _ in pairs], [label for _, label in pairs]


def path_cells(paths: Sequence[Path], rows: Sequence[int]) -> Iterator[EncodedImage]:
    """The cells of some image files."""
    return (file_cell(paths[row]) for row in rows)


# Tables of labels.


def read_table(path: Path, config: DataConfig) -> Splits:
    """Images that a table of labels names.

    Raises:
        DataError: the file is no such table.
    """
    found = labelled_images(path.parent, config, only=path)
    if found is None:
        raise DataError(
            f"expected a table with a column of file names (file_name) and one of labels (label) "
            f"in '{path}', whose files are in the same folder; name the columns with "
            "data.image_column and data.label_column"
        )
    return found


def labelled_images(
    folder: Path, config: DataConfig, split: str | None = None, only: Path | None = None
) -> Splits | None:
    """Images with a table of labels in the folder, or None where there is none.

    Args:
        folder: holds ``metadata.jsonl``, ``metadata.csv``, ``labels.csv`` or the like.
        config: names of splits and columns.
        split: the split that the folder is, by default ``data.train_split``.
        only: the table, by default every one in the folder.
    """
    found = read_label_files(folder, config, only)
    if found is None:
        return None
    images, reasons = images_below(folder)
    used = {same_place(row.path) for rows in found.rows.values() for row in rows}
    unnamed = sum(same_place(path) not in used for path in images)
    for table in found.tables:
        reasons[other_file(table)] -= 1
    reasons["images", f"{found.name} does not name them"] += unnamed
    splits = {}
    parents = {row.path.parent for rows in found.rows.values() for row in rows}
    folders = {same_place(parent) for parent in parents} - {same_place(folder)}
    notes = (f"labels come from {found.name}, not from the folders",) if len(folders) > 1 else ()
    for number, (name, rows) in enumerate(found.rows.items()):
        left_out = as_skipped(reasons) if not number else ()
        key = name or split or config.train_split
        splits[key] = partial(_labelled_table, rows, left_out, notes)
    return splits


def _named_images(folder: Path, config: DataConfig) -> Splits:
    """Images whose file names say their class; folders with the name of a split are splits.

    Raises:
        DataError: no name has the form.
    """
    images, reasons = images_below(folder)
    splits: dict[str, list[LabelRow]] = {}
    for path in images:
        if (label := class_in_name(path)) is None:
            reasons["images", "their names are no class with a number"] += 1
            continue
        above = (part for part in reversed(path.relative_to(folder).parts[:-1]))
        split = next((part for part in above if part.lower() in split_names(config)), None)
        splits.setdefault(split or config.train_split, []).append(LabelRow(path, label))
    if not splits:
        raise DataError(
            f"expected names of images in '{folder}' that are a class and a number, such as "
            f"cat.0.jpg, got {listing([path.name for path in images[:3]]) or 'no image'}; leave "
            "data.labels out and arrange the files in one folder a class"
        )
    trained = {*TRAIN_SPLITS, config.train_split.lower()}
    first, *_ = sorted(splits, key=lambda name: name.lower() not in trained)
    return {
        name: partial(_labelled_table, rows, as_skipped(reasons) if name == first else ())
        for name, rows in splits.items()
    }


def class_in_name(path: Path) -> str | None:
    """The name of an image file without the number at its end, where a class may be left.

    >>> class_in_name(Path("cat.0.jpg")), class_in_name(Path("great_dane_12.jpg"))
    ('cat', 'great_dane')
    >>> class_in_name(Path("0012.jpg")), class_in_name(Path("cat.jpg"))
    (None, None)
    """
    match = re.fullmatch(r"(.*?)[\s._-]*\(?\d+\)?", path.stem)
    name = match[1] if match else ""
    return name if re.search(r"[^\W\d_]", name) else None


def _arranged(images: Sequence[Path]) -> str:
    """What to do with images outside class folders."""
    return f"arrange the files as class/image or train/class/image{_or_by_name(images)}"


def _or_by_name(images: Sequence[Path]) -> str:
    """The way out where names of files say their class; empty where they do not."""
    labelled = [(path.name, label) for path in images if (label := class_in_name(path)) is not None]
    classes = {label for _, label in labelled}
    if not 2 <= len(classes) <= len(labelled) / 2:
        return ""
    return (
        ", or set data.labels=file_names (of an evaluation --data-option labels=file_names) if "
        f"names say the class, as '{labelled[0][0]}' might"
    )


def _labelled_table(
    rows: Sequence[LabelRow], skipped: tuple[Skipped, ...], notes: tuple[str, ...] = ()
) -> ImageTable:
    classes = in_order(row.label for row in rows)
    paths, labels = dealt([[r.path for r in rows if r.label == name] for name in classes])
    label = np.array(labels, dtype=np.int64)
    cells = partial(path_cells, paths)
    notes += order_notes(classes)
    return ImageTable(label, classes, cells, skipped, notes, any_order=True)
