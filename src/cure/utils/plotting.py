"""Figures from plain data, drawn by Matplotlib as SVG images on a white ground.

Series differ by colour, line and marker together, so that they are told apart without colour.
Text stays text, in the fonts of the reader.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1b1b"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""The palette of Okabe and Ito, which any colour vision can tell apart, and two more."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
LONGEST_LABEL = 26
"""Letters of a label in a figure."""

_MOST_TICKS = 40
_MOST_NUMBERS = 144
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cure",
    "font.family": "sans-serif",
    "font.size": 10.0,
    # A dollar sign in a name begins no formula.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
}

_BARS: Any = {"fmt": "none", "elinewidth": 1.1, "capsize": 2}

Interval = Sequence[float]
"""Lower and upper limit."""


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: letters, digits and hyphens; part of its file's name.
        title: a short line.
        description: what it shows, for readers who do not see it.
        svg: an SVG file as text.
        width: of the figure, in inches.
    """

    name: str
    title: str
    description: str
    svg: str
    width: float

    @property
    def address(self) -> str:
        """The figure as a data address, for the ``src`` of an image."""
        content = base64.b64encode(self.svg.encode()).decode()
        return f"data:image/svg+xml;base64,{content}"


@dataclass(frozen=True)
class Series:
    """Points of one curve or group of marks; points without a finite value are left out.

    Attributes:
        label: its name in the legend; empty for none.
        x: positions: numbers, or places (from 0) in the categories of the panel.
        y: values.
        intervals: limits of each value, drawn as a band around a line and as bars at marks.
        x_intervals: limits of each position, drawn as bars.
        style: number of its colour, marker and line; by default its place in the panel.
        line: whether points are connected.
        reference: a dotted line in ink without markers.
        hollow: markers with a white inside.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    intervals: Sequence[Interval | None] = ()
    x_intervals: Sequence[Interval] = ()
    style: int | None = None
    line: bool = True
    reference: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """Series over common axes.

    Attributes:
        series: what is drawn.
        x: label of the axis of positions, with its unit.
        y: label of the axis of values.
        title: a line above.
        categories: names of the positions 0, 1, ...
        horizontal: draw values from left to right and positions from top to bottom.
        log: axes with a logarithmic scale, "", "x", "y".
        limits: of the values; None where the data decide.
        marks: positions with a vertical line, and what is written there.
        names: (x, y, text) written beside points.
    """

    series: Sequence[Series]
    x: str = ""
    y: str = ""
    title: str = ""
    categories: Sequence[str] = ()
    horizontal: bool = False
    log: str = ""
    limits: tuple[float | None, float | None] = (None, None)
    marks: Sequence[tuple[float, str]] = ()
    names: Sequence[tuple[float, float, str]] = ()


@dataclass(frozen=True)
class HeatMap:
    """A matrix as coloured cells.

    Attributes:
        values: [row][column]; None or NaN leaves a cell blank.
        rows: names of rows.
        columns: names of columns.
        x: label below.
        y: label at the left.
        title: a line above, which also names the scale.
        low: value at the dark end of the scale.
        high: value at the light end.
        log: whether the scale is logarithmic.
    """

    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    x: str = ""
    y: str = ""
    title: str = ""
    low: float = 0.0
    high: float = 1.0
    log: bool = False


def style_of(number: int) -> dict[str, Any]:
    """Keyword arguments of ``Axes.plot`` for the series with that number, from 0.

    >>> style_of(0)
    {'color': '#0072b2', 'marker': 'o', 'linestyle': '-'}
    """
    # Colours, markers and lines repeat together, so each round shifts them against each other.
    again = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + again) % len(MARKERS)],
        "linestyle": LINES[(number + again) % len(LINES)],
    }


def printable(text: str) -> str:
    """``text`` with characters that cannot be seen replaced, such as those that reverse text.

    >>> printable("a\\x00b")
    'a\\ufffdb'
    """
    return "".join(c if c.isprintable() or c in "\n\N{NO-BREAK SPACE}" else "\ufffd" for c in text)


def short(text: str) -> str:
    """``text`` on one line, cut to the length of a label."""
    text = " ".join(printable(text).split())
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


@contextmanager
def _drawing() -> Iterator[None]:
    """Settings of all figures; letters that the fonts here lack are left to the reader's fonts."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def _canvas(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _finish(figure: Figure, of: Figures) -> Picture:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(
        buffer,
        format="svg",
        facecolor="white",
        metadata=nothing,
        bbox_inches="tight",
        pad_inches=0.08,
    )
    words = f"<title>{escape(of.title)}</title>\n<desc>{escape(of.description)}</desc>\n"
    head, _, rest = buffer.getvalue().partition("<defs>")
    svg = printable(f"{head}{words}<defs>{rest}").encode("utf-8", "replace").decode()
    return Picture(of.name, of.title, of.description, svg, float(figure.get_size_inches()[0]))


@dataclass(frozen=True)
class Chart:
    """Panels of series side by side, with one legend below.

    Attributes:
        name: see :class:`Picture`.
        title: as there.
        description: as there.
        panels: one or more.
        columns: panels in a row.
        width: of the whole figure, in inches.
        height: of a row of panels, in inches.
    """

    name: str
    title: str
    description: str
    panels: Sequence[Panel]
    columns: int = 1
    width: float = 6.4
    height: float = 3.4

    def draw(self) -> Picture:
        """The figure as SVG."""
        with _drawing():
            return _finish(self._figure(), self)

    def png(self) -> bytes:
        """The figure as a PNG file, 150 pixels an inch."""
        buffer = io.BytesIO()
        with _drawing():
            self._figure().savefig(
                buffer, format="png", dpi=150, facecolor="white", bbox_inches="tight"
            )
        return buffer.getvalue()

    def _figure(self) -> Figure:
        labels = {each.label for panel in self.panels for each in panel.series if each.label}
        in_row = max(1, min(len(labels), int(self.width / 2.1)))
        legend = 0.2 * math.ceil(len(labels) / in_row) if len(labels) > 1 else 0.0
        rows = math.ceil(len(self.panels) / self.columns)
        size = (self.width, rows * self.height + legend)
        figure, axes = _canvas(rows, self.columns, *size)
        handles: dict[str, Any] = {}
        for place, panel in enumerate(self.panels):
            _draw_panel(axes[place], panel)
            for handle, label in zip(*axes[place].get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        for unused in axes[len(self.panels) :]:
            unused.set_visible(False)
        if len(handles) > 1:
            figure.legend(
                list(handles.values()), list(handles), loc="outside lower center", ncols=in_row
            )
        return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for place, each in enumerate(panel.series):
        shift = 0.0
        if panel.categories and not each.line and not each.reference:
            shift = 0.6 * ((place + 0.5) / len(panel.series) - 0.5)
        _draw_series(axes, each, place, shift, panel.horizontal)
    position, value = ("y", "x") if panel.horizontal else ("x", "y")
    if panel.categories:
        every = math.ceil(len(panel.categories) / _MOST_TICKS)
        names = [short(text) for text in panel.categories[::every]]
        turned = not panel.horizontal and sum(map(len, names)) > 40
        getattr(axes, f"set_{position}ticks")(
            range(0, len(panel.categories), every),
            names,
            rotation=90 if turned else 0,
            fontsize=8 if turned else 10,
        )
    if panel.horizontal:
        axes.invert_yaxis()
    for scale in panel.log:
        getattr(axes, f"set_{scale}scale")("log")
        axis = getattr(axes, f"{scale}axis")
        axis.set_major_formatter(lambda number, _: f"{number:g}")
        axis.set_minor_formatter(lambda *_: "")
    low, high = panel.limits
    getattr(axes, f"set_{value}lim")(low, high)
    if panel.x == "epoch":
        axes.locator_params(axis="x", integer=True)
    for at, text in panel.marks:
        axes.axvline(at, color=INK, alpha=0.5, linewidth=0.9, linestyle="--")
        axes.annotate(
            *(text, (at, 1)),
            xycoords=("data", "axes fraction"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=8.5,
        )
    for x, y, text in panel.names:
        axes.annotate(short(text), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    getattr(axes, f"set_{position}label")(panel.x)
    getattr(axes, f"set_{value}label")(panel.y)
    axes.set_title(panel.title, loc="left")


def _draw_series(axes: Axes, each: Series, place: int, shift: float, horizontal: bool) -> None:
    kept = [p for p, value in enumerate(each.y) if value is not None and math.isfinite(value)]
    along = [each.x[p] + shift for p in kept]
    value: list[Any] = [each.y[p] for p in kept]
    label = short(each.label) or "_nolegend_"
    look = style_of(place if each.style is None else each.style)
    x, y = (value, along) if horizontal else (along, value)
    if each.reference:
        axes.plot(x, y, color=INK, linestyle=":", linewidth=1, label=label)
        return
    limits = [each.intervals[p] for p in kept] if each.intervals else []
    known = [p for p, limit in enumerate(limits) if limit is not None]
    if known and each.line and len(known) == len(limits):
        low, high = zip(*limits, strict=True)
        axes.fill_between(along, low, high, color=look["color"], alpha=0.15, linewidth=0)
    elif known:
        bars = _lengths([value[p] for p in known], [limits[p] for p in known])
        across, up = ([values[p] for p in known] for values in (x, y))
        way: Any = {"xerr" if horizontal else "yerr": bars}
        axes.errorbar(across, up, **_BARS, **way, ecolor=look["color"])
    if each.x_intervals:
        bars = _lengths(along, [each.x_intervals[p] for p in kept])
        axes.errorbar(x, y, xerr=bars, **_BARS, ecolor=look["color"])
    if not each.line:
        look["linestyle"] = "none"
    if each.hollow:
        look |= {"markerfacecolor": "white", "zorder": 3}
    axes.plot(x, y, label=label, markevery=max(1, len(x) // 12) if each.line else 1, **look)


def _lengths(values: Sequence[Any], limits: Sequence[Any]) -> list[list[float]]:
    """Lengths below and above; a limit on the wrong side by rounding gives 0."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, limits, strict=True)]
    return [below, [max(0.0, high - v) for v, (_, high) in zip(values, limits, strict=True)]]


@dataclass(frozen=True)
class HeatMaps:
    """Matrices side by side, each with its scale; numbers in the cells where these are few.

    Attributes:
        name: see :class:`Picture`.
        title: as there.
        description: as there.
        maps: one or more.
        side: width and height of each, in inches.
    """

    name: str
    title: str
    description: str
    maps: Sequence[HeatMap]
    side: float = 4.6

    def draw(self) -> Picture:
        """The figure as SVG."""
        with _drawing():
            figure, axes = _canvas(1, len(self.maps), self.side * len(self.maps), self.side)
            for panel, drawn in zip(axes, self.maps, strict=True):
                _draw_map(figure, panel, drawn)
            return _finish(figure, self)


def _draw_map(figure: Figure, axes: Axes, drawn: HeatMap) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = [[math.nan if v is None else v for v in row] for row in drawn.values]
    norm = (LogNorm if drawn.log else Normalize)(drawn.low, drawn.high, clip=True)
    image = axes.imshow(values, norm=norm, cmap="cividis", interpolation="none")
    axes.grid(False)
    for axis, names in ((axes.xaxis, drawn.columns), (axes.yaxis, drawn.rows)):
        every = math.ceil(len(names) / 30)
        labels = [short(name) for name in names[::every]]
        axis.set_ticks(range(0, len(names), every), labels, fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel(drawn.x)
    axes.set_ylabel(drawn.y)
    axes.set_title(drawn.title, loc="left")
    scale = figure.colorbar(image, ax=axes, shrink=0.8)
    if drawn.log:
        ends = [drawn.low * (drawn.high / drawn.low) ** (part / 4) for part in range(5)]
        scale.set_ticks(ends, labels=[f"{end:.2g}" for end in ends])
        scale.minorticks_off()
    if len(drawn.rows) * len(drawn.columns) <= _MOST_NUMBERS:
        _write_numbers(axes, values, norm)


def _write_numbers(axes: Axes, values: Sequence[Sequence[float]], norm: Any) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if math.isfinite(value):
                ink = "#ffffff" if norm(value) < 0.5 else "#111111"
                axes.text(
                    column, row, f"{value:.2f}", color=ink, fontsize=7, ha="center", va="center"
                )


@dataclass(frozen=True)
class ImageGrid:
    """Raster images in rows, enlarged without smoothing.

    Attributes:
        name: see :class:`Picture`.
        title: as there.
        description: as there.
        columns: names of the columns.
        rows: for each place the base64 of a PNG file (None: empty) and the text below it.
        side: width and height of an image, in inches.
    """

    name: str
    title: str
    description: str
    columns: Sequence[str]
    rows: Sequence[Sequence[tuple[str | None, str]]]
    side: float = 1.1

    def draw(self) -> Picture:
        """The figure as SVG.

        Raises:
            ValueError: for text that is no PNG.
        """
        with _drawing():
            size = (self.side * len(self.columns), (self.side + 0.2) * len(self.rows))
            figure, axes = _canvas(len(self.rows), len(self.columns), *size)
            for place, (png, caption) in enumerate(cell for row in self.rows for cell in row):
                axes[place].set_axis_off()
                axes[place].text(
                    *(0.5, -0.04, short(caption)),
                    fontsize=8,
                    ha="center",
                    va="top",
                    transform=axes[place].transAxes,
                )
                if place < len(self.columns):
                    axes[place].set_title(short(self.columns[place]), fontsize=8)
                if png is not None:
                    axes[place].imshow(_pixels(png), interpolation="none")
            return _finish(figure, self)


def _pixels(png: str) -> Any:
    from PIL import Image

    try:
        file = io.BytesIO(base64.b64decode(png, validate=True))
        return Image.open(file, formats=["PNG"]).convert("RGB")
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image of the grid is no PNG ({error})") from None


Figures = Chart | HeatMaps | ImageGrid
"""A figure as plain data, before it is drawn."""
