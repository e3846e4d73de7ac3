"""A front as sentences and as a picture."""

from __future__ import annotations

from pathlib import Path

from cure.errors import counted
from cure.runs.results import FrontEstimate, FrontPoint, FrontRecord
from cure.utils.io import write_bytes, write_text
from cure.utils.plotting import Chart, Panel, Series


def lines(record: FrontRecord) -> list[str]:
    """Hypervolumes, and natural accuracies at equal robustness, as sentences."""
    n, reference = f"{record.data.n:,}", record.reference
    found = [_point(point, record) for point in record.points]
    found += [
        f"hypervolume above natural {reference[0]:g} %, robust {reference[1]:g} % "
        f"({record.attack}, {n} {record.data.split} images; percent of the area to 100 %, 100 %):"
    ]
    known = [(label, c) for label, c in record.curves.items() if c.hypervolume is not None]
    for label, curve in sorted(known, key=lambda item: -item[1].hypervolume.mean):  # type: ignore[union-attr]
        found.append(f"  {label}: {_words(curve.hypervolume)}, {counted(len(curve.seeds), 'seed')}")
    for each in record.comparisons:
        named = [
            f"{label} {_words(value)}" if value is not None else f"{label} has no points around it"
            for label, value in each.natural.items()
        ]
        found.append(f"natural accuracy at {record.attack} {each.robust:g} %: {'; '.join(named)}")
    if record.common_range is not None:
        low, high = record.common_range
        found.append(f"all curves have points around {record.attack} {low:.1f} to {high:.1f} %")
    elif len(record.curves) > 1:
        found.append(
            "the methods have no robust accuracy in common to be compared at; give more values"
        )
    if record.missing:
        found.append(f"not done yet: {', '.join(record.missing)}")
    return found


def _point(point: FrontPoint, record: FrontRecord) -> str:
    """The accuracies of a point."""
    knob = record.curves[point.curve].knob
    setting = "" if knob is None else f" {knob} {point.value}"
    beaten = "; another point is as good in both and better in one" if point.dominated else ""
    return (
        f"{point.curve}{setting}: natural {point.natural.mean:.1f} %, {record.attack} "
        f"{point.robust.mean:.1f} %{beaten}"
    )


def _words(value: FrontEstimate | None) -> str:
    assert value is not None
    over = f"{value.images[0]:.1f} to {value.images[1]:.1f} over images"
    if value.seeds is not None:
        over += f", {value.seeds[0]:.1f} to {value.seeds[1]:.1f} over seeds"
    return f"{value.mean:.1f} ({over})"


def chart(record: FrontRecord) -> Chart:
    """Natural against robust accuracy: a curve a method, dominated points hollow."""
    series = []
    for style, label in enumerate(record.curves):
        points = [point for point in record.points if point.curve == label]
        if not points:
            continue
        x, y = [p.natural.mean for p in points], [p.robust.mean for p in points]
        series.append(Series(label, x, y, style=style))
        for hollow in (False, True):
            own = [point for point in points if point.dominated == hollow]
            if own:
                series.append(
                    Series(
                        "",
                        [point.natural.mean for point in own],
                        [point.robust.mean for point in own],
                        [point.robust.images for point in own],
                        [point.natural.images for point in own],
                        style=style,
                        line=False,
                        hollow=hollow,
                    )
                )
    n = f"{record.data.n:,} {record.data.split} images"
    panel = Panel(
        series,
        "natural accuracy, %",
        f"accuracy under {record.attack}, %",
        names=[
            (point.natural.mean, point.robust.mean, str(point.value))
            for point in record.points
            if point.value is not None
        ],
    )
    title = f"Natural and robust accuracy, {n}, {record.threat.norm} {record.threat.epsilon_text}"
    description = (
        "A curve a method, a point a value of its setting (mean over seeds, 95 % bootstrap "
        "interval over images); hollow points are dominated by another one. "
        + " ".join(lines(record))
    )
    return Chart("front", title, description, [panel], height=4.4)


def write_picture(record: FrontRecord, file: Path) -> None:
    """Draw the fronts beside the record, as .svg and .png."""
    picture = chart(record)
    write_text(file.with_suffix(".svg"), picture.draw().svg)
    write_bytes(file.with_suffix(".png"), picture.png())
