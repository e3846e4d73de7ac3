"""Pictures: vector graphics that read without colour, in light and dark, alone and in a page.

Text stays text.  What is ink (words, axes) takes the page's ``--ink``, and outside a page follows
the reader's choice of light or dark.  Series differ by colour, line and mark together.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the reader's ink until the picture is written."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Okabe and Ito's, told apart with any colour vision and on light and dark ground."""

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")

_STYLE = """<style>
svg.cure-picture { color: var(--ink, #1b1b1b); max-width: 100%; height: auto; }
svg.cure-picture text { fill: currentColor; }
svg.cure-picture [id*="QuadMesh"] { shape-rendering: crispEdges; }
@media (prefers-color-scheme: dark) { svg.cure-picture { color: var(--ink, #e6e6e6); } }
</style>"""

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cure",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: letters, digits and hyphens; names its file.
        title: a short line.
        description: what is to be seen, for readers who do not see it.
        svg: the drawing, an ``<svg>`` element whose ids begin with the name.
    """

    name: str
    title: str
    description: str
    svg: str


def canvas(
    rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 3.6, **options: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row.

    Args:
        rows: of axes.
        columns: of axes.
        width: inches.
        height: inches.
        options: of ``Figure.subplots``: ``sharex``, ``width_ratios``.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def series(number: int) -> dict[str, Any]:
    """Keyword arguments of ``Axes.plot`` for the series of that number (0 the first)."""
    # Colours, marks and lines come round together, so each round moves them against each other.
    again = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[(number + again) % len(MARKS)],
        "linestyle": LINES[(number + again) % len(LINES)],
    }


def plain(text: str) -> str:
    """``text`` that Matplotlib shows as it is: a dollar sign in a name begins no formula."""
    return text.replace("$", r"\$")


def legend(axes: Axes, **options: Any) -> None:
    """Name the series of ``axes``, without a box that would cover a dark page."""
    shown = axes.legend(frameon=False, labelcolor=INK, **options)
    for text in shown.get_texts():
        # A name may hold a dollar sign, as it is or as plain() has it.
        text.set_text(text.get_text().replace(r"\$", "$"))
        text.set_parse_math(False)


def picture(figure: Figure, name: str, title: str, description: str) -> Picture:
    """Finish a figure.

    Args:
        figure: from :func:`canvas`.
        name: unique in a page.
        title: what it is.
        description: what it shows, with its numbers where they are few.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None},
            # The layout reckons a little too little for words beside square axes.
            bbox_inches="tight",
            pad_inches=0.04,
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = svg.replace(INK, "currentColor")
    # A hundredth of a point is not seen, and maps have thousands of corners.
    svg = re.sub(r' d="([^"]*)"', lambda found: f' d="{_shorter(found[1])}"', svg)
    # Matplotlib's rule is for every element of the page that the drawing is put into.
    svg = svg.replace(">*{stroke-", ">svg.cure-picture *{stroke-")
    # Several drawings share a page, and Matplotlib calls the first axes of each "axes_1".
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    return _told(svg, name, title, description)


def _told(svg: str, name: str, title: str, description: str) -> Picture:
    """The drawing ``svg`` with what readers hear of it, and the reader's choice of ink."""
    words = f'<title id="{name}-title">{escape(title)}</title>\n'
    words += f'<desc id="{name}-description">{escape(description)}</desc>\n'
    svg = re.sub(
        r"<svg([^>]*)>",
        lambda found: (
            f'<svg class="cure-picture" role="img" aria-labelledby="{name}-title '
            f'{name}-description"{found[1]}>\n{words}{_STYLE}'
        ),
        svg,
        count=1,
    )
    return Picture(name, title, description, svg)


def _shorter(path: str) -> str:
    """The commands of a path with two decimals, on one line."""
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}", path)
    return " ".join(rounded.split())


def renamed(drawn: Picture, name: str) -> Picture:
    """The same picture under another name, for a page that holds several of one name."""
    old = re.escape(drawn.name)
    svg = re.sub(rf'\bid="{old}-', f'id="{name}-', drawn.svg)
    svg = re.sub(rf'href="#{old}-', f'href="#{name}-', svg)
    svg = re.sub(rf"url\(#{old}-", f"url(#{name}-", svg)
    svg = svg.replace(
        f'aria-labelledby="{drawn.name}-title {drawn.name}-description"',
        f'aria-labelledby="{name}-title {name}-description"',
    )
    return Picture(name, drawn.title, drawn.description, svg)


def lines(
    name: str,
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    description: str,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Picture:
    """Curves over one axis.

    Args:
        name: see :class:`Picture`.
        title: as there.
        curves: points (x, y) by the name of the curve.
        x: what the axis shows, with its unit.
        y: as ``x``.
        description: as in :class:`Picture`.
        intervals: lower and upper limit of each point, by the name of the curve.
    """
    figure, (axes,) = canvas()
    for number, (label, points) in enumerate(curves.items()):
        if not points:
            continue
        across, up = zip(*points, strict=True)
        axes.plot(across, up, label=plain(label), **series(number))
        if intervals and label in intervals:
            low, high = zip(*intervals[label], strict=True)
            colour = COLOURS[number % len(COLOURS)]
            axes.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if len(curves) > 1:
        legend(axes)
    return picture(figure, name, title, description)


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    *,
    low: float,
    high: float,
    colours: str = "cividis",
) -> Any:
    """Cells [row][column] as rectangles, the first row on top; returns what a colour bar needs.

    Args:
        axes: where.
        values: one number a cell.
        low: end of the scale.
        high: the other end.
        colours: Matplotlib's name; cividis grows in lightness for any colour vision.
    """
    mesh = axes.pcolormesh(values, vmin=low, vmax=high, cmap=colours, rasterized=False)
    mesh.set_clip_on(False)
    axes.invert_yaxis()
    return mesh


def colour_bar(figure: Figure, axes: Axes, mesh: Any, label: str) -> None:
    """The scale of a map beside it, in 64 steps."""
    from matplotlib.ticker import MaxNLocator

    low, high = mesh.get_clim()
    steps = [low + (high - low) * step / 64 for step in range(65)]
    bar = figure.colorbar(mesh, ax=axes, boundaries=steps, ticks=MaxNLocator(6))
    bar.set_label(label, color=INK)
    if bar.solids is not None:
        bar.solids.set_rasterized(False)


def contrast(values: Sequence[Sequence[float]], low: float, high: float) -> list[tuple[int, int]]:
    """Cells (row, column) of the lower half of a scale, whose numbers are to be written light."""
    middle = (low + high) / 2
    rows, columns = len(values), len(values[0]) if values else 0
    return [(r, c) for r, c in product(range(rows), range(columns)) if values[r][c] < middle]


@dataclass(frozen=True)
class Cell:
    """A place of :func:`image_grid`: a small raster image, and the lines of text below it.

    Attributes:
        png: base64 of a PNG; None leaves the place empty.
        caption: lines of text.
    """

    png: str | None
    caption: Sequence[str] = ()


def image_grid(
    name: str,
    title: str,
    description: str,
    heads: Sequence[tuple[str, int]],
    rows: Sequence[Sequence[Cell]],
    *,
    side: int = 84,
) -> Picture:
    """Raster images side by side, enlarged so that their pixels stay squares.

    Args:
        name: see :class:`Picture`.
        title: as there.
        description: as there.
        heads: what stands above the columns, and how many of them each spans.
        rows: cells, row by row.
        side: width and height of an image in the drawing.
    """
    gap, line, top = 10, 13, 22
    lines_below = max((len(cell.caption) for row in rows for cell in row), default=0)
    step = side + lines_below * line + gap + 4
    columns = max((len(row) for row in rows), default=0)
    width, height = columns * (side + gap) + gap, top + len(rows) * step
    drawn = []

    def write(x: float, y: float, text: str, room: float, weight: str = "normal") -> None:
        longest = max(3, int(room / 6))
        short = text if len(text) <= longest else f"{text[: longest - 1]}…"
        drawn.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="11" '
            f'font-weight="{weight}">{escape(short)}</text>'
        )

    across = 0
    for head, span in heads:
        room = span * (side + gap)
        write(gap / 2 + across * (side + gap) + room / 2, 14, head, room, "bold")
        across += span
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            x, y = gap + column * (side + gap), top + number * step
            # Nothing but base64 gets into the page.
            if cell.png is not None and re.fullmatch(r"[A-Za-z0-9+/]+=*", cell.png):
                drawn.append(
                    f'<image x="{x}" y="{y}" width="{side}" height="{side}" '
                    'style="image-rendering: pixelated" '
                    f'href="data:image/png;base64,{cell.png}"/>'
                )
            for place, text in enumerate(cell.caption):
                write(x + side / 2, y + side + (place + 1) * line, text, side + gap)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        + "\n".join(drawn)
        + "\n</svg>"
    )
    return _told(svg, name, title, description)
