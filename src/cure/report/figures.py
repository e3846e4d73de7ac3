"""The figures of a page; each network keeps its colour, marker and line in all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from cure.analysis.render import accuracy_series
from cure.attacks.registry import attack_label
from cure.errors import counted
from cure.experiments.compare.rows import TableRow
from cure.experiments.compare.sources import no_place
from cure.experiments.tradeoff import chart as tradeoff_chart
from cure.methods import METHODS
from cure.report.accuracies import measured_attacks
from cure.report.components import Cell, Figure, Grid, accuracy_cell, percent, share_cell, written
from cure.report.loader import Entry
from cure.runs.records import EpochMetrics, TradeoffPoint, TradeoffRecord
from cure.runs.results import EvaluationRecord, ResultRecord, Share
from cure.utils.plotting import Chart, Panel, Series

PAPER = Path(__file__).with_name("paper.json")

Place = Mapping[str, int]
"""Number of each network of the page, from 0, by name."""
Curve = Sequence[tuple[float, float]]

_SMALL, _MIDDLE = 4.4, 5.2
"""Inches; text of such figures can be read on a phone."""
_MOST_COLUMNS = 40


def paper() -> dict[str, Any]:
    """Rows of the paper that results on CIFAR-10 are drawn beside, with their source."""
    content: dict[str, Any] = json.loads(PAPER.read_text(encoding="utf-8"))
    return content


def _label(name: str, place: Place) -> str:
    return f"{place[name] + 1} {name}"


# Accuracies.


def by_attack(rows: Sequence[TableRow], place: Place) -> Figure | None:
    """Accuracy on natural images and under each attack, with intervals."""
    names = ["natural", *_in_order({name for row in rows for name in row["attack_settings"]})]
    if len(names) < 3:
        return None
    series = [
        Series(
            _label(row["run"], place),
            range(len(names)),
            [row.get(name) for name in names],
            [row.get(f"{name}_interval") for name in names],
            style=place[row["run"]],
            line=False,
        )
        for row in rows
    ]
    panel = Panel(
        series,
        y="images classified correctly, %, with 95 % interval",
        categories=[attack_label(name) for name in names],
        horizontal=True,
        limits=(-2, 100),
    )
    title = "Accuracy on natural images and under each attack"
    said = "; ".join(
        f"{row['run']}: "
        + ", ".join(f"{attack_label(n)} {percent(row[n])}" for n in names if row.get(n) is not None)
        for row in rows
    )
    height = 0.9 + 0.3 * len(names) * max(1, len(rows) / 3)
    return Figure(Chart("by-attack", title, said, [panel], width=_MIDDLE, height=height).draw())


def _in_order(attacks: set[str]) -> list[str]:
    return measured_attacks({"attack_settings": dict.fromkeys(attacks)})


def trade_off(rows: Sequence[TableRow], place: Place) -> tuple[Figure, bool] | None:
    """Natural against robust accuracy, and whether rows of the paper are drawn beside it.

    None where nothing was measured under attack.
    """
    having: dict[str, list[TableRow]] = {}
    for row in rows:
        for name in row["attack_settings"]:
            having.setdefault(name, []).append(row)
    if not having:
        return None
    order = _in_order(set(having))
    attack = max(having, key=lambda name: (len(having[name]), order.index(name)))
    shown, beside = having[attack], _paper_rows(having[attack], attack)
    lowest = [float(row["natural_interval"][0]) for row in shown] + [x for _, x, _ in beside]
    highest = [float(row[f"{attack}_interval"][1]) for row in shown] + [y for _, _, y in beside]
    low = max(0.0, min(lowest) - 6)
    series = [
        Series(
            _label(row["run"], place),
            [row["natural"]],
            [row[attack]],
            [row[f"{attack}_interval"]],
            [row["natural_interval"]],
            style=place[row["run"]],
            line=False,
        )
        for row in shown
    ]
    if beside:
        across, up = [x for _, x, _ in beside], [y for _, _, y in beside]
        series.append(Series("the paper, ResNet-18", across, up, style=7, line=False))
    series.append(Series("natural = robust", [low, 100], [low, 100], reference=True))
    panel = Panel(
        series,
        "natural accuracy, %",
        f"accuracy under {attack_label(attack)}, %",
        limits=(0, 1.12 * max([*highest, 10.0])),
        names=[(x, y, name) for name, x, y in beside],
    )
    title = f"Natural accuracy against accuracy under {attack_label(attack)}"
    said = "; ".join(
        f"{row['run']}: {percent(row['natural'])} natural, {percent(row[attack])} under attack"
        for row in shown
    )
    table = [
        [
            Cell(row["run"], series=place[row["run"]]),
            Cell("here"),
            *(accuracy_cell(row[n], row[f"{n}_interval"]) for n in ("natural", attack)),
        ]
        for row in shown
    ]
    table += [
        [Cell(name), Cell("the paper"), Cell(written(x, 2)), Cell(written(y, 2))]
        for name, x, y in beside
    ]
    header = ["network", "from", "natural (%)", f"{attack_label(attack)} (%)"]
    data = Grid("The numbers", header, table, words=2, folded=True)
    drawn = Chart("trade-off", title, said, [panel], width=_MIDDLE, height=4.0).draw()
    return Figure(drawn, data), bool(beside)


def between_weights(record: TradeoffRecord, series: int) -> Figure:
    """The points that ``cure tradeoff`` chose a network from."""

    def row(point: TradeoffPoint) -> list[Cell]:
        shares = zip(record.ends, point.shares, strict=True)
        mixed = ", ".join(f"{share:.2f} {end}" for end, share in shares if share)
        low_natural, high_natural = point.natural_interval
        low_robust, high_robust = point.robust_interval
        return [
            Cell(mixed, series=series if point == record.chosen else None),
            Cell(written(point.natural), f"{written(low_natural)} to {written(high_natural)}"),
            Cell(written(point.robust), f"{written(low_robust)} to {written(high_robust)}"),
        ]

    header = ["share of each end", "natural (%)", f"PGD-{record.steps} (%)"]
    rows = [row(point) for point in record.points]
    return Figure(tradeoff_chart(record).draw(), Grid("The numbers", header, rows, folded=True))


def _paper_rows(rows: Sequence[TableRow], attack: str) -> list[tuple[str, float, float]]:
    """Rows of the paper on these images under this attack; none for other images."""
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


# Training.


def learning(entries: Sequence[Entry], place: Place) -> list[Figure]:
    """What training recorded, over its epochs."""
    parts: dict[str, tuple[str, str, Callable[[EpochMetrics], float | None]]] = {
        "loss": ("Training loss", "mean training loss", lambda m: m.train.get("loss")),
        "validation-natural": (
            "Natural accuracy, validation images",
            "natural accuracy, %",
            lambda m: m.validation.natural if m.validation else None,
        ),
        "validation-robust": (
            "Robust accuracy, validation images",
            "accuracy under PGD, %",
            lambda m: m.validation.robust if m.validation else None,
        ),
        "learning-rate": ("Learning rate", "learning rate", lambda m: m.learning_rate),
    }
    figures = []
    for name, (title, unit, read) in parts.items():
        curves: dict[str, Curve] = {
            entry.name: [(m.epoch, value) for m in entry.metrics if (value := read(m)) is not None]
            for entry in entries
        }
        curves = {key: curve for key, curve in curves.items() if curve}
        if curves:
            series = [
                Series(
                    _label(key, place),
                    [x for x, _ in curve],
                    [y for _, y in curve],
                    style=place[key],
                )
                for key, curve in curves.items()
            ]
            figures.append(_curves(f"learning-{name}", title, curves, series, place, "epoch", unit))
    return figures


def _curves(
    name: str,
    title: str,
    curves: Mapping[str, Curve],
    series: Sequence[Series],
    place: Place,
    x: str,
    y: str,
    marks: Sequence[tuple[float, str]] = (),
) -> Figure:
    """A line for each network, and the numbers in a table."""
    limits = (0.0, None) if "%" in y else (None, None)
    panel = Panel(series, x, y, limits=limits, marks=marks, title=title)
    ends = "; ".join(
        f"{key}: {written(curve[0][1], 3)} at {curve[0][0]:.3g}, {written(curve[-1][1], 3)} at "
        f"{curve[-1][0]:.3g}"
        for key, curve in curves.items()
    )
    at = sorted({point for curve in curves.values() for point, _ in curve})
    rows = [
        [Cell(key, series=place[key]), *(Cell(written(dict(curve).get(p), 3)) for p in at)]
        for key, curve in curves.items()
    ]
    header = ["network", *(written(point, 0 if x == "epoch" else 2) for point in at)]
    data = None
    if len(at) <= _MOST_COLUMNS:
        data = Grid(f"The numbers, by {x}", header, rows, folded=True)
    said = f"{y} by {x}. {ends}."
    return Figure(Chart(name, title, said, [panel], width=_SMALL, height=2.9).draw(), data)


def best_and_last(entries: Sequence[Entry], place: Place) -> tuple[Figure, list[str]] | None:
    """Robust validation accuracy at its best epoch and at the last one, and a sentence each."""
    rows = []
    for entry in entries:
        curve = [(m.epoch, m.validation.robust) for m in entry.metrics if m.validation is not None]
        if len(curve) > 1 and not _natural(entry):
            rows.append((entry, max(curve, key=lambda point: point[1]), curve[-1]))
    if not rows:
        return None
    series = [
        Series(label, range(len(rows)), values, line=False)
        for label, values in (
            ("best epoch", [best for _, (_, best), _ in rows]),
            ("last epoch", [last for _, _, (_, last) in rows]),
        )
    ]
    panel = Panel(
        series,
        y="accuracy under PGD on validation images, %",
        categories=[_label(entry.name, place) for entry, _, _ in rows],
        horizontal=True,
        limits=(0, None),
    )
    said, cells = [], []
    for entry, (epoch, best), (end, last) in rows:
        count = entry.validation_images()
        images = "" if count is None else f" ({counted(count, 'validation image')})"
        said.append(
            f"{entry.name}: best {percent(best)} after epoch {epoch}, last {percent(last)} after "
            f"epoch {end}{images}: {written(best - last)} points were lost."
        )
        cells.append(
            [
                Cell(entry.name, series=place[entry.name]),
                *map(Cell, (str(epoch), written(best), str(end), written(last))),
                Cell(written(best - last)),
            ]
        )
    header = ["network", "best epoch", "best (%)", "last epoch", "last (%)", "gap (points)"]
    data = Grid("The numbers", header, cells, sortable=len(cells) > 1, folded=True)
    title = "Robust validation accuracy, best epoch and last"
    height = 0.9 + 0.32 * len(rows)
    drawn = Chart("best-last", title, " ".join(said), [panel], width=_MIDDLE, height=height).draw()
    return Figure(drawn, data), said


def _natural(entry: Entry) -> bool:
    """Whether its method does not aim at robust accuracy."""
    name = entry.setting("method", "name")
    return isinstance(name, str) and name in METHODS and METHODS[name].selection == "natural"


# Accuracy over epsilon.


def over_epsilon(entries: Sequence[Entry], place: Place) -> tuple[list[Figure], list[str]]:
    """Accuracy over the size of the change: a figure an attack, norm, checkpoint and images."""
    found: dict[tuple[str, str, str], dict[str, EvaluationRecord]] = {}
    for entry in entries:
        for result in entry.evaluations:
            if result.curve is not None:
                key = (result.curve.attack, result.threat.norm, _images(result))
                # Results come oldest first, and the newest one stands.
                found.setdefault(key, {})[entry.name] = result
    figures, said = [], []
    for serial, ((attack, norm, images), results) in enumerate(found.items()):
        scale, unit = (255.0, "/255") if norm == "Linf" else (1.0, "")
        curves: dict[str, Curve] = {}
        series = []
        for name, result in results.items():
            assert result.curve is not None
            sizes = [0.0, *(scale * point.epsilon for point in result.curve.points)]
            parts = [_plain(part) for part in (result.natural, *result.curve.points)]
            values = [part["accuracy"] for part in parts]
            curves[name] = list(zip(sizes, values, strict=True))
            series.append(accuracy_series(_label(name, place), sizes, parts, style=place[name]))
            zero = next((size for size, value in curves[name] if value == 0), None)
            said.append(
                f"{name}: {attack_label(attack)} leaves "
                + (
                    f"{percent(values[-1])} correct at the largest change, so the attack may have "
                    "failed"
                    if zero is None
                    else f"no image correct from ε = {zero:.3g}{unit} on"
                )
                + f" ({images}, n = {result.natural.n:,})."
            )
        at = scale * next(reversed(results.values())).threat.epsilon
        figures.append(
            _curves(
                f"epsilon-{serial}",
                f"Accuracy under {attack_label(attack)}, {norm},\n{images}",
                curves,
                series,
                place,
                "epsilon (1/255)" if unit else f"epsilon ({norm})",
                "images classified correctly, %",
                [(at, f"ε = {at:.3g}{unit}")],
            )
        )
    return figures, said


def _images(result: ResultRecord) -> str:
    """What a result is of: ``digits, test images of the best checkpoint``."""
    said = f"{no_place(result.data.name)}, {result.data.split} images"
    checkpoint = result.model.checkpoint
    return said if checkpoint is None else f"{said} of the {checkpoint} checkpoint"


def _plain(part: Share) -> dict[str, Any]:
    return {"accuracy": part.accuracy, "interval": part.interval}


# Corruptions.


def corrupted(entries: Sequence[Entry], place: Place) -> tuple[list[Figure], list[Grid], list[str]]:
    """Accuracy on corrupted images: by group, and each corruption in a table."""
    newest = {entry.name: entry.corruptions[-1] for entry in entries if entry.corruptions}
    if not newest:
        return [], [], []
    groups = list(dict.fromkeys(group for result in newest.values() for group in result.groups))
    names = ["natural", *groups]
    series, table, said = [], [], []
    for name, result in newest.items():
        parts = [result.natural, *(result.groups.get(group) for group in groups)]
        series.append(
            Series(
                _label(name, place),
                range(len(names)),
                [part.accuracy if part else None for part in parts],
                [part.interval if part else None for part in parts],
                style=place[name],
                line=False,
            )
        )
        table.append([Cell(name, series=place[name]), *map(share_cell, parts)])
        mean = result.means.get("all") or result.means.get("benchmark")
        worst = min(result.corruptions.items(), key=lambda item: item[1].accuracy)
        said.append(
            f"{name}: "
            + (f"on average {percent(mean.accuracy)}; " if mean else "")
            + f"worst is {worst[0].replace('_', ' ')} with {percent(worst[1].accuracy)} "
            f"({_images(result)}, n = {result.data.n or 0:,}, severities "
            f"{', '.join(map(str, result.settings.severities))})."
        )
    panel = Panel(
        series,
        y="images classified correctly, %, mean of a group, with 95 % interval",
        categories=names,
        horizontal=True,
        limits=(0, 100),
    )
    title = "Accuracy on natural and on corrupted images, by group"
    height = 0.9 + 0.13 * len(names) * (len(newest) + 2)
    drawn = Chart(
        "corruptions", title, " ".join(said), [panel], width=_MIDDLE, height=height
    ).draw()
    data = Grid("The numbers, by group", ["network", *names], table, folded=True)
    rows = []
    for name in dict.fromkeys(name for result in newest.values() for name in result.corruptions):
        cells = [result.corruptions.get(name) for result in newest.values()]
        group = next(cell.group for cell in cells if cell is not None)
        rows.append([Cell(name.replace("_", " ")), Cell(group), *map(share_cell, cells)])
    caption = "Each corruption: images classified correctly in %, mean over severities"
    header = ["corruption", "group", *newest]
    each = Grid(caption, header, rows, words=2, sortable=True, folded=True)
    return [Figure(drawn, data)], [each], said
