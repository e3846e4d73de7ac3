"""Natural against robust accuracy of every method, at one operating point each.

`make figures` writes docs/figures/front.svg from results/cifar10-mini/records.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from cure.experiments.compare.rows import rows_of
from cure.experiments.compare.sources import Source
from cure.runs.packed import read_packed

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
Points = dict[str, tuple[float, float]]
"""Method -> natural and robust accuracy in percent, means over seeds."""
ATTACK = "pgd20"


def mini() -> Points:
    """The methods of the plan cifar10-mini."""
    records = read_packed(RESULTS / "cifar10-mini" / "records.jsonl")
    rows = rows_of([Source.of_record(record, name, name) for name, record in records.items()])
    return means((row["plan_label"], row["natural"], row[ATTACK]) for row in rows)


def means(rows: Any) -> Points:
    """Means over the seeds of each method."""
    found: dict[str, list[tuple[float, float]]] = {}
    for method, natural, robust in rows:
        found.setdefault(method, []).append((natural, robust))
    return {
        method: (fmean(n for n, _ in pairs), fmean(r for _, r in pairs))
        for method, pairs in found.items()
    }


def best(points: Points) -> str:
    """The method with the highest harmonic mean of the two accuracies."""
    return max(points, key=lambda name: harmonic(*points[name]))


def harmonic(natural: float, robust: float) -> float:
    """2 / (1 / natural + 1 / robust), 0 where one of them is 0."""
    return 2 * natural * robust / (natural + robust) if natural and robust else 0.0


def front(points: Points) -> list[str]:
    """Methods that no other beats in both accuracies, by rising natural accuracy."""
    return sorted(
        (
            name
            for name, (natural, robust) in points.items()
            if not any(n >= natural and r >= robust and (n, r) != (natural, robust)
                       for n, r in points.values())
        ),
        key=lambda name: points[name],
    )  # fmt: skip


def place(name: str, point: tuple[float, float]) -> str:
    """Identity of a point in the SVG file, which the tests compare with the results."""
    return f"{name} {point[0]:.1f} {point[1]:.1f}"


def draw(axis: Any, points: Points) -> None:
    """A point a method, the front as a line, the best balance marked."""
    line = [points[name] for name in front(points)]
    axis.plot(*zip(*line, strict=True), color="#00796b", linewidth=1.5, zorder=1)
    chosen = best(points)
    for name, point in points.items():
        marked = name == chosen
        (mark,) = axis.plot(
            *point,
            marker="*" if marked else "o",
            markersize=17 if marked else 7,
            color="#d84315" if marked else "#00796b" if name in front(points) else "#90a4ae",
            linestyle="",
            zorder=2,
        )
        mark.set_gid(place(name, point))
    low, high = min(n for n, _ in points.values()), max(n for n, _ in points.values())
    axis.set_xlim(low - 4, high + 6)
    axis.set_ylim(-2, 1.32 * max(r for _, r in points.values()))
    x, y = points[chosen]
    axis.annotate(
        "an operating point:\nthe best balance of the two",
        (x, y),
        xytext=(24, 20),
        textcoords="offset points",
        color="#d84315",
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": "#d84315", "shrinkB": 8},
    )
    axis.set_title("CIFAR-10, small network, attacks of 8/255", fontsize=10, loc="left")
    axis.set_xlabel("right on unchanged images, %  (natural accuracy)")
    axis.set_ylabel("right on attacked images, %\n(robust accuracy)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


PLACES = [
    (dx, dy, side)
    for dy in (-3, 8, -14, 16, -22, 24, -30)
    for dx, side in ((9, "left"), (-9, "right"))
]
"""Offsets of a name from its point, in the order in which they are tried."""


def label(axis: Any, points: Points, chosen: str) -> None:
    """Names beside the points, where they cover no point and no other name."""
    figure = axis.figure
    figure.canvas.draw()
    around = [axis.transData.transform(point) for point in points.values()]
    taken: list[Any] = []
    for name, point in sorted(points.items(), key=lambda item: -item[1][0]):
        for dx, dy, side in PLACES:
            text = axis.annotate(
                name,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=8.5,
                fontweight="bold" if name == chosen else "normal",
                horizontalalignment=side,
            )
            box = text.get_window_extent(figure.canvas.get_renderer())
            free = not any(box.overlaps(other) for other in taken)
            if free and not any(box.padded(3).contains(*place) for place in around):
                taken.append(box)
                break
            if (dx, dy, side) != PLACES[-1]:
                text.remove()


def write(path: Path) -> None:
    """Draw the picture into an SVG file."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "cure", "svg.fonttype": "none", "font.family": "sans-serif"}
    points = mini()
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    draw(axis, points)
    figure.tight_layout()
    label(axis, points, best(points))
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    write(HERE / "front.svg")
