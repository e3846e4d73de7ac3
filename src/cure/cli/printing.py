"""The terminal: progress, and results as tables."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cure.errors import counted

if TYPE_CHECKING:
    from rich.progress import TaskID

    from cure.experiments.compare import ResultTable as ComparisonTable

# Of several processes that share a run only the first one prints.
SEVERAL = os.environ.get("WORLD_SIZE", "1") != "1"
QUIET = SEVERAL and os.environ.get("RANK", "0") != "0"
# Written to a file or a pipe, a table keeps its rows whole.
out = Console(quiet=QUIET) if sys.stdout.isatty() else Console(width=160, quiet=QUIET)
err = Console(stderr=True, quiet=QUIET)


def say(text: str) -> None:
    """A line of text as it is, whatever the width of the terminal."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """As :func:`say`, on stderr."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def print_run_ended(path: Path, quiet: bool = True) -> None:
    """Where the run is, and what is next where the training has not said that already."""
    from cure.runs.folder import RunFolder

    say(f"run folder: {path}")
    if quiet or RunFolder.open(path).outcome() is None:
        say(f"next: cure evaluate {shlex.quote(str(path))}")


@contextmanager
def show_progress() -> Iterator[Any]:
    """A bar an attack on a terminal, a line an attack elsewhere."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bars: dict[str, TaskID] = {}
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:

        def tell(name: str, done: int, count: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=count)
            progress.update(bars[name], completed=done)
            if done >= count and not err.is_terminal:
                warn(f"{name}: done ({count:,})")

        yield tell


MOST_COLUMNS = 4
"""Attacks that a table of results has columns for; more have rows."""

MOST_CLASSES = 20
"""Classes that a table of results has rows for."""


def print_evaluation(result: dict[str, Any], kept: bool) -> None:
    """A result of ``cure evaluate``, and what casts doubt on it.

    Args:
        result: see docs/result-files.md.
        kept: whether the same command continues a result that is unfinished.
    """
    print_results([result])
    print_classes(result)
    if "float" in result:
        print_replay(result)
    print_distances(result)
    print_beyond(result)
    for check in result["diagnosis"]["checks"]:
        if check["status"] != "pass":
            warn(f"warning: {check['name']}: {check['meaning']}")
    present, known = result["data"]["classes_present"], len(result["data"]["classes"])
    if present < known:
        warn(
            f"warning: these {result['data']['n']:,} images hold only {present} of the {known} "
            "classes; the images may be sorted by class: leave out --limit"
        )
    if "unfinished" in result:
        print_unfinished(result, kept)
    print_estimates(result)
    for row in result.get("requirements", ()):
        if row["met"]:
            say(f"met: {row['requirement']} ({row['measured']})")
        else:
            warn(f"not met: {row['requirement']}: {row['measured']}")


def print_beyond(result: dict[str, Any]) -> None:
    """Unseen threats and certificates, where they were asked for."""
    from cure.runs.results import EvaluationRecord

    rows = EvaluationRecord.parse(result, "the result").beyond()
    if not rows:
        return
    table = Table(title="beyond the threat: accuracy in percent, 95 % interval")
    for heading in ("", "accuracy"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, part in rows:
        table.add_row(escape(name), _accuracy(part.content()))
    out.print(table)


def print_replay(result: dict[str, Any]) -> None:
    """The file beside the float network, on images made on the float network."""
    table = Table(
        title="images made on the float network, replayed on the file",
        caption="accuracy in percent; difference in points, images paired; 95 % intervals",
    )
    for heading in ("", "float network", escape(result["target"]), "difference"):
        table.add_column(heading, justify="right" if table.columns else "left")
    own = {"natural": result["float"]["natural"]} | result["float"]["attacks"]
    for name, part in result["float"]["differences"].items():
        low, high = part["interval"]
        theirs = result["natural"] if name == "natural" else result["attacks"][name]
        table.add_row(
            escape(name),
            _accuracy(own[name]),
            _accuracy(theirs),
            f"{part['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
        )
    out.print(table)


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """A table of results of one threat, one row each; intervals are Wilson's at 95 %."""
    threat, data = results[0]["threat"], results[0]["data"]
    shown = [result["attacks"] | result.get("unfinished", {}) for result in results]
    names = list(dict.fromkeys(name for attacks in shown for name in attacks))
    largest = results[0]["majority"]
    baseline = f"always naming '{largest['class']}', the largest class: {largest['accuracy']:.1f}"
    table = Table(
        title=escape(
            f"{data['name']} {data['split']}, {data['n']:,} images, "
            f"{threat['norm']} {threat['epsilon_text']}"
        ),
        caption=f"accuracy in percent, 95 % interval; {escape(baseline)}",
    )
    if len(results) == 1 and len(names) > MOST_COLUMNS:
        _by_attack(table, results[0], shown[0], baseline)
        return
    table.add_column("model")
    for name in ("natural", *names):
        table.add_column(name, justify="right")
    ratios = [name for name in ("cw", "autoattack") if name in names]
    for name in ratios:
        table.add_column(f"NRR {name}", justify="right")
    if ratios:
        table.caption = f"{table.caption}; NRR: harmonic mean of natural accuracy and that one"
    for result, attacks in zip(results, shown, strict=True):
        cells = [result["natural"], *(attacks.get(name) for name in names)]
        table.add_row(
            escape(result["target"]),
            *(_accuracy(cell) for cell in cells),
            *(_ratio(result["nrr"][name]) for name in ratios),
        )
    out.print(table)


def _by_attack(
    table: Table, result: dict[str, Any], attacks: dict[str, Any], baseline: str
) -> None:
    """One row an attack, where there are too many for columns."""
    table.caption = (
        "accuracy in percent, 95 % interval; the worst case is over all, image by image; "
        + escape(baseline)
    )
    for heading in (escape(result["target"]), "accuracy", "seconds"):
        table.add_column(heading, justify="left" if table.columns == [] else "right")
    rows = {"natural": result["natural"]} | attacks
    if "worst_case" in result:
        rows["worst case"] = result["worst_case"]
    for name, part in rows.items():
        table.add_row(escape(name), _accuracy(part), f"{part.get('seconds', 0):,.0f}")
    out.print(table)


def print_classes(result: dict[str, Any]) -> None:
    """Accuracy of each class and their mean; of many classes those with the lowest ones."""
    data = result["data"]
    parts = {"natural": result["natural"]} | result["attacks"]
    if len(parts) > MOST_COLUMNS and "worst_case" in result:
        parts = {"natural": result["natural"], "worst case": result["worst_case"]}
    last = [part["accuracy_by_class"] for part in parts.values()][-1]
    present = [k for k, count in enumerate(data["images_by_class"]) if count]
    shown = sorted(present, key=lambda k: last[k])[:MOST_CLASSES]
    what = "" if len(shown) == len(present) else f", the {len(shown)} lowest of {len(present)}"
    table = Table(title=f"accuracy by class in percent{what}; balanced: mean over the classes")
    for heading in ("class", "images", *parts):
        table.add_column(escape(heading), justify="left" if heading == "class" else "right")
    for k in sorted(shown) if not what else shown:
        figures = (f"{part['accuracy_by_class'][k]:.1f}" for part in parts.values())
        table.add_row(escape(data["classes"][k]), f"{data['images_by_class'][k]:,}", *figures)
    table.add_section()
    table.add_row(
        "balanced",
        f"{data['n']:,}",
        *(_accuracy(part, "balanced_") for part in parts.values()),
    )
    out.print(table)


def print_distances(result: dict[str, Any]) -> None:
    """Smallest changes and the curve over epsilon, where they were measured."""
    for name, part in result["attacks"].items():
        if "median_distance" in part:
            low, high = (_distance(limit) for limit in part["median_interval"])
            say(
                f"{name}: the median image is fooled by a change of "
                f"{_distance(part['median_distance'])} ({low} to {high})"
            )
    if "curve" not in result:
        return
    table = Table(title=f"accuracy over epsilon, {escape(result['curve']['attack'])}")
    for heading in ("epsilon", "accuracy"):
        table.add_column(heading, justify="right")
    for point in result["curve"]["points"]:
        table.add_row(point["epsilon_text"], _accuracy(point))
    out.print(table)


def _distance(length: float | None) -> str:
    return "none found" if length is None else f"{length:.4g}"


def print_verification(result: dict[str, Any]) -> None:
    """Whether a claim holds."""
    low, high = result["interval"]
    say(
        f"{result['correct']:,} of {result['n']:,} images are right: {result['accuracy']:.2f} % "
        f"({low:.1f} to {high:.1f}); largest change {result['largest_change']:.6f}, epsilon "
        f"{result['threat']['epsilon']:.6f} ({result['threat']['norm']})"
    )
    if result["outside"]:
        count = counted(result["outside"], "image")
        warn(f"the claim fails: {count} outside of the ball or of [0, 1], which proves nothing")
    elif not result["holds"]:
        warn(f"the claim fails: it says {result['claimed_correct']:,} right")


def print_unfinished(result: dict[str, Any], kept: bool) -> None:
    """Attacks that reached the time limit."""
    for name, part in result["unfinished"].items():
        low, high = part["bounds"]
        where = f" in {part['stopped_in']}" if part["stopped_in"] != name else ""
        warn(
            f"unfinished: {name} ran out of time{where}; {part['undecided']:,} of {part['n']:,} "
            f"images are undecided, so its accuracy lies between {low:.1f} and {high:.1f}"
        )
    if kept:
        warn("the same command goes on where this one stopped")


def print_estimates(result: dict[str, Any]) -> None:
    """Attacks that left images alone."""
    from cure.runs.results import AttackAccuracy

    for name, part in result["attacks"].items():
        estimate = (
            AttackAccuracy.model_validate(part).estimate() if "not_attacked" in part else None
        )
        if estimate is not None:
            warn(f"{name}: {estimate}")


def print_corruptions(result: dict[str, Any]) -> None:
    """A row a corruption with its severities and their mean; then groups and means."""
    data, severities = result["data"], result["settings"]["severities"]
    errors = result["mce"]
    table = Table(
        title=escape(f"{result['target']}: {data['name']} {data['split']}, {data['n']:,} images"),
        caption="accuracy in percent, 95 % interval"
        + ("; CE: error in percent of the baseline's" if errors else ""),
    )
    for heading in ("", "group"):
        table.add_column(heading)
    for heading in (*map(str, severities), "mean", *(["CE"] if errors else [])):
        table.add_column(heading, justify="right")
    blank = [""] * len(severities)
    if result["natural"] is not None:
        table.add_row("natural", "", *blank, _accuracy(result["natural"]))
    for name, cell in result["corruptions"].items():
        cells = [f"{cell['severities'][str(s)]['accuracy']:.1f}" for s in severities]
        own = [f"{errors['corruptions'][name]:.1f}"] if errors else []
        table.add_row(name, cell["group"], *cells, _accuracy(cell), *own)
    table.add_section()
    for group, cell in result["groups"].items():
        table.add_row(f"mean of {len(cell['over'])}", group, *blank, _accuracy(cell))
    cells = [f"{result['severities'][str(s)]['accuracy']:.1f}" for s in severities]
    table.add_row(f"mean of {len(result['corruptions'])}", "", *cells)
    for kind, title in (
        ("benchmark", "mean of the 15"),
        ("all", "mean of all 19"),
        ("cure", "CURE's 17, severity 3"),
    ):
        cell = result["means"][kind]
        own = [f"{errors[kind]:.1f}"] if errors and errors.get(kind) is not None else []
        if cell is not None:
            table.add_row(title, "", *blank, _accuracy(cell), *own)
    out.print(table)
    for name, reason in result["settings"]["left_out"].items():
        warn(f"left out: {name} ({reason})")


def print_diagnosis(result: dict[str, Any]) -> None:
    """A line a check with its numbers, then what is not in order and what to do about it."""
    table = Table(
        title=escape(
            f"{result['target']}: {result['verdict']} ({result['n']:,} images of "
            f"{result['data']['name']} {result['data']['split']}, "
            f"{result['norm']} {result['epsilon_text']})"
        )
    )
    for heading in ("check", "status", "measured"):
        table.add_column(heading)
    colours = {"pass": "green", "warn": "yellow", "fail": "red"}
    for item in result["checks"]:
        numbers = _in_words(item["measured"])
        status = f"[{colours[item['status']]}]{item['status']}[/]"
        table.add_row(item["name"], status, escape(numbers))
    out.print(table)
    for item in result["checks"]:
        if item["status"] != "pass":
            line = f"{item['status']} {item['name']}: {item['meaning']}"
            say(line)
    for name, why in result["left_out"].items():
        line = f"left out {name}: {why}"
        say(line)


def _in_words(measured: dict[str, Any]) -> str:
    """Numbers with their names in a line, without those that are not there."""
    words = []
    for name, value in measured.items():
        if isinstance(value, dict):
            words += [f"{name.replace('_', ' ')} ({_in_words(value)})"]
        elif value is not None and value != []:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            words += [f"{name.replace('_', ' ')} {shown}"]
    return ", ".join(words)


def print_table(shown: ComparisonTable) -> None:
    """Runs side by side."""
    table = Table(caption=escape(shown.caption))
    for number, heading in enumerate(shown.header()):
        table.add_column(escape(heading), justify="right" if number else "left")
    for cells in shown.cells():
        table.add_row(*map(escape, cells))
    out.print(table)


def _accuracy(cell: dict[str, Any] | None, kind: str = "") -> str:
    if cell is None:
        return "-"
    if "bounds" in cell:
        low, high = cell["bounds"]
        return f"unfinished: {low:.1f} to {high:.1f}"
    low, high = cell[f"{kind}interval"]
    return f"{cell[f'{kind}accuracy']:.1f} ({low:.1f}-{high:.1f})"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
