"""Tables of labels beside images: ``labels.csv``, ``metadata.jsonl``, ``train.csv``, ``val.txt``.

Other files with labels are not read, and named where no classes are found without them.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cure.config import DataConfig
from cure.data.readers import (
    LABEL_COLUMNS,
    SPLIT_NAMES,
    TRAIN_SPLITS,
    composed,
    labels_repeat,
    listing,
    split_names,
)
from cure.data.walk import files_in
from cure.errors import DataError

FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_path", "path", "filepath", "image_name"),
    *("image_file", "name", "img", "image_id", "id"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_FLAGS = {
    "is_train": "train",
    "is_valid": "validation",
    "is_val": "validation",
    "is_test": "test",
}
"""Columns of true and false, and the splits that true stands for."""

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
_NOT_READ = (".json", ".xml", ".xlsx", ".xls", ".mat", ".yaml", ".yml")
"""Ends of names of other files that may hold labels."""

_LIST_WORDS = SPLIT_NAMES | {"label", "labels", "annotation", "annotations", "list", "files"}
"""Words in the names of text files that list images with their labels."""

Cells = dict[str, object]
"""A row of a table: its values by the names of the columns."""

_TRIED = 20
_LOOKED_AT = 1000
_MARKED = "the column with a 1"
_MARKS = {"0": False, "1": True, "0.0": False, "1.0": True}
_TRUTHS = _MARKS | {"true": True, "false": False}
_NAMED_SPLIT = "the split by its column"


@dataclass(frozen=True)
class LabelRow:
    """An image file and the name of its class."""

    path: Path
    label: str


@dataclass(frozen=True)
class LabelFiles:
    """What tables of labels say.

    Attributes:
        name: the file or files, for sentences.
        tables: their paths.
        rows: by split; None stands for the only split.
    """

    name: str
    tables: tuple[Path, ...]
    rows: dict[str | None, list[LabelRow]]


@dataclass(frozen=True)
class _Row:
    file: str
    label: str
    split: str | None


class _Tree:
    """Finds the files that a table names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def names(self) -> dict[str, list[Path]]:
        """Every file below the folder by its name, with and without suffix."""
        found: dict[str, list[Path]] = defaultdict(list)
        for place, folders, files in os.walk(self.folder, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = Path(place) / name
                found[composed(name)].append(path)
                if path.stem != name:
                    found[composed(path.stem)].append(path)
        return found

    def find(self, name: str) -> Path:
        """The file of that name or path; where there is none, the path that was tried.

        Raises:
            DataError: several files have the name.
        """
        name = name.replace("\\", "/")
        direct = self.folder / Path(name).expanduser()
        if _is_file(direct):
            return direct
        parts = Path(composed(name)).parts
        named = self.names.get(parts[-1] if parts else "", [])
        elsewhere = name.startswith("/") or name[1:3] == ":/"
        fits: list[Path] = []
        # Of a path of another machine, the longest end that leads to a file here.
        for start in range(len(parts) if elsewhere else 1):
            above = parts[start:-1]
            fits = [path for path in named if _ends(path.parent, above)]
            if fits:
                break
        if len(fits) > 1:
            raise DataError(
                f"the name '{name}' in the table of labels of '{self.folder}' fits "
                f"{listing([str(path.relative_to(self.folder)) for path in fits[:3]])}; write the "
                "path from that folder"
            )
        return fits[0] if fits else direct

    def has(self, name: str, whole: bool = False) -> bool:
        """Whether there is one file of that name or path, with its suffix where ``whole``."""
        if not name or (whole and not Path(name).suffix):
            return False
        try:
            return _is_file(self.find(name))
        except DataError:
            return False


def _ends(folder: Path, parts: tuple[str, ...]) -> bool:
    """Whether the last parts of a folder's path are these."""
    last = folder.parts[len(folder.parts) - len(parts) :]
    return tuple(map(composed, last)) == parts


def _is_file(path: Path) -> bool:
    """Whether there is a file; a long text in the place of its name is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_label_files(
    folder: Path, config: DataConfig, only: Path | None = None
) -> LabelFiles | None:
    """The tables of labels in a folder, or None where there is none that names images in it.

    A table has a column with file names and one with labels, and may have one with splits.  The
    columns are those that ``data.image_column`` and ``data.label_column`` name, those with a usual
    name (:data:`FILE_COLUMNS`, :data:`LABEL_COLUMNS`), or else the one whose values are files here
    and, where these lie in one folder, the only other one; a column of 0 and 1 for each class will
    do as well.  Without a header the first column is the file and the second the label.  Several
    tables must be named like splits (``train.csv``, ``test.csv``).

    Args:
        folder: where to look.
        config: names of columns.
        only: the table to read, by default all.

    Raises:
        DataError: a table is damaged, a row has no label, or an image several.
    """
    tree = _Tree(folder)
    paths = _label_files(folder) if only is None else [only]
    tables = {path: rows for path in paths if isinstance(rows := _table(path, tree, config), list)}
    own = {path: rows for path, rows in tables.items() if path.stem.lower() == "metadata"}
    tables = own or tables
    if not tables:
        return None
    # Beside train.csv, a sample of an answer is no table of labels.
    named = {path: rows for path, rows in tables.items() if path.stem.lower() in SPLIT_NAMES}
    tables = named if any(path.stem.lower() in TRAIN_SPLITS for path in named) else tables
    if len(tables) > 1 and not named:
        raise DataError(
            f"expected one table of labels in '{folder}', or one a split (train.csv, test.csv), "
            f"got {listing([path.name for path in tables])}; remove the others"
        )
    by_split: dict[str | None, list[LabelRow]] = {}
    for path, found in tables.items():
        whole = path.stem if path.stem.lower() in SPLIT_NAMES and len(tables) > 1 else None
        for row in found:
            one = LabelRow(tree.find(row.file), row.label)
            by_split.setdefault(row.split or whole, []).append(one)
    if by_split.keys() == {None}:
        by_split = _by_folder(by_split[None], folder, config)
    unique = {split: _distinct(listed, folder) for split, listed in by_split.items()}
    return LabelFiles(" and ".join(path.name for path in tables), tuple(tables), unique)


def _by_folder(
    rows: list[LabelRow], folder: Path, config: DataConfig
) -> dict[str | None, list[LabelRow]]:
    """Rows by the folder of a split that their image lies in, where each lies in one of several."""
    names, splits = split_names(config), defaultdict[str | None, list[LabelRow]](list)
    for row in rows:
        inside = Path(os.path.relpath(row.path, folder)).parts[:-1]
        split = next((part for part in inside if part.lower() in names), None)
        splits[split].append(row)
    # A class may be called "train" as well.
    labels = {row.label for row in rows}
    if None in splits or len(splits) < 2 or labels & splits.keys():
        return {None: rows}
    return dict(splits)


def same_place(path: Path) -> str:
    """A path that is equal for all ways to write where a file lies; links to files stay apart."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def unread_tables(folder: Path, config: DataConfig) -> str:
    """Why files in a folder that may hold labels are not read; empty where there are none."""
    tree, reasons = _Tree(folder), []
    for path in _label_files(folder):
        found = _table(path, tree, config)
        if isinstance(found, str):
            reasons.append(f"{path.name} is not read: {found}")
    others = [path.name for path in _files(folder, _NOT_READ)]
    if others:
        form = "write labels.csv with the columns file_name and label"
        reasons.append(f"{listing(others[:3])} cannot be read: {form}")
    return "; ".join(reasons[:3])


def _label_files(folder: Path) -> list[Path]:
    """Tables, and text files named like lists."""
    lists = [
        path
        for path in _files(folder, (".txt",))
        if _LIST_WORDS & set(re.split(r"[\W_\d]+", path.stem.lower()))
    ]
    return sorted([*_files(folder, TABLES), *lists])


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return [path for path in files_in(folder) if path.suffix.lower() in suffixes]


def _distinct(rows: Sequence[LabelRow], folder: Path) -> list[LabelRow]:
    """The rows without repetitions."""
    distinct: dict[str, LabelRow] = {}
    for row in rows:
        known = distinct.setdefault(same_place(row.path), row)
        if known.label != row.label:
            raise DataError(
                f"expected one label an image in the table of labels of '{folder}', got "
                f"'{known.label}' and '{row.label}' for '{row.path.name}'; keep one of them"
            )
    return list(distinct.values())


def _table(path: Path, tree: _Tree, config: DataConfig) -> list[_Row] | str:
    """The rows of a table of labels; of another file, why it is none."""
    try:
        rows = _rows_of(path, tree)
    except csv.Error as error:
        return f"it is no table ({error})"
    if not rows:
        return "it has no rows"
    columns = _columns(rows, tree, config)
    if isinstance(columns, str):
        return columns
    file, label, split = columns
    files = [str(row.get(file, "")).strip() for row in rows]
    without = [number for number, row in enumerate(rows) if _text(row.get(label)) == ""]
    if len(without) == len(rows):
        return f"its column '{label}' is empty"
    if without:
        raise DataError(
            f"expected a label in every row of '{path}', got none in {len(without)} rows, the "
            f"first for '{files[without[0]]}'; add the labels or remove these rows"
        )
    unsplit = [n for n, row in enumerate(rows) if split and _text(row.get(split)) == ""]
    if unsplit and len(unsplit) < len(rows):
        raise DataError(
            f"expected a split in every row of '{path}' or in none, got none in {len(unsplit)} of "
            f"{len(rows)} rows, the first for '{files[unsplit[0]]}'; fill the column '{split}' or "
            "remove these rows"
        )
    several = next((row[label] for row in rows if isinstance(row[label], list | dict)), None)
    if several is not None:
        raise DataError(
            f"expected one label an image in column '{label}' of '{path}', got {several}; keep one "
            "class an image, as a name or number"
        )
    return [
        _Row(name, _text(row[label]), _text(row.get(split)) or None if split else None)
        for name, row in zip(files, rows, strict=True)
    ]


def _rows_of(path: Path, tree: _Tree) -> list[Cells]:
    """The rows of a file, by the names of its columns."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the table '{path}' cannot be read ({error.strerror}); change its permissions or move "
            "it away"
        ) from None
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return list(_json_rows(path, text))
    if suffix == ".txt":
        return list(_list_rows(text, tree, split=path.stem.lower() in SPLIT_NAMES))
    return list(_csv_rows(text, tree, "\t" if suffix == ".tsv" else None))


def _columns(
    rows: list[Cells], tree: _Tree, config: DataConfig
) -> tuple[str, str, str | None] | str:
    """The columns of the file, the label and the split; where one is missing, why."""
    columns = list(rows[0])
    file = _column(columns, config.image_column, FILE_COLUMNS)
    if file is None or not _leads_to_files(rows, file, tree, any):
        other = next((c for c in columns if _leads_to_files(rows, c, tree, all)), None)
        if other is None and file is not None:
            first = _text(rows[0].get(file))
            return f"the files in its column '{file}' are not in this folder, such as '{first}'"
        file = other
    if file is None:
        return f"none of its columns ({listing(columns[:5])}) holds names of files in this folder"
    split = _split_column(rows, [column for column in columns if column != file], config)
    rest = [column for column in columns if column not in (file, split)]
    if config.label_column is not None and config.label_column not in rest:
        return (
            f"none of its columns ({listing(columns[:5])}) is '{config.label_column}' "
            "(data.label_column)"
        )
    label = _column(rest, config.label_column, LABEL_COLUMNS)
    # Files in several folders have classes already, which a guess must not replace.
    if (
        label is None
        and len({tree.find(_text(row[file])).parent for row in rows[:_LOOKED_AT]}) == 1
    ):
        label = _label_column(rows, rest)
    if label is None:
        return (
            f"none of its columns ({listing(columns[:5])}) is known to hold the label; name it "
            "with data.label_column"
        )
    return file, label, split


def _split_column(rows: list[Cells], columns: list[str], config: DataConfig) -> str | None:
    """The column of splits: of a usual name, of names of splits alone, or of true and false.

    Columns of true and false, such as ``is_valid``, are added to the rows as names of splits.
    """
    rest = [column for column in columns if column != config.label_column]
    usual = _column(rest, None, SPLIT_COLUMNS)
    names = split_names(config)
    values = {c: {_text(row.get(c)).lower() for row in rows} - {""} for c in rest}
    for column in rest if usual is None else (usual, *rest):
        if len(values[column]) > 1 and values[column] <= names:
            return column
    flags = {c: said for c in rest if (said := _FLAGS.get(c.strip().lower())) is not None}
    flags = {c: said for c, said in flags.items() if values[c] and values[c] <= _TRUTHS.keys()}
    for row in rows if flags else ():
        row[_NAMED_SPLIT] = _flagged(row, flags)
    return _NAMED_SPLIT if flags else usual


def _flagged(row: Cells, flags: Mapping[str, str]) -> str:
    """The split of a row whose columns of true and false are ``flags``; empty where none is told.

    Where none is true it is the first of training, test and validation that has no column.

    Raises:
        DataError: several are true.
    """
    truths = {column: _TRUTHS.get(_text(row.get(column)).lower()) for column in flags}
    if None in truths.values():
        return ""
    told = {said for column, said in flags.items() if truths[column]}
    if len(told) > 1:
        raise DataError(
            f"expected one split a row in a table of labels, got true in "
            f"{listing([column for column in flags if truths[column]])} of one row; correct it"
        )
    left = (one for one in ("train", "test", "validation") if one not in flags.values())
    return next(iter(told), next(left, ""))


def _leads_to_files(
    rows: Sequence[Cells],
    column: str,
    tree: _Tree,
    enough: Callable[[Iterable[bool]], bool],
) -> bool:
    """Whether any or all of the first values of a column are files."""
    return enough(tree.has(_text(row.get(column))) for row in rows[:_TRIED])


def _label_column(rows: list[Cells], columns: list[str]) -> str | None:
    """The column of labels among columns of unusual names.

    It is the only one, or is added to the rows where columns of 0 and 1 mark one class a row.
    """
    if len(columns) == 1:
        return columns[0] if labels_repeat(_text(row.get(columns[0])) for row in rows) else None
    marks = [c for c in columns if all(_text(row.get(c)) in _MARKS for row in rows)]
    if len(marks) < 2:
        return None
    on = [[c for c in marks if _MARKS[_text(row.get(c))]] for row in rows]
    if any(len(one) != 1 for one in on):
        return None
    for row, (name,) in zip(rows, on, strict=True):
        row[_MARKED] = name
    return _MARKED


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _column(columns: Sequence[str], given: str | None, usual: Sequence[str]) -> str | None:
    if given is not None and given in columns:
        return given
    by_name = {column.strip().lower(): column for column in columns}
    return next((by_name[name] for name in usual if name in by_name), None)


def _json_rows(path: Path, text: str) -> Iterator[Cells]:
    rows = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        why = ""
        try:
            row = json.loads(line)
        except ValueError as error:
            row, why = None, f" ({error})"
        if isinstance(row, dict):
            rows += 1
            yield row
        elif not why and not rows:
            return
        else:
            raise DataError(
                f"line {number} of '{path}' is no JSON object{why}; write one object a "
                'line, such as {"file_name": "a.jpg", "label": "cat"}'
            )


def _csv_rows(text: str, tree: _Tree, delimiter: str | None) -> Iterator[Cells]:
    if delimiter is None:
        delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    read = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = [row for row in read if any(row)]
    header = [name.strip() for name in rows[0]] if rows else []
    known = {name.lower() for name in header} & {*FILE_COLUMNS, *LABEL_COLUMNS}
    if not known and any(map(tree.has, header)):
        header = _header_of(rows, tree)
    else:
        rows = rows[1:]
    for row in rows:
        yield dict(zip(header, row, strict=False))


def _header_of(rows: list[list[str]], tree: _Tree) -> list[str]:
    """Names for the columns of a table without a header: the file, the split, else the label."""
    names = []
    for place, value in enumerate(rows[0]):
        column = {row[place].strip().lower() for row in rows if len(row) > place}
        if "file_name" not in names and tree.has(value.strip()):
            names.append("file_name")
        elif "split" not in names and len(rows[0]) > 2 and column <= SPLIT_NAMES:
            names.append("split")
        else:
            names.append(f"column {place + 1}")
    others = [name for name in names if name.startswith("column")]
    return ["label" if [name] == others else name for name in names]


def _list_rows(text: str, tree: _Tree, split: bool) -> Iterator[Cells]:
    """Lines of a file and its label, as ``im/1.jpg 0``; boxes may follow after tabs.

    Lists of a training split and another may name files alone, whose folders are the classes.

    In a file that is not named for a split, labels have to repeat: others may be captions.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [
        line.split("\t")[:2] if "\t" in line else re.split(r"[\s,;]+(?=\S+$)", line)
        for line in lines
    ]
    # Any text may be in such a file, so all of its first lines must be of this form.
    form = all(len(pair) == 2 and tree.has(pair[0], whole=True) for pair in pairs[:_TRIED])
    if form and (split or labels_repeat(pair[-1] for pair in pairs)):
        yield from ({"file_name": pair[0], "label": pair[-1]} for pair in pairs)
    elif split and _splits_are_listed(tree.folder) and all(map(tree.has, lines[:_TRIED])):
        # Paths alone: the folder of an image is its class.
        classes = [tree.find(line).parent.name for line in lines]
        if len(set(classes)) > 1:
            for line, name in zip(lines, classes, strict=True):
                yield {"file_name": line, "label": name}


def _splits_are_listed(folder: Path) -> bool:
    """Whether a text file is named like the training split and another like a split beside it."""
    stems = {path.stem.lower() for path in _files(folder, (".txt",))}
    return bool(stems & {*TRAIN_SPLITS}) and bool(stems & SPLIT_NAMES - {*TRAIN_SPLITS})
