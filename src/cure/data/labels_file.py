"""Tables of labels beside images: ``labels.csv``, ``metadata.jsonl``, ``train.csv``."""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cure.config import DataConfig
from cure.data.readers import TEST_SPLITS, TRAIN_SPLITS, VALIDATION_SPLITS, listing
from cure.errors import DataError

FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_path", "path", "filepath", "image_name"),
    *("image_file", "name", "img", "image_id", "id"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "category", "target", "species", "breed"),
    *("class_id", "y"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition")

LABEL_FILES = (".csv", ".tsv", ".jsonl", ".ndjson")
_TRIED = 20


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
                found[name].append(path)
                if path.stem != name:
                    found[path.stem].append(path)
        return found

    def find(self, name: str) -> Path:
        """The file of that name or path; where there is none, the path that was tried.

        Raises:
            DataError: several files have the name.
        """
        name = name.replace("\\", "/")
        direct = self.folder / Path(name).expanduser()
        if direct.is_file():
            return direct
        parts = Path(name).parts
        fits = [
            path
            for path in self.names.get(parts[-1] if parts else "", [])
            if path.parts[-len(parts) : -1] == parts[:-1]
        ]
        if len(fits) > 1:
            raise DataError(
                f"the name '{name}' in the table of labels of '{self.folder}' fits "
                f"{listing([str(path.relative_to(self.folder)) for path in fits[:3]])}; write the "
                "path from that folder"
            )
        return fits[0] if fits else direct


def read_label_files(
    folder: Path, config: DataConfig, only: Path | None = None
) -> LabelFiles | None:
    """The tables of labels in a folder, or None where there is none that names images in it.

    A table has a column with file names and one with labels (:data:`FILE_COLUMNS`,
    :data:`LABEL_COLUMNS`, or ``data.image_column`` and ``data.label_column``), and may have one
    with splits.  Several tables must be named like splits (``train.csv``, ``test.csv``).

    Args:
        folder: where to look.
        config: names of columns.
        only: the table to read, by default all.

    Raises:
        DataError: a table is damaged, a row has no label, or an image several.
    """
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in LABEL_FILES and not path.name.startswith(".") and path.is_file()
    )
    if only is not None:
        paths = [only]
    tree = _Tree(folder)
    tables = {path: rows for path in paths if (rows := _table(path, tree, config)) is not None}
    own = {path: rows for path, rows in tables.items() if path.stem.lower() == "metadata"}
    tables = own or tables
    if not tables:
        return None
    names = {*TRAIN_SPLITS, *TEST_SPLITS, *VALIDATION_SPLITS}
    # Beside train.csv, a sample of an answer is no table of labels.
    named = {path: rows for path, rows in tables.items() if path.stem.lower() in names}
    tables = named if any(path.stem.lower() in TRAIN_SPLITS for path in named) else tables
    if len(tables) > 1 and not named:
        raise DataError(
            f"expected one table of labels in '{folder}', or one a split (train.csv, test.csv), "
            f"got {listing([path.name for path in tables])}; remove the others"
        )
    by_split: dict[str | None, list[LabelRow]] = {}
    for path, found in tables.items():
        whole = path.stem if path.stem.lower() in names and len(tables) > 1 else None
        for row in found:
            one = LabelRow(tree.find(row.file), row.label)
            by_split.setdefault(row.split or whole, []).append(one)
    unique = {split: _distinct(listed, folder) for split, listed in by_split.items()}
    return LabelFiles(" and ".join(path.name for path in tables), tuple(tables), unique)


def _distinct(rows: Sequence[LabelRow], folder: Path) -> list[LabelRow]:
    """The rows without repetitions."""
    labels: dict[Path, str] = {}
    for row in rows:
        if labels.setdefault(row.path, row.label) != row.label:
            raise DataError(
                f"expected one label an image in the table of labels of '{folder}', got "
                f"'{labels[row.path]}' and '{row.label}' for '{row.path.name}'; keep one of them"
            )
    return [LabelRow(path, label) for path, label in labels.items()]


def _table(path: Path, tree: _Tree, config: DataConfig) -> list[_Row] | None:
    """The rows of a table of labels; None where the file is another."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise DataError(
            f"the table '{path}' cannot be read ({error.strerror}); change its permissions or move "
            "it away"
        ) from None
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        rows = list(_json_rows(path, text))
    else:
        rows = list(_csv_rows(text, tree, "\t" if path.suffix.lower() == ".tsv" else None))
    if not rows:
        return None
    columns = list(rows[0])
    file = _column(columns, config.image_column, FILE_COLUMNS)
    label = _column([c for c in columns if c != file], config.label_column, LABEL_COLUMNS)
    split = _column(columns, None, SPLIT_COLUMNS)
    if file is None or label is None:
        return None
    files = [str(row.get(file, "")).strip() for row in rows]
    if not any(tree.find(name).is_file() for name in files[:_TRIED] if name):
        return None
    without = [number for number, row in enumerate(rows) if _text(row.get(label)) == ""]
    if len(without) == len(rows):
        return None
    if without:
        raise DataError(
            f"expected a label in every row of '{path}', got none in {len(without)} rows, the "
            f"first for '{files[without[0]]}'; add the labels or remove these rows"
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


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _column(columns: Sequence[str], given: str | None, usual: Sequence[str]) -> str | None:
    if given is not None and given in columns:
        return given
    by_name = {column.strip().lower(): column for column in columns}
    return next((by_name[name] for name in usual if name in by_name), None)


def _json_rows(path: Path, text: str) -> Iterator[dict[str, object]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"line {number} of '{path}' is no JSON object ({error}); write one object a line, "
                'such as {"file_name": "a.jpg", "label": "cat"}'
            ) from None
        if not isinstance(row, dict):
            return
        yield row


def _csv_rows(text: str, tree: _Tree, delimiter: str | None) -> Iterator[dict[str, object]]:
    lines = text.splitlines()
    if not lines:
        return
    if delimiter is None:
        delimiter = max(",;\t|", key=lines[0].count)
    rows = [row for row in csv.reader(lines, delimiter=delimiter) if any(row)]
    header = [name.strip() for name in rows[0]] if rows else []
    known = {name.lower() for name in header} & {*FILE_COLUMNS, *LABEL_COLUMNS}
    if len(header) == 2 and not known and tree.find(header[0]).is_file():
        header = ["file_name", "label"]  # A table without a header.
    else:
        rows = rows[1:]
    for row in rows:
        yield dict(zip(header, row, strict=False))
