"""Tables of rows grouped by label over seeds, and differences between groups."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cure.config import Split, checked
from cure.errors import ConfigError, counted, unknown
from cure.experiments.compare.rows import (
    BY_CLASS,
    COMPARISON_FORMAT,
    COSTS,
    NESTED,
    RATIOS,
    SETTINGS,
    WHO,
    TableRow,
    attacks_of,
    check_alike,
    flattened,
    read_rows,
    refuse_unlike,
)
from cure.utils.io import check_free, user_path
from cure.utils.stats import student_t

if TYPE_CHECKING:
    from cure.runs.run import Run


SUFFIXES = (".md", ".csv", ".json")


class Difference(NamedTuple):
    """How far one group of runs lies above another.

    Attributes:
        mean: of the differences a - b over the seeds both have; None without such a seed.
        interval: its 95 % Student t interval over seeds; None for fewer than two seeds.
        n: seeds that both have.
    """

    mean: float | None
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class ResultTable:
    """What :func:`compare` returns.

    Attributes:
        rows: one flat record a run, as documented in docs/compare.md.
        groups: one record a label, means over its seeds; in the order of the table.
        columns: what the table shows of them.
        caption: on what images, with what intervals, on what hardware.
        chosen: whether the columns were asked for.
    """

    rows: list[TableRow]
    groups: list[TableRow]
    columns: list[str]
    caption: str
    chosen: bool = False

    def header(self) -> list[str]:
        """The heading of each column of the table."""
        return ["model", "n seeds", *(_heading(column, self.rows) for column in self.columns)]

    def cells(self) -> list[list[str]]:
        """The text of the table, a list a group; what is missing is "-"."""
        return [
            [
                group["label"],
                str(group["n_seeds"] or "-"),
                *(_cell(group, column, self.rows) for column in self.columns),
            ]
            for group in self.groups
        ]

    def markdown(self) -> str:
        """A table as GitHub reads it, and the caption."""
        header, *body = (
            [_markdown(text) for text in line] for line in [self.header(), *self.cells()]
        )
        rule = ["---"] + ["---:"] * (len(header) - 1)
        lines = ["| " + " | ".join(line) + " |" for line in (header, rule, *body)]
        return "\n".join([*lines, "", _markdown(self.caption), ""])

    def csv(self) -> str:
        """A line a run; intervals as two columns ``_low`` and ``_high``, missing values empty.

        All that is known of a run, or who it is and the columns that were asked for.
        """
        kept = [name for name in self.rows[0] if name != BY_CLASS]
        if self.chosen:
            parts = [(name, f"{name}_interval", f"{name}_n") for name in self.columns]
            kept = [*WHO, *(name for part in parts for name in part if name in kept)]
        flat = [_flat_record(row, kept) for row in self.rows]
        names = list(dict.fromkeys(name for record in flat for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()

    def json(self) -> str:
        """Everything: all columns of all rows and groups."""
        content = {
            "format": COMPARISON_FORMAT,
            "caption": self.caption,
            "rows": self.rows,
            "groups": self.groups,
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, output: str | Path) -> None:
        """Write a new file in the form that its suffix names.

        Raises:
            ConfigError: for another suffix, a file that exists, or a place that refuses it.
        """
        check_output(output)
        write: dict[str, Callable[[], str]] = {
            ".md": self.markdown,
            ".csv": self.csv,
            ".json": self.json,
        }
        text = write[user_path(output).suffix.lower()]()
        try:
            # "x": another process may have made the file since it was looked for.
            with user_path(output).open("x", encoding="utf-8", newline="") as file:
                file.write(text)
        except FileExistsError:
            raise ConfigError(f"{output} exists and is kept; name another output file") from None
        except OSError as error:
            raise ConfigError(
                f"{output} cannot be written ({error.strerror}); make room or name another file"
            ) from None


def compare(
    runs: str | Path | Run | Iterable[str | Path | Run],
    *,
    columns: str | Sequence[str] | None = None,
    sort: str | None = None,
    split: Split | None = None,
    output: str | Path | None = None,
) -> ResultTable:
    """Compare runs in one table: accuracies with intervals over images or seeds, and costs.

    Args:
        runs: run folders, result files of ``cure evaluate --output``, records that a plan keeps
            of its runs (also ``records.jsonl``), or tables of this function in JSON.  Results of
            the same run make one row.
        columns: of the table, as a list or as "natural,pgd20"; by default what was measured.
        sort: column to sort by, largest first; by default the NRR of the strongest attack that
            all have.
        split: only evaluations of this split; by default test images where all have them.
        output: new file to write, by its suffix: Markdown, CSV or JSON.

    Returns:
        Rows, groups of seeds and caption.

    Raises:
        CureError: when a run was not evaluated, when two were not evaluated alike, or for a
            column or file that cannot be.

    >>> import torch
    >>> import cure
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> asked = {"data": "digits", "attacks": ["fgsm"], "epsilon": "8/255", "limit": 50}
    >>> result = cure.evaluate(network, output="mine.json", **asked)
    >>> cure.compare(["mine.json"]).header()
    ['model', 'n seeds', 'natural', 'fgsm']
    """
    if output is not None:
        check_output(output)
    checked("split", split, Split | None)
    if isinstance(runs, str) or not isinstance(runs, Iterable):
        runs = [runs]
    done = table(read_rows(runs, split), columns, sort)
    if output is not None:
        done.write(output)
    return done


def check_output(output: str | Path) -> None:
    """Refuse a file that could not be written, before anything is read.

    Raises:
        ConfigError: for an unknown suffix, a file that exists, a folder that does not.
    """
    if user_path(output).suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"expected an output file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, "
            f"got {output}; name such a file"
        )
    check_free(output)


# Groups of seeds.


def table(
    rows: Sequence[TableRow],
    columns: str | Sequence[str] | None = None,
    sort: str | None = None,
) -> ResultTable:
    """Rows of :func:`read_rows` as groups of seeds, sorted.

    A group of one seed has that run's numbers with Wilson 95 % intervals over images; one of
    several has means with 95 % Student t intervals over seeds.

    Args:
        rows: one or more.
        columns: see :func:`compare`.
        sort: a column, largest first and missing values last; or "label", in alphabetical order.

    Raises:
        ConfigError: for an unknown column, rows that do not compare, or a seed that comes twice
            under one label.
    """
    if not rows:
        raise ConfigError("expected one or more rows, got none; name evaluated runs")
    rows = list(rows)
    check_alike(rows)
    known = _columns(rows)
    if isinstance(columns, str):
        columns = [name.strip() for name in columns.split(",") if name.strip()]
    shown = _usual_columns(rows) if columns is None else list(dict.fromkeys(columns))
    sort = _usual_sort(rows) if sort is None else sort
    for name in shown:
        if name not in known:
            raise ConfigError(unknown("column", name, known))
    if sort not in (*known, "label"):
        raise ConfigError(unknown("column", sort, [*known, "label"]))
    gathered: dict[tuple[Any, ...], list[TableRow]] = {}
    for number, row in enumerate(rows):
        # A network without a seed is one of its kind.
        key = (row["label"],) if row["seed"] is not None else (row["label"], number)
        gathered.setdefault(key, []).append(row)
    groups = [_group(members, known) for members in gathered.values()]
    groups.sort(key=lambda group: str(group["label"]))
    if sort != "label":
        # Sorting is stable: equal and missing values stay in the order of their labels.
        groups.sort(key=lambda group: (group[sort] is None, -(group[sort] or 0.0)))
    return ResultTable(
        rows, groups, shown, _caption(rows, groups, shown, sort), columns is not None
    )


def _columns(rows: Sequence[TableRow]) -> list[str]:
    """Every column that has a number to show."""
    attacks = attacks_of(rows)
    return [
        *("natural", *attacks),
        *(f"nrr_{name}" for name in RATIOS),
        *(f"balanced_{name}" for name in ("natural", *attacks)),
        "majority",
        *(f"last_{name}" for name in ("natural", *attacks)),
        *(f"best_minus_last_{name}" for name in ("natural", *attacks)),
        *COSTS,
        "epoch",
        *SETTINGS,
    ]


def _usual_columns(rows: Sequence[TableRow]) -> list[str]:
    attacks = attacks_of(rows)
    first = next((name for name in attacks if any(row.get(name) is not None for row in rows)), "")
    usual = ["natural", *attacks, *(f"nrr_{name}" for name in RATIOS)]
    if any(row.get("unequal") for row in rows):
        usual += ["majority", *(f"balanced_{name}" for name in ("natural", *attacks))]
    usual += [f"best_minus_last_{first}", "seconds_per_epoch"]
    return [name for name in usual if any(row.get(name) is not None for row in rows)]


def _usual_sort(rows: Sequence[TableRow]) -> str:
    """The NRR of the attack that left fewest right of those that all rows have, else that attack.

    Only attacks count that all rows have on as many images; of equals the usual strongest.
    """

    def shared(name: str) -> bool:
        return all(row.get(name) is not None for row in rows) and len(_counts(rows, name)) == 1

    attacks = [name for name in reversed(attacks_of(rows)) if shared(name)]
    if not attacks:
        return "natural"
    attack = min(attacks, key=lambda name: sum(float(row[name]) for row in rows))
    return f"nrr_{attack}" if attack in RATIOS and shared(f"nrr_{attack}") else attack


def _count(row: TableRow, column: str) -> int | None:
    """Images that a number of a row is about; None for columns that are about none."""
    name = re.sub("^(nrr|balanced|last|best_minus_last)_", "", column)
    if name in ("natural", "majority"):
        return int(row["n"])
    count = row.get(f"{name}_n")
    return None if count is None else int(count)


def _counts(rows: Iterable[TableRow], column: str) -> list[int]:
    return sorted({n for n in (_count(row, column) for row in rows) if n is not None})


def _group(rows: list[TableRow], columns: Sequence[str]) -> TableRow:
    """Means over the seeds of one label."""
    label, seeds = rows[0]["label"], [row["seed"] for row in rows if row["seed"] is not None]
    _once(rows)
    group: TableRow = {
        "label": label,
        "method": rows[0]["method"],
        "runs": [row["run"] for row in rows],
        "seeds": sorted(seeds),
        "n_seeds": len(seeds) or None,
    }
    for column in columns:
        having = [row for row in rows if row.get(column) is not None]
        values = [float(row[column]) for row in having]
        interval = having[0].get(f"{column}_interval") if len(values) == 1 else None
        over = None if interval is None else "images"
        if len(values) > 1 and column not in SETTINGS:
            interval, over = list(student_t(values)), "seeds"
        group[column] = statistics.fmean(values) if values else None
        group[f"{column}_interval"] = interval
        group[f"{column}_interval_over"] = over
        group[f"{column}_runs"] = len(values)
        group[f"{column}_images"] = _counts(having, column)
    return group


def _once(rows: Sequence[TableRow]) -> None:
    """Refuse a seed that comes twice: its runs are not independent."""
    seen: dict[Any, TableRow] = {}
    for row in rows:
        other = seen.setdefault(row["seed"], row)
        if row["seed"] is not None and other is not row:
            raise ConfigError(
                f"{other['run']} and {row['run']} both are '{row['label']}' with seed "
                f"{row['seed']}, and a seed counts once; leave one out, or name run folders, "
                "whose settings tell runs apart"
            )


def difference(rows_a: Sequence[TableRow], rows_b: Sequence[TableRow], column: str) -> Difference:
    """Mean difference of ``column`` between two kinds of runs (a - b), paired by seed.

    Args:
        rows_a: runs of one kind, each with another seed.
        rows_b: runs of the other kind.
        column: name of a number of a row ("pgd20", "nrr_cw", "seconds_per_epoch").

    Raises:
        ConfigError: when the column is unknown, the evaluations are not alike, or a seed comes
            twice on one side.
    """
    both = [*rows_a, *rows_b]
    if column not in _columns(both):
        raise ConfigError(unknown("column", column, _columns(both)))
    check_alike(both)
    _once(rows_a)
    _once(rows_b)
    first, second = (
        {r["seed"]: r for r in rows if r["seed"] is not None and r.get(column) is not None}
        for rows in (rows_a, rows_b)
    )
    seeds = sorted(first.keys() & second.keys())
    for seed in seeds:
        ours, theirs = _count(first[seed], column), _count(second[seed], column)
        if ours != theirs:
            refuse_unlike(first[seed], second[seed], [(f"{column} images", ours, theirs)])
    values = [float(first[seed][column]) - float(second[seed][column]) for seed in seeds]
    if not values:
        return Difference(None, None, 0)
    interval = student_t(values) if len(values) > 1 else None
    return Difference(statistics.fmean(values), interval, len(values))


# Words.


def _heading(column: str, rows: Sequence[TableRow]) -> str:
    heading = re.sub("^best_minus_last_", "best - last ", re.sub("^nrr_", "NRR ", column))
    counts = _counts([row for row in rows if row.get(column) is not None], column)
    if len(counts) == 1 and counts[0] != rows[0]["n"]:
        heading += f" (n = {counts[0]:,})"
    return heading.replace("_", " ").replace("mib", "MiB")


def _cell(group: TableRow, column: str, rows: Sequence[TableRow]) -> str:
    """``68.2 (67.3-69.1)``; with its seeds or images where they differ from the rest."""
    value, interval = group[column], group[f"{column}_interval"]
    if value is None:
        return "-"
    text = f"{value:,.0f}" if column in SETTINGS else f"{value:.1f}"
    if interval is not None:
        low, high = interval
        dash = "-" if low >= 0 else " to "
        text += f" ({low:.1f}{dash}{high:.1f})"
    if group[f"{column}_runs"] < (group["n_seeds"] or 1):
        text += f", {counted(group[f'{column}_runs'], 'seed')}"
    if len(_counts([row for row in rows if row.get(column) is not None], column)) > 1:
        text += ", n = " + " and ".join(f"{count:,}" for count in group[f"{column}_images"])
    return text


def _caption(
    rows: list[TableRow], groups: list[TableRow], columns: Sequence[str], sort: str
) -> str:
    """Images and threat, meaning of the intervals, seeds, hardware and versions."""
    first = rows[0]
    fewer = [
        f"{name}: {' or '.join(f'{count:,}' for count in _counts(rows, name))}"
        for name in attacks_of(rows)
        if name in columns and _counts(rows, name) not in ([], [first["n"]])
    ]
    checkpoint = next((row["checkpoint"] for row in rows if row["checkpoint"]), None)
    sentences = [
        f"On {first['data']} {first['split']}, n = {first['n']:,} images"
        + (f" ({'; '.join(fewer)})" if fewer else "")
        + f", {first['norm']} ε = {first['epsilon_text']}"
        + (f", {checkpoint} checkpoint" if checkpoint else "")
        + f"; accuracies in percent, sorted by {_heading(sort, rows)}"
    ]
    if any(column.startswith("nrr_") for column in columns):
        sentences.append(
            "NRR: harmonic mean of natural accuracy and accuracy under that attack, same images"
        )
    kinds = {group[f"{column}_interval_over"] for group in groups for column in columns}
    if "seeds" in kinds:
        sentences.append("Several seeds: mean over seeds (95 % Student t interval over seeds)")
    if "images" in kinds or any(group["n_seeds"] == 1 for group in groups):
        sentences.append(
            "One seed: accuracy (Wilson 95 % interval over images), which says nothing about the "
            "spread over seeds"
        )
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    sentences.append(f"Seeds: {', '.join(map(str, seeds))}" if seeds else "No seed is known")
    unknown_settings = {row["label"] for row in rows if not row["configuration"]}
    if any(g["label"] in unknown_settings and (g["n_seeds"] or 0) > 1 for g in groups):
        sentences.append(
            "Runs known by result files alone are grouped by method, recipe and network; their "
            "settings are not in these files"
        )
    if len({row["images_sha256"] for row in rows if row.get("images_sha256")}) > 1:
        sentences.append(
            "The pixels of these images are not the same in all rows: other photos under one name, "
            "or decoded by another library"
        )
    stopped = [row["run"] for row in rows if row.get("finished") is False]
    if stopped:
        sentences.append(f"Not trained to the end: {', '.join(stopped)}")
    hardware = list(dict.fromkeys(_hardware(row["environment"]) for row in rows))
    if len(hardware) > 1 and any("seconds" in column for column in columns):
        sentences.append("Times of different hardware do not compare")
    sentences.append(f"Hardware: {'; '.join(hardware)}")
    sentences.append("; ".join(dict.fromkeys(_versions(row["environment"]) for row in rows)))
    return ". ".join(sentences) + "."


def _hardware(environment: Mapping[str, Any]) -> str:
    cores = environment.get("cores")
    text = str(environment.get("processor") or "unknown processor")
    text += f", {counted(cores, 'core')}" if cores else ""
    return text + (f", {environment['gpu']}" if environment.get("gpu") else "")


def _versions(environment: Mapping[str, Any]) -> str:
    torch = (environment.get("packages") or {}).get("torch", "unknown")
    return f"cure {environment.get('cure')}, torch {torch}, Python {environment.get('python')}"


def _markdown(text: str) -> str:
    """Text with the characters escaped that Markdown or HTML would interpret."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)


def _flat_record(row: TableRow, names: Iterable[str]) -> TableRow:
    """The named values of a row for CSV, intervals in two parts."""
    record: TableRow = {}
    for name in names:
        value = row[name]
        if name.endswith("_interval"):
            ends = ("_low", "_high")
            limits = value or (None, None)
            record |= {
                name.removesuffix("_interval") + e: v for e, v in zip(ends, limits, strict=True)
            }
        elif isinstance(value, Mapping):
            for key, inner in flattened(value, f"{name}.").items():
                record[key] = " ".join(map(str, inner)) if isinstance(inner, list) else inner
        elif value is not None or name not in NESTED:
            record[name] = value
    return record
