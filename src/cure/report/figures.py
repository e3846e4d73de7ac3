"""The drawings of a page; each network keeps its colour, mark and line in all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from cure.experiments.compare.rows import TableRow
from cure.methods import METHODS
from cure.report.accuracies import attack_name, measured_attacks
from cure.report.components import Cell, Figure, Grid, between, label, percent, written
from cure.report.loader import Content, Entry, number, time_of
from cure.utils.plotting import INK, canvas, picture, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

MOST_NAMES = 6
"""Networks that a drawing names itself; more are numbered as in the list of networks."""

PAPER = Path(__file__).with_name("paper.json")

Place = Mapping[str, int]
Curve = Sequence[tuple[float, float]]
Spot = tuple[float, float, float]
"""A value, and the limits of its interval."""
Size = tuple[float, float]
Spots = tuple[float, Spot]

_WIDTH, _HEIGHT = 4.4, 3.1
_MIDDLE = 5.2
"""Inches; a phone still shows words of such a drawing at a size to read."""
_LEADER: dict[str, object] = {"arrowstyle": "-", "color": INK, "alpha": 0.35, "linewidth": 0.5}


def paper() -> Content:
    """The rows of the paper that results on CIFAR-10 are drawn beside, with their source."""
    content: Content = json.loads(PAPER.read_text(encoding="utf-8"))
    return content


def _named(figure: Drawing, axes: Axes, count: int) -> None:
    """Say which series is which: below the axes, or by the numbers that stand at the marks."""
    handles, labels = axes.get_legend_handles_labels()
    if count > 1 and count <= MOST_NAMES and handles:
        shown = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=2 if count > 2 or len(labels) > 2 else len(labels),
            frameon=False,
            labelcolor=INK,
            fontsize=9,
        )
        for text in shown.get_texts():
            text.set_parse_math(False)


def _number_marks(axes: Axes, marks: Mapping[int, tuple[float, float]], size: Size) -> None:
    """The number of each network beside its mark, where there are too many for a legend.

    Args:
        axes: with its limits set.
        marks: (x, y) by the number of the network, 0 the first.
        size: of the axes in points, about.
    """
    if len(marks) <= MOST_NAMES:
        return
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    across, up = size[0] / (right - left), size[1] / (high - low)
    spots = [(x * across, y * up) for x, y in marks.values()]
    taken: list[tuple[float, float]] = []
    for (index, mark), (x, y) in zip(marks.items(), spots, strict=True):
        # Around the mark, further away as long as another number or mark is there.
        around = (
            (x + reach * math.cos(turn), y + reach * math.sin(turn))
            for reach in range(10, 90, 5)
            for turn in (0.6, -0.6, 2.5, -2.5, 1.57, -1.57, 0.0, 3.14)
        )
        free = (
            spot
            for spot in around
            if all(abs(spot[0] - a) > 11 or abs(spot[1] - b) > 9 for a, b in taken)
            and all(abs(spot[0] - a) > 8 or abs(spot[1] - b) > 7 for a, b in spots)
        )
        at = next(free, (x + 8, y + 8))
        taken.append(at)
        axes.annotate(
            str(index + 1),
            mark,
            xytext=(at[0] - x, at[1] - y),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="center",
            fontsize=7.5,
            color=INK,
            arrowprops={**_LEADER, "shrinkA": 0, "shrinkB": 3},
        )


def _number_ends(axes: Axes, ends: Mapping[int, tuple[float, float]]) -> None:
    """The number of each network at the end of its line; as :func:`_number_marks`."""
    if len(ends) <= MOST_NAMES:
        return
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for end in sorted({x for x, _ in ends.values()}):
        here = [(str(index + 1), x, y) for index, (x, y) in ends.items() if x == end]
        ordered, heights = _spread(here, (high - low) / 36)
        over = max(0.0, heights[-1] - high)
        for (name, x, y), height in zip(ordered, heights, strict=True):
            axes.annotate(
                name,
                (x, y),
                xytext=(x + 0.07 * (right - left), height - over),
                verticalalignment="center",
                fontsize=7,
                color=INK,
                arrowprops={**_LEADER, "shrinkA": 0, "shrinkB": 2},
            )


def _points_with_bars(
    axes: Axes,
    index: int,
    name: str,
    across: Sequence[Spot],
    up: Sequence[Spot],
    size: float = 5.5,
) -> None:
    """The marks of one network, with intervals in one direction or in both."""
    look = series(index)

    def reach(spots: Sequence[Spot]) -> list[list[float]]:
        # A limit that rounding put on the wrong side of its value is none.
        below = [max(0.0, value - low) for value, low, _ in spots]
        return [below, [max(0.0, high - value) for value, _, high in spots]]

    x, y = [value for value, _, _ in across], [value for value, _, _ in up]
    axes.errorbar(
        x, y, reach(up), reach(across), fmt="none", ecolor=look["color"], elinewidth=1.1, capsize=2
    )
    axes.plot(
        x,
        y,
        linestyle="none",
        color=look["color"],
        marker=look["marker"],
        markersize=size,
        label=label(name),
    )


def _spot(value: float, interval: Sequence[float] | None = None) -> Spot:
    low, high = interval or (value, value)
    return float(value), float(low), float(high)


def _tall(count: int) -> float:
    """Height of a drawing whose legend names so many networks below the axes."""
    if count > MOST_NAMES:
        return _HEIGHT + 0.05 * count
    return _HEIGHT + (0.19 * ((count + 1) // 2) if count > 1 else 0)


# Accuracies.


def by_attack(rows: Sequence[TableRow], place: Place) -> Figure | None:
    """Accuracy on natural images and under each attack, with intervals."""
    attacks = {name for row in rows for name in row["attack_settings"]}
    names = ["natural", *_in_order(attacks)]
    if len(names) < 3 or len(rows) > MOST_NAMES:
        return None
    figure, (axes,) = canvas(width=_MIDDLE, height=1.1 + 0.3 * len(names) * max(1, len(rows) / 3))
    for offset, row in enumerate(rows):
        having = [(at, name) for at, name in enumerate(names) if row.get(name) is not None]
        _points_with_bars(
            axes,
            place[row["run"]],
            row["run"],
            [_spot(row[name], row[f"{name}_interval"]) for _, name in having],
            [_spot(at + 0.6 * ((offset + 0.5) / len(rows) - 0.5)) for at, _ in having],
        )
    axes.set_yticks(range(len(names)), [label(attack_name(n)) for n in names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(-2, 100)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel("images right (%), with 95 % interval")
    _named(figure, axes, len(rows))
    said = "; ".join(
        f"{row['run']}: "
        + ", ".join(f"{attack_name(n)} {percent(row[n])}" for n in names if row.get(n) is not None)
        for row in rows
    )
    title = "Accuracy on natural images and under each attack"
    return Figure(
        picture(
            figure,
            "by-attack",
            title,
            f"Accuracy falls from natural images to the strongest attack. {said}.",
        )
    )


def _in_order(attacks: set[str]) -> list[str]:
    return measured_attacks({"attack_settings": dict.fromkeys(attacks)})


def trade_off(rows: Sequence[TableRow], place: Place) -> tuple[Figure, str] | None:
    """Natural against robust accuracy, and a sentence on what is drawn; None without an attack."""
    having: dict[str, list[TableRow]] = {}
    for row in rows:
        for name in row["attack_settings"]:
            having.setdefault(name, []).append(row)
    if not having:
        return None
    order = _in_order(set(having))
    attack = max(having, key=lambda name: (len(having[name]), order.index(name)))
    shown = having[attack]
    beside = _paper_rows(shown, attack)
    figure, (axes,) = canvas(width=_MIDDLE, height=4.2)
    axes.plot([0, 100], [0, 100], color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
    for row in shown:
        index = place[row["run"]]
        across = _spot(row["natural"], row["natural_interval"])
        up = _spot(row[attack], row[f"{attack}_interval"])
        _points_with_bars(axes, index, row["run"], [across], [up], 7)
    for name, x, y in beside:
        mine = name == "CURE"
        axes.plot(
            [x],
            [y],
            marker="D",
            markersize=5.5,
            markerfacecolor="none",
            markeredgecolor=INK,
            markeredgewidth=1.6 if mine else 0.8,
            linestyle="none",
            label="the paper's, ResNet-18" if mine else None,
        )
    highest = [float(row[f"{attack}_interval"][1]) for row in shown] + [y for _, _, y in beside]
    top = max([*highest, 10.0]) * 1.12
    for (name, x, y), height in zip(*_spread(beside, top / 26), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(max(x for _, x, _ in beside) + 2.5, height),
            verticalalignment="center",
            fontsize=8,
            color=INK,
            fontweight="bold" if name == "CURE" else "normal",
            arrowprops=_LEADER,
        )
    lowest = [float(row["natural_interval"][0]) for row in shown] + [x for _, x, _ in beside]
    axes.set_xlim(max(0.0, min(lowest) - 6), 100)
    axes.set_ylim(-top / 40, top)
    marks = {place[row["run"]]: (float(row["natural"]), float(row[attack])) for row in shown}
    _number_marks(axes, marks, (310, 255))
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.set_xlabel("right on natural images (%)")
    axes.set_ylabel(f"right under {label(attack_name(attack))} (%)", parse_math=False)
    _named(figure, axes, max(2, len(shown)) if beside else len(shown))
    counts = sorted({int(row[f"{attack}_n"]) for row in shown})
    said = (
        f"Right and high is good. Bars are 95 % intervals; under {attack_name(attack)}, "
        f"n = {' or '.join(f'{n:,}' for n in counts)} images."
    )
    if beside:
        said += " Hollow diamonds are rows of the paper, not measured here."
    table = [
        [
            Cell(row["run"], series=place[row["run"]]),
            Cell("here"),
            Cell(written(row["natural"]), f"({between(row['natural_interval'])})"),
            Cell(written(row[attack]), f"({between(row[f'{attack}_interval'])})"),
        ]
        for row in shown
    ]
    table += [
        [Cell(name), Cell("the paper"), Cell(written(x, 2)), Cell(written(y, 2))]
        for name, x, y in beside
    ]
    header = ["network", "measured", "natural (%)", f"{attack_name(attack)} (%)"]
    drawn = picture(
        figure,
        "trade-off",
        f"Natural accuracy against accuracy under {attack_name(attack)}",
        said
        + f" {len(shown)} networks of this page"
        + (f" and {len(beside)} rows of the paper." if beside else "."),
    )
    return Figure(drawn, Grid("The numbers", header, table, words=2, folded=True)), said


def _paper_rows(rows: Sequence[TableRow], attack: str) -> list[tuple[str, float, float]]:
    """The paper's rows on these images under this attack; none for other images."""
    first = rows[0]
    same = (
        PurePath(str(first["data"])).name == "cifar10"
        and first["split"] == "test"
        and (first["norm"], round(float(first["epsilon"]), 4)) == ("Linf", round(8 / 255, 4))
    )
    known = paper()
    if not same or attack not in known["columns"]:
        return []
    natural, robust = known["columns"].index("natural"), known["columns"].index(attack)
    return [
        (name, row[natural], row[robust])
        for name, row in known["rows"].items()
        if row[robust] is not None
    ]


def _spread(
    named: Sequence[tuple[str, float, float]], apart: float
) -> tuple[list[tuple[str, float, float]], list[float]]:
    """The points from the lowest up, and heights for their names that do not overlap."""
    ordered = sorted(named, key=lambda point: point[2])
    heights: list[float] = []
    for _, _, y in ordered:
        heights.append(max(y, heights[-1] + apart) if heights else y)
    # The pile grew upwards only: half of that is given back.
    lift = (heights[-1] - ordered[-1][2]) / 2 if ordered else 0.0
    return ordered, [height - lift for height in heights]


# Training.


def learning(entries: Sequence[Entry], place: Place) -> list[Figure]:
    """What training recorded, over its epochs."""
    parts: dict[str, tuple[str, str, Callable[[Content], float | None]]] = {
        "loss": ("Training loss", "mean training loss", lambda r: r["train"].get("loss")),
        "validation-natural": (
            "Natural accuracy, validation images",
            "right on natural images (%)",
            lambda r: r["validation"].get("natural"),
        ),
        "validation-robust": (
            "Robust accuracy, validation images",
            "right under PGD (%)",
            lambda r: r["validation"].get("robust"),
        ),
        "learning-rate": ("Learning rate", "learning rate", lambda r: r.get("learning_rate")),
    }
    figures = []
    for name, (title, unit, read) in parts.items():
        curves = {
            entry.name: [
                (r["epoch"], value) for r in entry.metrics if (value := read(r)) is not None
            ]
            for entry in entries
        }
        curves = {key: points for key, points in curves.items() if points}
        if curves:
            figures.append(_curves(f"learning-{name}", title, curves, place, "epoch", unit))
    return figures


def _curves(
    name: str,
    title: str,
    curves: Mapping[str, Curve],
    place: Place,
    x: str,
    y: str,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """One line a network."""
    figure, (axes,) = canvas(width=_WIDTH, height=_tall(len(curves)))
    for key, curve in curves.items():
        look = series(place[key])
        across, up = zip(*curve, strict=True)
        # Of many epochs a mark each would be a blot.
        every = max(1, len(curve) // 8)
        axes.plot(across, up, label=label(key), markevery=every, **look)
        if intervals and len(curves) <= MOST_NAMES:
            low, high = zip(*intervals[key], strict=True)
            axes.fill_between(across, low, high, color=look["color"], alpha=0.14, linewidth=0)
    if mark is not None:
        at, text = mark
        axes.axvline(at, color=INK, alpha=0.5, linewidth=0.9, linestyle="--")
        axes.annotate(
            text,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
            parse_math=False,
        )
    if x == "epoch":
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if "%" in y:
        axes.set_ylim(bottom=0)
    _number_ends(axes, {place[key]: curve[-1] for key, curve in curves.items()})
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.set_xlabel(x)
    axes.set_ylabel(y, parse_math=False)
    axes.set_title(title, loc="left", parse_math=False)
    _named(figure, axes, len(curves))
    ends = "; ".join(
        f"{key}: {written(curve[0][1], 3)} at {written(curve[0][0], 2)}, "
        f"{written(curve[-1][1], 3)} at {written(curve[-1][0], 2)}"
        for key, curve in list(curves.items())[:MOST_NAMES]
    )
    points = sorted({point for curve in curves.values() for point, _ in curve})
    rows = []
    for key, curve in curves.items():
        known = dict(curve)
        cells = [Cell(written(known.get(point), 3)) for point in points]
        rows.append([Cell(key, series=place[key]), *cells])
    header = ["network", *(written(point, 0 if x == "epoch" else 2) for point in points)]
    # A table for who cannot see the lines; of hundreds of epochs nobody reads one.
    data = Grid(f"The numbers, by {x}", header, rows, folded=True) if len(points) <= 40 else None
    drawn = picture(figure, name, title, f"{y} by {x}. {ends}.")
    return Figure(drawn, data)


def best_and_last(entries: Sequence[Entry], place: Place) -> tuple[Figure, list[str]] | None:
    """Robust validation accuracy at its best epoch and at the last one, and a sentence each."""
    rows = []
    for entry in entries:
        curve = [
            (int(r["epoch"]), r["validation"]["robust"])
            for r in entry.metrics
            if "robust" in r["validation"]
        ]
        if len(curve) > 1 and not _natural(entry):
            best = max(curve, key=lambda point: point[1])
            rows.append((entry, best, curve[-1]))
    if not rows:
        return None
    figure, (axes,) = canvas(width=_MIDDLE, height=1.1 + 0.32 * len(rows))
    for down, (entry, (_, best), (_, last)) in enumerate(rows):
        look = series(place[entry.name])
        axes.plot([last, best], [down, down], color=look["color"], linewidth=2.2)
        axes.plot([best], [down], color=look["color"], marker="o", markersize=7, linestyle="none")
        axes.plot(
            [last],
            [down],
            color=look["color"],
            marker="o",
            markersize=7,
            markerfacecolor="none",
            linestyle="none",
        )
    names = [f"{place[entry.name] + 1} {label(entry.name)}" for entry, _, _ in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel("right under PGD on validation images (%)\nfilled: best epoch, hollow: last")
    said, cells = [], []
    for entry, (epoch, best), (end, last) in rows:
        gap = best - last
        said.append(
            f"{entry.name}: best {percent(best)} after epoch {epoch}, last {percent(last)} after "
            f"epoch {end}{_of_validation(entry)}: "
            + ("nothing was lost." if gap == 0 else f"{written(gap)} points were lost.")
        )
        cells.append(
            [
                Cell(entry.name, series=place[entry.name]),
                Cell(str(epoch)),
                Cell(written(best)),
                Cell(str(end)),
                Cell(written(last)),
                Cell(written(gap)),
            ]
        )
    header = ["network", "best epoch", "best (%)", "last epoch", "last (%)", "gap (points)"]
    data = Grid("The numbers", header, cells, sortable=len(cells) > 1, folded=True)
    title = "Robust validation accuracy, best epoch and last"
    return Figure(picture(figure, "best-last", title, " ".join(said)), data), said


def _natural(entry: Entry) -> bool:
    """Whether its method is not after robust accuracy, so that there is none to lose."""
    name = (entry.config.get("method") or {}).get("name")
    return isinstance(name, str) and name in METHODS and METHODS[name].selection == "natural"


def _of_validation(entry: Entry) -> str:
    count = number((entry.config.get("data") or {}).get("validation"))
    return f" ({count:,.0f} validation images)" if count is not None and count > 1 else ""


# Accuracy over epsilon.


def over_epsilon(entries: Sequence[Entry], place: Place) -> tuple[list[Figure], list[str]]:
    """Accuracy over the size of the change, a drawing for each attack, norm and split."""
    found: dict[tuple[str, str, str], dict[str, tuple[list[Spots], Content]]] = {}
    for entry in entries:
        for result in entry.source.results:
            points = _points(result)
            if points:
                of = (result["curve"]["attack"], result["threat"]["norm"], result["data"]["split"])
                # The newest result stands; they come oldest first.
                found.setdefault((of[0], str(of[1]), str(of[2])), {})[entry.name] = (points, result)
    figures, said = [], []
    for serial, ((attack, norm, split), of_entry) in enumerate(found.items()):
        scale, unit = (255.0, "/255") if norm == "Linf" else (1.0, "")
        curves = {
            name: [(x * scale, y) for x, (y, _, _) in points]
            for name, (points, _) in of_entry.items()
        }
        limits = {
            name: [(low, high) for _, (_, low, high) in points]
            for name, (points, _) in of_entry.items()
        }
        results = [result for _, result in of_entry.values()]
        at = float(results[-1]["threat"]["epsilon"]) * scale
        figures.append(
            _curves(
                f"epsilon-{serial}",
                f"Accuracy under {label(attack_name(attack))}, {label(norm)}",
                curves,
                place,
                "epsilon (1/255)" if unit else f"epsilon ({label(norm)})",
                "images right (%)",
                limits,
                (at, f"ε = {at:.3g}{unit}"),
            )
        )
        counts = sorted({int(result["natural"]["n"]) for result in results})
        n = " or ".join(f"{count:,}" for count in counts)
        for name, curve in curves.items():
            zero = next((x for x, y in curve if y == 0), None)
            said.append(
                f"{name}: {attack_name(attack)} leaves "
                + (
                    f"{percent(curve[-1][1])} right at the largest change tried, so it may not "
                    "have found all there is"
                    if zero is None
                    else f"no image right from ε = {zero:.3g}{unit} on"
                )
                + f" ({split} images, n = {n})."
            )
    return figures, said


def _points(result: Content) -> list[Spots] | None:
    """The curve of a result from epsilon 0 on; None when there is none, or no whole one."""
    try:
        parts = [(0.0, result["natural"])]
        parts += [(float(part["epsilon"]), part) for part in result["curve"]["points"]]
        if not isinstance(result["curve"]["attack"], str):
            return None
        return [(x, _spot(part["accuracy"], part["interval"])) for x, part in parts]
    except (KeyError, TypeError, ValueError):
        return None


# Corruptions.


def corrupted(entries: Sequence[Entry], place: Place) -> tuple[list[Figure], list[Grid], list[str]]:
    """Accuracy on corrupted images: by group, by severity, and each corruption in a table."""
    newest = {e.name: max(e.corruptions, key=time_of) for e in entries if e.corruptions}
    if not newest:
        return [], [], []
    groups = list(dict.fromkeys(group for r in newest.values() for group in r["groups"]))
    figure, (axes,) = canvas(
        width=_MIDDLE, height=1.2 + 0.13 * (len(groups) + 1) * (len(newest) + 2)
    )
    names = ["natural", *groups]
    table = []
    for offset, (name, result) in enumerate(newest.items()):
        cells = [result["natural"], *(result["groups"].get(group) for group in groups)]
        known = [(at, cell) for at, cell in enumerate(cells) if cell is not None]
        across = [_spot(cell["accuracy"], cell["interval"]) for _, cell in known]
        up = [_spot(at + 0.7 * ((offset + 0.5) / len(newest) - 0.5)) for at, _ in known]
        _points_with_bars(axes, place[name], name, across, up)
        if len(newest) > MOST_NAMES:
            for right, at in zip(across, up, strict=True):
                axes.annotate(
                    str(place[name] + 1),
                    (right[0], at[0]),
                    xytext=(5, -3),
                    textcoords="offset points",
                    fontsize=7,
                    color=INK,
                )
        line = [Cell(name, series=place[name])]
        for cell in cells:
            line.append(
                Cell(written(None))
                if cell is None
                else Cell(written(cell["accuracy"]), f"({between(cell['interval'])})")
            )
        table.append(line)
    axes.set_yticks(range(len(names)), [label(n) for n in names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_xlabel("images right (%), mean of a group, with 95 % interval")
    _named(figure, axes, len(newest))
    said = []
    for name, result in newest.items():
        data, mean = result["data"], result["means"].get("all") or result["means"].get("benchmark")
        over = (
            f"on average {percent(mean['accuracy'])} ({between(mean['interval'])})"
            if mean
            else (f"under {len(result['corruptions'])} corruptions")
        )
        worst = min(result["corruptions"].items(), key=lambda item: float(item[1]["accuracy"]))
        said.append(
            f"{name}: {over}; worst is {worst[0].replace('_', ' ')} with "
            f"{percent(worst[1]['accuracy'])} ({data['name']}, n = {int(data['n']):,} images, "
            f"severities {', '.join(map(str, result['settings']['severities']))})."
        )
    title = "Accuracy on natural and on corrupted images, by group"
    data_table = Grid("The numbers, by group", ["network", *names], table, folded=True)
    figures = [Figure(picture(figure, "corruptions", title, " ".join(said)), data_table)]
    return figures, [_each_corruption(newest)], said


def _each_corruption(newest: Mapping[str, Content]) -> Grid:
    """Every corruption, a row each: the mean over its severities."""
    names = list(dict.fromkeys(name for r in newest.values() for name in r["corruptions"]))
    rows = []
    for name in names:
        cells = [result["corruptions"].get(name) for result in newest.values()]
        group = next(cell["group"] for cell in cells if cell is not None)
        line = [Cell(name.replace("_", " ")), Cell(group)]
        for cell in cells:
            line.append(
                Cell(written(None), order=-1.0)
                if cell is None
                else Cell(
                    written(cell["accuracy"]),
                    f"({between(cell['interval'])})",
                    float(cell["accuracy"]),
                )
            )
        rows.append(line)
    header = ["corruption", "group", *newest]
    caption = "Each corruption: images right in percent, mean over severities (95 % interval)"
    return Grid(caption, header, rows, words=2, sortable=True, folded=True)
