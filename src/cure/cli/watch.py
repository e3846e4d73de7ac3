"""A run as the terminal shows it while it trains, or after: only read, never touched.

:func:`read` takes from a folder what there is at that moment; :func:`view` and :func:`overview`
make of it what is shown, and depend on nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from cure.runs.folder import RunFolder
from cure.runs.records import EpochMetrics
from cure.training.overfitting_detector import robust_overfitting

LAST = 5
"""Epochs in the table."""
RECENT = 3
"""Epochs that the time left is reckoned from."""
ROWS = 3
"""Lines of a curve."""
WIDEST = 3
"""Columns of an epoch in a curve, at most."""
NARROW = 60
"""Columns below which the table has accuracies only."""
SILENT = 3
"""So many times the length of an epoch without one are worth a word."""

BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN = " ..::||##"

Record = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a run's folder held at one moment.

    Attributes:
        path: as the user named it.
        facts: method, recipe, seed, data, network.
        state: "new", "running", "stopped", "failed", "finished".
        reason: why it failed.
        phases: what is trained inside it now ("natural start"), the outermost first; none for the
            run itself.
        epochs: of that phase.
        validation: images that accuracies in training are measured on.
        records: lines of ``metrics.jsonl`` of that phase.
        timing: lines of ``timing.jsonl`` by epoch.
        best: epoch of its best weights, once written.
        since: time (seconds since 1970) of the last line, or of the beginning.
        held: whether a process of this machine trains it; None where that is not known.
    """

    path: str
    facts: str
    state: str
    reason: str | None
    phases: tuple[str, ...]
    epochs: int
    validation: int
    records: Sequence[Record]
    timing: dict[int, Record]
    best: int | None
    since: float
    held: bool | None

    @property
    def epoch_seconds(self) -> float | None:
        """Length of an epoch with its validation, of the last few."""
        last = [self.timing[r["epoch"]] for r in self.records if r["epoch"] in self.timing]
        if not last:
            return None
        seconds = [line["seconds"] + line["validation_seconds"] for line in last[-RECENT:]]
        return float(sum(seconds) / len(seconds))

    def left(self, now: float) -> float | None:
        """Seconds to the end of this phase, if it is running and has an epoch behind it."""
        each = self.epoch_seconds
        if each is None or self.state != "running":
            return None
        return max(0.0, (self.epochs - len(self.records)) * each - min(now - self.since, each))


# -- reading -------------------------------------------------------------------------------------


def read(path: str | Path) -> Seen:
    """What the folder of a run holds now.

    Raises:
        CheckpointError: when there is no run.
    """
    outer = RunFolder.open(path)
    config, status = outer.config, outer.status()
    folder, phases = _active(outer)
    inner = folder.config
    files = [folder.path / name for name in ("metrics.jsonl", "status.json", "config.yaml")]
    return Seen(
        path=str(path),
        facts=f"{config.method.name}, recipe {config.name}, seed {config.seed}, "
        f"{config.data.source}, {config.model.name}",
        state=status.state,
        reason=status.reason,
        phases=phases,
        epochs=inner.training.epochs,
        validation=int(inner.data.validation),
        records=[line.content() for line in folder.metrics()],
        timing={line.epoch: line.content() for line in folder.timing()},
        best=_best(folder),
        since=max(file.stat().st_mtime for file in files if file.exists()),
        held=_held(outer.path / ".lock"),
    )


def _active(folder: RunFolder) -> tuple[RunFolder, tuple[str, ...]]:
    """The run that is trained at the moment: itself, its natural start, or a teacher."""
    phases: tuple[str, ...] = ()
    while phase := folder.status().phase:
        kind, _, role = str(phase).partition(" ")
        path = folder.path / ("natural" if kind == "natural" else f"teachers/{role}")
        if not (path / "config.yaml").is_file():
            break
        folder, phases = RunFolder(path), (*phases, str(phase))
    return folder, phases


def _best(folder: RunFolder) -> int | None:
    try:
        with safe_open(str(folder.checkpoints / "best.safetensors"), framework="pt") as file:
            return int((file.metadata() or {})["epoch"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _held(lock: Path) -> bool | None:
    """Whether a process of this machine holds the lock.

    Linux has a list.  To try the lock would hold it for a moment, in which a run could not begin.
    """
    try:
        inode = lock.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return any(word.endswith(f":{inode}") for line in lines for word in line.split())


# -- showing -------------------------------------------------------------------------------------


def view(seen: Seen, now: float, width: int, unicode: bool = True) -> Group:
    """One run: how far it is, its warnings, its last epochs, its curves.

    Args:
        seen: from :func:`read`.
        now: seconds since 1970.
        width: columns of the terminal.
        unicode: False where the terminal has letters and signs of ASCII only.
    """

    def line(text: str, style: str = "") -> Text:
        return Text(_printable(text, unicode), style=style)

    parts: list[Text | Table] = [
        line(f"{seen.path}: {_state(seen)}", "bold"),
        line(seen.facts),
        line(_bar(seen, width, unicode)),
        *(line(text) for text in _told(seen, now)),
        *(line(f"warning: {text}", "yellow") for text in warnings(seen, now)),
    ]
    if seen.records:
        parts += [line(""), _epochs(seen, width)]
    for name, unit, values in _curves(seen):
        # One cell is left free, so that no terminal wraps.
        parts += [line(text) for text in curve(name, unit, values, width - 1, unicode)]
    return Group(*parts)


def overview(several: Sequence[Seen], now: float, unicode: bool = True) -> Table:
    """Several runs, a line each; arguments as for :func:`view`."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for heading in ("state", "epoch", "natural %", "robust %", "left"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for seen in several:
        last: Record = next((r for r in reversed(seen.records) if r.get("validation")), {})
        left = seen.left(now)
        words = (
            seen.path,
            _state(seen),
            f"{len(seen.records)}/{seen.epochs}",
            *_accuracies(last),
            "" if left is None else span(left),
        )
        table.add_row(*(Text(_printable(word, unicode)) for word in words))
    return table


def warnings(seen: Seen, now: float) -> Iterator[str]:
    """What a user should look at."""
    if seen.reason is not None:
        yield seen.reason
    overfits = robust_overfitting(
        [EpochMetrics.model_validate(r) for r in seen.records], seen.validation
    )
    if overfits is not None:
        yield overfits
    if seen.state != "running":
        return
    if seen.held is False:
        yield (
            "no process of this machine trains it; if none of another does, it was killed: "
            f"`cure resume {seen.path}` goes on"
        )
    each = seen.epoch_seconds
    if each is not None and now - seen.since > SILENT * each:
        yield f"no epoch ended for {span(now - seen.since)}; one takes {span(each)}"


def _state(seen: Seen) -> str:
    if not seen.phases:
        return {"new": "not begun"}.get(seen.state, seen.state)
    return f"{seen.state} ({', '.join(seen.phases)})"


def _bar(seen: Seen, width: int, unicode: bool) -> str:
    done = len(seen.records)
    words = f"epoch {done} of {seen.epochs}"
    room = max(5, min(40, width - len(words) - 10))
    full = min(room, room * done // seen.epochs)
    signs = "━─" if unicode else "#-"
    return f"{words} {signs[0] * full}{signs[1] * (room - full)} {100 * done // seen.epochs} %"


def _told(seen: Seen, now: float) -> Iterator[str]:
    """Best epoch, speed, time."""
    record = next((r for r in seen.records if r["epoch"] == seen.best), None)
    if record is not None:
        natural, robust = _accuracies(record)
        yield f"best epoch {seen.best}: natural {natural} %, robust {robust} %"
    each = seen.epoch_seconds
    if each is None:
        yield f"no epoch yet, {span(now - seen.since)} since it began"
        return
    speed = seen.timing[max(seen.timing)]["images_per_second"]
    left = seen.left(now)
    if left is not None:
        of_phase = " of this part" if seen.phases else ""
        time = f"about {span(left)} left{of_phase}"
    else:
        spent = [line["seconds"] + line["validation_seconds"] for line in seen.timing.values()]
        time = f"{span(sum(spent))} spent"
    yield f"{speed:,.0f} images/s, {span(each)} an epoch, {time}"


def _epochs(seen: Seen, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ["epoch", "loss", "natural %", "robust %"]
    names += ["images/s", "seconds"] if width >= NARROW else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for record in seen.records[-LAST:]:
        timing = seen.timing.get(record["epoch"])
        cells = [str(record["epoch"]), f"{record['train']['loss']:.3f}", *_accuracies(record)]
        if timing is None:
            cells += ["-", "-"]
        else:
            cells += [f"{timing['images_per_second']:,.0f}", f"{timing['seconds']:.1f}"]
        table.add_row(*cells[: len(names)])
    return table


def _accuracies(record: Record) -> tuple[str, str]:
    measured = record.get("validation")
    if not measured:
        return "-", "-"
    return f"{measured['natural']:.1f}", f"{measured['robust']:.1f}"


def _curves(seen: Seen) -> Iterator[tuple[str, str, list[float]]]:
    measured = [r["validation"] for r in seen.records if r.get("validation")]
    series = (
        ("robust accuracy", " %", [float(v["robust"]) for v in measured]),
        ("natural accuracy", " %", [float(v["natural"]) for v in measured]),
        ("loss", "", [float(r["train"]["loss"]) for r in seen.records]),
    )
    for name, unit, values in series:
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) > 1:
            yield name, unit, finite


def curve(name: str, unit: str, values: Sequence[float], width: int, unicode: bool) -> list[str]:
    """A heading and :data:`ROWS` lines of columns, from the least value to the largest.

    Args:
        name: what is drawn.
        unit: after a number.
        values: one an epoch; where there are more than columns, means of neighbours.
        width: columns.
        unicode: whether eighths of a block can be drawn.
    """
    low, high = min(values), max(values)
    labels = [f"{high:.4g}", *[""] * (ROWS - 2), f"{low:.4g}"]
    margin = max(map(len, labels)) + 1
    room = max(1, width - margin)
    if len(values) > room:
        edges = [len(values) * place // room for place in range(room + 1)]
        means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        each = 1
    else:
        means, each = list(values), min(WIDEST, room // len(values))
    signs = BLOCKS if unicode else PLAIN
    steps = len(signs) - 1
    # The least value is one step high, or it could not be told from no value.
    whole = ROWS * steps - 1
    heights = [1 + round(whole * (m - low) / (high - low)) if high > low else 1 for m in means]
    drawn = [f"{name}, from {low:.4g} to {high:.4g}{unit}, last {values[-1]:.4g}{unit}"]
    for row in range(ROWS):
        below = steps * (ROWS - 1 - row)
        cells = "".join(signs[min(max(h - below, 0), steps)] * each for h in heights)
        drawn.append(f"{labels[row]:>{margin - 1}} {cells}".rstrip())
    return drawn


def span(seconds: float) -> str:
    """A duration: "8.4 s", "2:05", "3:10:00"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _printable(text: str, unicode: bool) -> str:
    """The text without what a terminal would obey, and without what it cannot show."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if unicode else text.encode("ascii", "replace").decode("ascii")


# -- watching ------------------------------------------------------------------------------------


def over(several: Sequence[Seen]) -> bool:
    """Whether nothing will change by itself any more."""
    return all(seen.state in ("stopped", "failed", "finished") for seen in several)


def shown(
    paths: Sequence[str | Path], now: float, width: int, unicode: bool
) -> tuple[Group | Table, bool]:
    """What to show of these runs now, and whether that is the last word."""
    several = [read(path) for path in paths]
    if len(several) == 1:
        return view(several[0], now, width, unicode), over(several)
    return overview(several, now, unicode), over(several)
